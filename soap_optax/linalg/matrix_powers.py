"""Inverse powers of symmetric positive matrices, from their eigenvectors."""

import jax
import jax.numpy as jnp
from jax import Array

from soap_optax.linalg.products import gram_matrix, matmul


@jax.custom_jvp
def inverse_power(
    matrix: Array, vectors: Array, values: Array, shift: Array, floor: Array, exponent: Array
) -> Array:
    """The power `(A + shift I)^-exponent` of a symmetric positive matrix, `(d, d)`.

    Eigenvalues of `A + shift I` below `floor` are raised to it. The derivative by the matrix holds
    for equal eigenvalues too, whose eigenvectors have none.

    Args:
      matrix: `A`, `(d, d)`. Only its derivative enters.
      vectors: the eigenvectors of `A`, `(d, d)`, without a derivative.
      values: the eigenvalues of `A`, `(d,)`, without a derivative.
      shift: a positive scalar.
      floor: a scalar, without a derivative.
      exponent: a positive scalar.

    References:
      Higham, Functions of Matrices, 2008, theorem 3.11, for the derivative.
    """
    del matrix
    # Half of the power on each side: the product is positive, and symmetric up to rounding.
    power = gram_matrix(vectors * jnp.maximum(values + shift, floor) ** (-exponent / 2), 0)
    return (power + power.T) / 2


@inverse_power.defjvp
def _derivative(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    _, vectors, values, shift, floor, exponent = primals
    matrix_tangent, _, _, shift_tangent, _, exponent_tangent = tangents
    shifted = values + shift
    raised = jnp.maximum(shifted, floor)
    powers = raised**-exponent
    slopes = jnp.where(shifted >= floor, -exponent * powers / raised, 0)
    by_scalars = slopes * shift_tangent - powers * jnp.log(raised) * exponent_tangent
    rotated = matmul(vectors.T, matmul((matrix_tangent + matrix_tangent.T) / 2, vectors))
    inner = _divided_differences(shifted, powers, slopes) * rotated + jnp.diag(by_scalars)
    result = inverse_power(*primals)
    return result, matmul(vectors, matmul(inner, vectors.T))


def _divided_differences(values: Array, powers: Array, slopes: Array) -> Array:
    """`(f_i - f_j) / (x_i - x_j)`, or the mean slope where the two values are close, `(d, d)`."""
    gaps = values[:, None] - values[None, :]
    sizes = jnp.maximum(jnp.abs(values)[:, None], jnp.abs(values)[None, :])
    is_gap = jnp.abs(gaps) > jnp.finfo(values.dtype).eps ** 0.5 * sizes
    quotients = (powers[:, None] - powers[None, :]) / jnp.where(is_gap, gaps, 1)
    return jnp.where(is_gap, quotients, (slopes[:, None] + slopes[None, :]) / 2)
