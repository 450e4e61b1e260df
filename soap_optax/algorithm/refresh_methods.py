"""The refresh methods: how a basis follows its factor, for one axis of one block.

Each method takes the factor `L`, the basis `Q` and the product `L Q`, all `(d, d)`. It returns a
new basis and a permutation: the old column that each new column succeeds. The second moment belongs
to columns and is permuted along with them.

| method | new basis | cost beside `L Q` |
| --- | --- | --- |
| `qr` | one step of orthogonal iteration, `QR(L Q)`, as in the authors' code | a QR |
| `cholesky_qr` | the same by two Cholesky passes, or a QR | 2 products, 2 Choleskys, 2 solves |
| `eigh` | the factor's eigenvectors | an `eigh` |
| `jacobi` | up to three sweeps of simultaneous Jacobi rotations | 4 products, then 5 a sweep |

`partial`, the fifth method, is in `partial_refresh`: it multiplies only a quarter of the columns.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from soap_optax.algorithm.jacobi import jacobi_sweeps
from soap_optax.linalg import (
    decoupled_columns,
    decoupled_rows,
    descending_eigenvectors,
    is_orthonormal,
    orthonormalize,
    orthonormalize_by_cholesky,
    rayleigh_quotients,
    with_unit_vectors,
)

RefreshMethod = Literal["qr", "cholesky_qr", "eigh", "jacobi", "partial", "auto"]


class NewBasis(NamedTuple):
    """A new basis, `(d, d)`, and for each column the old column that it succeeds, `(d,)`."""

    basis: Array
    permutation: Array


def orthogonal_iteration(factor: Array, basis: Array, product: Array) -> NewBasis:
    """One step of orthogonal iteration (Vyas et al., 2024, Algorithm 4).

    Columns are first sorted by their Rayleigh quotients, in descending order. A QR decomposition
    orthogonalizes each column against the columns before it, so an ascending sort would move away
    from the eigenbasis.
    """
    return _orthogonalized(orthonormalize, factor, basis, product)


def cholesky_iteration(factor: Array, basis: Array, product: Array) -> NewBasis:
    """The same step by a Cholesky decomposition, or by a QR where the Cholesky basis fails."""

    def orthonormalize_fast(matrix: Array) -> Array:
        fast = orthonormalize_by_cholesky(matrix)
        return lax.cond(
            is_orthonormal(fast),
            lambda fast, _matrix: fast,
            lambda _fast, matrix: orthonormalize(matrix),
            fast,
            matrix,
        )

    return _orthogonalized(orthonormalize_fast, factor, basis, product)


def _orthogonalized(
    orthonormalize: Callable[[Array], Array], factor: Array, basis: Array, product: Array
) -> NewBasis:
    """The columns of `L Q`, sorted and orthonormalized.

    The unit vectors of decoupled rows come first. So they are columns of the result, and all other
    columns are zero in these rows, even if columns of `L Q` vanish.
    """
    rows = decoupled_rows(factor, basis)
    columns = decoupled_columns(rows, basis)
    permutation = descending_permutation(product, basis, first=columns)
    # On CPUs, gathering rows is faster than gathering columns.
    sorted_columns = jnp.where(columns[None, :], basis, product).T[permutation].T
    return NewBasis(with_unit_vectors(orthonormalize(sorted_columns), rows), permutation)


def eigendecomposition(factor: Array, basis: Array, product: Array) -> NewBasis:
    """The eigenvectors: column `k` gets the eigenvector of the k-th largest eigenvalue."""
    first = decoupled_columns(decoupled_rows(factor, basis), basis)
    permutation = descending_permutation(product, basis, first)
    return NewBasis(descending_eigenvectors(factor), permutation)


def jacobi(factor: Array, basis: Array, product: Array) -> NewBasis:
    """Up to three sweeps of simultaneous Jacobi rotations; columns stay in place."""
    return NewBasis(jacobi_sweeps(factor, basis, product), jnp.arange(len(basis)))


# Up to this length, an eigh on TPUs is faster than Jacobi sweeps: it is one operation there.
ONE_OPERATION_ON_TPUS = 256


def method_for_platform(factor: Array, basis: Array, product: Array) -> NewBasis:
    """The method `auto`: chooses by platform and by the length of the axis.

    On CPUs a QR: no other method is faster for all factors, at any length. On TPUs an eigh for
    short axes, which is one operation there. Elsewhere Jacobi sweeps, which are matrix products.
    """
    is_short = len(basis) <= ONE_OPERATION_ON_TPUS
    return lax.platform_dependent(
        factor,
        basis,
        product,
        cpu=orthogonal_iteration,
        tpu=eigendecomposition if is_short else jacobi,
        default=jacobi,
    )


METHODS: dict[str, Callable[[Array, Array, Array], NewBasis]] = {
    "qr": orthogonal_iteration,
    "cholesky_qr": cholesky_iteration,
    "eigh": eigendecomposition,
    "jacobi": jacobi,
    "auto": method_for_platform,
}


def descending_permutation(product: Array, basis: Array, first: Array) -> Array:
    """The columns by their Rayleigh quotients, the largest first, `(d,)`.

    Args:
      product: `L Q`, `(d, d)`.
      basis: `Q`, `(d, d)`.
      first: the columns that come before all others, `(d,)`.
    """
    quotients = jnp.where(first, jnp.inf, rayleigh_quotients(product, basis))
    return jnp.argsort(quotients, descending=True)
