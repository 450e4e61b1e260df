"""BlackJAX: full-rank variational inference of a correlated Gaussian."""

import blackjax
import jax
import jax.numpy as jnp
import optax
from program_result import print_result

from soap_optax import soap

STEPS = 400
factor = jnp.eye(8) + 0.3 * jax.random.normal(jax.random.key(0), (8, 8))
center = jnp.linspace(-2.0, 2.0, 8)


def log_density(position: dict[str, jax.Array]) -> jax.Array:
    deviation = jnp.concatenate([position["a"], position["b"].ravel()]) - center
    return -0.5 * jnp.sum((factor @ deviation) ** 2)


def train(optimizer: optax.GradientTransformation) -> jax.Array:
    """The mean negative evidence bound of the last 20 steps."""
    method = blackjax.fullrank_vi(log_density, optimizer, num_samples=8)

    def step(state, key):
        state, info = method.step(key, state)
        return state, info.elbo

    state = method.init({"a": jnp.zeros(4), "b": jnp.zeros((2, 2))})
    _, bounds = jax.lax.scan(step, state, jax.random.split(jax.random.key(1), STEPS))
    return jnp.mean(bounds[-20:])


rate = optax.cosine_decay_schedule(3e-2, STEPS)
losses = {"adam": train(optax.adam(rate)), "soap": train(soap(rate, weight_decay=0.0))}
print_result("blackjax", losses, tolerance=0.02)
