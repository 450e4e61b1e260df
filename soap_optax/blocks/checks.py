"""Checks of the trees and the state that `init` and `update` receive, and the plan of a tree."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from soap_optax.blocks.plan import Plan, make_plan
from soap_optax.blocks.views import BlockOptions, axes_of_leaves
from soap_optax.state import ScaleBySoapState


def plan_of(
    tree: Any, options: BlockOptions, dimension_numbers: Any = None, multiple: int = 1
) -> Plan:
    """The plan of a tree of parameters or gradients, checked leaf by leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    dtypes = [jnp.result_type(leaf) for _, leaf in leaves]
    check_leaves([path for path, _ in leaves], dtypes)
    axes = axes_of_leaves(dimension_numbers, tree)
    return _cached_plan(
        tuple(jnp.shape(leaf) for _, leaf in leaves), tuple(dtypes), options, tuple(axes), multiple
    )


_cached_plan = lru_cache(maxsize=64)(make_plan)


def is_placeholder(params: Any) -> bool:
    """Whether `params` is the placeholder with which `optax.tree_map_params` calls `init`.

    It is a private node without leaves. Optax uses it to find the leaves of a state that mirror the
    parameters.
    """
    return type(params).__name__ == "_ParamsPlaceholder"


def check_leaves(paths: Sequence[Any], dtypes: Sequence[DTypeLike]) -> None:
    """Raises if a leaf is not real floating point."""
    for path, dtype in zip(paths, dtypes, strict=True):
        if not jnp.issubdtype(dtype, jnp.floating):
            where = jax.tree_util.keystr(path) or "the tree itself"
            raise TypeError(
                f"every leaf must be a real floating-point array, got {dtype} at "
                f"{where}; leave it out with optax.masked, or give it an optimizer of its own with "
                "optax.partition"
            )


def check_state(state: Any, expected: Any) -> ScaleBySoapState:
    """Returns the state, or raises if `init` would make another one for these gradients.

    Args:
      state: the state handed to `update`.
      expected: the state that `init` makes for these gradients, as a tree of shapes.
    """
    if not isinstance(state, ScaleBySoapState):
        raise TypeError(
            f"state must be a ScaleBySoapState, got {type(state).__name__}; pass what init returned"
        )
    wanted = _shapes_by_path(expected)
    found = _shapes_by_path(state)
    for path in [*wanted, *found]:
        if wanted.get(path) != found.get(path):
            raise ValueError(
                f"the state does not belong to these gradients: {path} has shape "
                f"{found.get(path, '(absent)')} and must have {wanted.get(path, '(absent)')}; "
                "likely the tree, a shape, a dtype from or to float64, or one of block_size, "
                "max_precond_dim, merge_dims, precondition_1d, dimension_numbers, stack_multiple "
                "(which is the number of shards of stack_sharding where it is not given), "
                "one_sided, factored, fold_factors changed after init, so call init again or "
                "restore the options"
            )
    return state


def _shapes_by_path(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {f"state{jax.tree_util.keystr(path)}": jnp.shape(leaf) for path, leaf in leaves}
