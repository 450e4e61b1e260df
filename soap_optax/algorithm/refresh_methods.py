"""The refresh methods: how a basis follows its factor, for one axis of one block.

Each method takes a factor in its basis. It returns a new basis and a permutation: the old column
that each new column succeeds. The second moment belongs to columns and is permuted along with them.
The unit vectors of decoupled rows come first. They have rounding errors, which the caller removes.

| method | new basis | cost beside `L Q` |
| --- | --- | --- |
| `qr` | one step of orthogonal iteration, `QR(L Q)`, as in the authors' code | a QR |
| `cholesky_qr` | the same by two Cholesky passes, or a QR | 2 products, 2 Choleskys, 2 solves |
| `eigh` | the factor's eigenvectors | an `eigh` |
| `jacobi` | up to three sweeps of simultaneous Jacobi rotations | 4 products, then 5 a sweep |

`partial`, the fifth method, is in `partial_refresh`: it multiplies only a quarter of the columns.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from soap_optax.algorithm.jacobi import jacobi_sweeps
from soap_optax.linalg import (
    decoupled_columns,
    descending_eigenvectors,
    orthonormalize,
    orthonormalize_by_cholesky,
    probed_departure,
    rayleigh_quotients,
    target_departure,
)

RefreshMethod = Literal["qr", "cholesky_qr", "eigh", "jacobi", "partial", "auto"]


class FactorInBasis(NamedTuple):
    """The factor of one axis and its basis before a refresh.

    Attributes:
      factor: the factor `L`, `(d, d)`.
      basis: its basis `Q`, `(d, d)`.
      product: `L Q`, `(d, d)`.
      rows: the decoupled rows of the factor, `(d,)`.
    """

    factor: Array
    basis: Array
    product: Array
    rows: Array


class NewBasis(NamedTuple):
    """A new basis, `(d, d)`, and for each column the old column that it succeeds, `(d,)`."""

    basis: Array
    permutation: Array


def orthogonal_iteration(axis: FactorInBasis) -> NewBasis:
    """One step of orthogonal iteration (Vyas et al., 2024, Algorithm 4).

    Columns are first sorted by their Rayleigh quotients, in descending order. A QR decomposition
    orthogonalizes each column against the columns before it, so an ascending sort would move away
    from the eigenbasis.
    """
    return _orthogonalized(orthonormalize, axis)


def cholesky_iteration(axis: FactorInBasis) -> NewBasis:
    """The same step by a Cholesky decomposition, or by a QR where the Cholesky basis fails.

    Near the largest condition number that a Cholesky decomposition can take, a basis may depart
    from orthonormality by 1e-4 in float32. The guard of a refresh would adopt it.
    """

    def orthonormalize_fast(matrix: Array) -> Array:
        fast = orthonormalize_by_cholesky(matrix)
        return lax.cond(
            probed_departure(fast) <= target_departure(fast),
            lambda fast, _matrix: fast,
            lambda _fast, matrix: orthonormalize(matrix),
            fast,
            matrix,
        )

    return _orthogonalized(orthonormalize_fast, axis)


def _orthogonalized(orthonormalize: Callable[[Array], Array], axis: FactorInBasis) -> NewBasis:
    """The columns of `L Q`, sorted and orthonormalized.

    The unit vectors of decoupled rows come first. So they are columns of the result, and all other
    columns are zero in these rows, even if columns of `L Q` vanish.
    """
    _, basis, product, rows = axis
    columns = decoupled_columns(rows, basis)
    permutation = descending_permutation(product, basis, first=columns)
    # On CPUs, gathering rows is faster than gathering columns.
    sorted_columns = jnp.where(columns[None, :], basis, product).T[permutation].T
    return NewBasis(orthonormalize(sorted_columns), permutation)


def eigendecomposition(axis: FactorInBasis) -> NewBasis:
    """The eigenvectors: column `k` gets the eigenvector of the k-th largest eigenvalue."""
    factor, basis, product, rows = axis
    first = decoupled_columns(rows, basis)
    permutation = descending_permutation(product, basis, first)
    return NewBasis(descending_eigenvectors(factor, rows), permutation)


def jacobi(axis: FactorInBasis) -> NewBasis:
    """Up to three sweeps of simultaneous Jacobi rotations; columns stay in place."""
    basis = jacobi_sweeps(axis.factor, axis.basis, axis.product)
    return NewBasis(basis, columns_in_place(basis))


def columns_in_place(basis: Array) -> Array:
    """The permutation that moves no column, `(d,)`.

    In a `shard_map` it varies over devices as the basis does, so that both branches of a
    conditional have the same type.
    """
    return jnp.arange(len(basis)) + jnp.zeros_like(basis[0], dtype=int)


# Up to this length, an eigh on TPUs is faster than Jacobi sweeps: it is one operation there.
ONE_OPERATION_ON_TPUS = 256


def method_for_platform(axis: FactorInBasis) -> NewBasis:
    """The method `auto`: chooses by platform and by the length of the axis.

    On CPUs a QR: no other method is faster for all factors, at any length. On TPUs an eigh for
    short axes, which is one operation there. Elsewhere Jacobi sweeps, which are matrix products.
    """
    is_short = len(axis.basis) <= ONE_OPERATION_ON_TPUS
    return lax.platform_dependent(
        axis,
        cpu=orthogonal_iteration,
        tpu=eigendecomposition if is_short else jacobi,
        default=jacobi,
    )


METHODS: dict[str, Callable[[FactorInBasis], NewBasis]] = {
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
    # In a `shard_map`, the result of `argsort` does not vary over devices in JAX 0.10.
    _, permutation = lax.sort((-quotients, columns_in_place(basis)), num_keys=1)
    return permutation


def over_axes(function: Callable[[Any], Any], inputs: Sequence[Any]) -> list[Any]:
    """Calls a function for every axis of a block, with the arrays of that axis.

    On accelerators, where decompositions compile slowly, axes of equal length share one program. On
    CPUs each axis has its own program.
    """

    def each(inputs: Sequence[Any]) -> list[Any]:
        return [function(one) for one in inputs]

    def by_length(inputs: Sequence[Any]) -> list[Any]:
        results: dict[int, Any] = {}
        for length in dict.fromkeys(lengths):
            equal = [axis for axis, other in enumerate(lengths) if other == length]
            stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *(inputs[i] for i in equal))
            mapped = lax.map(function, stacked)
            for number, axis in enumerate(equal):
                results[axis] = jax.tree.map(lambda array, number=number: array[number], mapped)
        return [results[axis] for axis in range(len(lengths))]

    lengths = [len(jax.tree.leaves(one)[0]) for one in inputs]
    if len(set(lengths)) == len(lengths):
        return each(inputs)
    return lax.platform_dependent(inputs, cpu=each, default=by_length)
