"""Penzai: an MLP with named axes, and `StatefulTrainer`."""

import jax
import jax.numpy as jnp
import optax
from penzai import pz
from penzai.models import simple_mlp
from penzai.toolshed import basic_training
from program_result import print_result

from soap_optax import soap

STEPS = 200
x = jax.random.normal(jax.random.key(0), (128, 4))
y = jnp.sin(3 * x[:, :2]) * x[:, 2:]


def mean_square(model, state, rng, x, y):
    del rng
    found = model(pz.nx.wrap(x).tag("batch", "features")).untag("batch", "features").unwrap()
    loss = jnp.mean((found - y) ** 2)
    return loss, state, {"loss": loss}


def train(optimizer: optax.GradientTransformation) -> jax.Array:
    model = simple_mlp.MLP.from_config(jax.random.key(1), [4, 32, 32, 2])
    trainer = basic_training.StatefulTrainer.build(
        jax.random.key(2), model, optimizer, mean_square, donate_states=True
    )
    for _ in range(STEPS):
        out = trainer.step(x=x, y=y)
    return out["loss"]


rate = optax.cosine_decay_schedule(1e-2, STEPS)
losses = {"adam": train(optax.adam(rate)), "soap": train(soap(rate, weight_decay=0.0))}
print_result("penzai", losses)
