"""Products that feed factors and refreshes, in full precision.

A TF32 product has been measured to turn an eigenvalue of 0.1 into -6. Every function takes one
matrix, or one array.
"""

from functools import partial

import jax.numpy as jnp
from jax import Array, lax
from jax.lax import Precision


def times(left: Array, right: Array) -> Array:
    """The product of two matrices in their full precision."""
    return jnp.matmul(left, right, precision=Precision.HIGHEST)


# On CPUs, the lower triangle of a large Gram matrix takes less time than all of it: ten products of
# parts of the axis instead of sixteen. Measured there, and done there only.
PARTS, PARTS_FROM = 4, 512


def gram_matrix(array: Array, axis: int) -> Array:
    """The Gram matrix of one axis, `(d, d)`: `G G^T` for axis 0 of a matrix, `G^T G` for axis 1."""
    whole, by_parts = partial(_inner_products, axis=axis), partial(_gram_by_parts, axis=axis)
    if array.shape[axis] < PARTS_FROM:
        return whole(array, array)
    return lax.platform_dependent(array, cpu=by_parts, default=lambda array: whole(array, array))


def _gram_by_parts(array: Array, axis: int) -> Array:
    """The Gram matrix from the products of parts of the axis, each pair of which is taken once."""
    parts = jnp.array_split(array, PARTS, axis)
    lower = [
        [_inner_products(part, other, axis) for other in parts[: number + 1]]
        for number, part in enumerate(parts)
    ]
    numbers = range(PARTS)
    return jnp.block([[lower[i][j] if i >= j else lower[j][i].T for j in numbers] for i in numbers])


def _inner_products(left: Array, right: Array, axis: int) -> Array:
    """The inner products of the slices of two arrays along one axis."""
    others = [other for other in range(left.ndim) if other != axis]
    return jnp.tensordot(left, right, axes=(others, others), precision=Precision.HIGHEST)
