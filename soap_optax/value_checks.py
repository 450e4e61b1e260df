"""Checks of one value that a user passes in.

Every check takes the argument's name and its value. Every message has both, the rule and a remedy.
Traced values, such as `optax.inject_hyperparams` passes, are not checked.
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

_STATIC_HINT = (
    "; under optax.inject_hyperparams pass static_args=soap_optax.STATIC_ARGS, or for shampoo "
    "soap_optax.SHAMPOO_STATIC_ARGS, or for soap_adamw soap_optax.SOAP_ADAMW_STATIC_ARGS, because "
    "it decides shapes or branches and cannot be traced"
)
_COMPLEX_HINT = "; for complex parameters pass inject_hyperparams hyperparam_dtype=jnp.float32"


def check_decay(name: str, value: Any) -> None:
    """Raises unless `value` is in [0, 1)."""
    number = _number(value, f"{name} must be a number in [0, 1)")
    if not _is_traced(number) and not 0 <= _as_float32(number) < 1:
        raise ValueError(
            f"{name} must be in [0, 1) as a float32, got {value}; 0 keeps no memory, 0.95 is the "
            "usual value; if optax.inject_hyperparams rounded it to bfloat16, as it does for "
            "parameters in bfloat16, pass it hyperparam_dtype=jnp.float32"
        )


def check_eps(
    name: str,
    value: Any,
    default: str = "1e-8",
    why: str = "an entry that never had a gradient would become 0/0",
) -> None:
    """Raises unless `value` is positive and finite."""
    number = _number(value, f"{name} must be a positive number")
    if not _is_traced(number) and not _TINY <= _as_float32(number) < math.inf:
        raise ValueError(
            f"{name} must be positive and finite as a normal float32, got {value}; pass {default}, "
            f"the default, or 1e-30, which is as good as none: without it {why}; if "
            "optax.inject_hyperparams rounded it to float16, as it does for parameters in float16, "
            "pass it hyperparam_dtype=jnp.float32"
        )


def check_ratio(name: str, value: Any) -> None:
    """Raises unless `value` is a finite number above 1."""
    number = _number(value, f"{name} must be a number above 1")
    if not _is_traced(number) and not 1 < _as_float32(number) < math.inf:
        raise ValueError(
            f"{name} must be finite and above 1 as a float32, got {value}; 3 clips norms to three "
            "times their mean, and with 1 or less the mean could never grow"
        )


def check_exponent(name: str, value: Any) -> None:
    """Raises unless `value` is None or a number in (0, 1]."""
    if value is None:
        return
    number = _number(value, f"{name} must be None or a number in (0, 1]")
    if not _is_traced(number) and not 0 < _as_float32(number) <= 1:
        raise ValueError(
            f"{name} must be in (0, 1], got {value}; it is the exponent of each side, 0.25 for a "
            "matrix in the original paper, and None means 1/(2k) for k preconditioned axes"
        )


def check_learning_rate(name: str, value: Any, good_start: str = "3e-3") -> None:
    """Raises unless `value` is a finite number or a schedule."""
    if callable(value):
        return
    number = _number(value, f"{name} must be a number or a schedule (a function of the step)")
    if not _is_traced(number) and not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {value}; {good_start} is a good start")


def check_weight_decay(name: str, value: Any) -> None:
    """Raises unless `value` is a finite number that is not negative, or a schedule."""
    if callable(value):
        return
    number = _number(value, f"{name} must be a number or a schedule")
    if not _is_traced(number) and not 0 <= number < math.inf:
        raise ValueError(f"{name} must be finite and not negative, got {value}; 0 decays nothing")


def check_mask(name: str, value: Any) -> None:
    """Raises if a mask is a single value, such as the one of a function of the step."""
    if isinstance(value, (str, numbers.Number, np.bool_)):
        raise TypeError(
            f"{name} must be None, a tree of booleans that matches the parameters, or a function "
            f"of the parameters that returns one, got {value!r}; None takes every parameter; under "
            f"optax.inject_hyperparams add {name!r} to static_args: it calls functions as schedules"
        )


def check_frequency(name: str, value: Any) -> None:
    """Raises unless `value` is an integer of at least 1, or a schedule."""
    if callable(value):
        return
    number = _number(value, f"{name} must be an integer or a schedule")
    if _is_traced(number):
        return
    if not 1 <= number < math.inf:
        raise ValueError(
            f"{name} must be at least 1, got {value}; 1 refreshes in every step, "
            "and for no preconditioning use optax.adamw"
        )
    if number > np.iinfo(np.int32).max:
        raise ValueError(
            f"{name} must fit into 32 bits, got {value}; 2147483647 never "
            "refreshes after the first basis"
        )
    if number != int(number):
        raise ValueError(
            f"{name} must be a whole number of steps, got {value}; round it, or pass a schedule"
        )


def check_tree(name: str, value: Any, entries: str) -> None:
    """Raises if `value` cannot be a tree with entries for parameters, or a function of them."""
    if isinstance(value, (bool, str, numbers.Number)):
        raise TypeError(
            f"{name} must be None, a tree of {entries} that matches the parameters, or a function "
            f"of the parameters that returns one, got {value!r}" + _STATIC_HINT
        )


def check_report(name: str, value: Any) -> None:
    """Raises unless `value` is None or a function."""
    if value is not None and not callable(value):
        raise TypeError(
            f"{name} must be None or a function of a Description, got {value!r}; print is one"
            + _STATIC_HINT
        )


def check_stack_sharding(name: str, value: Any, is_optional: bool = True) -> None:
    """Raises unless `value` is a sharding of axis 0 alone, or None where that is allowed."""
    if value is None and is_optional:
        return
    if not isinstance(value, NamedSharding) or not isinstance(value.mesh, Mesh):
        raise TypeError(
            f"{name} must be {'None or ' * is_optional}a NamedSharding of a Mesh, such as "
            f"NamedSharding(mesh, P('data')), got {value!r}"
        )
    leading, others = tuple(value.spec[:1]), value.spec[1:]
    if leading in ((), (None,), (PartitionSpec.UNCONSTRAINED,)) or any(others):
        raise ValueError(
            f"{name} must shard axis 0 and no other, got {value.spec}; name all mesh axes in one "
            "entry, as in PartitionSpec(('data', 'fsdp'))"
        )
    [first] = leading
    named = first if isinstance(first, tuple) else (first,)
    automatic = [axis for axis in named if axis in value.mesh.auto_axes]
    if value.mesh.explicit_axes and automatic:
        raise ValueError(
            f"{name} must name explicit axes only if its mesh has any, got {value.spec}, where "
            f"{automatic[0]!r} is automatic; leave automatic axes out, or give all axes of the "
            "mesh the same type"
        )
    if value.memory_kind == "pinned_host":
        raise ValueError(
            f"{name} must be in the devices' memory, got memory_kind='pinned_host'; move a state "
            "to the host and back between steps, with jax.device_put"
        )


def check_flag(name: str, value: Any) -> None:
    """Raises unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}{_STATIC_HINT}")


