"""When the blocks of a stack are refreshed, and the conditionals and loops around a refresh."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_batching import custom_vmap

from soap_optax.algorithm import FirstGradient
from soap_optax.linalg import unfolded
from soap_optax.stacks.equations import Equations
from soap_optax.state import AnyStackState

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


class BlockForm(NamedTuple):
    """The properties that all blocks of a stack share.

    Attributes:
      axes: the preconditioned axes, ascending.
      lengths: the lengths of these axes.
      dtype: the dtype of the statistics.
      equations: the equations of the blocks.
    """

    axes: tuple[int, ...]
    lengths: tuple[int, ...]
    dtype: np.dtype
    equations: Equations


def stagger_phases(numbers: Sequence[int]) -> np.ndarray:
    """The phases of blocks in the refresh cycle, as fractions of the cycle, `(blocks,)`.

    They are the fractional parts of multiples of the golden ratio. So the phases of consecutive
    blocks are spread evenly: in a stack, on one device, and over several small stacks.
    """
    golden = (math.sqrt(5) - 1) / 2
    return np.modf(np.asarray(numbers) * golden)[0].astype(np.float32)


def is_due(state: AnyStackState, phases: Array, timing: RefreshTiming) -> Array:
    """Whether each block is due for a refresh if its gradient is accepted, `(blocks,)`.

    A block is due if it has factors and no basis yet, or `frequency` updates after its last refresh
    was due. A staggered block is due at its phase, from half a cycle after its last refresh. After
    one and a half cycles it is due at any phase. So blocks return to their phases after the
    frequency changes, and no block waits for long while it changes. A block that rejects its
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
@partial(jax.jit, static_argnames="form")
def refresh_if_due(
    fields: Any,
    factors: tuple[Array, ...],
    due: Array,
    rule: Any,
    form: BlockForm,
    first: FirstGradient | None = None,
) -> tuple[tuple[Array, ...], Any]:
    """Refreshes the preconditioners of the blocks that are due.

    Only factors and the fields that a refresh changes pass through the conditional; the branch
    without a refresh returns them without a copy. Factors do not change, but are returned as well.
    Otherwise XLA copies them in every step, because later operations overwrite them while the
    refresh may still read them.

    Args:
      fields: the fields of the stack that a refresh changes, see `Equations.fields_of`.
      factors: the factors of the stack, as stored.
      due: whether each block is due, `(blocks,)`.
      rule: how to refresh.
      form: what all blocks share.
      first: the gradients of the step, `(blocks, *block)`; a block's first one enters its moments.
        None if the first gradients make no update.
    """
    return lax.cond(
        any_unbatched(due),
        partial(_refresh_blocks, form),
        lambda _due, factors, fields, _rule, _first: (factors, fields),
        due,
        factors,
        fields,
        rule,
        first,
    )


def _refresh_blocks(
    form: BlockForm,
    due: Array,
    factors: tuple[Array, ...],
    states: Any,
    rule: Any,
    first: FirstGradient | None,
) -> tuple[tuple[Array, ...], Any]:
    """Loops over a stack and refreshes the blocks that are due."""
    # In a `shard_map`, the numbers of the rule then vary over devices, as blocks do.
    rule = jax.tree.map(lambda number: jnp.full_like(due[0], number, dtype=number.dtype), rule)

    def refresh(factors: tuple[Array, ...], state: Any, first: FirstGradient | None) -> Any:
        wide = tuple(
            unfolded(factor, d).astype(form.dtype)
            for factor, d in zip(factors, form.lengths, strict=True)
        )
        return form.equations.refresh(state, wide, form.axes, rule, first)

    def refresh_block_if_due(
        states: Any, block: tuple[Array, Array, tuple[Array, ...]]
    ) -> tuple[Any, None]:
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
