"""Derivatives of decompositions: how orthonormal columns follow their matrix.

Every derivative has the form `dQ = Q W` with an antisymmetric `W`, and is linear in the tangent, so
that it has a reverse mode. Columns that share an eigenvalue, such as those of a null space, are
unique only up to a rotation among them. The derivative does not rotate them.

References:
  Giles, Collected matrix derivative results for forward and reverse mode algorithmic
  differentiation, 2008.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from soap_optax.linalg.products import matmul

# How a result follows its argument: a function of argument, tangent and result.
Derivative = Callable[[Array, Array, Array], Array]


def with_derivative(derivative: Derivative) -> Callable[[Callable[[Array], Array]], Callable]:
    """Gives a function of one matrix a derivative."""

    def decorate(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
        differentiable = jax.custom_jvp(function)

        @differentiable.defjvp
        def _jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
            [matrix], [tangent] = primals, tangents
            result = differentiable(matrix)
            return result, derivative(matrix, tangent, result)

        return differentiable

    return decorate


def derivative_of_eigenvectors(matrix: Array, tangent: Array, vectors: Array) -> Array:
    """The derivative of all eigenvectors of a symmetric matrix, `(d, d)`."""
    values = jnp.sum(vectors * matmul(matrix, vectors), axis=0)
    gaps = values[None, :] - values[:, None]
    is_gap = jnp.abs(gaps) > _rounding(matrix) * jnp.max(jnp.abs(values))
    rotated = matmul(vectors.T, matmul((tangent + tangent.T) / 2, vectors))
    return matmul(vectors, jnp.where(is_gap, rotated / jnp.where(is_gap, gaps, 1), 0))


def derivative_of_qr(matrix: Array, tangent: Array, basis: Array) -> Array:
    """The derivative of the `Q` of a QR decomposition, `(d, d)`, for any signs of its columns.

    With `W = L - L^T`, `L` is the strict lower triangle of `Q^T dA R^-1`.
    """
    triangle = jnp.triu(matmul(basis.T, matrix))  # R
    sizes = jnp.abs(jnp.diagonal(triangle))
    is_zero = sizes <= _rounding(matrix) * jnp.max(sizes)
    identity = jnp.eye(len(matrix), dtype=matrix.dtype)
    triangle = jnp.where(is_zero[:, None] | is_zero[None, :], identity, triangle)
    rotated = matmul(basis.T, tangent)
    lower = lax.linalg.triangular_solve(triangle, rotated, left_side=False, lower=False)
    lower = jnp.where(is_zero[None, :], 0, jnp.tril(lower, -1))
    return matmul(basis, lower - lower.T)


def derivative_of_nearest_orthonormal(matrix: Array, tangent: Array, nearest: Array) -> Array:
    """The derivative of the orthonormal matrix nearest to a nearly orthonormal one, `(d, d)`.

    For a polar decomposition `A = Q P`, `W` solves `P W + W P = K - K^T` with `K = Q^T dA`. Because
    `P` is near the identity, a fixed-point iteration converges.
    """
    excess = matmul(nearest.T, matrix) - jnp.eye(len(matrix), dtype=matrix.dtype)
    rotated = matmul(nearest.T, tangent)
    antisymmetric = (rotated - rotated.T) / 2
    solution = antisymmetric
    for _ in range(_ITERATIONS):
        product = matmul(excess, solution)
        solution = antisymmetric - (product - product.T) / 2
    return matmul(nearest, solution)


_ITERATIONS = 6


def _rounding(matrix: Array) -> float:
    """The relative size of a rounding error of eigenvalues."""
    return 32 * len(matrix) * float(jnp.finfo(matrix.dtype).eps)
