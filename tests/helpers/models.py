"""Parameter trees of models in Flax, Equinox and Haiku, as shapes: nothing is computed."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx

D, HEADS, HIDDEN, VOCABULARY = 8, 2, 24, 11
LAYERS, EXPERTS = 3, 5

Tree = Any
TOKENS = jax.ShapeDtypeStruct((1, 6), jnp.int32)
IMAGES = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)


# Linen ------------------------------------------------------------------------------------------


class LinenBlock(linen.Module):
    """Attention and an MLP, or a mixture of MLPs."""

    use_bias: bool = True
    experts: int = 0

    @linen.compact
    def __call__(self, x: jax.Array, _: Any = None) -> tuple[jax.Array, None]:
        attention = linen.MultiHeadAttention(HEADS, use_bias=self.use_bias)
        x = x + attention(linen.RMSNorm()(x))
        y = linen.RMSNorm()(x)
        if not self.experts:
            return x + LinenMLP(self.use_bias, name="mlp")(y), None
        gates = linen.Dense(self.experts, use_bias=False, name="router")(y)
        mixture = linen.vmap(
            LinenMLP,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,  # pyright: ignore[reportArgumentType]  # Flax takes it.
            out_axes=-1,
            axis_size=self.experts,
        )
        outputs = mixture(self.use_bias, name="experts")(y)
        return x + (outputs * linen.softmax(gates)[:, :, None]).sum(-1), None


class LinenMLP(linen.Module):
    """Two layers."""

    use_bias: bool

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = linen.gelu(linen.Dense(HIDDEN, use_bias=self.use_bias, name="up")(x))
        return linen.Dense(D, use_bias=self.use_bias, name="down")(x)


class LinenGPT(linen.Module):
    """A transformer whose layers are apart, or stacked along an axis by `linen.scan`."""

    scan_axis: int | None = None
    use_bias: bool = True
    experts: int = 0

    @linen.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = linen.Embed(VOCABULARY, D, name="wte")(tokens)
        if self.scan_axis is None:
            for number in range(LAYERS):
                x, _ = LinenBlock(self.use_bias, self.experts, name=f"h_{number}")(x)
        else:
            scanned = linen.scan(
                LinenBlock,
                variable_axes={"params": self.scan_axis},
                split_rngs={"params": True},
                length=LAYERS,
            )
            x, _ = scanned(self.use_bias, self.experts, name="layers")(x, None)
        return linen.Dense(VOCABULARY, use_bias=False, name="lm_head")(linen.RMSNorm()(x))


class ResNet(linen.Module):
    """A stem and a residual block with a projection."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = linen.Conv(8, (7, 7), use_bias=False, name="stem")(x)
        x = linen.relu(linen.BatchNorm(True)(x))
        y = linen.Conv(8, (3, 3), use_bias=False)(x)
        y = linen.relu(linen.GroupNorm(4)(y))
        y = linen.Conv(16, (3, 3), use_bias=False)(y)
        x = y + linen.Conv(16, (1, 1), use_bias=False, name="conv_proj")(x)
        return linen.Dense(10, name="head")(x.mean((1, 2)))


class UNet(linen.Module):
    """One level down and up again."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = linen.Conv(8, (3, 3), name="enter")(x)
        down = linen.Conv(16, (3, 3), (2, 2), name="down")(x)
        up = linen.ConvTranspose(8, (2, 2), (2, 2), name="up")(down)
        x = jnp.concatenate([x, up], -1)
        return linen.Conv(3, (1, 1), name="leave")(x)


class LinenLSTM(linen.Module):
    """An LSTM over time."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return linen.Dense(4)(linen.RNN(linen.OptimizedLSTMCell(HIDDEN))(x))


class LinenPerceptron(linen.Module):
    """An MLP."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return linen.Dense(4)(jnp.tanh(linen.Dense(HIDDEN)(x)))


def linen_params(model: linen.Module, x: Any) -> Tree:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return jax.eval_shape(model.init, jax.random.key(0), x)["params"]


# NNX --------------------------------------------------------------------------------------------


class NNXMLP(nnx.Module):
    """Two layers without biases."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(D, HIDDEN, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, D, use_bias=False, rngs=rngs)


