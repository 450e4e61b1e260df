"""The eigenbases of one block: the first ones, their refresh, and the guard that may reject them.

Every function takes one block. `soap_optax.stacks` decides when a refresh runs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.lax import Precision

from soap_optax.algorithm import partial_refresh, second_moment
from soap_optax.algorithm.refresh_methods import (
    METHODS,
    FactorInBasis,
    NewBasis,
    RefreshMethod,
    columns_in_place,
)
from soap_optax.linalg import (
    decoupled_rows,
    descending_eigenvectors,
    is_finite,
    is_orthonormal,
    matmul,
    multiply_along,
    off_diagonal_mass,
    with_unit_vectors,
)
from soap_optax.state import SecondMoment


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RefreshRule:
    """How the bases of a due block are refreshed.

    Attributes:
      tolerance: the off-diagonal mass up to which a refresh is skipped, a scalar; None skips none.
      method: how a basis follows its factor.
    """

    tolerance: Array | None
    method: RefreshMethod = field(metadata={"static": True})


class EigenbasisState(NamedTuple):
    """The fields of a block's state that a refresh changes; see `StackState`."""

    bases: tuple[Array, ...]
    mu: Array
    nu: SecondMoment
    age: Array
    refreshes: Array
    rejected_refreshes: Array
    eigenvalues: tuple[Array, ...] = ()


class RefreshedBases(NamedTuple):
    """New bases and the moments in their coordinates, or the old ones where the refresh is skipped.

    Attributes:
      bases: orthonormal eigenvectors of each factor, `(d, d)`.
      mu: first moment, `(*block)`.
      nu: second moment, `(*block)`, or its marginals.
      skipped: whether bases and moments are the old ones, a boolean scalar.
      eigenvalues: the eigenvalue estimates of KL factors, permuted with the columns, `(d,)` each.
    """

    bases: tuple[Array, ...]
    mu: Array
    nu: SecondMoment
    skipped: Array
    eigenvalues: tuple[Array, ...]


def refresh(
    state: EigenbasisState,
    factors: Sequence[Array],
    axes: Sequence[int],
    rule: RefreshRule,
) -> EigenbasisState:
    """Refreshes the bases of a block, or makes the first ones, and adopts them if they are sound.

    Args:
      state: the bases, moments and counters before.
      factors: the Kronecker factors, `(d, d)` each, in the dtype of the statistics.
      axes: the preconditioned axes of the block, ascending.
      rule: how to refresh.

    Returns:
      The new state. The refresh is rejected if a factor or a new basis is not finite, or a new
      basis is not orthonormal. Bases and moments are then the old ones.
    """
    dtype = factors[0].dtype
    wide = state._replace(
        bases=tuple(basis.astype(dtype) for basis in state.bases), mu=state.mu.astype(dtype)
    )
    if rule.method == "partial":
        refreshed = _refresh_partly_or_first(axes, wide, factors)
    elif rule.tolerance is None:
        refreshed = _refresh_fully(axes, rule.method, wide, factors, None)
    else:
        products = _products(factors, wide.bases)
        refreshed = lax.cond(
            (state.refreshes > 0) & _are_near(wide.bases, products, rule.tolerance),
            _skip_refresh,
            partial(_refresh_fully, axes, rule.method),
            wide,
            factors,
            products,
        )
    return adopt(state, factors, refreshed)


def adopt(
    state: EigenbasisState, factors: Sequence[Array], refreshed: RefreshedBases
) -> EigenbasisState:
    """Adopts new bases if they are sound, rejects them otherwise, and counts either.

    Args:
      state: the bases, moments and counters before.
      factors: the factors that the new bases were computed from, `(d, d)` each.
      refreshed: the new bases, and the moments in their coordinates.
    """
    sound = jnp.asarray(True)
    for factor, basis in zip(factors, refreshed.bases, strict=True):
        sound &= is_finite(factor) & is_orthonormal(basis)
    sound |= refreshed.skipped
    state = state._replace(age=jnp.zeros_like(state.age))
    adopted = state._replace(
        bases=refreshed.bases,
        mu=refreshed.mu,
        nu=refreshed.nu,
        eigenvalues=refreshed.eigenvalues,
        refreshes=state.refreshes + (~refreshed.skipped).astype(jnp.int32),
    )
    rejected = state._replace(rejected_refreshes=state.rejected_refreshes + 1)
    adopted = jax.tree.map(lambda new, old: new.astype(old.dtype), adopted, rejected)
    return lax.cond(sound, lambda new, _old: new, lambda _new, old: old, adopted, rejected)


def _products(factors: Sequence[Array], bases: Sequence[Array]) -> tuple[Array, ...]:
    return tuple(map(matmul, factors, bases))  # L Q


def _are_near(bases: Sequence[Array], products: Sequence[Array], tolerance: Array) -> Array:
    """Whether the off-diagonal mass of every factor in its basis is within the tolerance."""
    masses = map(off_diagonal_mass, products, bases)
    return jnp.max(jnp.stack(list(masses))) <= tolerance


def _skip_refresh(
    state: EigenbasisState, _factors: Sequence[Array], _products: Sequence[Array]
) -> RefreshedBases:
    skipped = _varying_flag(True, state)
    return RefreshedBases(state.bases, state.mu, state.nu, skipped, state.eigenvalues)


