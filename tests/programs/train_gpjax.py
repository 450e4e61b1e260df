"""GPJax: a sparse Gaussian process with `fit`, in float64."""

import gpjax as gpx
import jax
import jax.numpy as jnp
import optax
from program_result import print_result

from soap_optax import soap

jax.config.update("jax_enable_x64", True)
STEPS = 300
x = jnp.linspace(-3.0, 3.0, 200).reshape(-1, 1)
y = jnp.sin(3 * x) + 0.1 * jax.random.normal(jax.random.key(0), x.shape)
data = gpx.Dataset(X=x, y=y)


def train(optimizer: optax.GradientTransformation) -> jax.Array:
    """The last negative evidence bound."""
    prior = gpx.gps.Prior(mean_function=gpx.mean_functions.Zero(), kernel=gpx.kernels.RBF())
    posterior = prior * gpx.likelihoods.Gaussian()
    family = gpx.variational_families.VariationalGaussian(
        model=posterior, inducing_inputs=jnp.linspace(-3.0, 3.0, 12).reshape(-1, 1)
    )
    _, history = gpx.fit(
        model=family,
        objective=lambda family, data: -gpx.objectives.elbo(family, data),
        train_data=data,
        optim=optimizer,
        num_iters=STEPS,
        verbose=False,
    )
    return history[-1]


rate = optax.cosine_decay_schedule(3e-2, STEPS)
losses = {"adam": train(optax.adam(rate)), "soap": train(soap(rate, weight_decay=0.0))}
print_result("gpjax", losses)
