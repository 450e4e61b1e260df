"""Optimistix: a matrix least-squares problem with `OptaxMinimiser`."""

import jax
import jax.numpy as jnp
import optax
import optimistix
from program_result import print_result

from soap_optax import soap

STEPS = 300
left, right = (
    jax.random.normal(jax.random.key(seed), (8, 8)) @ jnp.diag(jnp.geomspace(1, 0.1, 8))
    for seed in range(2)
)
target = jax.random.normal(jax.random.key(2), (8, 8))


def mean_square(params: dict[str, jax.Array], _: None) -> jax.Array:
    return jnp.mean((left @ params["matrix"] @ right + params["bias"] - target) ** 2)


def train(optimizer: optax.GradientTransformation) -> jax.Array:
    solution = optimistix.minimise(
        mean_square,
        optimistix.OptaxMinimiser(optimizer, rtol=1e-9, atol=1e-9),
        {"matrix": jnp.zeros((8, 8)), "bias": jnp.zeros(8)},
        max_steps=STEPS,
        throw=False,
    )
    return mean_square(solution.value, None)


rate = optax.cosine_decay_schedule(0.1, STEPS)
losses = {"adam": train(optax.adam(rate)), "soap": train(soap(rate, weight_decay=0.0))}
print_result("optimistix", losses)
