"""NetKet: the ground state of a spin chain in a transverse field, with and without `SR`."""

import jax.numpy as jnp
import netket as nk
import numpy as np
import optax
from program_result import print_result

from soap_optax import soap

SITES, STEPS = 10, 150
hilbert = nk.hilbert.Spin(s=0.5, N=SITES)
graph = nk.graph.Chain(SITES)
hamiltonian = nk.operator.IsingJax(hilbert, graph=graph, h=1.0)
ground = float(nk.exact.lanczos_ed(hamiltonian)[0])


def train(optimizer, dtype=float, preconditioner=None):
    """The mean energy of the last 20 steps, above the ground state's."""
    state = nk.vqs.MCState(
        nk.sampler.MetropolisLocal(hilbert, n_chains=16),
        nk.models.RBM(alpha=2, param_dtype=dtype),
        n_samples=512,
        seed=0,
        sampler_seed=1,
    )
    kwargs = {"preconditioner": preconditioner} if preconditioner else {}
    driver = nk.driver.VMC(hamiltonian, optimizer, variational_state=state, **kwargs)
    log = nk.logging.RuntimeLog()
    driver.run(STEPS, out=log, show_progress=False)
    energies = jnp.real(jnp.asarray(log.data["Energy"]["Mean"]))
    return float(np.mean(energies[-20:])) - ground


def make_soap(rate: float = 3e-2) -> optax.GradientTransformation:
    return soap(optax.cosine_decay_schedule(rate, STEPS), weight_decay=0.0)


adam = optax.adam(optax.cosine_decay_schedule(1e-2, STEPS))
regression = nk.optimizer.SR(diag_shift=0.01)
losses = {
    "adam": train(adam),
    "soap": train(make_soap()),
    "adam, complex": train(adam, complex),
    "soap, complex": train(make_soap(), complex),
    "sgd and SR": train(optax.sgd(5e-2), preconditioner=regression),
    "soap and SR": train(make_soap(1e-2), preconditioner=regression),
}
assert losses["soap, complex"] <= losses["adam, complex"] + 0.01, losses
print_result("netket", losses, tolerance=0.01)
