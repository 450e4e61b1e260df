"""Departures of columns from orthonormal ones and from eigenvectors, and Newton-Schulz iterations.

Every function takes one matrix, or one array.
"""

import jax.numpy as jnp
from jax import Array, lax

from soap_optax.linalg.derivatives import derivative_of_nearest_orthonormal, with_derivative
from soap_optax.linalg.products import gram_matrix, matmul


def largest_magnitude(array: Array) -> Array:
    """The largest magnitude of all entries; NaN where an entry is NaN.

    The sum shows a NaN. XLA's maximum on CPUs ignores NaN from 4096 entries on (jaxlib 0.10 to
    0.12), and returns minus infinity where every entry is NaN.
    """
    magnitudes = jnp.abs(array)
    return jnp.where(jnp.isnan(jnp.sum(magnitudes)), jnp.nan, jnp.max(magnitudes))


def is_finite(matrix: Array) -> Array:
    """Whether all entries are finite. The trace must bound them, as in a factor.

    The sum of all magnitudes is at most `d` times the trace. So their mean row sum overflows only
    where the trace does.
    """
    return jnp.isfinite(jnp.sum(jnp.abs(matrix) / len(matrix)))


def frobenius_norm(array: Array) -> Array:
    """The root of the sum of squares, a scalar; no square overflows or underflows."""
    largest = largest_magnitude(array)
    is_zero = largest == 0
    scaled = array / jnp.where(is_zero, 1, largest)
    square = jnp.sum(jnp.square(scaled))
    # The root of 0 has no finite derivative.
    return jnp.where(is_zero, 0, largest * jnp.sqrt(jnp.where(is_zero, 1, square)))


def rayleigh_quotients(product: Array, basis: Array) -> Array:
    """The diagonal of `Q^T A Q`, `(d,)`, from the product `A Q`."""
    return jnp.sum(basis * product, axis=0)


def off_diagonal_mass(product: Array, basis: Array) -> Array:
    """The off-diagonal share of the Frobenius norm of `B = Q^T A Q`, from the product `A Q`.

    Because `Q` is orthonormal, `A Q = Q B` has the norm of `B`, and `A Q - Q diag(B)` has the norm
    of `B` without its diagonal. The difference is taken entry by entry: a difference of two norms
    would cancel.
    """
    largest = largest_magnitude(product)
    scaled = product / jnp.where(largest > 0, largest, 1)  # Else squares overflow, or vanish.
    off_diagonal = scaled - basis * rayleigh_quotients(scaled, basis)[None, :]
    whole = jnp.sqrt(jnp.sum(jnp.square(scaled)))
    return jnp.sqrt(jnp.sum(jnp.square(off_diagonal))) / jnp.where(whole > 0, whole, 1)


def orthonormality_tolerance(basis: Array) -> Array:
    """The square root of the machine epsilon, which is half of the digits.

    A sound QR or eigh stays far below this tolerance; a failed one is off by about one.
    """
    return jnp.sqrt(jnp.finfo(basis.dtype).eps)


def departure_from_orthonormality(basis: Array) -> Array:
    """The largest entry of `|Q^T Q - I|`; NaN where the basis has a NaN."""
    return largest_magnitude(gram_matrix(basis, 1) - jnp.eye(len(basis), dtype=basis.dtype))


# The number of sign vectors that probe a basis.
PROBES = 16


def target_departure(basis: Array) -> Array:
    """The departure that approximate methods aim at: an eighth of the tolerance.

    In float32 it is 4e-5, which is above the rounding errors that `probed_departure` describes.
    """
    return orthonormality_tolerance(basis) / 8


def is_orthonormal(basis: Array) -> Array:
    """Whether `Q^T Q` is the identity to the tolerance. A NaN fails the comparison."""
    return probed_departure(basis) <= orthonormality_tolerance(basis)


def probed_departure(basis: Array) -> Array:
    """Estimates the size of `E = Q^T Q - I` by its products with a few vectors of signs `s`.

    All of `E` would cost `O(d^3)` operations, and `E s` costs `O(d^2)`.
    Each vector detects an entry `E_ij` above a tolerance with a probability of at least one half.
    Flipping the sign of `s_j` changes `(E s)_i` by more than twice the tolerance. So at most one of
    the two values is within it. An entry that large goes undetected once in `2^16`. In float32, the
    rounding errors of a sound basis of 10,000 columns add up to 2.5e-5. Small bases are multiplied
    out instead.
    """
    if len(basis) <= 2 * PROBES:
        return departure_from_orthonormality(basis)
    signs = _signs(len(basis), basis.dtype)
    return largest_magnitude(matmul(basis.T, matmul(basis, signs)) - signs)


def _signs(length: int, dtype: jnp.dtype) -> Array:
    """Pseudorandom vectors of signs, `(length, PROBES)`, from a hash of the entries' numbers."""
    bits = jnp.arange(length, dtype=jnp.uint32)[:, None] * PROBES
    bits = bits + jnp.arange(PROBES, dtype=jnp.uint32)[None, :]
    for multiplier in (0x7FEB352D, 0x846CA68B):  # Of Wellons' hash `lowbias32`, 2018.
        bits = (bits ^ (bits >> 16)) * jnp.uint32(multiplier)
    return jnp.where(bits >> 31 == 0, 1, -1).astype(dtype)


@with_derivative(derivative_of_nearest_orthonormal)
def nearest_orthonormal(matrix: Array) -> Array:
    """The orthonormal matrix nearest to a nearly orthonormal one.

    Newton-Schulz iterations `X <- X (3 I - X^T X) / 2` run until the probed departure is at
    `target_departure`; a matrix below that is returned unchanged. Every singular value converges to
    one if none exceeds the square root of three, which scaling ensures. Near the end each iteration
    squares the departure.
    """
    identity = jnp.eye(len(matrix), dtype=matrix.dtype)

    def departs(carry: tuple[Array, Array]) -> Array:
        iteration, matrix = carry
        return (iteration < 20) & (probed_departure(matrix) > target_departure(matrix))

    def iterate(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        iteration, matrix = carry
        gram = gram_matrix(matrix, 1)
        bound = jnp.max(jnp.sum(jnp.abs(gram), axis=0))  # of the largest squared singular value
        scale = jnp.where(bound > 2.5, bound, 1)
        matrix = matmul(matrix, 1.5 * identity - 0.5 * gram / scale) / jnp.sqrt(scale)
        return iteration + 1, matrix

    return lax.while_loop(departs, iterate, (jnp.int32(0), matrix))[1]
