"""The optimizer's state: NamedTuples and dicts of plain arrays, nothing else.

Symbols used in every module:

| symbol | meaning |
| --- | --- |
| `B` | blocks in a stack: equal shape, equal preconditioned axes; padding among them |
| `d` | length of one preconditioned axis of a block |
| `*block` | shape of a block, `m n` for a matrix |
| `L` | leaves (or tiles of leaves) that are ravelled together, `N` entries in all, with padding |
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.core import Tracer
from jax.typing import DTypeLike

from soap_optax import folding
from soap_optax.planning import Group, Plan
from soap_optax.second_moment import SecondMoment

# Raised whenever the meaning or the arrangement of the state's leaves changes.
LAYOUT_VERSION = 1


class Eigenframe(NamedTuple):
    """What a refresh changes in a block: the bases, what is expressed in them, and its counters.

    Attributes:
      bases: orthonormal eigenvectors of each preconditioned axis' factor, `(d, d)`, columns by
        descending eigenvalue; ``"jacobi"`` and ``"partial"`` leave columns where they are.
      mu: first moment in the bases' coordinates, `(*block)`.
      nu: second moment in the bases' coordinates, `(*block)`, or its marginals, `(d,)` each.
      age: updates applied since the last refresh was due.
      refreshes: bases adopted so far, the first included.
      refused_refreshes: refreshes refused because they were not finite or not orthonormal.
    """

    bases: tuple[Array, ...]
    mu: Array
    nu: SecondMoment
    age: Array
    refreshes: Array
    refused_refreshes: Array


class StackState(NamedTuple):
    """State of one stack: every array has a leading axis of length `B`.

    Grouped by how often a field changes: the factors and moments with every accepted gradient, the
    bases with every refresh.

    Attributes:
      accepted_gradients: gradients taken in so far, `(B,)`. The first one only fills the factors.
      refused_gradients: gradients refused because they were not finite, `(B,)`.
      factors: average of each preconditioned axis' Gram matrix, `(B, d, d)`, in axis order; with
        ``fold_factors`` their lower triangles, `(B, ceil(d / 2), d + 1)` (`soap_optax.folding`).
      mu: first moment in the eigenbases' coordinates, `(B, *block)`.
      nu: second moment in the eigenbases' coordinates, `(B, *block)`; with ``factored`` its means
        over all axes but one, `(B, d)` for each axis of the block.
      bases: eigenvectors of each factor as of the last refresh, `(B, d, d)`, columns by descending
        eigenvalue unless the method leaves them in place (see `Eigenframe`); identity before that.
      age: updates applied since the last refresh was due, `(B,)`.
      refreshes: bases adopted so far, the first included, `(B,)`.
      refused_refreshes: refreshes refused, the old basis kept, `(B,)`.
    """

    accepted_gradients: Array
    refused_gradients: Array
    factors: tuple[Array, ...]
    mu: Array
    nu: SecondMoment
    bases: tuple[Array, ...]
    age: Array
    refreshes: Array
    refused_refreshes: Array


class RavelledState(NamedTuple):
    """State of all the leaves that have no preconditioned axis, ravelled together: Adam's.

    Attributes:
      accepted_gradients: gradients taken in so far, `(L,)`. The first one moves nothing.
      refused_gradients: gradients refused because they were not finite, `(L,)`.
      mu: first moment, `(N,)`.
      nu: second moment, `(N,)`.
    """

    accepted_gradients: Array
    refused_gradients: Array
    mu: Array
    nu: Array


class ScaleBySoapState(NamedTuple):
    """State of `scale_by_soap`.

    Attributes:
      layout_version: the arrangement of the state's leaves, a scalar (`LAYOUT_VERSION`).
      count: calls of `update` so far, a scalar.
      stacks: the preconditioned blocks by kind, such as `"512x2048"`; a suffix names a dtype of
        statistics other than float32.
      ravelled: the leaves with no preconditioned axis: the small ones together, by dtype of
        statistics, and each large one by itself, such as `"50304x16384"`.
    """

    layout_version: Array
    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]  # Optax's name; hides tuple.count
    stacks: dict[str, StackState]
    ravelled: dict[str, RavelledState]


@dataclass(frozen=True)
class Storage:
    """How the state is stored; the fields are arguments of `scale_by_soap`.

    A dtype that is wider than that of the statistics, in which all is computed, is not used.
    """

    mu_dtype: DTypeLike | None
    preconditioner_dtype: DTypeLike | None
    fold_factors: bool
    factored: bool


def initial_state(plan: Plan, storage: Storage) -> ScaleBySoapState:
    """The state before the first gradient: no statistics, and the identity as every basis."""
    state = ScaleBySoapState(
        layout_version=jnp.asarray(LAYOUT_VERSION, jnp.int32),
        count=jnp.zeros((), jnp.int32),
        stacks={name: _empty_stack(group, storage) for name, group in plan.stacks.items()},
        ravelled={name: _empty_vector(group, storage) for name, group in plan.ravelled.items()},
    )
    return _unknown_to_the_compiler(state)


def opaque_state() -> ScaleBySoapState:
    """A state of which no leaf mirrors a parameter, whatever the parameters: blocks are opaque."""
    leaf: Any = jnp.zeros((), jnp.int32)
    return ScaleBySoapState(layout_version=leaf, count=leaf, stacks=leaf, ravelled=leaf)


def _unknown_to_the_compiler(state: ScaleBySoapState) -> ScaleBySoapState:
    """Hides from XLA that moments are zero and bases the identity, in a program that makes them.

    Compiled for CPUs by jaxlib 0.10 to 0.12, products with long constants of zeros come out wrong
    where XLA combines them with what follows: the sum over a first update, which is zero, was NaN,
    or 1e37. A state from outside is unknown anyway, and arrays are given back as they are.
    """
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(state)):
        return lax.optimization_barrier(state)
    return state


def _empty_stack(group: Group, storage: Storage) -> StackState:
    blocks, dtype = group.places, group.dtype
    narrow = _narrower(storage.preconditioner_dtype, dtype)
    lengths = [group.block[axis] for axis in group.axes]
    shapes = [folding.folded_shape(d) if storage.fold_factors else (d, d) for d in lengths]
    if storage.factored:
        nu = tuple(jnp.zeros((blocks, d), dtype) for d in group.block)
    else:
        nu = jnp.zeros((blocks, *group.block), dtype)
    return StackState(
        accepted_gradients=jnp.zeros(blocks, jnp.int32),
        refused_gradients=jnp.zeros(blocks, jnp.int32),
        factors=tuple(jnp.zeros((blocks, *shape), narrow) for shape in shapes),
        mu=jnp.zeros((blocks, *group.block), _narrower(storage.mu_dtype, dtype)),
        nu=nu,
        bases=tuple(jnp.tile(jnp.eye(d, dtype=narrow), (blocks, 1, 1)) for d in lengths),
        age=jnp.zeros(blocks, jnp.int32),
        refreshes=jnp.zeros(blocks, jnp.int32),
        refused_refreshes=jnp.zeros(blocks, jnp.int32),
    )


def _empty_vector(group: Group, storage: Storage) -> RavelledState:
    return RavelledState(
        accepted_gradients=jnp.zeros(group.blocks, jnp.int32),
        refused_gradients=jnp.zeros(group.blocks, jnp.int32),
        mu=jnp.zeros(group.entries + group.padding, _narrower(storage.mu_dtype, group.dtype)),
        nu=jnp.zeros(group.entries + group.padding, group.dtype),
    )


def _narrower(wanted: DTypeLike | None, statistics: DTypeLike) -> DTypeLike:
    """The dtype to store in: what is wanted, unless that takes more bits than it could hold."""
    if wanted is None or jnp.finfo(wanted).bits > jnp.finfo(statistics).bits:
        return statistics
    return wanted
