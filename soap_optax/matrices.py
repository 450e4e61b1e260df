"""Linear algebra of single matrices: decompositions, and how near to orthonormal a basis is.

Every function takes one matrix, or one array.
"""

from functools import partial

import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import sequential_vmap
from jax.extend.core import Primitive
from jax.interpreters import mlir

from soap_optax import householder
from soap_optax.products import gram_matrix, times

# LAPACK is called for one matrix at a time, whatever surrounds the call. Batched decompositions
# under a conditional hang for good in jaxlib 0.10 on two CPU cores, and make TPU programs slow to
# compile; `vmap`, which would batch them, becomes a loop here. `stop_gradient` says that
# derivatives through an update take the bases as constants: such a loop has no reverse mode.


# The length from which CPUs get a QR out of products: it takes two thirds of the time at 512, two
# fifths at 1024 and 2048, and as long at 256.
BLOCKED_FROM = 512


@sequential_vmap
def _qr(matrix: Array) -> Array:
    if len(matrix) < BLOCKED_FROM:
        return _qr_in_one(matrix)
    return lax.platform_dependent(matrix, cpu=householder.orthonormal_factor, default=_qr_in_one)


def _qr_in_one(matrix: Array) -> Array:
    return jnp.linalg.qr(matrix)[0]


# TPUs have an operation of their own for eigenvectors, Jacobi's method. JAX calls it up to a length
# of 256, and beyond that a program that takes the TPU compiler many minutes; here it is called at
# every length. A primitive can be lowered differently for each platform, where
# `lax.platform_dependent` lowers all its branches for all platforms of an exported program: CPUs do
# not have that method.
_eigenvectors = Primitive("eigenvectors")
_eigenvectors.def_impl(lambda matrix: lax.linalg.eigh(matrix)[0])  # Under `jax.disable_jit`.
_eigenvectors.def_abstract_eval(lambda matrix: matrix)
mlir.register_lowering(
    _eigenvectors,
    mlir.lower_fun(lambda matrix: lax.linalg.eigh(matrix)[0], multiple_results=False),
)
if hasattr(lax.linalg, "EighImplementation"):  # JAX 0.8 has no such choice.
    _by_jacobi = partial(lax.linalg.eigh, implementation=lax.linalg.EighImplementation.JACOBI)
    mlir.register_lowering(
        _eigenvectors,
        mlir.lower_fun(lambda matrix: _by_jacobi(matrix)[0], multiple_results=False),
        platform="tpu",
    )


@sequential_vmap
def _eigh(matrix: Array) -> Array:
    return _eigenvectors.bind(matrix)


@sequential_vmap
def _cholesky_qr(matrix: Array) -> Array:
    lengths = jnp.linalg.norm(matrix, axis=0)
    scaled = matrix / jnp.where(lengths > 0, lengths, 1)
    lower = lax.linalg.cholesky(gram_matrix(scaled, 1), symmetrize_input=False)
    return lax.linalg.triangular_solve(lower, scaled, lower=True, transpose_a=True)


def orthonormal_factor(matrix: Array) -> Array:
    """The `Q` of a QR decomposition of a square matrix, `(d, d)`, by Householder reflections."""
    return _qr(lax.stop_gradient(matrix))


def orthonormal_factor_by_cholesky(matrix: Array) -> Array:
    """The same `Q` up to the signs of its columns, from the Cholesky factor of the Gram matrix.

    That squares the condition number, of the matrix with its columns scaled to length one, and
    costs the result orthonormality. What Newton-Schulz iterations can restore is restored. Where
    there is no Cholesky factor, or nothing left to restore, the result is not orthonormal, or not
    finite.

    References:
      Yamamoto et al., Roundoff error analysis of the CholeskyQR2 algorithm, 2015.
    """
    return polished(_cholesky_qr(lax.stop_gradient(matrix)))


def descending_eigenvectors(factor: Array) -> Array:
    """All eigenvectors of a symmetric matrix, columns by descending eigenvalue, `(d, d)`."""
    return _eigh(lax.stop_gradient(factor))[:, ::-1]


def largest_magnitude(array: Array) -> Array:
    """The largest magnitude of all entries; NaN where an entry is.

    The second half needs saying: from 4096 entries on, a maximum that XLA compiles for a CPU leaves
    NaN out (jaxlib 0.10 to 0.12), and that of nothing but NaN is minus infinity.
    """
    return jnp.where(jnp.any(jnp.isnan(array)), jnp.nan, jnp.max(jnp.abs(array)))


