"""When and over what the equations run: stacks of blocks, ravelled leaves, refreshes when due.

No equation lives here, and nothing here depends on how the parameter tree was cut.
"""

from collections.abc import Sequence
from functools import partial
from itertools import accumulate

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import custom_vmap
from jax.sharding import NamedSharding
from jax.typing import ArrayLike

from soap_optax import basis, block, placement
from soap_optax.block import Hyperparameters
from soap_optax.planning import Group
from soap_optax.state import Eigenframe, RavelledState, StackState


def update_stack(
    grads: Array,
    state: StackState,
    group: Group,
    hyper: Hyperparameters,
    frequency: ArrayLike,
    sharding: NamedSharding | None,
) -> tuple[Array, StackState]:
    """Takes one gradient for each block of a stack, `(B, *block)`, and gives the updates.

    Where the stack is sharded, every device goes through its own blocks and exchanges nothing:
    whether it refreshes any is for each device to decide.
    """
    padding = jnp.arange(group.blocks + group.padding) >= group.blocks
    update = partial(_update_blocks, group.axes)
    shared = (hyper, jnp.asarray(frequency))
    return placement.on_local_blocks(update, (grads, padding, state), shared, sharding)


def _update_blocks(
    axes: tuple[int, ...],
    blocks: tuple[Array, Array, StackState],
    shared: tuple[Hyperparameters, Array],
) -> tuple[Array, StackState]:
    """Refreshes the bases that are due, then takes a step.

    The refresh uses the factors that the previous call stored. The authors refresh at the end of
    that previous step, from the same factors: the parameters are the same. A block of padding takes
    nothing in and counts nothing.
    """
    (grads, padding, state), (hyper, frequency) = blocks, shared
    acceptable = jax.vmap(block.is_acceptable)(grads)
    accepted = acceptable & ~padding
    with jax.named_scope("refresh"):
        state = refresh_if_due(state, accepted, axes, frequency)
    with jax.named_scope("step"):
        step = partial(block.step_block, axes=axes, hyper=hyper)
        updates, state = jax.vmap(step)(grads, accepted, state)
    refused = state.refused_gradients + ~acceptable
    return updates, state._replace(refused_gradients=refused)


# Outside `jax.jit` a conditional is compiled anew in every call, because its branches are functions
# made in that call: seconds, where the step takes a millisecond.
@partial(jax.jit, static_argnames="axes")
def refresh_if_due(
    state: StackState, accepted: Array, axes: tuple[int, ...], frequency: ArrayLike
) -> StackState:
    """Refreshes the bases of those blocks whose turn it is.

    A block is due once it has been updated `frequency` times since its last refresh, or has factors
    and no basis yet. One whose gradient is refused waits, so that nothing of it changes.

    Only bases, moments and counters pass through the conditional; the branch that refreshes nothing
    hands them on without a copy.
    """
    has_factors = state.accepted_gradients > 0
    has_basis = state.refreshes > 0
    due = accepted & has_factors & (~has_basis | (state.age >= frequency))
    frame = Eigenframe(**{name: getattr(state, name) for name in Eigenframe._fields})
    frame = lax.cond(
        any_unbatched(due),
        partial(_refresh_blocks, axes),
        lambda _due, _factors, frame: frame,
        due,
        state.factors,
        frame,
    )
    return state._replace(**frame._asdict())


def _refresh_blocks(
    axes: Sequence[int], due: Array, factors: tuple[Array, ...], frame: Eigenframe
) -> Eigenframe:
    """Goes through a stack one block at a time, so that each may be refreshed or kept."""

    def refresh_or_keep(block: tuple[Array, tuple[Array, ...], Eigenframe]) -> Eigenframe:
        due, factors, frame = block
        refresh = partial(_refresh_block, axes)
        return lax.cond(due, refresh, lambda _factors, frame: frame, factors, frame)

    return lax.map(refresh_or_keep, (due, factors, frame))


def _refresh_block(
    axes: Sequence[int], factors: tuple[Array, ...], frame: Eigenframe
) -> Eigenframe:
    bases, nu = lax.cond(
        frame.refreshes > 0,
        partial(basis.iterate_bases, axes=axes),
        lambda factors, _bases, nu: (basis.first_bases(factors), nu),
        factors,
        frame.bases,
        frame.nu,
    )
    return basis.adopt(frame, factors, bases, nu, axes)


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
    accepted = jnp.concatenate([jax.vmap(block.is_acceptable)(grad) for grad in grads])
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
