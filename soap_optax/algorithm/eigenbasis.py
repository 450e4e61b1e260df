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
from soap_optax.algorithm.refresh_methods import METHODS, NewBasis, RefreshMethod
from soap_optax.linalg import (
    descending_eigenvectors,
    is_orthonormal,
    matmul,
    multiply_along,
    off_diagonal_mass,
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
    has_bases = state.refreshes > 0
    refreshed = lax.cond(
        has_bases, partial(_later_bases, axes, rule), partial(_first_bases, axes), wide, factors
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
        sound &= jnp.all(jnp.isfinite(factor)) & is_orthonormal(basis)
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
    return jax.tree.map(
        lambda new, old: jnp.where(sound, new.astype(old.dtype), old), adopted, rejected
    )


def _first_bases(
    axes: Sequence[int], state: EigenbasisState, factors: Sequence[Array]
) -> RefreshedBases:
    """The exact eigenvectors of the factors."""
    bases = over_axes(descending_eigenvectors, factors)
    return _with_moments(axes, state, [NewBasis(basis, jnp.arange(len(basis))) for basis in bases])


def _later_bases(
    axes: Sequence[int], rule: RefreshRule, state: EigenbasisState, factors: Sequence[Array]
) -> RefreshedBases:
    """The bases after one refresh, unless their off-diagonal mass is within the tolerance."""
    if rule.method == "partial":
        return _refresh_partly(axes, state, factors)
    products = tuple(map(matmul, factors, state.bases))  # L Q
    refresh_fully = partial(_refresh_fully, axes, rule.method)
    if rule.tolerance is None:
        return refresh_fully(state, factors, products)
    masses = map(off_diagonal_mass, products, state.bases)
    is_near = jnp.all(jnp.stack(list(masses)) <= rule.tolerance)
    return lax.cond(is_near, _skip_refresh, refresh_fully, state, factors, products)


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
    products: Sequence[Array],
) -> RefreshedBases:
    return _with_moments(axes, state, over_axes(METHODS[method], factors, state.bases, products))


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
    axes: Sequence[int], state: EigenbasisState, new_bases: Sequence[NewBasis]
) -> RefreshedBases:
    """Adds the moments in the coordinates of new bases.

    The first moment is a vector: it is rotated back from the old basis and into the new one. The
    second moment and the eigenvalue estimates belong to columns and are permuted with them.
    """
    mu, nu = state.mu, state.nu
    for axis, old, new in zip(axes, state.bases, new_bases, strict=True):
        mu = multiply_along(old, mu, axis, Precision.HIGHEST)
        mu = multiply_along(new.basis.T, mu, axis, Precision.HIGHEST)
        nu = second_moment.permute(nu, new.permutation, axis)
    bases = tuple(new.basis for new in new_bases)
    eigenvalues = _permuted(state.eigenvalues, [new.permutation for new in new_bases])
    return RefreshedBases(bases, mu, nu, _varying_flag(False, state), eigenvalues)


def _permuted(eigenvalues: Sequence[Array], permutations: Sequence[Array]) -> tuple[Array, ...]:
    """The estimates of eigenvalues, permuted with the columns of each basis; none for `gram`."""
    return tuple(old[new] for old, new in zip(eigenvalues, permutations, strict=False))


def over_axes(function: Callable[..., Any], *arguments: Sequence[Array]) -> list[Any]:
    """Calls a function for every axis of a block.

    On accelerators, where decompositions compile slowly, axes of the same length share one program.
    On CPUs each axis has a program of its own.
    """

    def each(*arguments: Sequence[Array]) -> list[Any]:
        return [function(*of_axis) for of_axis in zip(*arguments, strict=True)]

    def by_length(*arguments: Sequence[Array]) -> list[Any]:
        results: dict[int, Any] = {}
        for length in dict.fromkeys(lengths):
            equal = [axis for axis, other in enumerate(lengths) if other == length]
            stacked = [jnp.stack([arrays[axis] for axis in equal]) for arrays in arguments]
            mapped = lax.map(lambda one: function(*one), stacked)
            for number, axis in enumerate(equal):
                results[axis] = jax.tree.map(lambda array, number=number: array[number], mapped)
        return [results[axis] for axis in range(len(lengths))]

    lengths = [len(array) for array in arguments[0]]
    if len(set(lengths)) == len(lengths):
        return each(*arguments)
    return lax.platform_dependent(*arguments, cpu=each, default=by_length)