def check_choice(name: str, value: Any, choices: Sequence[str], is_optional: bool = False) -> None:
    """Raises unless `value` is one of the choices, or None where that is allowed."""
    if value is None and is_optional:
        return
    listed = ", ".join(map(repr, choices))
    rule = f"{name} must be {'None or ' * is_optional}one of {listed}, got {value!r}"
    if not isinstance(value, str):
        raise TypeError(rule + _STATIC_HINT)
    if value not in choices:
        raise ValueError(rule)


def check_tolerance(name: str, value: Any) -> None:
    """Raises unless `value` is None or a number in [0, 1]."""
    if value is None:
        return
    number = _number(value, f"{name} must be None or a number in [0, 1]")
    if not _is_traced(number) and not 0 <= number <= 1:
        raise ValueError(
            f"{name} must be in [0, 1], got {value}; it is a share of the factors' norm, 0.02 "
            "skips refreshes that hardly change a basis, and None skips none"
        )


def check_precision(name: str, value: Any) -> None:
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
            f"{name} must be None or one that jax.lax.dot takes for both arrays, with the range of "
            f"float32, got {value!r}; pass 'highest', jax.lax.Precision.HIGH, or None for the "
            "platform's default"
        ) from error


def check_dtype(name: str, value: Any) -> None:
    """Raises unless `value` is None or a float at least as wide and as precise as bfloat16."""
    if value is None:
        return
    rule = f"{name} must be None or a floating dtype such as jnp.bfloat16, got "
    if isinstance(value, (jax.Array, np.ndarray)):
        raise TypeError(f"{rule}{value!r}{_STATIC_HINT}")
    try:
        dtype = jnp.dtype(value)
    except TypeError as error:
        raise TypeError(f"{rule}{value!r}") from error
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{rule}{dtype.name}")
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
        raise TypeError(
            f"{name} must be an integer of at least {least}, got {value!r}; pass a Python integer"
            + hint
        )
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}; {way_out}")
    if most is not None and int(value) > most:
        raise ValueError(
            f"{name} must be at most {most}, got {value}; lower it, {most} is in effect infinity"
        )


_TINY = np.finfo(np.float32).tiny


def _as_float32(number: float) -> np.float32:
    with np.errstate(over="ignore"):  # A number that is too large becomes infinity, and raises.
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
        raise TypeError(f"{rule}, got {value!r}{_COMPLEX_HINT * isinstance(value, complex)}")
    return value
