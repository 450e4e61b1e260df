"""The state before the first gradient."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from soap_optax.algorithm import INITIAL_EIGENVALUE, FactorEstimator
from soap_optax.blocks import Group, Plan
from soap_optax.linalg import folded_shape
from soap_optax.stacks.varying import vary_like
from soap_optax.state import LAYOUT_VERSION, AdamState, ScaleBySoapState, StackState


@dataclass(frozen=True)
class StorageOptions:
    """How the state is stored. The fields are arguments of `scale_by_soap`.

    A dtype that is wider than the dtype of the statistics has no effect.
    """

    mu_dtype: DTypeLike | None
    preconditioner_dtype: DTypeLike | None
    fold_factors: bool
    factored: bool
    factor_estimator: FactorEstimator = "gram"


def initial_state(
    plan: Plan, storage: StorageOptions, leaves: Sequence[ArrayLike]
) -> ScaleBySoapState:
    """The state before the first gradient: zero statistics, and the identity as every basis.

    Args:
      plan: the plan of the tree.
      storage: how the state is stored.
      leaves: the leaves of the tree, over whose mesh axes the state varies in a `jax.shard_map`;
        empty for the state's shapes alone.
    """
    state = ScaleBySoapState(
        layout_version=jnp.asarray(LAYOUT_VERSION, jnp.int32),
        count=jnp.zeros((), jnp.int32),
        stacks={
            name: vary_like(_initial_stack(group, storage), _leaves_of(group, leaves))
            for name, group in plan.stacks.items()
        },
        adam={
            name: vary_like(_initial_adam(group, storage), _leaves_of(group, leaves))
            for name, group in plan.adam.items()
        },
    )
    return _hide_values(state)


def placeholder_state() -> ScaleBySoapState:
    """A state without leaves that mirror parameters, for `optax.tree_map_params`.

    Blocks do not have the shapes of parameters, so `optax.tree_map_params` changes none of them.
    """
    leaf: Any = jnp.zeros((), jnp.int32)
    return ScaleBySoapState(layout_version=leaf, count=leaf, stacks=leaf, adam=leaf)


def _leaves_of(group: Group, leaves: Sequence[ArrayLike]) -> list[ArrayLike]:
    return [leaves[region.leaf] for region in group.regions] if leaves else []


def _hide_values(state: ScaleBySoapState) -> ScaleBySoapState:
    """Hides from XLA that moments are zero and bases the identity, where `init` is traced.

    In jaxlib 0.10 to 0.12, XLA for CPUs miscompiles products with long constants of zeros that it
    fuses with later operations. The sum over a first update, which is zero, was NaN, or 1e37.
    Concrete arrays are returned unchanged.
    """
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(state)):
        return lax.optimization_barrier(state)
    return state


def _initial_stack(group: Group, storage: StorageOptions) -> StackState:
    length, dtype = group.length, group.dtype
    narrow = _narrower(storage.preconditioner_dtype, dtype)
    axes = [group.block[axis] for axis in group.axes]
    shapes = [folded_shape(d) if storage.fold_factors else (d, d) for d in axes]
    if storage.factored:
        nu = tuple(jnp.zeros((length, d), dtype) for d in group.block)
    else:
        nu = jnp.zeros((length, *group.block), dtype)
    estimated_axes = axes if storage.factor_estimator == "kl" else []
    return StackState(
        accepted_gradients=jnp.zeros(length, jnp.int32),
        rejected_gradients=jnp.zeros(length, jnp.int32),
        factors=tuple(jnp.zeros((length, *shape), narrow) for shape in shapes),
        mu=jnp.zeros((length, *group.block), _narrower(storage.mu_dtype, dtype)),
        nu=nu,
        bases=tuple(jnp.tile(jnp.eye(d, dtype=narrow), (length, 1, 1)) for d in axes),
        age=jnp.zeros(length, jnp.int32),
        refreshes=jnp.zeros(length, jnp.int32),
        rejected_refreshes=jnp.zeros(length, jnp.int32),
        eigenvalues=tuple(jnp.full((length, d), INITIAL_EIGENVALUE, dtype) for d in estimated_axes),
    )


def _initial_adam(group: Group, storage: StorageOptions) -> AdamState:
    return AdamState(
        accepted_gradients=jnp.zeros(group.blocks, jnp.int32),
        rejected_gradients=jnp.zeros(group.blocks, jnp.int32),
        mu=jnp.zeros(group.entries + group.padding, _narrower(storage.mu_dtype, group.dtype)),
        nu=jnp.zeros(group.entries + group.padding, group.dtype),
    )


def _narrower(wanted: DTypeLike | None, statistics: DTypeLike) -> DTypeLike:
    """The dtype to store in: the wanted one, unless it is wider than the statistics."""
    if wanted is None or jnp.finfo(wanted).bits > jnp.finfo(statistics).bits:
        return statistics
    return wanted