class NNXBlock(nnx.Module):
    """Attention and an MLP, or a mixture of MLPs."""

    def __init__(self, rngs: nnx.Rngs, experts: int = 0) -> None:
        self.attention = nnx.MultiHeadAttention(HEADS, D, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(D, rngs=rngs)
        if experts:
            self.router = nnx.Linear(D, experts, rngs=rngs)
            self.experts = nnx.split_rngs(splits=experts)(nnx.vmap(NNXMLP))(rngs)
        else:
            self.mlp = NNXMLP(rngs)


class NNXGPT(nnx.Module):
    """A transformer whose layers are apart, or stacked by `create`."""

    def __init__(
        self, rngs: nnx.Rngs, create: Callable[..., Any] | None = None, experts: int = 0
    ) -> None:
        def block(rngs: nnx.Rngs) -> NNXBlock:
            return NNXBlock(rngs, experts)

        self.embedding = nnx.Embed(VOCABULARY, D, rngs=rngs)
        if create is None:
            self.layers = nnx.List([block(rngs) for _ in range(LAYERS)])
        else:
            self.layers = nnx.split_rngs(splits=LAYERS)(create(block))(rngs)
        self.norm = nnx.LayerNorm(D, rngs=rngs)
        self.head = nnx.Linear(D, VOCABULARY, use_bias=False, rngs=rngs)


class NNXLSTM(nnx.Module):
    """An LSTM over time."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.cell = nnx.OptimizedLSTMCell(D, HIDDEN, rngs=rngs)
        self.dense = nnx.Linear(HIDDEN, 4, rngs=rngs)


def nnx_params(make: Callable[[nnx.Rngs], nnx.Module]) -> Tree:
    return nnx.state(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param)


# Equinox ----------------------------------------------------------------------------------------


class EquinoxBlock(eqx.Module):
    """Attention and an MLP."""

    attention: eqx.nn.MultiheadAttention
    norm: eqx.nn.LayerNorm
    second_norm: eqx.nn.RMSNorm
    mlp: eqx.nn.MLP

    def __init__(self, key: jax.Array) -> None:
        self.attention = eqx.nn.MultiheadAttention(HEADS, D, key=key)
        self.norm = eqx.nn.LayerNorm(D)
        self.second_norm = eqx.nn.RMSNorm(D, use_bias=False)
        self.mlp = eqx.nn.MLP(D, D, HIDDEN, 1, key=key)


class EquinoxModel(eqx.Module):
    """A stack of layers, convolutions in a list, and an LSTM."""

    embedding: eqx.nn.Embedding
    layers: EquinoxBlock
    extra: list[Any]
    cell: eqx.nn.LSTMCell

    def __init__(self, key: jax.Array) -> None:
        self.embedding = eqx.nn.Embedding(VOCABULARY, D, key=key)
        self.layers = eqx.filter_vmap(EquinoxBlock)(jax.random.split(key, LAYERS))
        self.extra = [
            eqx.nn.Conv2d(3, 8, 3, key=key),
            eqx.nn.Conv1d(8, 6, 5, key=key),
            eqx.nn.Conv2d(6, 4, 3, use_bias=False, key=key),
        ]
        self.cell = eqx.nn.LSTMCell(D, HIDDEN, key=key)


def equinox_params() -> Tree:
    model = eqx.filter_eval_shape(EquinoxModel, jax.random.key(0))
    return eqx.filter(model, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))


# Haiku ------------------------------------------------------------------------------------------


def haiku_params() -> Tree:
    haiku = pytest.importorskip("haiku")

    def block(x: jax.Array) -> jax.Array:
        x = haiku.LayerNorm(-1, create_scale=True, create_offset=True)(x)
        init = haiku.initializers.VarianceScaling()
        x = haiku.MultiHeadAttention(HEADS, D // HEADS, w_init=init)(x, x, x)
        return haiku.nets.MLP([HIDDEN, D])(x)

    def model(tokens: jax.Array) -> jax.Array:
        x = haiku.Embed(VOCABULARY, D)(tokens)
        x = haiku.experimental.layer_stack(LAYERS)(block)(x)
        x = haiku.Conv1D(D, 3)(x)
        cell = haiku.LSTM(HIDDEN)
        x, _ = haiku.dynamic_unroll(cell, x, cell.initial_state(6))
        return haiku.Linear(VOCABULARY, name="lm_head")(x)

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return jax.eval_shape(haiku.transform(model).init, jax.random.key(0), TOKENS)


SEQUENCE = jax.ShapeDtypeStruct((1, 6, D), jnp.float32)
TREES: dict[str, Callable[[], Tree]] = {
    "Linen transformer": lambda: linen_params(LinenGPT(), TOKENS),
    "Linen transformer, scanned": lambda: linen_params(LinenGPT(scan_axis=0), TOKENS),
    "Linen transformer, scanned, no biases": lambda: linen_params(
        LinenGPT(scan_axis=0, use_bias=False), TOKENS
    ),
    "Linen transformer, scanned along axis 1": lambda: linen_params(LinenGPT(scan_axis=1), TOKENS),
    "Linen mixture of experts": lambda: linen_params(LinenGPT(experts=EXPERTS), TOKENS),
    "Linen mixture of experts, scanned": lambda: linen_params(
        LinenGPT(scan_axis=0, experts=EXPERTS), TOKENS
    ),
    "Linen ResNet": lambda: linen_params(ResNet(), IMAGES),
    "Linen U-Net": lambda: linen_params(UNet(), IMAGES),
    "Linen MLP": lambda: linen_params(LinenPerceptron(), SEQUENCE),
    "Linen LSTM": lambda: linen_params(LinenLSTM(), SEQUENCE),
    "NNX transformer": lambda: nnx_params(NNXGPT),
    "NNX transformer, stacked by vmap": lambda: nnx_params(lambda rngs: NNXGPT(rngs, nnx.vmap)),
    "NNX transformer, stacked by scan": lambda: nnx_params(
        lambda rngs: NNXGPT(rngs, nnx.scan(in_axes=0, out_axes=0))
    ),
    "NNX mixture of experts, stacked": lambda: nnx_params(
        lambda rngs: NNXGPT(rngs, nnx.vmap, EXPERTS)
    ),
    "NNX LSTM": lambda: nnx_params(NNXLSTM),
    "Equinox": equinox_params,
    "Haiku": haiku_params,
}
