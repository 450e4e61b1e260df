"""Haiku: attention over tokens, made by `hk.transform`."""

import haiku as hk
import jax
import jax.numpy as jnp
import optax
from program_result import print_result

import soap_optax

STEPS, VOCABULARY, LENGTH = 100, 32, 16
# Each token is the sum of the two before it.
start = jax.random.randint(jax.random.key(0), (64, 2), 0, VOCABULARY)
tokens = [start[:, 0], start[:, 1]]
for _ in range(LENGTH):
    tokens.append((tokens[-1] + tokens[-2]) % VOCABULARY)
data = jnp.stack(tokens, axis=1)


def predict(tokens: jax.Array) -> jax.Array:
    h = hk.Embed(VOCABULARY, 32, name="embed")(tokens)
    mask = jnp.tril(jnp.ones((1, 1, tokens.shape[1], tokens.shape[1])))
    attention = hk.MultiHeadAttention(2, 16, w_init=hk.initializers.VarianceScaling(1.0))
    h = h + attention(h, h, h, mask)
    h = h + hk.Linear(32)(jax.nn.gelu(hk.Linear(64)(h)))
    return hk.Linear(VOCABULARY, name="lm_head")(h)


model = hk.without_apply_rng(hk.transform(predict))


def cross_entropy(params: hk.Params) -> jax.Array:
    logits = model.apply(params, data[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, data[:, 1:]).mean()


def train(optimizer: optax.GradientTransformation) -> jax.Array:
    @jax.jit
    def train_step(params, state):
        loss, grads = jax.value_and_grad(cross_entropy)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    params = model.init(jax.random.key(1), data[:, :-1])
    state = optimizer.init(params)
    for _ in range(STEPS):
        params, state, loss = train_step(params, state)
    return loss


losses = {
    "adamw": train(optax.adamw(1e-2)),
    "soap_adamw": train(soap_optax.soap_adamw(1e-2)),
}
print_result("dm-haiku", losses, usual="adamw", soap="soap_adamw")
