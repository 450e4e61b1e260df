"""When the blocks of a stack are refreshed, and the conditionals and loops around a refresh."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_batching import custom_vmap

from soap_optax import algorithm
from soap_optax.algorithm import EigenbasisState, FirstGradient, RefreshRule
from soap_optax.linalg import unfolded
from soap_optax.state import StackState

RefreshOrder = Literal["before_gradient", "after_gradient"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RefreshTiming:
    """When blocks are refreshed.

    Attributes:
      frequency: the number of updates from one refresh of a block to the next, a scalar.
      order: whether a refresh comes before or after the step's gradient enters the factors.
      stagger: whether blocks have different phases in the refresh cycle.
    """

    frequency: Array
    order: RefreshOrder = field(metadata={"static": True})
    stagger: bool = field(metadata={"static": True})


def stagger_phases(numbers: Sequence[int]) -> np.ndarray:
    """The phases of blocks in the refresh cycle, as fractions of the cycle, `(blocks,)`.

    They are the fractional parts of multiples of the golden ratio. So the phases of consecutive
    blocks are spread evenly: in a stack, on one device, and over several small stacks.
    """
    golden = (math.sqrt(5) - 1) / 2
    return np.modf(np.asarray(numbers) * golden)[0].astype(np.float32)


def is_due(state: StackState, phases: Array, timing: RefreshTiming) -> Array:
    """Whether each block is due for a refresh if its gradient is accepted, `(blocks,)`.

    A block is due if it has factors and no basis yet, or `frequency` updates after its last refresh
    was due. A staggered block waits for its phase in the cycle: from half a cycle after its last
    refresh, and for one and a half cycles at most. So blocks return to their phases when the
    frequency changes, and no block is forgotten while it keeps changing. A block that rejects its
    gradient waits, so that its state does not change.

    Args:
      state: the state of the stack.
      phases: the phases of the blocks in the refresh cycle, `(blocks,)`, from 0 to 1.
      timing: the frequency, and whether to stagger.
    """
    frequency = timing.frequency
    if timing.stagger:
        offsets = jnp.floor(phases * frequency.astype(phases.dtype)).astype(jnp.int32)
        offsets = jnp.minimum(offsets, frequency - 1)  # A phase near 1 may be rounded to 1.
        in_phase = state.accepted_gradients % frequency == offsets
        half = frequency // 2
        is_old = in_phase & (state.age >= frequency - half) | (state.age - frequency >= half)
    else:
        is_old = state.age >= frequency
    return (state.accepted_gradients > 0) & (is_old | (state.refreshes == 0))


# Outside `jax.jit` a conditional is compiled again in every call, because its branches are new
# functions in each call: seconds, where the step takes a millisecond.
@partial(jax.jit, static_argnames="axes")
def refresh_if_due(
    state: StackState,
    due: Array,
    axes: tuple[int, ...],
    rule: RefreshRule,
    first: FirstGradient | None = None,
) -> StackState:
    """Refreshes the bases of the blocks that are due.

    Only factors, bases, moments and counters pass through the conditional; the branch without a
    refresh returns them without a copy. Factors do not change, but are returned as well. Otherwise
    XLA copies them in every step, because later operations overwrite them while the refresh may
    still read them.

    Args:
      state: the state of the stack.
      due: whether each block is due, `(blocks,)`.
      axes: the preconditioned axes of the blocks, ascending.
      rule: how to refresh.
      first: the gradients of the step, `(blocks, *block)`, which start the moments of the blocks
        whose first ones they are; None without `first_update="apply"`.
    """
    old = EigenbasisState(**{name: getattr(state, name) for name in EigenbasisState._fields})
    factors, new = lax.cond(
        any_unbatched(due),
        partial(_refresh_blocks, axes),
        lambda _due, factors, old, _rule, _first: (factors, old),
        due,
        state.factors,
        old,
        rule,
        first,
    )
    return state._replace(factors=factors, **new._asdict())


def _refresh_blocks(
    axes: Sequence[int],
    due: Array,
    factors: tuple[Array, ...],
    states: EigenbasisState,
    rule: RefreshRule,
    first: FirstGradient | None,
) -> tuple[tuple[Array, ...], EigenbasisState]:
    """Loops over a stack and refreshes the blocks that are due."""
    dtype = jax.tree.leaves(states.nu)[0].dtype
    lengths = [basis.shape[-1] for basis in states.bases]
    if rule.tolerance is not None:  # In a `shard_map` it then varies over devices, as blocks do.
        tolerance = jnp.full_like(due[0], rule.tolerance, dtype=rule.tolerance.dtype)
        rule = replace(rule, tolerance=tolerance)

    def refresh(
        factors: tuple[Array, ...], state: EigenbasisState, first: FirstGradient | None
    ) -> EigenbasisState:
        wide = tuple(
            unfolded(factor, d).astype(dtype) for factor, d in zip(factors, lengths, strict=True)
        )
        return algorithm.refresh(state, wide, axes, rule, first)

    def refresh_block_if_due(
        states: EigenbasisState, block: tuple[Array, Array, tuple[Array, ...]]
    ) -> tuple[EigenbasisState, None]:
        number, due, factors = block
        state = jax.tree.map(lambda stack: stack[number], states)
        of_block = first
        if first is not None:
            of_block = replace(first, grad=first.grad[number], is_first=first.is_first[number])
        state = lax.cond(
            due, refresh, lambda _factors, state, _first: state, factors, state, of_block
        )
        return jax.tree.map(lambda stack, new: stack.at[number].set(new), states, state), None

    # The states are carried and not scanned over, so that each block is written in place.
    states, _ = lax.scan(refresh_block_if_due, states, (jnp.arange(len(due)), due, factors))
    return lax.optimization_barrier(factors), states


def any_unbatched(flags: Array) -> Array:
    """Whether any flag is set, in this stack and in every other stack of an enclosing `vmap`.

    A conditional on a batched predicate becomes a select, which would run every refresh in every
    step. Inside the branch each block has its own conditional, so a predicate that is true for too
    many stacks costs time and changes no result.
    """
    return _any(jnp.any(flags))


@custom_vmap
def _any(flag: Array) -> Array:
    return flag


@_any.def_vmap
def _any_over_batch(axis_size: int, in_batched: list[bool], flag: Array) -> tuple[Array, bool]:
    del axis_size, in_batched
    return _any(jnp.any(flag)), False
