"""Rows of zeros in a symmetric matrix, decoupled from all other rows exactly.

In exact arithmetic the unit vector of such a row is an eigenvector, and all other eigenvectors are
zero there. Decompositions round. So they get a matrix whose decomposition separates these rows up
to rounding, and `with_unit_vectors` removes the rounding errors.
"""

import jax.numpy as jnp
from jax import Array


def zero_rows(matrix: Array) -> Array:
    """Whether each row has only zeros, `(d,)`.

    Here and below, sums of floats stand for `any` and `all`, which take six times as long to
    compile on CPUs.
    """
    return jnp.sum(jnp.abs(matrix), axis=1) == 0


def decoupled_rows(matrix: Array, basis: Array) -> Array:
    """The rows of zeros in a matrix whose unit vector is a column of its basis, `(d,)`.

    A row that became zero by an underflow may have no such column. It is not decoupled.
    """
    entries = jnp.sum((basis != 0).astype(basis.dtype), axis=1)
    return zero_rows(matrix) & (entries == 1)


def decoupled_columns(rows: Array, basis: Array) -> Array:
    """The columns of a basis that are unit vectors of decoupled rows, `(d,)`."""
    return jnp.sum(jnp.where(rows[:, None], jnp.abs(basis), 0), axis=0) > 0


def with_unit_vectors(basis: Array, rows: Array) -> Array:
    """A basis whose vectors of decoupled rows are exact unit vectors.

    Args:
      basis: orthonormal columns, `(d, d)`. For each decoupled row, one of them is a unit vector up
        to its sign and rounding errors.
      rows: the decoupled rows, `(d,)`.
    """
    ones = (rows[:, None] & (jnp.abs(basis) > 0.5)).astype(basis.dtype)
    columns = jnp.sum(ones, axis=0) > 0
    return jnp.where(rows[:, None] | columns[None, :], ones, basis)
