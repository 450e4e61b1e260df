"""Which check each argument of `soap` and `scale_by_soap` gets, before anything is traced."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, get_args

from soap_optax import values
from soap_optax.algorithm import FactorEstimator, RefreshMethod
from soap_optax.devices import shard_count
from soap_optax.stacks import RefreshOrder

_ALIAS_CHECKS: dict[str, Callable[[str, Any], None]] = {
    "learning_rate": values.check_learning_rate,
    "weight_decay": values.check_weight_decay,
    "mask": values.check_mask,
}

_CHECKS: dict[str, Callable[[str, Any], None]] = {
    "b1": values.check_decay,
    "b2": values.check_decay,
    "eps": values.check_eps,
    "shampoo_beta": lambda name, value: None if value is None else values.check_decay(name, value),
    "precondition_frequency": values.check_frequency,
    "max_precond_dim": values.check_max_precond_dim,
    "precondition_1d": values.check_flag,
    "merge_dims": values.check_flag,
    "normalize_grads": values.check_flag,
    "correct_bias": values.check_flag,
    "mu_dtype": values.check_dtype,
    "block_size": values.check_block_size,
    "dimension_numbers": partial(
        values.check_tree, entries="objects with reduction_axis and output_axis"
    ),
    "stack_sharding": values.check_stack_sharding,
    "stack_multiple": values.check_stack_multiple,
    "param_shardings": partial(values.check_tree, entries="NamedSharding"),
    "refresh": partial(values.check_choice, choices=get_args(RefreshMethod)),
    "refresh_tolerance": values.check_tolerance,
    "refresh_order": partial(values.check_choice, choices=get_args(RefreshOrder)),
    "stagger": values.check_flag,
    "one_sided": values.check_flag,
    "factored": values.check_flag,
    "preconditioner_dtype": values.check_dtype,
    "fold_factors": values.check_flag,
    "factor_estimator": partial(values.check_choice, choices=get_args(FactorEstimator)),
    "precision": values.check_precision,
}


def check_alias(**arguments: Any) -> None:
    """Raises if an argument that only `soap` has is out of range."""
    for name, value in arguments.items():
        _ALIAS_CHECKS[name](name, value)


def check_transform(**arguments: Any) -> None:
    """Raises if an argument of `scale_by_soap` is out of range or contradicts another."""
    for name, value in arguments.items():
        _CHECKS[name](name, value)
    _check_pairs(arguments)


def _check_pairs(arguments: Mapping[str, Any]) -> None:
    """Raises if two arguments contradict each other."""
    block_size, max_precond_dim = arguments["block_size"], arguments["max_precond_dim"]
    if block_size is not None and block_size > max_precond_dim:
        raise ValueError(
            f"block_size must be at most max_precond_dim ({max_precond_dim}), got {block_size}: a "
            "longer tile would have no preconditioner; lower block_size or raise max_precond_dim"
        )
    if arguments["dimension_numbers"] is not None and arguments["merge_dims"]:
        raise ValueError(
            "merge_dims must be False where dimension_numbers are given, got True: they already "
            "decide which axes are merged"
        )
    sharding, multiple = arguments["stack_sharding"], arguments["stack_multiple"]
    shards = 1 if sharding is None else shard_count(sharding)
    if multiple is not None and multiple % shards:
        raise ValueError(
            f"stack_multiple must be a multiple of the {shards} shards of stack_sharding, got "
            f"{multiple}; None means {shards}"
        )
    if arguments["param_shardings"] is not None and sharding is None:
        raise ValueError(
            "param_shardings must be None where stack_sharding is None: stacks that are not "
            "sharded need no hints"
        )
    if arguments["refresh_tolerance"] is not None and arguments["refresh"] == "partial":
        raise ValueError(
            "refresh_tolerance must be None where refresh is 'partial', got "
            f"{arguments['refresh_tolerance']}: a partial refresh costs less than measuring the "
            "off-diagonal mass"
        )
