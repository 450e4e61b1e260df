"""Decompositions of single matrices: QR, Cholesky QR and eigenvectors.

LAPACK is called for one matrix at a time, also under `vmap`. Batched decompositions under a
conditional hang for good in jaxlib 0.10 on two CPU cores, and make TPU programs slow to compile.
`sequential_vmap` turns a batch into a loop. Such a loop has no reverse mode, so each decomposition
has its derivative from `soap_optax.linalg.derivatives`.
"""

from functools import partial

import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import sequential_vmap
from jax.extend.core import Primitive
from jax.interpreters import mlir

from soap_optax.linalg.derivatives import (
    derivative_of_eigenvectors,
    derivative_of_qr,
    with_derivative,
)
from soap_optax.linalg.householder import q_from_panels
from soap_optax.linalg.products import gram_matrix

# The length from which CPUs use the blocked QR: it takes two thirds of LAPACK's time at 512, two
# fifths at 1024 and 2048, and the same time at 256.
BLOCKED_FROM = 512


@sequential_vmap
def _qr(matrix: Array) -> Array:
    if len(matrix) < BLOCKED_FROM:
        return _qr_in_one(matrix)
    return lax.platform_dependent(matrix, cpu=q_from_panels, default=_qr_in_one)


def _qr_in_one(matrix: Array) -> Array:
    return jnp.linalg.qr(matrix)[0]


# TPUs have one operation for eigenvectors, Jacobi's method. JAX calls it up to a length of 256, and
# a program that compiles for many minutes beyond that; this primitive calls it at every length. A
# primitive can have a lowering for each platform. `lax.platform_dependent` lowers all its branches
# for all platforms of an exported program, and CPUs do not have this method.
_eigenvectors = Primitive("eigenvectors")
_eigenvectors.def_impl(lambda matrix: lax.linalg.eigh(matrix)[0])  # Under `jax.disable_jit`.
_eigenvectors.def_abstract_eval(lambda matrix: matrix)
mlir.register_lowering(
    _eigenvectors,
    mlir.lower_fun(lambda matrix: lax.linalg.eigh(matrix)[0], multiple_results=False),
)
if hasattr(lax.linalg, "EighImplementation"):  # Delete the test when JAX 0.8 is dropped.
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
    lengths = jnp.linalg.norm(matrix, axis=0, keepdims=True)
    scaled = matrix / jnp.where(lengths > 0, lengths, 1)
    lower = lax.linalg.cholesky(gram_matrix(scaled, 1), symmetrize_input=False)
    return lax.linalg.triangular_solve(lower, scaled, lower=True, transpose_a=True)


@with_derivative(derivative_of_qr)
def orthonormalize(matrix: Array) -> Array:
    """The `Q` of a QR decomposition of a square matrix, `(d, d)`, by Householder reflections."""
    return _qr(matrix)


@with_derivative(derivative_of_qr)
def orthonormalize_by_cholesky(matrix: Array) -> Array:
    """The same `Q` up to the signs of its columns, from the Cholesky factor of the Gram matrix.

    The columns are first scaled to length one. The Gram matrix squares the condition number, which
    costs orthonormality, so the result is decomposed once more. If the first pass has no Cholesky
    factor, or is too far from orthonormal, the result is not orthonormal or not finite.

    References:
      Yamamoto et al., Roundoff error analysis of the CholeskyQR2 algorithm, 2015.
    """
    return _cholesky_qr(_cholesky_qr(matrix))


@with_derivative(derivative_of_eigenvectors)
def _ascending_eigenvectors(matrix: Array) -> Array:
    return _eigh(matrix)


def descending_eigenvectors(matrix: Array, rows: Array) -> Array:
    """All eigenvectors of a symmetric positive matrix, columns by descending eigenvalue, `(d, d)`.

    Args:
      matrix: the matrix, `(d, d)`.
      rows: its rows of zeros, `(d,)`. Their eigenvectors come first. They are unit vectors up to
        rounding errors, which `with_unit_vectors` removes.
    """
    # An eigenvalue of its own for each row of zeros, above the eigenvalues of all other rows.
    bound = lax.stop_gradient(jnp.max(jnp.sum(jnp.abs(matrix), axis=0)))
    numbers = jnp.arange(len(matrix), dtype=matrix.dtype)
    values = jnp.where(bound > 0, bound, 1) * (3 - numbers / len(matrix))
    is_diagonal = jnp.eye(len(matrix), dtype=bool)
    separated = jnp.where(rows[None, :] & is_diagonal, values[None, :], matrix)
    return _ascending_eigenvectors(separated)[:, ::-1]
