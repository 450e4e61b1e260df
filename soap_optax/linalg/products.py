"""Products of matrices and arrays. Only `multiply_along` may use less than the highest precision.

In a trial, a TF32 product changed an eigenvalue from 0.1 to -6. Every function takes one matrix, or
one array.
"""

from functools import partial

import jax.numpy as jnp
from jax import Array, lax
from jax.lax import Precision, PrecisionLike


def matmul(left: Array, right: Array) -> Array:
    """The product of two matrices at the highest precision."""
    return jnp.matmul(left, right, precision=Precision.HIGHEST)


def multiply_along(matrix: Array, x: Array, axis: int, precision: PrecisionLike = None) -> Array:
    """Multiplies every vector along `axis` of `x` by `matrix`, from the left."""
    if axis == 0:  # The product already has its axes in place.
        return jnp.tensordot(matrix, x, axes=(1, 0), precision=precision)
    product = jnp.tensordot(x, matrix, axes=(axis, 1), precision=precision)
    return jnp.moveaxis(product, -1, axis)


# On CPUs, the lower triangle of a large Gram matrix takes less time than the whole matrix: ten
# products of slices of the axis instead of sixteen. Measured on CPUs, and used there only.
SLICES, SLICED_FROM = 4, 512


def gram_matrix(array: Array, axis: int) -> Array:
    """The Gram matrix of one axis, `(d, d)`: `G G^T` for axis 0 of a matrix, `G^T G` for axis 1."""
    in_one, by_slices = partial(_inner_products, axis=axis), partial(_gram_by_slices, axis=axis)
    if array.shape[axis] < SLICED_FROM:
        return in_one(array, array)
    return lax.platform_dependent(array, cpu=by_slices, default=lambda array: in_one(array, array))


def _gram_by_slices(array: Array, axis: int) -> Array:
    """The Gram matrix from the products of slices of the axis, one product for each pair."""
    slices = jnp.array_split(array, SLICES, axis)
    lower = [
        [_inner_products(left, right, axis) for right in slices[: number + 1]]
        for number, left in enumerate(slices)
    ]
    numbers = range(SLICES)
    return jnp.block([[lower[i][j] if i >= j else lower[j][i].T for j in numbers] for i in numbers])


def _inner_products(left: Array, right: Array, axis: int) -> Array:
    """The inner products of the slices of two arrays along one axis."""
    others = [other for other in range(left.ndim) if other != axis]
    return jnp.tensordot(left, right, axes=(others, others), precision=Precision.HIGHEST)
