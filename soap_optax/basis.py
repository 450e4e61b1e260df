"""Eigenbases of one block: the first one, its refresh, and the guard that may refuse either.

Every function takes one block; `soap_optax.execution` decides when they run. All products state the
highest precision: a TF32 product has been measured to turn an eigenvalue of 0.1 into -6.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_batching import sequential_vmap
from jax.lax import Precision

from soap_optax.block import multiply_along
from soap_optax.state import Eigenframe


def first_bases(factors: Sequence[Array]) -> tuple[Array, ...]:
    """The exact eigenvectors of a block's factors, `(d, d)` each: its first bases."""
    return tuple(descending_eigenvectors(factor) for factor in factors)


def iterate_bases(
    factors: Sequence[Array], bases: Sequence[Array], nu: Array, axes: Sequence[int]
) -> tuple[tuple[Array, ...], Array]:
    """Takes the eigenbases one step of orthogonal iteration toward the factors' eigenvectors.

    The columns are first sorted by their Rayleigh quotients, in descending order: a QR
    decomposition orthogonalises each column against those before it, so that an ascending order
    would move away from the eigenbasis. The second moment belongs to columns and is permuted along
    with them.

    Args:
      factors: the Kronecker factors as of the last accepted gradient, `(d, d)` each.
      bases: the bases as of the last refresh, `(d, d)` each.
      nu: the second moment in the coordinates of `bases`, `(*block)`.
      axes: the preconditioned axes of the block, ascending.

    Returns:
      The new bases, and the second moment in their coordinates.

    References:
      Vyas et al. (2024), Algorithm 4 of arXiv:2409.11321.
    """
    new_bases = []
    for factor, basis, axis in zip(factors, bases, axes, strict=True):
        product = jnp.matmul(factor, basis, precision=Precision.HIGHEST)  # L Q
        order = jnp.argsort(rayleigh_quotients(product, basis), descending=True)
        nu = jnp.take(nu, order, axis=axis)
        new_bases.append(orthonormal_factor(product[:, order]))
    return tuple(new_bases), nu


def adopt(
    frame: Eigenframe,
    factors: Sequence[Array],
    bases: tuple[Array, ...],
    nu: Array,
    axes: Sequence[int],
) -> Eigenframe:
    """Moves a block to new bases if they can be trusted, and counts it either way.

    The first moment is a vector: it keeps its direction and is expressed in the new coordinates.

    Args:
      frame: the bases, moments and counters before.
      factors: the factors that the new bases were made of, `(d, d)` each.
      bases: the new bases, `(d, d)` each.
      nu: the second moment in the coordinates of the new bases, `(*block)`.
      axes: the preconditioned axes of the block, ascending.

    Returns:
      The new frame, or the old one, counted as refused, where a factor or a basis is not finite or
      a basis is not orthonormal.
    """
    trusted = jnp.asarray(True)
    for factor, basis in zip(factors, bases, strict=True):
        trusted &= jnp.all(jnp.isfinite(factor)) & is_orthonormal(basis)
    mu = frame.mu.astype(nu.dtype)
    for axis, old, new in zip(axes, frame.bases, bases, strict=True):
        mu = multiply_along(old, mu, axis, Precision.HIGHEST)
        mu = multiply_along(new.T, mu, axis, Precision.HIGHEST)
    moved = Eigenframe(
        bases=bases,
        mu=mu.astype(frame.mu.dtype),
        nu=nu,
        age=frame.age,
        refreshes=frame.refreshes + 1,
        refused_refreshes=frame.refused_refreshes,
    )
    stayed = frame._replace(refused_refreshes=frame.refused_refreshes + 1)
    chosen = jax.tree.map(lambda new, old: jnp.where(trusted, new, old), moved, stayed)
    return chosen._replace(age=jnp.zeros_like(frame.age))


def is_orthonormal(basis: Array) -> Array:
    """Whether `Q^T Q` is the identity to the square root of the machine epsilon, entry by entry.

    That is half of the digits: a sound QR or eigh stays far below it, one that failed is off by
    about one. A NaN fails every comparison.
    """
    return departure_from_orthonormality(basis) <= jnp.sqrt(jnp.finfo(basis.dtype).eps)


def departure_from_orthonormality(basis: Array) -> Array:
    """The largest entry of `|Q^T Q - I|`; NaN where the basis has one."""
    gram = jnp.matmul(basis.T, basis, precision=Precision.HIGHEST)
    return jnp.max(jnp.abs(gram - jnp.eye(len(basis), dtype=basis.dtype)))


def rayleigh_quotients(product: Array, basis: Array) -> Array:
    """The diagonal of `Q^T L Q`, `(d,)`, from the product `L Q`."""
    return jnp.sum(basis * product, axis=0)


# LAPACK is called for one matrix at a time, whatever surrounds the call. Batched decompositions
# under a conditional hang for good in jaxlib 0.10 on two CPU cores, and make TPU programs slow to
# compile; `vmap`, which would batch them, becomes a loop here. `stop_gradient` says that
# derivatives through an update take the bases as constants: such a loop has no reverse mode.


@sequential_vmap
def _qr(matrix: Array) -> Array:
    return jnp.linalg.qr(matrix)[0]


@sequential_vmap
def _eigh(matrix: Array) -> Array:
    return jnp.linalg.eigh(matrix)[1]


def orthonormal_factor(matrix: Array) -> Array:
    """The `Q` of a QR decomposition of a square matrix, `(d, d)`."""
    return _qr(jax.lax.stop_gradient(matrix))


def descending_eigenvectors(factor: Array) -> Array:
    """All eigenvectors of a symmetric matrix, columns by descending eigenvalue, `(d, d)`."""
    return _eigh(jax.lax.stop_gradient(factor))[:, ::-1]
