"""Checks of what users pass in, made before anything is traced.

Every message names the argument, its value, the rule and the way out. A traced value, as
`optax.inject_hyperparams` passes it, is taken as it is.
"""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from soap_optax.placement import axes_of

_STATIC_HINT = (
    "; under optax.inject_hyperparams pass static_args=soap_optax.STATIC_ARGS, because it decides "
    "shapes or branches and cannot be traced"
)


def check_decay(name: str, value: Any) -> None:
    """Raises unless `value` is in [0, 1)."""
    number = _number(value, f"{name} must be a number in [0, 1)")
    if not _is_traced(number) and not 0 <= _as_float32(number) < 1:
        raise ValueError(
            f"{name} must be in [0, 1) as a float32, got {value}; 0 keeps no memory, 0.95 is the "
            "usual value; if optax.inject_hyperparams rounded it to bfloat16, as it does for "
            "parameters in bfloat16, pass it hyperparam_dtype=jnp.float32"
        )


def check_eps(value: Any) -> None:
    """Raises unless `value` is positive and finite."""
    number = _number(value, "eps must be a positive number")
    if not _is_traced(number) and not _TINY <= _as_float32(number) < math.inf:
        raise ValueError(
            f"eps must be positive and finite as a normal float32, got {value}; it keeps an entry "
            "that never had a gradient from becoming 0/0, and 1e-30 is as good as none"
        )


def check_learning_rate(value: Any) -> None:
    """Raises unless `value` is a finite number or a schedule."""
    if callable(value):
        return
    number = _number(value, "learning_rate must be a number or a schedule (a function of the step)")
    if not _is_traced(number) and not math.isfinite(number):
        raise ValueError(f"learning_rate must be finite, got {value}; 3e-3 is a good start")


def check_weight_decay(value: Any) -> None:
    """Raises unless `value` is a finite number that is not negative, or a schedule."""
    if callable(value):
        return
    number = _number(value, "weight_decay must be a number or a schedule")
    if not _is_traced(number) and not 0 <= number < math.inf:
        raise ValueError(
            f"weight_decay must be finite and not negative, got {value}; 0 decays nothing"
        )


def check_mask(value: Any) -> None:
    """Raises where a mask is a single value that is no boolean."""
    if isinstance(value, (str, numbers.Number)) and not isinstance(value, bool):
        raise TypeError(
            "mask must be None, a tree of booleans that matches the parameters, or a function of "
            f"the parameters that returns one, got {value!r}"
        )


def check_frequency(value: Any) -> None:
    """Raises unless `value` is an integer of at least 1, or a schedule."""
    if callable(value):
        return
    number = _number(value, "precondition_frequency must be an integer or a schedule")
    if _is_traced(number):
        return
    if not 1 <= number < math.inf:
        raise ValueError(
            f"precondition_frequency must be at least 1, got {value}; 1 refreshes in every step, "
            "and for no preconditioning use optax.adamw"
        )
    if number > np.iinfo(np.int32).max:
        raise ValueError(
            f"precondition_frequency must fit into 32 bits, got {value}; 2147483647 never "
            "refreshes after the first basis"
        )
    if number != int(number):
        raise ValueError(
            f"precondition_frequency must be a whole number of steps, got {value}; round it, or "
            "pass a schedule for a changing one"
        )


def check_max_precond_dim(value: Any) -> None:
    """Raises unless `value` is an integer of at least 1."""
    check_integer("max_precond_dim", value, 1, "for no preconditioning use optax.adamw")


def check_block_size(value: Any, max_precond_dim: int) -> None:
    """Raises unless `value` is None or an integer from 2 to `max_precond_dim`."""
    if value is None:
        return
    check_integer("block_size", value, 2, "None leaves every parameter whole")
    if value > max_precond_dim:
        raise ValueError(
            f"block_size must be at most max_precond_dim ({max_precond_dim}), got {value}: a "
            "longer tile would have no preconditioner; lower block_size or raise max_precond_dim"
        )


def check_dimension_numbers(value: Any, merge_dims: bool) -> None:
    """Raises where `value` cannot be a tree of dimension numbers, or contradicts `merge_dims`."""
    if isinstance(value, (bool, str, numbers.Number)):
        raise TypeError(
            "dimension_numbers must be None, a tree of objects with reduction_axis and "
            f"output_axis, or a function of the parameters that returns one, got {value!r}"
        )
    if value is not None and merge_dims:
        raise ValueError(
            "merge_dims must be False where dimension_numbers are given, got True: they already "
            "say which axes are taken together"
        )


def check_stack_sharding(value: Any, is_optional: bool = True) -> None:
    """Raises unless `value` is a sharding of the leading axis alone, or None where that will do."""
    if value is None and is_optional:
        return
    if not isinstance(value, NamedSharding) or not isinstance(value.mesh, Mesh):
        raise TypeError(
            f"stack_sharding must be {'None or ' * is_optional}a NamedSharding of a Mesh, such as "
            f"NamedSharding(mesh, P('data')), got {value!r}"
        )
    leading, others = tuple(value.spec[:1]), value.spec[1:]
    if leading in ((), (None,), (PartitionSpec.UNCONSTRAINED,)) or any(others):
        raise ValueError(
            "stack_sharding must divide the leading axis and no other, got "
            f"{value.spec}; name all mesh axes to divide by in one entry, as in "
            "PartitionSpec(('data', 'fsdp'))"
        )
    automatic = [axis for axis in axes_of(value) if axis in value.mesh.auto_axes]
    if value.mesh.explicit_axes and automatic:
        raise ValueError(
            "stack_sharding must name explicit axes alone where its mesh has any, but of "
            f"{value.spec}, {automatic[0]!r} is automatic; make all of one type, or name no other"
        )
    if value.memory_kind == "pinned_host":
        raise ValueError(
            "stack_sharding must be in the devices' memory, got memory_kind='pinned_host'; move a "
            "state to the host and back between steps, with jax.device_put"
        )


