"""A byte-level GPT in Flax NNX, and its training text."""

from __future__ import annotations

import math
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

# Text ---------------------------------------------------------------------------------------------

MAX_BYTES = 32 * 2**20

# Some installations lack these folders, and others contain tables rather than code.
SKIPPED_FOLDERS = {"__pycache__", "dist-packages", "site-packages", "test", "tests", "tkinter"}
SKIPPED_FOLDERS |= {"distutils", "encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data"}


def standard_library() -> list[Path]:
    """Returns the source files of Python's standard library, in a fixed sequence."""
    root = Path(sysconfig.get_path("stdlib"))
    names = [path.relative_to(root) for path in root.rglob("*.py")]
    return [
        root / name
        for name in sorted(names, key=Path.as_posix)
        if SKIPPED_FOLDERS.isdisjoint(name.parts) and not name.name.startswith("_sysconfigdata")
    ]


def files_in(path: Path) -> list[Path]:
    """Returns the file `path`, or the visible files of the folder `path` in a fixed sequence."""
    if not path.is_dir():
        return [path]
    names = [file.relative_to(path) for file in path.rglob("*") if file.is_file()]
    visible = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    return [path / name for name in sorted(visible, key=Path.as_posix)]


def read_text(files: Sequence[Path]) -> np.ndarray:
    """Joins the files in the given sequence and returns the first `MAX_BYTES` bytes."""
    text = bytearray()
    for path in files:
        with path.open("rb") as file:
            text += file.read(MAX_BYTES - len(text))
    return np.frombuffer(bytes(text), np.uint8)


def random_batches(
    text: np.ndarray, batch_size: int, context: int, seed: int
) -> Iterator[np.ndarray]:
    """Yields `(batch_size, context + 1)` bytes from random positions, which `seed` determines."""
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.integers(len(text) - context, size=(batch_size, 1))
        yield text[starts + np.arange(context + 1)]


def even_batches(text: np.ndarray, batches: int, batch_size: int, context: int) -> np.ndarray:
    """Returns `(batches, batch_size, context + 1)` bytes from evenly spaced positions."""
    starts = np.linspace(0, len(text) - context - 1, batches * batch_size).astype(int)
    return text[starts.reshape(batches, batch_size, 1) + np.arange(context + 1)]


# Model --------------------------------------------------------------------------------------------


class Size(NamedTuple):
    """The size of a `GPT`. `width` is a multiple of `heads`."""

    layers: int
    width: int
    heads: int
    context: int


def precision() -> jnp.dtype:
    """Returns the dtype of the parameters: float32, or float64 if JAX_ENABLE_X64 is set."""
    return jnp.result_type(float)


def norm(width: int, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """Returns an RMS norm."""
    return nnx.RMSNorm(width, param_dtype=precision(), rngs=rngs)


def embedding(count: int, width: int, rngs: nnx.Rngs) -> nnx.Embed:
    """Returns an embedding table of `count` vectors."""
    init = nnx.initializers.normal(0.02)
    return nnx.Embed(count, width, embedding_init=init, param_dtype=precision(), rngs=rngs)


def linear(inputs: int, outputs: int, rngs: nnx.Rngs, stddev: float = 0.02) -> nnx.Linear:
    """Returns a linear layer without bias."""
    init = nnx.initializers.normal(stddev)
    return nnx.Linear(
        inputs, outputs, use_bias=False, kernel_init=init, param_dtype=precision(), rngs=rngs
    )


class Block(nnx.Module):
    """Causal attention, then a GELU MLP, each after a norm and with a residual connection."""

    def __init__(self, size: Size, rngs: nnx.Rngs):
        width, residual_stddev = size.width, 0.02 / math.sqrt(2 * size.layers)
        self.heads = size.heads
        self.attention_norm = norm(width, rngs)
        self.query = linear(width, width, rngs)
        self.key = linear(width, width, rngs)
        self.value = linear(width, width, rngs)
        self.mix = linear(width, width, rngs, residual_stddev)
        self.mlp_norm = norm(width, rngs)
        self.up = linear(width, 4 * width, rngs)
        self.down = linear(4 * width, width, rngs, residual_stddev)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `(B, T, C)` to `(B, T, C)`."""
        y = self.attention_norm(x)
        heads = (*y.shape[:2], self.heads, -1)  # (B, T, H, C / H)
        query, key, value = (f(y).reshape(heads) for f in (self.query, self.key, self.value))
        seen = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + self.mix(seen.reshape(x.shape))
        return x + self.down(jax.nn.gelu(self.up(self.mlp_norm(x))))


class GPT(nnx.Module):
    """A pre-norm transformer over bytes with learned positions, no biases and an untied head."""

    def __init__(self, size: Size, rngs: nnx.Rngs):
        width = size.width
        self.embedding = embedding(256, width, rngs)
        self.positions = embedding(size.context, width, rngs)
        self.blocks = nnx.List([Block(size, rngs) for _ in range(size.layers)])
        self.norm = norm(width, rngs)
        self.head = linear(width, 256, rngs)

    def residual(self, tokens: jax.Array) -> jax.Array:
        """Maps bytes, `(B, T)`, to the residual vectors after the last block, `(B, T, C)`."""
        x = self.embedding(tokens) + self.positions(jnp.arange(tokens.shape[1]))[None]
        for block in self.blocks:
            x = block(x)
        return x

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps bytes, `(B, T)`, to the logits of the next bytes, `(B, T, 256)`."""
        return self.head(self.norm(self.residual(tokens)))


Loss = Callable[[nnx.State, jax.Array], jax.Array]


def make_model(size: Size, seed: int) -> tuple[nnx.State, Loss]:
    """Returns the initial parameters and the loss: mean cross-entropy, in nats per byte."""
    graph, params = nnx.split(GPT(size, nnx.Rngs(seed)))

    def loss(params: nnx.State, windows: jax.Array) -> jax.Array:  # (B, T + 1) -> ()
        tokens = windows.astype(jnp.int32)
        logits = nnx.merge(graph, params)(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    return params, loss
