"""The state before the first gradient."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.typing import ArrayLike

from soap_optax.blocks import Group, Plan
from soap_optax.stacks.equations import Equations
from soap_optax.stacks.storage import StorageOptions, narrower
from soap_optax.stacks.varying import vary_like
from soap_optax.state import LAYOUT_VERSION, AdamState, PreconditionerState


def initial_state(
    plan: Plan, equations: Equations, storage: StorageOptions, leaves: Sequence[ArrayLike]
) -> PreconditionerState:
    """The state before the first gradient: zero statistics, and identities as preconditioners.

    Args:
      plan: the plan of the tree.
      equations: the equations of the blocks.
      storage: how the state is stored.
      leaves: the leaves of the tree, over whose mesh axes the state varies in a `jax.shard_map`;
        empty for the state's shapes alone.
    """
    state = equations.state_type(
        layout_version=jnp.asarray(LAYOUT_VERSION, jnp.int32),
        count=jnp.zeros((), jnp.int32),
        stacks={
            name: vary_like(equations.initial_stack(group, storage), _leaves_of(group, leaves))
            for name, group in plan.stacks.items()
        },
        adam={
            name: vary_like(_initial_adam(group, storage), _leaves_of(group, leaves))
            for name, group in plan.adam.items()
        },
    )
    return _hide_values(state)


def placeholder_state(equations: Equations) -> PreconditionerState:
    """A state without leaves that mirror parameters, for `optax.tree_map_params`.

    Blocks do not have the shapes of parameters, so `optax.tree_map_params` changes none of them.
    """
    leaf: Any = jnp.zeros((), jnp.int32)
    return equations.state_type(layout_version=leaf, count=leaf, stacks=leaf, adam=leaf)


def _leaves_of(group: Group, leaves: Sequence[ArrayLike]) -> list[ArrayLike]:
    return [leaves[region.leaf] for region in group.regions] if leaves else []


def _hide_values(state: PreconditionerState) -> PreconditionerState:
    """Hides from XLA that moments are zero and bases the identity, where `init` is traced.

    In jaxlib 0.10 to 0.12, XLA for CPUs miscompiles products with long constants of zeros that it
    fuses with later operations. The sum over a first update, which is zero, became NaN or 1e37.
    Concrete arrays are returned unchanged.
    """
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(state)):
        return lax.optimization_barrier(state)
    return state


def _initial_adam(group: Group, storage: StorageOptions) -> AdamState:
    return AdamState(
        accepted_gradients=jnp.zeros(group.blocks, jnp.int32),
        rejected_gradients=jnp.zeros(group.blocks, jnp.int32),
        mu=jnp.zeros(group.entries + group.padding, narrower(storage.mu_dtype, group.dtype)),
        nu=jnp.zeros(group.entries + group.padding, group.dtype),
    )
