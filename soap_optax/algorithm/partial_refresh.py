"""The refresh method `partial`: rotates a quarter of a basis' columns at a time.

Columns are cut into chunks, and each partial refresh rotates the columns of two chunks among
themselves.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.lax import Precision

from soap_optax.linalg import (
    descending_eigenvectors,
    matmul,
    multiply_along,
    nearest_orthonormal,
    with_unit_vectors,
    zero_rows,
)

# Pairs of neighbouring chunks come first: columns with similar eigenvalues rotate fastest.
CHUNKS = 8
PAIRS = np.array([(a, a + gap) for gap in range(1, CHUNKS) for a in range(CHUNKS - gap)])


class PartlyNewBasis(NamedTuple):
    """A basis, `(d, d)`, after some of its columns have been rotated.

    Attributes:
      basis: the new basis.
      rotation: the matrix that multiplied these columns from the right, `(s, s)`.
      permutation: for each column the old column that it succeeds, `(d,)`.
    """

    basis: Array
    rotation: Array
    permutation: Array


def chunk_length(length: int) -> int:
    """The number of columns in a chunk. A basis of fewer than 32 columns is one chunk."""
    return length // CHUNKS if length >= 4 * CHUNKS else length


def scheduled_chunks(length: int, refreshes: Array) -> Array:
    """The first columns of the chunks that a partial refresh rotates, `(2,)`; `(1,)` for one chunk.

    A round of 28 refreshes rotates every pair of chunks once. All chunks have the same length, so
    up to seven columns are in none. In the first round these are the last columns. In each
    following round they are one chunk earlier. So every pair of columns meets within five rounds.

    Args:
      length: the number of columns of the basis.
      refreshes: the number of refreshes before this one.
    """
    chunk = chunk_length(length)
    if chunk == length:
        return jnp.zeros(1, jnp.int32)
    pair = jnp.asarray(PAIRS, jnp.int32)[refreshes % len(PAIRS)]
    first_after_gap = CHUNKS - refreshes // len(PAIRS) % (CHUNKS + 1)
    return pair * chunk + jnp.where(pair >= first_after_gap, length - CHUNKS * chunk, 0)


def take_chunks(array: Array, axis: int, starts: Array) -> Array:
    """The chunks of an axis of an array, concatenated along it."""
    chunk = chunk_length(array.shape[axis])
    chunks = [lax.dynamic_slice_in_dim(array, start, chunk, axis) for start in starts]
    return jnp.concatenate(chunks, axis)


def put_chunks(array: Array, axis: int, starts: Array, new: Array) -> Array:
    """The array with new values in the chunks: undoes `take_chunks`."""
    for start, chunk in zip(starts, jnp.split(new, len(starts), axis), strict=True):
        array = lax.dynamic_update_slice_in_dim(array, chunk, start, axis)
    return array


def rotate_chunks(factor: Array, basis: Array, starts: Array) -> PartlyNewBasis:
    """Rotates the columns of some chunks so that their part of `Q^T L Q` is diagonal."""
    columns = take_chunks(basis, 1, starts)
    rotated = matmul(columns.T, matmul(factor, columns))
    symmetric = (rotated + rotated.T) / 2
    rows = zero_rows(symmetric)
    descending = jnp.argsort(jnp.where(rows, -jnp.inf, -jnp.diagonal(symmetric)))
    rotation = with_unit_vectors(descending_eigenvectors(symmetric, rows), rows)
    new = put_chunks(basis, 1, starts, matmul(columns, rotation))
    numbers = jnp.arange(len(basis))
    permutation = put_chunks(numbers, 0, starts, take_chunks(numbers, 0, starts)[descending])
    return PartlyNewBasis(nearest_orthonormal(new), rotation, permutation)


def rotate_moment(mu: Array, axis: int, starts: Array, rotation: Array) -> Array:
    """The first moment, `(*block)`, in the coordinates of a basis whose chunks were rotated."""
    rotated = multiply_along(rotation.T, take_chunks(mu, axis, starts), axis, Precision.HIGHEST)
    return put_chunks(mu, axis, starts, rotated)
