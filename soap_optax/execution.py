"""When and over what the equations of a block run: whole stacks, and refreshes when due.

No equation lives here, and nothing here depends on how the parameter tree was cut.
"""

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
from jax.sharding import NamedSharding
from jax.typing import ArrayLike

from soap_optax import basis, block, folding, placement, products
from soap_optax.basis import RefreshRule
from soap_optax.block import Hyperparameters
from soap_optax.planning import Group
from soap_optax.state import Eigenframe, StackState

Order = Literal["before_gradient", "after_gradient"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RefreshTiming:
    """When blocks are refreshed.

    Attributes:
      frequency: updates from one refresh of a block to the next, a scalar.
      order: whether a refresh comes before or after the factors take in the step's gradient.
      stagger: whether the blocks take turns.
    """

    frequency: Array
    order: Order = field(metadata={"static": True})
    stagger: bool = field(metadata={"static": True})


def update_stack(
    grads: Array,
    state: StackState,
    group: Group,
    number: int,
    hyper: Hyperparameters,
    refreshing: tuple[RefreshTiming, RefreshRule],
    sharding: NamedSharding | None,
) -> tuple[Array, StackState]:
    """Takes one gradient for each block of a stack, `(B, *block)`, and gives the updates.

    Where the stack is sharded, every device goes through its own blocks and exchanges nothing:
    whether it refreshes any is for each device to decide.

    Args:
      grads: in the dtype of the statistics.
      state: that of the stack.
      group: the blocks and their padding.
      number: how many blocks other stacks have before these.
      hyper: the numbers of the step.
      refreshing: when and how bases are refreshed.
      sharding: how the stack is divided among devices; None if it is not.
    """
    places = group.places_of_blocks(group.places)
    padding, turns = np.ones(group.places, bool), np.zeros(group.places, np.float32)
    padding[places] = False
    turns[places] = turns_of(range(number, number + group.blocks))
    update = partial(_update_blocks, group.block, group.axes)
    return placement.on_local_blocks(
        update,
        (grads, jnp.asarray(padding), jnp.asarray(turns), state),
        (hyper, *refreshing),
        sharding,
    )


def turns_of(numbers: Sequence[int]) -> np.ndarray:
    """Where in a cycle of refreshes blocks have their turns, as fractions of the cycle, `(B,)`.

    Fractions of multiples of the golden ratio: those of any consecutive numbers lie evenly, and so
    do a stack's blocks, those of one device, and small stacks one after another.
    """
    golden = (math.sqrt(5) - 1) / 2
    return np.modf(np.asarray(numbers) * golden)[0].astype(np.float32)


def _update_blocks(
    shape: tuple[int, ...],
    axes: tuple[int, ...],
    blocks: tuple[Array, Array, Array, StackState],
    shared: tuple[Hyperparameters, RefreshTiming, RefreshRule],
) -> tuple[Array, StackState]:
    """Refreshes the bases that are due, and takes a step.

    The refresh uses the factors that the previous call stored, or those with this gradient in them.
    In the first case, the authors refresh at the end of that previous step, from the same factors:
    the parameters are the same. A block of padding takes nothing in and counts nothing.
    """
    (grads, padding, turns, state), (hyper, timing, rule) = blocks, shared
    stored = [array.dtype for array in (*state.factors, state.mu)]
    with jax.named_scope("step"):
        acceptable = jax.vmap(partial(block.is_acceptable, stored=stored))(grads)
    accepted = acceptable & ~padding
    lengths = tuple(shape[axis] for axis in axes)

    def take_in(state: StackState) -> StackState:
        average = partial(_average_factors, axes, hyper.shampoo_beta)
        return state._replace(factors=jax.vmap(average)(grads, accepted, state.factors))

    before = state
    if timing.order == "after_gradient":
        with jax.named_scope("step"):
            state = take_in(state)
    with jax.named_scope("refresh"):
        due = accepted & is_due(state, turns, timing)
        state = refresh_if_due(state, due, axes, lengths, rule)
    with jax.named_scope("step"):
        step = partial(block.step_block, axes=axes, hyper=hyper)
        updates, state = jax.vmap(step)(grads, accepted, state)
        if timing.order == "before_gradient":
            state = take_in(state)
    return updates, state._replace(refused_gradients=before.refused_gradients + ~acceptable)


def _average_factors(
    axes: Sequence[int], beta: Array, grad: Array, accepted: Array, factors: Sequence[Array]
) -> tuple[Array, ...]:
    """Takes the Gram matrices of a block's gradient into its factors, as these are stored."""

    def average(factor: Array, axis: int) -> Array:
        gram = folding.arranged_as(factor, products.gram_matrix(grad, axis))
        new = block.average_factor(factor.astype(gram.dtype), gram, accepted, beta)
        return new.astype(factor.dtype)

    return tuple(map(average, factors, axes))


def is_due(state: StackState, turns: Array, timing: RefreshTiming) -> Array:
    """Which blocks are to be refreshed if they accept a gradient, `(B,)`.

    Those that have factors and no basis yet, and those that have been updated `frequency` times
    since their last refresh. Staggered blocks wait for their turn in the cycle, from half a cycle
    after their last refresh on, and not longer than for one and a half: so they find their turns
    again when the frequency changes, and none is forgotten where it never stops changing. One that
    refuses its gradient waits, so that nothing of it changes.

    Args:
      state: that of the stack.
      turns: where in the cycle the blocks have their turns, `(B,)`, from 0 to 1.
      timing: the frequency, and whether blocks take turns.
    """
    frequency = timing.frequency
    if timing.stagger:
        places = jnp.floor(turns * frequency.astype(turns.dtype)).astype(jnp.int32)
        places = jnp.minimum(places, frequency - 1)  # A fraction near 1 may be rounded to 1.
        has_turn = state.accepted_gradients % frequency == places
        half = frequency // 2
        is_old = has_turn & (state.age >= frequency - half) | (state.age - frequency >= half)
    else:
        is_old = state.age >= frequency
    return (state.accepted_gradients > 0) & (is_old | (state.refreshes == 0))


# Outside `jax.jit` a conditional is compiled anew in every call, because its branches are functions
# made in that call: seconds, where the step takes a millisecond.
@partial(jax.jit, static_argnames=("axes", "lengths"))
def refresh_if_due(
    state: StackState,
    due: Array,
    axes: tuple[int, ...],
    lengths: tuple[int, ...],
    rule: RefreshRule,
) -> StackState:
    """Refreshes the bases of the blocks that are due.

    Only factors, bases, moments and counters pass through the conditional; the branch that
    refreshes nothing hands them on without a copy. Factors do not change, and come out of it all
    the same: else XLA copies them in every step, for the refresh that may read them, before what
    follows writes new ones in their place.
    """
    frame = Eigenframe(**{name: getattr(state, name) for name in Eigenframe._fields})
    factors, frame = lax.cond(
        any_unbatched(due),
        partial(_refresh_blocks, axes, lengths),
        lambda _due, factors, frame, _rule: (factors, frame),
        due,
        state.factors,
        frame,
        rule,
    )
    return state._replace(factors=factors, **frame._asdict())


def _refresh_blocks(
    axes: Sequence[int],
    lengths: Sequence[int],
    due: Array,
    factors: tuple[Array, ...],
    frame: Eigenframe,
    rule: RefreshRule,
) -> tuple[tuple[Array, ...], Eigenframe]:
    """Goes through a stack one block at a time, so that each may be refreshed or kept."""
    dtype = jax.tree.leaves(frame.nu)[0].dtype
    if rule.tolerance is not None:  # In a `shard_map` it may differ between devices, as blocks do.
        tolerance = jnp.full_like(due[0], rule.tolerance, dtype=rule.tolerance.dtype)
        rule = replace(rule, tolerance=tolerance)

    def refresh(factors: tuple[Array, ...], frame: Eigenframe) -> Eigenframe:
        whole = tuple(
            folding.whole(factor, d).astype(dtype)
            for factor, d in zip(factors, lengths, strict=True)
        )
        return basis.refresh(frame, whole, axes, rule)

    def refresh_or_keep(
        frames: Eigenframe, block: tuple[Array, Array, tuple[Array, ...]]
    ) -> tuple[Eigenframe, None]:
        number, due, factors = block
        frame = jax.tree.map(lambda stack: stack[number], frames)
        frame = lax.cond(due, refresh, lambda _factors, frame: frame, factors, frame)
        return jax.tree.map(lambda stack, new: stack.at[number].set(new), frames, frame), None

    # The frames are carried and not mapped over, so that each is written where it is.
    frames, _ = lax.scan(refresh_or_keep, frame, (jnp.arange(len(due)), due, factors))
    return lax.optimization_barrier(factors), frames


def any_unbatched(flags: Array) -> Array:
    """Whether any flag is set: in this stack, and in every other one of an enclosing `vmap`.

    A conditional on a batched predicate becomes a select, which would run every refresh in every
    step. Blocks decide one by one inside the branch, so that a predicate that is true for too many
    costs time and changes nothing.
    """
    return _any(jnp.any(flags))


@custom_vmap
def _any(flag: Array) -> Array:
    return flag


@_any.def_vmap
def _any_over_batch(axis_size: int, in_batched: list[bool], flag: Array) -> tuple[Array, bool]:
    del axis_size, in_batched
    return _any(jnp.any(flag)), False


def hide_from_cpu_compiler(numbers: Sequence[int], count: Array) -> dict[int, ArrayLike]:
    """Makes scalars of numbers, ones whose value XLA cannot see where it compiles for a CPU.

    XLA compiles one kernel for each slice at a constant position, 25 ms apiece, and one for all
    slices that get the position as an operand: with 600 leaves 13 s of compilation become one. What
    a conditional returns is such an operand. Other platforms compile constants best.

    Args:
      numbers: distinct numbers, at least 0.
      count: a scalar of the state that is never negative, which the compiler does not know.
    """
    return dict(zip(numbers, _hidden(tuple(numbers), count), strict=True))


@partial(jax.jit, static_argnames="numbers")
def _hidden(numbers: tuple[int, ...], count: Array) -> tuple[Array, ...]:
    known = tuple(jnp.asarray(number, jnp.int32) for number in numbers)

    def behind_a_conditional() -> tuple[Array, ...]:
        return lax.cond(any_unbatched(count >= 0), lambda: known, lambda: known[:1] * len(known))

    return lax.platform_dependent(cpu=behind_a_conditional, default=lambda: known) if known else ()
