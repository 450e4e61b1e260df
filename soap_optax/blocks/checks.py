"""Checks of the trees and the state that `init` and `update` receive, and the plan of a tree."""

import numbers
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from soap_optax.blocks.complex_leaves import split_complex
from soap_optax.blocks.plan import Plan, make_plan
from soap_optax.blocks.prefixes import tree_of
from soap_optax.blocks.views import BlockOptions, axes_of_leaves
from soap_optax.state import PreconditionerState


def plan_of(
    tree: Any,
    options: BlockOptions,
    dimension_numbers: Any = None,
    multiple: int = 1,
    statistics: Sequence[DTypeLike] | None = None,
) -> Plan:
    """The plan of a tree of parameters or gradients, checked leaf by leaf.

    Args:
      tree: parameters or gradients. A complex leaf counts as two leaves.
      options: how leaves are cut into blocks.
      dimension_numbers: the argument of `scale_by_soap`.
      multiple: the leading axis of the arrays of state is padded to a multiple of this number.
      statistics: the dtype of each leaf's statistics; None means that its own dtype decides.

    Raises:
      TypeError: if a leaf is not a floating-point or complex array.
      ValueError: if `dimension_numbers` do not fit the tree.
    """
    dimension_numbers = tree_of(dimension_numbers, tree)
    tree = split_complex(tree)
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    dtypes = [check_leaf(path, leaf) for path, leaf in leaves]
    axes = axes_of_leaves(dimension_numbers, tree)
    return _cached_plan(
        tuple(jnp.shape(leaf) for _, leaf in leaves),
        tuple(dtypes if statistics is None else statistics),
        options,
        tuple(axes),
        multiple,
    )


_cached_plan = lru_cache(maxsize=64)(make_plan)


def is_placeholder(params: Any) -> bool:
    """Whether `params` is the placeholder with which `optax.tree_map_params` calls `init`.

    It is a private node without leaves. Optax uses it to find the leaves of a state that mirror the
    parameters.
    """
    return type(params).__name__ == "_ParamsPlaceholder"


def check_leaf(path: Any, leaf: Any, may_be_complex: bool = False) -> np.dtype:
    """Returns the dtype of a leaf, or raises if it is not a floating-point array.

    Complex leaves are split before, into two of these, unless `may_be_complex`.
    """
    where = jax.tree_util.keystr(path) or "the tree itself"
    dtype = _dtype_of(leaf)
    if dtype is None:
        raise TypeError(
            f"every leaf must be an array, got {leaf!r} at {where}; filter the tree before init, "
            "in Equinox by eqx.filter(model, eqx.is_inexact_array), or leave the leaf out with "
            "optax.masked"
        )
    if not jnp.issubdtype(dtype, jnp.inexact if may_be_complex else jnp.floating):
        raise TypeError(
            f"every leaf must be a floating-point or complex array, got {dtype} at {where}; leave "
            "it out with optax.masked, or give it an optimizer of its own with optax.partition"
        )
    return jnp.result_type(leaf)


def _dtype_of(leaf: Any) -> DTypeLike | None:
    """The dtype of an array, of its shape, or of a number; None for anything else."""
    if isinstance(leaf, numbers.Number):
        return jnp.result_type(leaf)
    return leaf.dtype if hasattr(leaf, "dtype") and hasattr(leaf, "shape") else None


def statistics_of(state: Any, updates: Any, params: Any) -> list[DTypeLike]:
    """The dtype of each leaf's statistics: the state decides, whatever the gradients' dtypes.

    A state with statistics in one dtype decides for all leaves. If it has both float32 and float64,
    the parameters decide, or the gradients if there are no parameters.

    Args:
      state: the state handed to `update`.
      updates: the gradients.
      params: the parameters, or None.

    Raises:
      ValueError: if the state has float64 statistics and `jax_enable_x64` is off.
    """
    groups = [*_groups(state, "stacks").items(), *_groups(state, "adam").items()]
    found = {_statistics_of_group(name, group) for name, group in groups}
    if np.dtype(np.float64) in found and not jax.config.read("jax_enable_x64"):
        raise ValueError(
            "the state has float64 statistics, and jax_enable_x64 is off: it was made under "
            "jax.enable_x64; use it there too, or call init again"
        )
    updates, params = split_complex(updates), split_complex(params)
    leaves = jax.tree.leaves(updates)
    if len(found) == 1:
        return [*found] * len(leaves)
    if jax.tree.structure(params) == jax.tree.structure(updates):
        leaves = jax.tree.leaves(params)
    return [jnp.result_type(leaf) for leaf in leaves]


def _statistics_of_group(name: str, group: Any) -> np.dtype:
    """The dtype of its second moment; if it has none, the one that its name ends with."""
    leaves = jax.tree.leaves(group.nu)
    if leaves:
        return leaves[0].dtype
    return np.dtype(np.float64 if name.endswith("_float64") else np.float32)


def _groups(state: Any, name: str) -> dict[str, Any]:
    groups = getattr(state, name, None)
    return groups if isinstance(groups, dict) else {}


def check_state(state: Any, expected: PreconditionerState) -> PreconditionerState:
    """Returns the state, or raises if `init` would make another one for these gradients.

    Args:
      state: the state handed to `update`.
      expected: the state that `init` makes for these gradients, as a tree of shapes.
    """
    if not isinstance(state, type(expected)):
        raise TypeError(
            f"state must be a {type(expected).__name__}, got {type(state).__name__}; pass what "
            "init returned"
        )
    wanted = _shapes_by_path(expected)
    found = _shapes_by_path(state)
    for path in [*wanted, *found]:
        if wanted.get(path) != found.get(path):
            raise ValueError(
                f"the state does not belong to these gradients: {path} has shape "
                f"{found.get(path, '(absent)')} and must have {wanted.get(path, '(absent)')}; "
                "likely the tree, a shape, a dtype from or to float64 or complex, or one of "
                "block_size, max_precond_dim, merge_dims, precondition_1d, dimension_numbers, "
                "stack_multiple (the number of shards of stack_sharding where it is not given), "
                "one_sided, factored, fold_factors, factor_estimator, grafting changed after init; "
                "undo the change, or call init again for a new state"
            )
    return state


def _shapes_by_path(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {f"state{jax.tree_util.keystr(path)}": jnp.shape(leaf) for path, leaf in leaves}
