"""NumPyro: stochastic variational inference of a logistic regression with a full covariance."""

import jax
import jax.numpy as jnp
import numpyro
import optax
from numpyro import distributions as dist
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal
from numpyro.optim import optax_to_numpyro
from program_result import print_result

from soap_optax import soap

STEPS, RATE = 600, 5e-2
mixing = jax.random.normal(jax.random.key(0), (20, 20))
x = jax.random.normal(jax.random.key(1), (100, 20)) @ mixing / 4
weights = jax.random.normal(jax.random.key(2), (20,))
y = (jax.random.uniform(jax.random.key(3), (100,)) < jax.nn.sigmoid(x @ weights)).astype(int)


def model(x: jax.Array, y: jax.Array) -> None:
    weights = numpyro.sample("weights", dist.Normal(0, 2).expand([20]).to_event(1))
    bias = numpyro.sample("bias", dist.Normal(0, 2))
    numpyro.sample("y", dist.Bernoulli(logits=x @ weights + bias), obs=y)


def train(optimizer: optax.GradientTransformation) -> jax.Array:
    """The mean loss of the last 50 steps."""
    svi = SVI(model, AutoMultivariateNormal(model), optax_to_numpyro(optimizer), Trace_ELBO())
    result = svi.run(jax.random.key(4), STEPS, x, y, progress_bar=False)
    return jnp.mean(result.losses[-50:])


# All parameters of the guide are vectors, which get Adam unless `precondition_1d`.
like_adam = {"b1": 0.9, "b2": 0.999, "weight_decay": 0.0}
losses = {
    "adam": train(optax.adam(RATE)),
    "adam, betas of 0.95": train(optax.adam(RATE, b1=0.95, b2=0.95)),
    "soap, default betas": train(soap(RATE, weight_decay=0.0)),
    "soap, Adam's betas": train(soap(RATE, **like_adam)),
    "soap, Adam's betas, vectors": train(soap(RATE, **like_adam, precondition_1d=True)),
}
print_result("numpyro", losses, soap="soap, Adam's betas, vectors", tolerance=0.5)
