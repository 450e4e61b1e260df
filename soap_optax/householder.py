"""A QR decomposition that is matrix products for the most part.

LAPACK's QR keeps one core of a CPU busy, and half of its operations are products of a matrix and a
vector. Here it decomposes narrow panels only. What their reflections do to all else are products of
matrices, which XLA spreads over all cores: at a length of 2048, two cores take half of the time or
less. A product of reflections is `I - Y T Y^T`, with `Y` unit lower trapezoidal and `T` upper
triangular.

References:
  Schreiber and Van Loan, A storage-efficient WY representation for products of Householder
  transformations, 1989.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from soap_optax.products import times

# How many panels a matrix is cut into. The time is about the same from four to twelve, and every
# panel takes a compiler a tenth of a second.
PANELS = 6


class Reflections(NamedTuple):
    """The product `I - Y T Y^T` of the reflections that triangularize a panel of `w` columns.

    Attributes:
      rows: `Y^T`, `(w, m)`.
      weights: `T`, `(w, w)`.
    """

    rows: Array
    weights: Array


def orthonormal_factor(matrix: Array) -> Array:
    """The `Q` of a QR decomposition of a square matrix, `(d, d)`.

    Columns are kept as rows of the transpose: a panel is contiguous then, and lies as LAPACK wants
    it.
    """
    width = -(-len(matrix) // PANELS)
    rest, reflections = matrix.T, []
    while rest.size:
        reflections.append(_reflections_of(rest[:width]))
        rest = _below(rest[width:], reflections[-1])
    basis = rest  # Of no rows and no columns.
    for reflection in reversed(reflections):
        basis = _reflect_bordered(basis, reflection)
    return basis


def _reflections_of(panel: Array) -> Reflections:
    """The reflections of LAPACK's QR of a panel, whose columns are given as rows, `(w, m)`.

    `T` is the inverse of `diag(1 / tau) + striu(Y^T Y)`, written so that a `tau` of zero, which
    reflects nothing, divides nothing.
    """
    packed, taus = jnp.linalg.qr(panel.T, mode="raw")
    rows = jnp.triu(packed, 1) + jnp.eye(*panel.shape, dtype=panel.dtype)
    identity = jnp.eye(len(taus), dtype=panel.dtype)
    overlaps = jnp.triu(times(rows, rows.T), 1)
    weights = lax.linalg.triangular_solve(
        identity + taus[:, None] * overlaps, taus * identity, left_side=True, unit_diagonal=True
    )
    return Reflections(rows, weights)


def _below(columns: Array, reflections: Reflections) -> Array:
    """What is below a panel of other columns, given as rows, `(n, m)`, after its reflections."""
    rows, weights = reflections
    width = len(weights)
    turned = times(times(columns, rows.T), weights)
    return columns[:, width:] - times(turned, rows[:, width:])


def _reflect_bordered(basis: Array, reflections: Reflections) -> Array:
    """The product of reflections and of a basis, `(n, n)`, bordered by an identity, `(m, m)`."""
    rows, weights = reflections
    width, length = rows.shape
    overlaps = jnp.concatenate([rows[:, :width], times(rows[:, width:], basis)], axis=1)
    bordered = jnp.pad(basis, ((width, 0), (width, 0)))
    bordered += jnp.diag((jnp.arange(length) < width).astype(basis.dtype))
    return bordered - times(rows.T, times(weights, overlaps))