def _varying_flag(value: bool, state: EigenbasisState) -> Array:
    """A flag that varies over the devices of a `shard_map`, as the state does.

    The results of both branches of a conditional need the same type. Under `vmap` the conditional
    becomes a select, and devices choose differently.
    """
    return jnp.full_like(state.refreshes, value, dtype=bool)


def _refresh_fully(
    axes: Sequence[int],
    method: RefreshMethod,
    state: EigenbasisState,
    factors: Sequence[Array],
    products: Sequence[Array] | None,
) -> RefreshedBases:
    """Bases by one refresh, or the first ones, and the moments in their coordinates.

    Only the decompositions are in a conditional, so that all that follows is compiled once.
    """
    rows = tuple(map(decoupled_rows, factors, state.bases))
    new_bases = lax.cond(
        state.refreshes > 0,
        partial(_later_bases, method),
        lambda _bases, factors, rows, _products: _first_bases(factors, rows),
        state.bases,
        factors,
        rows,
        products,
    )
    return _with_moments(axes, state, new_bases, rows)


def _first_bases(factors: Sequence[Array], rows: Sequence[Array]) -> list[NewBasis]:
    """The exact eigenvectors of the factors."""
    inputs = list(zip(factors, rows, strict=True))
    bases = over_axes(lambda one: descending_eigenvectors(*one), inputs)
    return [NewBasis(basis, columns_in_place(basis)) for basis in bases]


def _later_bases(
    method: RefreshMethod,
    bases: Sequence[Array],
    factors: Sequence[Array],
    rows: Sequence[Array],
    products: Sequence[Array] | None,
) -> list[NewBasis]:
    """The bases after one refresh; computes the products of factors and bases if not given."""
    products = _products(factors, bases) if products is None else products
    inputs = list(map(FactorInBasis, factors, bases, products, rows))
    return over_axes(METHODS[method], inputs)


def _refresh_partly_or_first(
    axes: Sequence[int], state: EigenbasisState, factors: Sequence[Array]
) -> RefreshedBases:
    """Bases by one partial refresh, or the first ones, and the moments in their coordinates."""

    def refresh_first(state: EigenbasisState, factors: Sequence[Array]) -> RefreshedBases:
        rows = tuple(map(decoupled_rows, factors, state.bases))
        return _with_moments(axes, state, _first_bases(factors, rows), rows)

    return lax.cond(
        state.refreshes > 0, partial(_refresh_partly, axes), refresh_first, state, factors
    )


def _refresh_partly(
    axes: Sequence[int], state: EigenbasisState, factors: Sequence[Array]
) -> RefreshedBases:
    """Rotates a quarter of the columns of each basis and leaves the others."""
    bases, permutations, mu, nu = [], [], state.mu, state.nu
    for axis, factor, basis in zip(axes, factors, state.bases, strict=True):
        starts = partial_refresh.scheduled_chunks(len(basis), state.refreshes)
        new = partial_refresh.rotate_chunks(factor, basis, starts)
        mu = partial_refresh.rotate_moment(mu, axis, starts, new.rotation)
        nu = second_moment.permute(nu, new.permutation, axis)
        bases.append(new.basis)
        permutations.append(new.permutation)
    eigenvalues = _permuted(state.eigenvalues, permutations)
    return RefreshedBases(tuple(bases), mu, nu, _varying_flag(False, state), eigenvalues)


def _with_moments(
    axes: Sequence[int],
    state: EigenbasisState,
    new_bases: Sequence[NewBasis],
    rows: Sequence[Array],
) -> RefreshedBases:
    """New bases with exact unit vectors of decoupled rows, and the moments in their coordinates.

    The first moment is a vector: it is rotated back from the old basis and into the new one. The
    second moment and the eigenvalue estimates belong to columns and are permuted with them.
    """
    mu, nu = state.mu, state.nu
    bases = [
        with_unit_vectors(new.basis, of_axis) for new, of_axis in zip(new_bases, rows, strict=True)
    ]
    for axis, old, basis, new in zip(axes, state.bases, bases, new_bases, strict=True):
        mu = multiply_along(old, mu, axis, Precision.HIGHEST)
        mu = multiply_along(basis.T, mu, axis, Precision.HIGHEST)
        nu = second_moment.permute(nu, new.permutation, axis)
    eigenvalues = _permuted(state.eigenvalues, [new.permutation for new in new_bases])
    return RefreshedBases(tuple(bases), mu, nu, _varying_flag(False, state), eigenvalues)


def _permuted(eigenvalues: Sequence[Array], permutations: Sequence[Array]) -> tuple[Array, ...]:
    """The estimates of eigenvalues, permuted with the columns of each basis; none for `gram`."""
    return tuple(old[new] for old, new in zip(eigenvalues, permutations, strict=False))


def over_axes(function: Callable[[Any], Any], inputs: Sequence[Any]) -> list[Any]:
    """Calls a function for every axis of a block, with the tree of arrays that is the axis' input.

    On accelerators, where decompositions compile slowly, axes of the same length share one program.
    On CPUs each axis has a program of its own.
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
