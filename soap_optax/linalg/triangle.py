"""Symmetric matrices in packed storage: the lower triangle, folded into a rectangle.

Row `i` of the lower triangle has `i + 1` entries and row `d - 1 - i` has `d - i`. Together they
have `d + 1` entries for every `i`, so both share one row of a `(ceil(d / 2), d + 1)` rectangle. The
longer row starts at the left; the shorter one is reversed at the right end.
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


def unfolded(stored: Array, d: int) -> Array:
    """A symmetric matrix, `(d, d)`, whether it is stored folded or not."""
    return stored if stored.shape == (d, d) else unfold(stored, d)


def folded_like(stored: Array, matrix: Array) -> Array:
    """A symmetric matrix, `(d, d)`, in the storage of another: folded, or as it is."""
    return matrix if stored.shape == matrix.shape else fold(matrix)


def unfold(folded: Array, d: int) -> Array:
    """The symmetric matrix, `(d, d)`, from its folded lower triangle."""
    half = (d + 1) // 2
    upper = folded[: d - half, ::-1][:, :d]
    lower = folded[::-1][:, :d]
    triangle = jnp.tril(jnp.concatenate([upper, lower]))
    return triangle + jnp.tril(triangle, -1).T


def _belongs_to_lower_half(half: int, width: int) -> Array:
    rows, columns = jnp.arange(half)[:, None], jnp.arange(width)[None, :]
    return columns < width - 1 - rows
