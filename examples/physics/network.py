"""The network: an MLP with tanh, in Flax NNX, and the options of the field."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from physics.problems import Problem

# Logarithms of the factors of random weight factorization: jaxpi's mean and standard deviation.
FACTOR_MEAN, FACTOR_STDDEV = 1.0, 0.1


class Size(NamedTuple):
    """The settings of a network.

    Attributes:
      layers: the number of hidden layers.
      width: their width, which is even if there are Fourier features.
      fourier_scale: standard deviation of the random Fourier features, or 0 for none.
      factorized: whether the weights are factorized.
    """

    layers: int
    width: int
    fourier_scale: float
    factorized: bool


def precision() -> jnp.dtype:
    """Returns the dtype of the parameters: float32, or float64 if JAX is set to 64 bits."""
    return jnp.result_type(float)


class Dense(nnx.Module):
    """A linear layer with bias, Glorot initialization and, optionally, factorized weights.

    Random weight factorization trains the kernel as `kernel * factor`, with one factor for each
    output. The product starts as without it.

    References:
      Wang, Wang, Seidman and Perdikaris, Random Weight Factorization,
        https://arxiv.org/abs/2210.01274, 2022
    """

    def __init__(self, inputs: int, outputs: int, factorized: bool, rngs: nnx.Rngs):
        init = nnx.initializers.glorot_normal()
        kernel = init(rngs.params(), (inputs, outputs), precision())
        if factorized:
            normal = jax.random.normal(rngs.params(), (outputs,), precision())
            factor = jnp.exp(FACTOR_MEAN + FACTOR_STDDEV * normal)
            self.factor = nnx.Param(factor)
            kernel = kernel / factor[None]
        self.factorized = factorized
        self.kernel = nnx.Param(kernel)
        self.bias = nnx.Param(jnp.zeros(outputs, precision()))

    def __call__(self, x: Array) -> Array:
        """Maps `(N, inputs)` to `(N, outputs)`."""
        kernel = self.kernel[...]
        if self.factorized:
            kernel = kernel * self.factor[...][None]
        return x @ kernel + self.bias[...][None]


class FourierFeatures(nnx.Module):
    """Cosines and sines of random projections, which are not trained.

    References:
      Tancik et al., Fourier Features Let Networks Learn High Frequency Functions in Low Dimensional
        Domains, https://arxiv.org/abs/2006.10739, 2020
    """

    def __init__(self, inputs: int, outputs: int, scale: float, rngs: nnx.Rngs):
        normal = jax.random.normal(rngs.params(), (inputs, outputs // 2), precision())
        self.frequencies = nnx.Variable(scale * normal)

    def __call__(self, x: Array) -> Array:
        """Maps `(N, inputs)` to `(N, outputs)`."""
        phase = x @ self.frequencies[...]
        return jnp.concatenate([jnp.cos(phase), jnp.sin(phase)], -1)


class Network(nnx.Module):
    """Maps points to the solution. A periodic coordinate enters as its cosine and sine."""

    def __init__(self, size: Size, period: float | None, rngs: nnx.Rngs):
        self.period = period
        inputs = 2 if period is None else 3
        scale = size.fourier_scale
        self.features = FourierFeatures(inputs, size.width, scale, rngs) if scale else None
        sizes = [size.width if scale else inputs, *[size.width] * size.layers]
        self.hidden = nnx.List(
            [Dense(sizes[i], size.width, size.factorized, rngs) for i in range(size.layers)]
        )
        self.head = Dense(size.width, 1, size.factorized, rngs)

    def __call__(self, points: Array) -> Array:
        """Maps `(N, 2)` to `(N,)`."""
        x = points
        if self.period is not None:
            phase = 2 * math.pi / self.period * points[:, 1:]
            x = jnp.concatenate([points[:, :1], jnp.cos(phase), jnp.sin(phase)], -1)
        if self.features is not None:
            x = self.features(x)
        for layer in self.hidden:
            x = jnp.tanh(layer(x))
        return self.head(x)[:, 0]


Apply = Callable[[nnx.State, nnx.State, Array], Array]


def make_network(size: Size, problem: Problem, key: Array) -> tuple[nnx.State, nnx.State, Apply]:
    """Returns the initial parameters, the arrays that are not trained, and the network."""
    network = Network(size, problem.period, nnx.Rngs(params=key))
    graph, params, fixed = nnx.split(network, nnx.Param, ...)

    def apply(params: nnx.State, fixed: nnx.State, points: Array) -> Array:  # (N, 2) -> (N,)
        return nnx.merge(graph, params, fixed)(points)

    return params, fixed, apply