def rayleigh_quotients(product: Array, basis: Array) -> Array:
    """The diagonal of `Q^T L Q`, `(d,)`, from the product `L Q`."""
    return jnp.sum(basis * product, axis=0)


def off_diagonal_mass(product: Array, basis: Array) -> Array:
    """The part of the norm of `B = Q^T L Q` that is off its diagonal, from the product `L Q`.

    Because `Q` is orthonormal, `L Q = Q B` has the norm of `B`, and `L Q - Q diag(B)` that of `B`
    without its diagonal: the difference is taken entry by entry, and not between two norms, which
    would cancel.
    """
    largest = largest_magnitude(product)
    scaled = product / jnp.where(largest > 0, largest, 1)  # Else squares overflow, or vanish.
    off_diagonal = scaled - basis * rayleigh_quotients(scaled, basis)
    whole = jnp.sqrt(jnp.sum(jnp.square(scaled)))
    return jnp.sqrt(jnp.sum(jnp.square(off_diagonal))) / jnp.where(whole > 0, whole, 1)


def orthonormality_tolerance(basis: Array) -> Array:
    """The square root of the machine epsilon, which is half of the digits.

    A sound QR or eigh stays far below it, one that failed is off by about one.
    """
    return jnp.sqrt(jnp.finfo(basis.dtype).eps)


def departure_from_orthonormality(basis: Array) -> Array:
    """The largest entry of `|Q^T Q - I|`; NaN where the basis has one."""
    return largest_magnitude(gram_matrix(basis, 1) - jnp.eye(len(basis), dtype=basis.dtype))


# How many vectors probe a basis.
PROBES = 16


def is_orthonormal(basis: Array) -> Array:
    """Whether `Q^T Q` is the identity to the tolerance; a NaN fails every comparison."""
    return probed_departure(basis) <= orthonormality_tolerance(basis)


def probed_departure(basis: Array) -> Array:
    """How far `E = Q^T Q - I` is from zero, by what it does to a few vectors of signs `s`.

    All of `E` would take as many operations as one of a refresh's products; `E s` takes `O(d^2)`.
    An entry `E_ij` above a tolerance is seen by each vector with a chance of one half or more: with
    the other sign of `s_j`, `(E s)_i` is more than twice the tolerance away, so that at most one of
    the two is within it. What is that far off goes unseen once in `2^16`. The roundings of a sound
    basis of 10,000 columns add up to 2.5e-5 in float32. Small bases are multiplied out.
    """
    if len(basis) <= 2 * PROBES:
        return departure_from_orthonormality(basis)
    signs = _signs(len(basis), basis.dtype)
    return largest_magnitude(times(basis.T, times(basis, signs)) - signs)


def _signs(length: int, dtype: jnp.dtype) -> Array:
    """Vectors of signs, `(length, PROBES)`: one bit each of the rows' numbers, well mixed."""
    bits = jnp.arange(length, dtype=jnp.uint32)[:, None] * PROBES
    bits = bits + jnp.arange(PROBES, dtype=jnp.uint32)
    for factor in (0x7FEB352D, 0x846CA68B):  # The constants of Wellons' hash `lowbias32`, 2018.
        bits = (bits ^ (bits >> 16)) * jnp.uint32(factor)
    return jnp.where(bits >> 31 == 0, 1, -1).astype(dtype)


def polished(matrix: Array) -> Array:
    """The orthonormal matrix nearest to one that is nearly so, which is left as it is.

    Newton-Schulz iterations `X <- X (3 I - X^T X) / 2` go on until the departure, as probed, is an
    eighth of the tolerance. They take every singular value to one if none exceeds the root of
    three, which scaling ensures, and near the end square the departure.
    """
    identity = jnp.eye(len(matrix), dtype=matrix.dtype)

    def departs(carry: tuple[Array, Array]) -> Array:
        iteration, matrix = carry
        limit = orthonormality_tolerance(matrix) / 8
        return (iteration < 20) & (probed_departure(matrix) > limit)

    def iterate(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        iteration, matrix = carry
        gram = gram_matrix(matrix, 1)
        bound = jnp.max(jnp.sum(jnp.abs(gram), axis=0))  # of the largest squared singular value
        scale = jnp.where(bound > 2.5, bound, 1)
        matrix = times(matrix, 1.5 * identity - 0.5 * gram / scale) / jnp.sqrt(scale)
        return iteration + 1, matrix

    start = (jnp.int32(0), lax.stop_gradient(matrix))
    return lax.while_loop(departs, iterate, start)[1]
