"""jinns: Burgers' equation with `solve`."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jinns
import optax
from jinns.parameters import Params
from program_result import print_result

from soap_optax import soap

STEPS = 1000
linear, tanh = eqx.nn.Linear, (jax.nn.tanh,)
network = ((linear, 2, 20), tanh, (linear, 20, 20), tanh, (linear, 20, 1))


def initial_and_boundary(t_x, output, _):
    """Makes the solution -sin(pi x) at the start, and zero at x = -1 and x = 1."""
    t, x = t_x
    return -jnp.sin(jnp.pi * x) + t * (1 - x**2) * output


u, nn_params = jinns.nn.PINN_MLP.create(
    key=jax.random.key(0),
    eqx_list=network,
    eq_type="PDENonStatio",
    output_transform=initial_and_boundary,
)
params = Params(nn_params=nn_params, eq_params={"nu": jnp.array(0.1)})
loss = jinns.loss.LossPDENonStatio(
    u=u,
    dynamic_loss=jinns.loss.BurgersEquation(Tmax=1),
    loss_weights=jinns.loss.LossWeightsPDENonStatio(dyn_loss=1.0),
    params=params,
)
points = jinns.data.CubicMeshPDENonStatio(
    key=jax.random.key(1),
    n=512,
    ni=1,
    dim=1,
    min_pts=(-1,),
    max_pts=(1,),
    tmin=0,
    tmax=1,
    method="uniform",
)


def train(optimizer: optax.GradientTransformation) -> float:
    _, losses, *_ = jinns.solve(
        n_iter=STEPS, init_params=params, data=points, loss=loss, optimizer=optimizer, verbose=False
    )
    return losses[-1]


rate = optax.cosine_decay_schedule(3e-3, STEPS)
losses = {"adam": train(optax.adam(rate)), "soap": train(soap(rate, weight_decay=0.0))}
print_result("jinns", losses)
