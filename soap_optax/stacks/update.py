"""The update of one stack: the equations of a block over all blocks, and refreshes when due."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from soap_optax.algorithm import Hyperparameters, RefreshRule
from soap_optax.blocks import Group
from soap_optax.devices import Layout
from soap_optax.stacks import factors
from soap_optax.stacks.equations import Equations
from soap_optax.stacks.refresh_gating import (
    BlockForm,
    RefreshTiming,
    is_due,
    refresh_if_due,
    stagger_phases,
)
from soap_optax.stacks.varying import vary_like
from soap_optax.state import AnyStackState


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepSettings:
    """The numbers of one step.

    Attributes:
      timing: when blocks are refreshed.
      rule: how blocks are refreshed.
      hyper: the hyperparameters by dtype of statistics, such as ``"float32"``.
      equations: the equations of the blocks.
    """

    timing: RefreshTiming
    rule: RefreshRule
    hyper: dict[str, Hyperparameters]
    equations: Equations = field(metadata={"static": True})


def update_stack(
    grads: Array,
    state: AnyStackState,
    group: Group,
    blocks_before: int,
    settings: StepSettings,
    layout: Layout,
) -> tuple[Array, AnyStackState]:
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
    lengths = tuple(group.block[axis] for axis in group.axes)
    form = BlockForm(group.axes, lengths, group.dtype)
    return layout.map_blocks(partial(_update_blocks, form, settings.equations), blocks, shared)


def _update_blocks(
    form: BlockForm,
    equations: Equations,
    blocks: tuple[Array, Array, Array, AnyStackState],
    shared: tuple[Hyperparameters, RefreshTiming, RefreshRule],
) -> tuple[Array, AnyStackState]:
    """Refreshes the preconditioners that are due, and takes a step.

    The refresh uses the factors that the previous call stored, or factors with this gradient, as
    the refresh order says. The authors refresh at the end of the previous step, from the same
    stored factors: the parameters are the same. Padding accepts no gradient and counts none.
    """
    (grads, padding, phases, state), (hyper, timing, rule) = blocks, shared
    with jax.named_scope("step"):
        acceptable = jax.vmap(factors.is_acceptable)(grads, state)
    accepted = acceptable & ~padding

    before = state
    averaged = state.accepted_gradients
    if timing.order == "after_gradient":
        with jax.named_scope("step"):
            average = partial(_average_factors, form.axes, hyper)
            state = state._replace(factors=jax.vmap(average)(grads, accepted, state))
            averaged = averaged + accepted.astype(jnp.int32)
    with jax.named_scope("refresh"):
        due = accepted & is_due(state, phases, timing)
        fields = equations.fields_of(state, averaged)
        rule = equations.rule(hyper, rule)
        kept, fields = refresh_if_due(fields, state.factors, due, rule, form, equations)
        state = equations.with_fields(state, fields)._replace(factors=kept)
    with jax.named_scope("step"):
        averages_factors = timing.order == "before_gradient"
        updates, state = jax.vmap(
            lambda grad, accepted, state: equations.step(
                grad, accepted, state, form.axes, hyper, averages_factors
            )
        )(grads, accepted, state)
    rejected = before.rejected_gradients + (~acceptable).astype(jnp.int32)
    return updates, state._replace(rejected_gradients=rejected)


def _average_factors(
    axes: Sequence[int], hyper: Hyperparameters, grad: Array, accepted: Array, state: AnyStackState
) -> tuple[Array, ...]:
    """Averages a gradient into the factors of its block before their refresh."""
    by_others = factors.rotations_by_others(grad, state, axes)
    return factors.average_factors(grad, accepted, state, by_others, axes, hyper.shampoo_beta)
