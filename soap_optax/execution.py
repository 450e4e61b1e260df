"""When and over what the equations run: stacks of blocks, ravelled leaves, refreshes when due.

No equation lives here, and nothing here depends on how the parameter tree was cut.
"""

import math
from collections.abc import Sequence
from functools import partial
from itertools import accumulate

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_batching import custom_vmap
from jax.sharding import NamedSharding
from jax.typing import ArrayLike

from soap_optax import basis, block, folding, placement
from soap_optax.basis import RefreshRule
from soap_optax.block import Hyperparameters
from soap_optax.planning import Group
from soap_optax.state import Eigenframe, RavelledState, StackState


def update_stack(
    grads: Array,
    state: StackState,
    group: Group,
    number: int,
    hyper: Hyperparameters,
    rule: RefreshRule,
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
      rule: how and when bases are refreshed.
      sharding: how the stack is divided among devices; None if it is not.
    """
    blocks = group.blocks + group.padding
    padding = jnp.arange(blocks) >= group.blocks
    first_ages = jnp.zeros(blocks, jnp.int32)
    if rule.stagger:
        first_ages = ages_in_turn(range(number, number + blocks), rule.frequency)
    update = partial(_update_blocks, group.block, group.axes)
    return placement.on_local_blocks(
        update, (grads, padding, first_ages, state), (hyper, rule), sharding
    )


def ages_in_turn(numbers: Sequence[int], frequency: Array) -> Array:
    """At what age the first bases of blocks begin, so that refreshes spread over the cycle, `(B,)`.

    Fractions of multiples of the golden ratio: those of any consecutive numbers lie evenly, and so
    do a stack's blocks, those of one device, and small stacks one after another.
    """
    golden = (math.sqrt(5) - 1) / 2
    turns = np.modf(np.asarray(numbers) * golden)[0].astype(np.float32)
    ages = jnp.floor(turns * frequency.astype(jnp.float32)).astype(jnp.int32)
    return jnp.clip(ages, 0, frequency - 1)


def _update_blocks(
    shape: tuple[int, ...],
    axes: tuple[int, ...],
    blocks: tuple[Array, Array, Array, StackState],
    shared: tuple[Hyperparameters, RefreshRule],
) -> tuple[Array, StackState]:
    """Refreshes the bases that are due, and takes a step.

    The refresh uses the factors that the previous call stored, or those with this gradient in them.
    In the first case, the authors refresh at the end of that previous step, from the same factors:
    the parameters are the same. A block of padding takes nothing in and counts nothing.
    """
    (grads, padding, first_ages, state), (hyper, rule) = blocks, shared
    stored = [array.dtype for array in (*state.factors, state.mu)]
    acceptable = jax.vmap(partial(block.is_acceptable, stored=stored))(grads)
    accepted = acceptable & ~padding
    lengths = tuple(shape[axis] for axis in axes)

    def take_in(state: StackState) -> StackState:
        average = partial(block.average_factors, axes=axes, beta=hyper.shampoo_beta)
        return state._replace(factors=jax.vmap(average)(grads, accepted, state.factors))

    before = state
    if rule.order == "after_gradient":
        with jax.named_scope("step"):
            state = take_in(state)
    with jax.named_scope("refresh"):
        state = refresh_if_due(state, accepted, first_ages, axes, lengths, rule)
    with jax.named_scope("step"):
        step = partial(block.step_block, axes=axes, hyper=hyper)
        updates, state = jax.vmap(step)(grads, accepted, state)
        if rule.order == "before_gradient":
            state = take_in(state)
    return updates, state._replace(refused_gradients=before.refused_gradients + ~acceptable)


# Outside `jax.jit` a conditional is compiled anew in every call, because its branches are functions
# made in that call: seconds, where the step takes a millisecond.
@partial(jax.jit, static_argnames=("axes", "lengths"))
def refresh_if_due(
    state: StackState,
    accepted: Array,
    first_ages: Array,
    axes: tuple[int, ...],
    lengths: tuple[int, ...],
    rule: RefreshRule,
) -> StackState:
    """Refreshes the bases of those blocks whose turn it is.

    A block is due once it has been updated `frequency` times since its last refresh, or has factors
    and no basis yet. One whose gradient is refused waits, so that nothing of it changes.

    Only bases, moments and counters pass through the conditional; the branch that refreshes nothing
    hands them on without a copy.
    """
    has_factors = state.accepted_gradients > 0
    has_basis = state.refreshes > 0
    due = accepted & has_factors & (~has_basis | (state.age >= rule.frequency))
    frame = Eigenframe(**{name: getattr(state, name) for name in Eigenframe._fields})
    frame = lax.cond(
        any_unbatched(due),
        partial(_refresh_blocks, axes, lengths),
        lambda _due, _first_ages, _factors, frame, _rule: frame,
        due,
        first_ages,
        state.factors,
        frame,
        rule,
    )
    return state._replace(**frame._asdict())


def _refresh_blocks(
    axes: Sequence[int],
    lengths: Sequence[int],
    due: Array,
    first_ages: Array,
    factors: tuple[Array, ...],
    frame: Eigenframe,
    rule: RefreshRule,
) -> Eigenframe:
    """Goes through a stack one block at a time, so that each may be refreshed or kept."""
    dtype = jax.tree.leaves(frame.nu)[0].dtype

    def refresh(first_age: Array, factors: tuple[Array, ...], frame: Eigenframe) -> Eigenframe:
        whole = tuple(
            folding.whole(factor, d).astype(dtype)
            for factor, d in zip(factors, lengths, strict=True)
        )
        return basis.refresh(frame, whole, first_age, axes, rule)

    def refresh_or_keep(block: tuple[Array, Array, tuple[Array, ...], Eigenframe]) -> Eigenframe:
        due, *operands = block
        return lax.cond(due, refresh, lambda _age, _factors, frame: frame, *operands)

    return lax.map(refresh_or_keep, (due, first_ages, factors, frame))


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


def update_ravelled(
    grads: Sequence[Array],
    state: RavelledState,
    group: Group,
    hyper: Hyperparameters,
    sharding: NamedSharding | None,
) -> tuple[list[Array], RavelledState]:
    """Takes the gradients of leaves without a preconditioned axis and gives their updates: Adam.

    The moments of all of them are one vector, while each leaf is accepted, refused and scaled by
    itself.

    Args:
      grads: the leaves stacked by shape, `(k, *leaf)`, in the dtype of the statistics.
      state: the state of all of them.
      group: the leaves and their padding.
      hyper: the numbers of the step.
      sharding: how the vector is divided among devices; None if it is not.

    Returns:
      The updates, in the shapes of `grads`, and the new state.
    """
    acceptable = jax.vmap(partial(block.is_acceptable, stored=[state.mu.dtype]))
    accepted = jnp.concatenate([acceptable(grad) for grad in grads])
    applied = accepted & (state.accepted_gradients > 0)
    leaves = _consecutive_slices([len(grad) for grad in grads])
    entries = _consecutive_slices([grad.size for grad in grads])

    def spread(per_leaf: Array) -> Array:
        """Repeats each leaf's value for all of its entries, `(N,)`; zero for the padding."""
        parts = [
            jnp.broadcast_to(per_leaf[leaf, None], (len(grad), grad[0].size)).ravel()
            for grad, leaf in zip(grads, leaves, strict=True)
        ]
        return pad(jnp.concatenate(parts))

    def pad(vector: Array) -> Array:
        if group.padding:
            vector = jnp.concatenate([vector, jnp.zeros(group.padding, vector.dtype)])
        return placement.divide(vector, sharding)

    correction = jax.vmap(partial(block.bias_correction, hyper=hyper))(state.accepted_gradients)
    vector = pad(jnp.concatenate([grad.ravel() for grad in grads]))
    mu, nu = block.average_moments(state.mu, state.nu, vector, spread(applied), hyper)
    assert isinstance(nu, Array)
    # The division comes last: XLA would repeat cheaper work in the slice for every single leaf.
    scaled = mu * spread(jnp.where(applied, correction, 0))
    direction = block.adam_direction(scaled, nu, hyper)
    if sharding is not None:
        direction = placement.join_axis(direction, 0, sharding)
    updates = [
        direction[entry].reshape(grad.shape) for grad, entry in zip(grads, entries, strict=True)
    ]
    if hyper.normalize_grads:
        unit = jax.vmap(lambda update, scale: update * scale * block.normalization(update, hyper))
        updates = [
            unit(update, correction[leaf]) for update, leaf in zip(updates, leaves, strict=True)
        ]
    return updates, RavelledState(
        accepted_gradients=placement.replicate(state.accepted_gradients + accepted, sharding),
        refused_gradients=placement.replicate(state.refused_gradients + ~accepted, sharding),
        mu=mu.astype(state.mu.dtype),
        nu=nu,
    )


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


def _consecutive_slices(lengths: Sequence[int]) -> list[slice]:
    ends = list(accumulate(lengths))
    return [slice(end - length, end) for length, end in zip(lengths, ends, strict=True)]
