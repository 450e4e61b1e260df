"""Rows of zeros in a symmetric matrix, decoupled from all other rows exactly.

In exact arithmetic the unit vector of such a row is an eigenvector, and all other eigenvectors are
zero there. Decompositions round: they mix a row of zeros with null directions, and leave errors of
the size of the machine epsilon in the others. So decompositions get the rows of zeros last, and
unit vectors replace the vectors that they return for these rows.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike


def zero_rows(matrix: Array) -> Array:
    """Whether each row has only zeros, `(d,)`."""
    return jnp.all(matrix == 0, axis=1)


def decoupled_rows(matrix: Array, basis: Array) -> Array:
    """The rows of zeros in a matrix whose unit vector is a column of its basis, `(d,)`.

    A row that became zero by an underflow may have no such column. It is not decoupled.
    """
    return zero_rows(matrix) & (jnp.sum(basis != 0, axis=1) == 1)


def decoupled_columns(rows: Array, basis: Array) -> Array:
    """The columns of a basis that are unit vectors of decoupled rows, `(d,)`."""
    return jnp.any(rows[:, None] & (basis != 0), axis=0)


def with_rows_last(
    function: Callable[[Array], Array],
    matrix: Array,
    rows: Array,
    columns: Array | None = None,
    value: ArrayLike = 1,
) -> Array:
    """Calls a decomposition with some rows last, decoupled from all others.

    Args:
      function: a decomposition that returns orthonormal columns, `(d, d)`.
      matrix: its argument, `(d, d)`.
      rows: the rows to decouple, `(d,)`.
      columns: a permutation of the columns that puts the columns of these rows last. None permutes
        columns as rows.
      value: the diagonal entry of a decoupled row in the argument of `function`.

    Returns:
      The result, with unit vectors of the decoupled rows as its last columns. If no row is
      decoupled, this is the result of `function` for the permuted columns.
    """
    rows_last = jnp.argsort(rows, stable=True)
    is_last = rows[rows_last]
    is_decoupled = is_last[:, None] | is_last[None, :]
    identity = jnp.eye(len(matrix), dtype=matrix.dtype)
    # On CPUs, gathering rows is faster than gathering columns.
    permuted = matrix.T[rows_last if columns is None else columns].T[rows_last]
    result = function(jnp.where(is_decoupled, value * identity, permuted))
    return jnp.where(is_decoupled, identity, result)[jnp.argsort(rows_last)]
