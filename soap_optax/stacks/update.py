"""The update of one stack: the equations of a block over all blocks, and refreshes when due."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from soap_optax import algorithm
from soap_optax.algorithm import FirstGradient, Hyperparameters, RefreshRule
from soap_optax.blocks import Group
from soap_optax.devices import Layout
from soap_optax.stacks import factors
from soap_optax.stacks.refresh_gating import (
    RefreshTiming,
    any_unbatched,
    is_due,
    refresh_if_due,
    stagger_phases,
)
from soap_optax.stacks.varying import vary_like
from soap_optax.state import StackState


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepSettings:
    """The numbers of one step.

    Attributes:
      timing: when blocks are refreshed.
      rule: how blocks are refreshed.
      hyper: the hyperparameters by dtype of statistics, such as ``"float32"``.
    """

    timing: RefreshTiming
    rule: RefreshRule
    hyper: dict[str, Hyperparameters]


def update_stack(
    grads: Array,
    state: StackState,
    group: Group,
    blocks_before: int,
    settings: StepSettings,
    layout: Layout,
) -> tuple[Array, StackState]:
    """Updates a stack by one gradient for each block, `(blocks, *block)`, and returns the updates.

    On a mesh every device updates its own blocks without communication. Whether it refreshes any of
    them is decided on each device.

    Args:
      grads: the gradients, in the dtype of the statistics.
      state: the state of the stack.
      group: the blocks and their padding.
      blocks_before: the number of blocks in the stacks before this one.
      settings: the numbers of the step.
      layout: the devices.
    """
    positions = group.positions(group.length)
    padding, phases = np.ones(group.length, bool), np.zeros(group.length, np.float32)
    padding[positions] = False
    phases[positions] = stagger_phases(range(blocks_before, blocks_before + group.blocks))
    shared = (settings.hyper[group.dtype.name], settings.timing, settings.rule)
    blocks = (grads, jnp.asarray(padding), jnp.asarray(phases), state)
    blocks = vary_like(blocks, shared)
    return layout.map_blocks(partial(_update_blocks, group.axes), blocks, shared)


def _update_blocks(
    axes: tuple[int, ...],
    blocks: tuple[Array, Array, Array, StackState],
    shared: tuple[Hyperparameters, RefreshTiming, RefreshRule],
) -> tuple[Array, StackState]:
    """Refreshes the bases that are due, and takes a step.

    The refresh uses the factors that the previous call stored, or factors with this gradient, as
    the refresh order says. The authors refresh at the end of the previous step, from the same
    stored factors: the parameters are the same. Padding accepts no gradient and counts none.

    With `first_update="apply"` the first gradient of a block enters its factors before the refresh
    in either order.
    """
    (grads, padding, phases, state), (hyper, timing, rule) = blocks, shared
    with jax.named_scope("step"):
        acceptable = jax.vmap(factors.is_acceptable)(grads, state)
    accepted = acceptable & ~padding

    before, first = state, None
    with jax.named_scope("refresh"):
        due = accepted & is_due(state, phases, timing)
    if hyper.first_update == "apply":
        first = FirstGradient(grads, state.accepted_gradients == 0, hyper)
        due |= accepted & first.is_first
    with jax.named_scope("step"):
        if timing.order == "after_gradient":
            average = partial(_average_factors, axes, hyper.shampoo_beta)
            state = state._replace(factors=jax.vmap(average)(grads, accepted, state))
        elif first is not None:
            state = _enter_first_gradients(state, first, accepted, axes)
    with jax.named_scope("refresh"):
        state = refresh_if_due(state, due, axes, rule, first)
    with jax.named_scope("step"):
        step = partial(_step_block, axes, hyper, timing.order == "before_gradient")
        updates, state = jax.vmap(step)(grads, accepted, state)
    rejected = before.rejected_gradients + (~acceptable).astype(jnp.int32)
    return updates, state._replace(rejected_gradients=rejected)


# Compiled by itself for the reason given at `refresh_if_due`.
@partial(jax.jit, static_argnames="axes")
def _enter_first_gradients(
    state: StackState, first: FirstGradient, accepted: Array, axes: tuple[int, ...]
) -> StackState:
    """Averages the first gradients of blocks into their factors, in the calls that have any."""
    entering = accepted & first.is_first
    average = jax.vmap(partial(_average_factors, axes, first.hyper.shampoo_beta))
    averages = lax.cond(
        any_unbatched(entering),
        average,
        lambda _grads, _entering, state: state.factors,
        first.grad,
        entering,
        state,
    )
    return state._replace(factors=averages)


def _average_factors(
    axes: Sequence[int], beta: Array, grad: Array, accepted: Array, state: StackState
) -> tuple[Array, ...]:
    """Averages a gradient into the factors of its block before their refresh."""
    by_others = factors.rotations_by_others(grad, state, axes)
    return factors.average_factors(grad, accepted, state, by_others, axes, beta)


def _step_block(
    axes: Sequence[int],
    hyper: Hyperparameters,
    averages_factors: bool,
    grad: Array,
    accepted: Array,
    state: StackState,
) -> tuple[Array, StackState]:
    """Takes a step with one block, and averages the gradient into its factors if asked to."""
    beta = hyper.shampoo_beta
    rotated = factors.rotations(grad, state, axes, hyper.precision)
    by_others, whole = rotated or (None, None)
    update, new = algorithm.step_block(grad, accepted, state, axes, hyper, whole)
    if averages_factors:
        entering = accepted
        if hyper.first_update == "apply":  # The first gradient is in the factors already.
            entering &= state.accepted_gradients > 0
        averages = factors.average_factors(grad, entering, state, by_others, axes, beta)
        new = new._replace(factors=averages)
    applied = accepted & (algorithm.update_number(state.accepted_gradients, hyper) > 0)
    eigenvalues = factors.average_eigenvalues(applied, state, rotated, axes, beta)
    return update, new._replace(eigenvalues=eigenvalues)
