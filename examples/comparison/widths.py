"""Learning rates by width, by the rules of arXiv 2512.05620.

The rules keep the change of activations in a step the same at every width. For a matrix that maps
`d_in` features to `d_out`, SOAP's learning rate is proportional to

    sqrt(d_out / d_in)                      with one block for the whole matrix
    sqrt(b_out * b_in) / d_in               with blocks of at most `b` along each axis

Embeddings, positions and vectors keep their rate: their inputs have the same size at every width.
The rules assume initial kernels whose size is proportional to `1 / sqrt(d_in)`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import optax
from jax import Array


def rule(inputs: int, outputs: int, block_size: int | None) -> float:
    """The learning rate of a matrix, up to a constant."""
    if block_size is None:
        return math.sqrt(outputs / inputs)
    return math.sqrt(min(outputs, block_size) * min(inputs, block_size)) / inputs


def width_scales(params: Any, base_width: int, block_size: int | None) -> Any:
    """The scale of each parameter's learning rate; it is 1 at the width `base_width`.

    Args:
      params: the parameters of a model in this folder, or their shapes. Kernels are
        `(inputs, outputs)`.
      base_width: the width at which the learning rate was tuned.
      block_size: SOAP's `block_size`.
    """
    (width,) = {leaf.shape[-1] for path, leaf in paths_of(params) if is_embedding(path)}

    def scale(path: Sequence[Any], leaf: Any) -> float:
        if leaf.ndim < 2 or is_embedding(path):
            return 1.0
        # An axis that grows with the width is a multiple of it. The other axis of a head is not.
        grows = [True, "head" not in jax.tree_util.keystr(tuple(path))]
        at_base = [
            length * base_width // width if growing else length
            for length, growing in zip(leaf.shape, grows, strict=True)
        ]
        (inputs, outputs), (base_inputs, base_outputs) = leaf.shape, at_base
        return rule(inputs, outputs, block_size) / rule(base_inputs, base_outputs, block_size)

    return jax.tree_util.tree_map_with_path(scale, params)


def with_scaled_kernels(params: Any, scale: float) -> Any:
    """The parameters with all kernels multiplied by a scale, embeddings and vectors as they are."""

    def scaled(path: Sequence[Any], leaf: Any) -> Any:
        return leaf if leaf.ndim < 2 or is_embedding(path) else leaf * scale

    return jax.tree_util.tree_map_with_path(scaled, params)


def paths_of(params: Any) -> list[tuple[Any, Any]]:
    """The paths and leaves of a tree."""
    return jax.tree_util.tree_flatten_with_path(params)[0]


def is_embedding(path: Sequence[Any]) -> bool:
    """Whether a path is that of an embedding table."""
    return "'embedding'" in jax.tree_util.keystr(tuple(path))


def scale_by_width(base_width: int, block_size: int | None) -> optax.GradientTransformation:
    """Scales updates by `width_scales`."""

    def update(updates: Any, params: Any) -> Any:
        scales = width_scales(params, base_width, block_size)

        def scaled(scale: float, leaf: Array) -> Array:
            return leaf * scale

        return jax.tree.map(scaled, scales, updates)

    return optax.stateless(update)
