"""Equinox: an ensemble of eight MLPs made by `filter_vmap`, trained with `filter_jit`."""

import io

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from program_result import print_result

import soap_optax

STEPS = 200
x = jax.random.normal(jax.random.key(0), (128, 2))
y = jnp.sin(3 * x[:, 0]) * x[:, 1]


@eqx.filter_vmap
def make_ensemble(key: jax.Array) -> eqx.nn.MLP:
    return eqx.nn.MLP(2, "scalar", width_size=50, depth=2, activation=jnp.tanh, key=key)


@eqx.filter_jit
def train_step(model, state, optimizer):
    def mean_square(model):
        predict = eqx.filter_vmap(lambda member: jax.vmap(member)(x))
        return jnp.mean((predict(model) - y) ** 2)

    loss, grads = eqx.filter_value_and_grad(mean_square)(model)
    params = eqx.filter(model, eqx.is_inexact_array)
    updates, state = optimizer.update(grads, state, params)
    return eqx.apply_updates(model, updates), state, loss


def train(optimizer):
    model = make_ensemble(jax.random.split(jax.random.key(1), 8))
    state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    for _ in range(STEPS):
        model, state, loss = train_step(model, state, optimizer)
    return (model, state), loss


losses = {}
rate = optax.cosine_decay_schedule(1e-2, STEPS)
_, losses["adam"] = train(optax.adam(rate))
_, losses["plain soap"] = train(soap_optax.soap(rate, weight_decay=0.0))
optimizer = soap_optax.soap_adamw(rate, weight_decay=0.0)
trained, losses["soap_adamw"] = train(optimizer)

file = io.BytesIO()
eqx.tree_serialise_leaves(file, trained)
file.seek(0)
restored = eqx.tree_deserialise_leaves(file, trained)
continued = [train_step(*run, optimizer)[2] for run in (trained, restored)]
assert continued[0] == continued[1], continued
print_result(
    "equinox", losses, soap="soap_adamw", checkpoint="tree_serialise_leaves: continues equally"
)
