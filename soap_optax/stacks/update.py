"""The update of one stack: the equations of a block over all blocks, and refreshes when due."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from soap_optax import algorithm
from soap_optax.algorithm import Hyperparameters, RefreshRule
from soap_optax.blocks import Group
from soap_optax.devices import Layout
from soap_optax.linalg import folded_like, gram_matrix
from soap_optax.stacks.refresh_gating import RefreshTiming, is_due, refresh_if_due, stagger_phases
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
    return layout.map_blocks(partial(_update_blocks, group.block, group.axes), blocks, shared)


def _update_blocks(
    shape: tuple[int, ...],
    axes: tuple[int, ...],
    blocks: tuple[Array, Array, Array, StackState],
    shared: tuple[Hyperparameters, RefreshTiming, RefreshRule],
) -> tuple[Array, StackState]:
    """Refreshes the bases that are due, and takes a step.

    The refresh uses the factors that the previous call stored, or factors with this gradient, as
    the refresh order says. The authors refresh at the end of the previous step, from the same
    stored factors: the parameters are the same. Padding accepts no gradient and counts none.
    """
    (grads, padding, phases, state), (hyper, timing, rule) = blocks, shared
    stored = [array.dtype for array in (*state.factors, state.mu)]
    with jax.named_scope("step"):
        acceptable = jax.vmap(partial(algorithm.is_acceptable, stored=stored))(grads)
    accepted = acceptable & ~padding
    lengths = tuple(shape[axis] for axis in axes)

    def average_factors(state: StackState) -> StackState:
        average = partial(_average_factors, axes, hyper.shampoo_beta)
        return state._replace(factors=jax.vmap(average)(grads, accepted, state.factors))

    before = state
    if timing.order == "after_gradient":
        with jax.named_scope("step"):
            state = average_factors(state)
    with jax.named_scope("refresh"):
        due = accepted & is_due(state, phases, timing)
        state = refresh_if_due(state, due, axes, lengths, rule)
    with jax.named_scope("step"):
        step = partial(algorithm.step_block, axes=axes, hyper=hyper)
        updates, state = jax.vmap(step)(grads, accepted, state)
        if timing.order == "before_gradient":
            state = average_factors(state)
    rejected = before.rejected_gradients + (~acceptable).astype(jnp.int32)
    return updates, state._replace(rejected_gradients=rejected)


def _average_factors(
    axes: Sequence[int], beta: Array, grad: Array, accepted: Array, factors: Sequence[Array]
) -> tuple[Array, ...]:
    """Averages the Gram matrices of a block's gradient into its factors, in their storage."""

    def average(factor: Array, axis: int) -> Array:
        gram = folded_like(factor, gram_matrix(grad, axis))
        new = algorithm.average_factor(factor.astype(gram.dtype), gram, accepted, beta)
        return new.astype(factor.dtype)

    return tuple(map(average, factors, axes))
