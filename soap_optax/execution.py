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
from jax.typing import ArrayLike

from soap_optax import basis, block
from soap_optax.block import Hyperparameters
from soap_optax.state import Eigenframe, RavelledState, StackState


def update_stack(
    grads: Array,
    state: StackState,
    axes: Sequence[int],
    hyper: Hyperparameters,
    frequency: ArrayLike,
) -> tuple[Array, StackState]:
    """Takes one gradient for each block of a stack, `(B, *block)`, and gives the updates.

    The refresh comes first and uses the factors that the previous call stored. The authors refresh
    at the end of that previous step, from the same factors: the parameters are the same.
    """
    accepted = jax.vmap(block.is_acceptable)(grads)
    with jax.named_scope("refresh"):
        state = refresh_if_due(state, accepted, axes, frequency)
    with jax.named_scope("step"):
        step = partial(block.step_block, axes=axes, hyper=hyper)
        return jax.vmap(step)(grads, accepted, state)


KEEP, FIRST, REFRESH = range(3)


def refresh_if_due(
    state: StackState, accepted: Array, axes: Sequence[int], frequency: ArrayLike
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
    turn = jnp.where(due, jnp.where(has_basis, REFRESH, FIRST), KEEP)
    frame = Eigenframe(**{name: getattr(state, name) for name in Eigenframe._fields})
    frame = lax.cond(
        any_unbatched(due),
        partial(_refresh_blocks, axes),
        lambda _turn, _factors, frame: frame,
        turn,
        state.factors,
        frame,
    )
    return state._replace(**frame._asdict())


def _refresh_blocks(
    axes: Sequence[int], turn: Array, factors: tuple[Array, ...], frame: Eigenframe
) -> Eigenframe:
    """Goes through a stack one block at a time, so that each may be kept or refreshed."""
    branches = (
        lambda _factors, frame: frame,
        partial(basis.first_refresh, axes=axes),
        partial(basis.qr_refresh, axes=axes),
    )
    return lax.map(
        lambda operand: lax.switch(operand[0], branches, *operand[1:]), (turn, factors, frame)
    )


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
    grads: Sequence[Array], state: RavelledState, hyper: Hyperparameters
) -> tuple[list[Array], RavelledState]:
    """Takes the gradients of leaves without a preconditioned axis and gives their updates: Adam.

    The moments of all of them are one vector, while each leaf is accepted, refused and scaled by
    itself.

    Args:
      grads: arrays of `k` leaves of one shape, `(k, *leaf)`, in the dtype of the statistics.
      state: the state of all of them.
      hyper: the numbers of the step.

    Returns:
      The updates, in the shapes of `grads`, and the new state.
    """
    with jax.named_scope("adam"):
        accepted = jnp.concatenate([jax.vmap(block.is_acceptable)(grad) for grad in grads])
        applied = accepted & (state.accepted_gradients > 0)
        leaves = _consecutive_slices([len(grad) for grad in grads])
        entries = _consecutive_slices([grad.size for grad in grads])
        moved = jnp.concatenate(
            [
                jnp.broadcast_to(applied[leaf, None], (len(grad), grad[0].size)).ravel()
                for grad, leaf in zip(grads, leaves, strict=True)
            ]
        )
        vector = jnp.concatenate([grad.ravel() for grad in grads])
        mu, nu = block.average_moments(state.mu, state.nu, vector, hyper)
        direction = jnp.where(moved, block.adam_direction(mu, nu, hyper), 0)
        scale = jax.vmap(partial(block.scale_update, hyper=hyper))
        updates = [
            scale(direction[entry].reshape(grad.shape), state.accepted_gradients[leaf])
            for grad, leaf, entry in zip(grads, leaves, entries, strict=True)
        ]
        return updates, RavelledState(
            accepted_gradients=state.accepted_gradients + accepted,
            refused_gradients=state.refused_gradients + ~accepted,
            mu=jnp.where(moved, mu.astype(state.mu.dtype), state.mu),
            nu=jnp.where(moved, nu, state.nu),
        )


def _consecutive_slices(lengths: Sequence[int]) -> list[slice]:
    ends = list(accumulate(lengths))
    return [slice(end - length, end) for length, end in zip(lengths, ends, strict=True)]