def check_stack_multiple(value: Any, shards: int) -> None:
    """Raises unless `value` is None or an integer that a stack's shards divide evenly."""
    if value is None:
        return
    check_integer("stack_multiple", value, 1, "1 pads nothing")
    if value % shards:
        raise ValueError(
            f"stack_multiple must be a multiple of the {shards} shards of stack_sharding, got "
            f"{value}; None means {shards}"
        )


def check_param_shardings(value: Any, stack_sharding: NamedSharding | None) -> None:
    """Raises where `value` cannot be a tree of shardings, or there are no stacks to divide."""
    if isinstance(value, (bool, str, numbers.Number)):
        raise TypeError(
            "param_shardings must be None, a tree of NamedSharding that matches the parameters, or "
            f"a function of the parameters that returns one, got {value!r}"
        )
    if value is not None and stack_sharding is None:
        raise ValueError(
            "param_shardings must be None where stack_sharding is None: undivided stacks are "
            "exchanged with nobody"
        )


def check_flag(name: str, value: Any) -> None:
    """Raises unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}{_STATIC_HINT}")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raises unless `value` is one of a few words."""
    rule = f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}"
    if not isinstance(value, str):
        raise TypeError(rule + _STATIC_HINT)
    if value not in choices:
        raise ValueError(rule)


def check_tolerance(value: Any, method: str) -> None:
    """Raises unless `value` is None or a part of a whole, and the method measures it."""
    if value is None:
        return
    number = _number(value, "refresh_tolerance must be None or a number in [0, 1]")
    if not _is_traced(number) and not 0 <= number <= 1:
        raise ValueError(
            f"refresh_tolerance must be in [0, 1], got {value}; it is a part of the factors' norm, "
            "0.02 skips what a refresh would hardly change, and None skips nothing"
        )
    if method == "partial":
        raise ValueError(
            "refresh_tolerance must be None where refresh is 'partial', got "
            f"{value}: to measure the off-diagonal mass costs more than such a refresh"
        )


def check_precision(value: Any) -> None:
    """Raises unless `value` is None or one precision for both arrays of a product."""
    if value is None:
        return
    matrix = jax.ShapeDtypeStruct((1, 1), np.float32)  # An array would start JAX's backends.
    try:
        if isinstance(value, tuple):  # A basis is the first of both along one axis only.
            raise TypeError("two precisions")
        if str(getattr(value, "name", value)).upper().startswith(("F16_", "ANY_F8_")):
            raise ValueError("narrower in range than float32")
        jax.eval_shape(lambda x: jnp.matmul(x, x, precision=value), matrix)
    except (TypeError, ValueError) as error:
        raise ValueError(
            "precision must be None or one that jax.lax.dot takes for both arrays, with the range "
            f"of float32, such as 'highest' or jax.lax.Precision.HIGH, got {value!r}"
        ) from error


def check_dtype(name: str, value: DTypeLike | None) -> None:
    """Raises unless `value` is None or a float at least as wide and as precise as bfloat16."""
    if value is None:
        return
    try:
        dtype = jnp.dtype(value)
    except TypeError as error:
        raise TypeError(
            f"{name} must be None or a floating dtype such as jnp.bfloat16, got {value!r}"
        ) from error
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{name} must be None or a floating dtype such as jnp.bfloat16, got {dtype.name}"
        )
    if jnp.finfo(dtype).maxexp < jnp.finfo(np.float32).maxexp:
        raise ValueError(
            f"{name} must be as wide in range as float32, got {dtype.name}, in which an ordinary "
            "gradient may become an infinity; jnp.bfloat16 has that range in 16 bits"
        )
    if jnp.finfo(dtype).nmant < jnp.finfo(jnp.bfloat16).nmant:
        raise ValueError(
            f"{name} must be as precise as bfloat16, got {dtype.name}, in which averages stand "
            "still; pass jnp.bfloat16"
        )


def check_integer(
    name: str,
    value: Any,
    least: int,
    way_out: str,
    hint: str = _STATIC_HINT,
    most: int | None = None,
) -> None:
    """Raises unless `value` is an integer of at least `least`, and at most `most` if given."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer of at least {least}, got {value!r}{hint}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}; {way_out}")
    if most is not None and int(value) > most:
        raise ValueError(f"{name} must be at most {most}, got {value}")


_TINY = np.finfo(np.float32).tiny


def _as_float32(number: float) -> np.float32:
    with np.errstate(over="ignore"):  # What is too large becomes an infinity, and is refused.
        return np.float32(number)


def _is_traced(value: Any) -> bool:
    return isinstance(value, Tracer)


def _number(value: Any, rule: str) -> Any:
    """The Python number behind a real scalar; a traced value as it is."""
    if _is_traced(value):
        return value
    if isinstance(value, (jax.Array, np.ndarray, np.generic)) and np.ndim(value) == 0:
        value = np.asarray(value).item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{rule}, got {value!r}")
    return value
