"""Which check each argument of the public transformations gets, before anything is traced."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, get_args

from soap_optax import value_checks
from soap_optax.algorithm import FactorEstimator, FirstUpdate, Grafting, RefreshMethod
from soap_optax.blocks import DEFAULT_MAX_PRECOND_DIM
from soap_optax.devices import shard_count
from soap_optax.stacks import RefreshOrder


def _or_none(check: Callable[..., None], *limits: Any) -> Callable[[str, Any], None]:
    """The check, for a value that may also be None."""
    return lambda name, value: None if value is None else check(name, value, *limits)


_check_dimension_numbers = partial(
    value_checks.check_tree, entries="objects with reduction_axis and output_axis"
)

_ALIAS_CHECKS: dict[str, Callable[[str, Any], None]] = {
    "learning_rate": value_checks.check_learning_rate,
    "weight_decay": value_checks.check_weight_decay,
    "mask": value_checks.check_mask,
}

_HYPERBALL_CHECKS: dict[str, Callable[[str, Any], None]] = {
    "learning_rate": partial(value_checks.check_learning_rate, good_start="0.02"),
    "dimension_numbers": _check_dimension_numbers,
    "mask": value_checks.check_mask,
}

_CLIPPING_CHECKS: dict[str, Callable[[str, Any], None]] = {
    "max_ratio": value_checks.check_ratio,
    "decay": value_checks.check_decay,
}

_SOAP_ADAMW_CHECKS: dict[str, Callable[[str, Any], None]] = {
    "adamw_learning_rate": _or_none(value_checks.check_learning_rate),
    "adamw_b1": value_checks.check_decay,
    "adamw_b2": value_checks.check_decay,
    "labels": partial(value_checks.check_tree, entries="'soap' and 'adamw'"),
    "report": value_checks.check_report,
    "max_norm_ratio": _or_none(value_checks.check_ratio),
}

_CHECKS: dict[str, Callable[[str, Any], None]] = {
    "b1": value_checks.check_decay,
    "b2": value_checks.check_decay,
    "eps": value_checks.check_eps,
    "shampoo_beta": _or_none(value_checks.check_decay),
    "precondition_frequency": value_checks.check_frequency,
    "max_precond_dim": _or_none(
        value_checks.check_integer, 1, "for no preconditioning use optax.adamw"
    ),
    "precondition_1d": value_checks.check_flag,
    "merge_dims": value_checks.check_flag,
    "normalize_grads": value_checks.check_flag,
    "correct_bias": value_checks.check_flag,
    "first_update": partial(value_checks.check_choice, choices=get_args(FirstUpdate)),
    "mu_dtype": value_checks.check_dtype,
    "block_size": _or_none(value_checks.check_integer, 2, "None leaves every parameter whole"),
    "dimension_numbers": _check_dimension_numbers,
    "stack_sharding": value_checks.check_stack_sharding,
    "stack_multiple": _or_none(value_checks.check_integer, 1, "1 pads nothing"),
    "param_shardings": partial(value_checks.check_tree, entries="NamedSharding"),
    "refresh": partial(value_checks.check_choice, choices=get_args(RefreshMethod)),
    "refresh_tolerance": value_checks.check_tolerance,
    "refresh_order": partial(value_checks.check_choice, choices=get_args(RefreshOrder)),
    "stagger": value_checks.check_flag,
    "one_sided": value_checks.check_flag,
    "factored": value_checks.check_flag,
    "factor_estimator": partial(value_checks.check_choice, choices=get_args(FactorEstimator)),
    "preconditioner_dtype": value_checks.check_dtype,
    "fold_factors": value_checks.check_flag,
    "precision": value_checks.check_precision,
}


_SHAMPOO_CHECKS: dict[str, Callable[[str, Any], None]] = {
    "eps": partial(
        value_checks.check_eps, default="1e-12", why="a factor may have no inverse root"
    ),
    "grafting_eps": value_checks.check_eps,
    "exponent": value_checks.check_exponent,
    "grafting": partial(value_checks.check_choice, choices=get_args(Grafting), is_optional=True),
}


def check_alias(**arguments: Any) -> None:
    """Raises if an argument that only `soap` has is out of range."""
    for name, value in arguments.items():
        _ALIAS_CHECKS[name](name, value)


def check_hyperball(**arguments: Any) -> None:
    """Raises if an argument of `hyperball` is out of range."""
    for name, value in arguments.items():
        _HYPERBALL_CHECKS[name](name, value)


def check_clipping(**arguments: Any) -> None:
    """Raises if an argument of `clip_by_running_norm` is out of range."""
    for name, value in arguments.items():
        _CLIPPING_CHECKS[name](name, value)


def check_soap_adamw(**arguments: Any) -> None:
    """Raises if an argument that only `soap_adamw` has is out of range."""
    for name, value in arguments.items():
        _SOAP_ADAMW_CHECKS[name](name, value)


def check_left_to_default_dimension_numbers(**flags: bool) -> None:
    """Raises if `soap_adamw` gets an option that its default dimension numbers overrule."""
    for name, value in flags.items():
        _CHECKS[name](name, value)
        if value:
            raise ValueError(
                f"{name} must be False where default_dimension_numbers decide about the axes, got "
                "True; pass dimension_numbers=lambda params: None for the treatment by soap"
            )


def check_shampoo(**arguments: Any) -> None:
    """Raises if an argument of `scale_by_shampoo` is out of range or contradicts another."""
    for name, value in arguments.items():
        (_CHECKS | _SHAMPOO_CHECKS)[name](name, value)
    _check_pairs({"refresh_tolerance": None, **arguments})
    if arguments["factor_estimator"] == "gram" and arguments["refresh"] != "eigh":
        raise ValueError(
            "refresh must be 'eigh' where factor_estimator is 'gram', got "
            f"{arguments['refresh']!r}: inverse roots come from an eigendecomposition; drop "
            "refresh, or choose factor_estimator='kl', which has bases"
        )


def check_transform(**arguments: Any) -> None:
    """Raises if an argument of `scale_by_soap` is out of range or contradicts another."""
    for name, value in arguments.items():
        _CHECKS[name](name, value)
    _check_pairs(arguments)


def _check_pairs(arguments: Mapping[str, Any]) -> None:
    """Raises if two arguments contradict each other."""
    block_size, max_precond_dim = arguments["block_size"], arguments["max_precond_dim"]
    max_precond_dim = DEFAULT_MAX_PRECOND_DIM if max_precond_dim is None else max_precond_dim
    if block_size is not None and block_size > max_precond_dim:
        raise ValueError(
            f"block_size must be at most max_precond_dim ({max_precond_dim}), got {block_size}: a "
            "longer tile would have no preconditioner; lower block_size or raise max_precond_dim"
        )
    if arguments["dimension_numbers"] is not None and arguments["merge_dims"]:
        raise ValueError(
            "merge_dims must be False where dimension_numbers are given, got True: they already "
            "decide which axes are merged; name all axes to merge in reduction_axis or output_axis"
        )
    sharding, multiple = arguments["stack_sharding"], arguments["stack_multiple"]
    shards = shard_count(sharding)
    if multiple is not None and multiple % shards:
        raise ValueError(
            f"stack_multiple must be a multiple of the {shards} shards of stack_sharding, got "
            f"{multiple}; None means {shards}"
        )
    if arguments["param_shardings"] is not None and sharding is None:
        raise ValueError(
            "param_shardings must be None where stack_sharding is None, because the state is not "
            "sharded; pass stack_sharding too, or drop param_shardings"
        )
    if arguments["refresh_tolerance"] is not None and arguments["refresh"] == "partial":
        raise ValueError(
            "refresh_tolerance must be None where refresh is 'partial', got "
            f"{arguments['refresh_tolerance']}: a partial refresh costs less than measuring the "
            "off-diagonal mass; drop refresh_tolerance, or choose another refresh"
        )
