"""The language model of the SOAP paper (arXiv 2409.11321) in Flax NNX.

It has rotary positions, layer norms without biases, norms of queries and keys, and a GELU MLP. Its
loss adds a small penalty on the logarithm of the softmax' denominator (z-loss). Parameters are
float32. Products are in bfloat16 on accelerators, and the activations of a layer are recomputed in
the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

Z_LOSS = 1e-4
ROPE_BASE = 10_000.0
STDDEV = 0.02


class Shape(NamedTuple):
    """The size of the model."""

    layers: int
    width: int
    heads: int
    context: int
    vocabulary: int


def compute_dtype() -> jnp.dtype:
    """The dtype of products: bfloat16, and float32 on CPUs."""
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


def linear(inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.Linear:
    """A linear layer without bias."""
    init = nnx.initializers.normal(STDDEV)
    return nnx.Linear(
        inputs, outputs, use_bias=False, kernel_init=init, dtype=compute_dtype(), rngs=rngs
    )


def norm(width: int, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """A layer norm with a scale and no bias."""
    return nnx.LayerNorm(width, use_bias=False, dtype=compute_dtype(), rngs=rngs)


def rotate_positions(x: jax.Array) -> jax.Array:
    """Rotary positions of `(B, T, H, D)`."""
    half = x.shape[-1] // 2
    frequencies = ROPE_BASE ** (-jnp.arange(half, dtype=jnp.float32) / half)
    positions = jnp.arange(x.shape[1], dtype=jnp.float32)
    angles = positions[:, None, None] * frequencies  # (T, 1, D / 2)
    sine, cosine = jnp.sin(angles).astype(x.dtype)[None], jnp.cos(angles).astype(x.dtype)[None]
    first, second = x[..., :half], x[..., half:]
    rotated = (first * cosine - second * sine, second * cosine + first * sine)
    return jnp.concatenate(rotated, axis=-1)


class Block(nnx.Module):
    """Causal attention, then a GELU MLP, each after a norm and with a residual connection."""

    def __init__(self, shape: Shape, rngs: nnx.Rngs):
        width, self.heads = shape.width, shape.heads
        self.attention_norm, self.mlp_norm = norm(width, rngs), norm(width, rngs)
        self.query_norm = norm(width // shape.heads, rngs)
        self.key_norm = norm(width // shape.heads, rngs)
        self.query, self.key, self.value, self.mix = (linear(width, width, rngs) for _ in range(4))
        self.up, self.down = linear(width, 4 * width, rngs), linear(4 * width, width, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `(B, T, C)` to `(B, T, C)`."""
        y = self.attention_norm(x)
        heads = (*y.shape[:2], self.heads, -1)  # (B, T, H, C / H)
        query = rotate_positions(self.query_norm(self.query(y).reshape(heads)))
        key = rotate_positions(self.key_norm(self.key(y).reshape(heads)))
        value = self.value(y).reshape(heads)
        seen = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + self.mix(seen.reshape(x.shape))
        return x + self.down(jax.nn.gelu(self.up(self.mlp_norm(x))))


class GPT(nnx.Module):
    """A pre-norm transformer with rotary positions, no biases and an untied head."""

    def __init__(self, shape: Shape, rngs: nnx.Rngs):
        init = nnx.initializers.normal(STDDEV)
        self.embedding = nnx.Embed(
            shape.vocabulary, shape.width, embedding_init=init, dtype=compute_dtype(), rngs=rngs
        )
        self.blocks = nnx.List([Block(shape, rngs) for _ in range(shape.layers)])
        self.norm = norm(shape.width, rngs)
        self.head = linear(shape.width, shape.vocabulary, rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens, `(B, T)`, to the logits of the next tokens, `(B, T, V)`, in float32."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = nnx.remat(lambda block, x: block(x))(block, x)
        return self.head(self.norm(x)).astype(jnp.float32)


def make_model(
    shape: tuple[int, int, int, int, int], seed: int
) -> tuple[nnx.State, Callable[[nnx.State, jax.Array], jax.Array]]:
    """Returns the initial parameters and the loss, in nats per token."""
    graph, params = nnx.split(GPT(Shape(*shape), nnx.Rngs(seed)))

    def loss(params: nnx.State, windows: jax.Array) -> jax.Array:  # (B, T + 1) -> ()
        tokens = windows.astype(jnp.int32)
        logits = nnx.merge(graph, params)(tokens[:, :-1])
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        denominators = jax.nn.logsumexp(logits, axis=-1)
        return entropy.mean() + Z_LOSS * (denominators**2).mean()

    return params, loss
