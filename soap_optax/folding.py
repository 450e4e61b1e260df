"""Symmetric matrices stored once: the lower triangle, folded into a rectangle of half the size.

Row `i` of the lower triangle has `i + 1` entries and row `d - 1 - i` has `d - i`, together `d + 1`
for any `i`. So the rows of the lower half are laid out from the left, and those of the upper half,
from the right and backwards, in what they leave free: `(ceil(d / 2), d + 1)`.
"""

import jax.numpy as jnp
from jax import Array


def folded_shape(d: int) -> tuple[int, int]:
    """The shape in which a symmetric `(d, d)` matrix is stored."""
    return (d + 1) // 2, d + 1


def fold(matrix: Array) -> Array:
    """The lower triangle of a symmetric matrix, `(d, d)`, as a rectangle."""
    d = len(matrix)
    half, width = folded_shape(d)
    lower = jnp.pad(matrix[::-1][:half], ((0, 0), (0, 1)))
    upper = jnp.pad(matrix[:half, ::-1], ((0, 0), (1, 0)))
    return jnp.where(_belongs_to_lower_half(half, width), lower, upper)


def whole(factor: Array, d: int) -> Array:
    """A factor as a matrix, `(d, d)`, which it is unless it is folded."""
    return factor if factor.shape == (d, d) else unfold(factor, d)


def arranged_as(factor: Array, matrix: Array) -> Array:
    """A symmetric matrix, `(d, d)`, folded if the factor is."""
    return matrix if factor.shape == matrix.shape else fold(matrix)


def unfold(folded: Array, d: int) -> Array:
    """The symmetric matrix, `(d, d)`."""
    half = (d + 1) // 2
    upper = folded[: d - half, ::-1][:, :d]
    lower = folded[::-1][:, :d]
    triangle = jnp.tril(jnp.concatenate([upper, lower]))
    return triangle + jnp.tril(triangle, -1).T


def _belongs_to_lower_half(half: int, width: int) -> Array:
    rows, columns = jnp.arange(half)[:, None], jnp.arange(width)
    return columns < width - 1 - rows
