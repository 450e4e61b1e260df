"""Brax: its own update step, which calls `update` without parameters, on a network of PPO."""

import jax
import jax.numpy as jnp
import optax
from brax.training import gradients, networks
from program_result import print_result

from soap_optax import soap

STEPS = 300
x = jax.random.normal(jax.random.key(0), (256, 8))
y = jnp.sin(2 * x[:, :1]) * x[:, 1:2]
model = networks.MLP([32, 32, 1])


def mean_square(params: dict, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean((model.apply(params, x) - y) ** 2)


def train(optimizer: optax.GradientTransformation) -> jax.Array:
    update = gradients.gradient_update_fn(mean_square, optimizer, pmap_axis_name=None)

    @jax.jit
    def step(params, state):
        return update(params, x, y, optimizer_state=state)

    params = model.init(jax.random.key(1), x)
    state = optimizer.init(params)
    for _ in range(STEPS):
        loss, params, state = step(params, state)
    return loss


rate = optax.cosine_decay_schedule(1e-2, STEPS)
losses = {"adam": train(optax.adam(rate)), "soap": train(soap(rate, weight_decay=0.0))}
print_result("brax", losses)
