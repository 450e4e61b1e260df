"""Checks a checkpoint against the model, the optimizer and the state layout, leaf by leaf."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from soap_optax.state import LAYOUT_VERSION


def check_checkpoint(checkpoint: Any, expected: Any) -> None:
    """Raises if a checkpoint does not fit the model and the optimizer, and names the leaf.

    Before a restore, pass the checkpoint's metadata, such as Orbax's. After it, and outside of
    `jax.jit`, pass the restored arrays: only their values include the layout version. Both
    arguments may be the whole training state or the same part of it. Prefer the whole: a stack
    holds blocks in the order of the parameters, and only the parameters have names.

    Example:
      >>> import jax, jax.numpy as jnp, soap_optax
      >>> optimizer = soap_optax.soap(3e-3)
      >>> def training_state(width):
      ...     params = {"kernel": jnp.ones((4, width))}
      ...     return {"params": params, "opt_state": optimizer.init(params)}
      >>> restored = training_state(3)
      >>> soap_optax.check_checkpoint(restored, jax.eval_shape(lambda: training_state(3)))

    Args:
      checkpoint: a tree whose leaves are arrays, or have a `shape` and a `dtype`. Paths are
        compared, not types: dicts may replace named tuples, and lists tuples, as in a restore by
        Orbax without a target.
      expected: the same part of the training state as this program makes it, as arrays or as
        `jax.ShapeDtypeStruct`, such as `jax.eval_shape` returns. A Python number matches any dtype.
        For a `jax.random.key` only the path is compared, because stored keys are plain integers.

    Raises:
      ValueError: if a SOAP state has a layout version other than this package's, or a leaf has
        another shape or dtype, is missing, or is not expected.
    """
    found, wanted = _leaves_by_path(checkpoint), _leaves_by_path(expected)
    for path, leaf in found.items():
        if _is_version(path, leaf) and np.any(np.asarray(leaf) != LAYOUT_VERSION):
            raise ValueError(
                f"checkpoint must have layout version {LAYOUT_VERSION}, which this soap_optax "
                f"reads, got {np.asarray(leaf)} at {path}; restore it with the version of "
                "soap_optax that wrote it, or see the changelog for how to convert it"
            )
    # Parameters tend to come after the state that depends on them, so name the first and the last.
    differing = [path for path in found if path not in wanted]
    differing += [
        path for path, leaf in wanted.items() if path not in found or not _agrees(found[path], leaf)
    ]
    if differing:
        first, *others = [
            f"{path} as {_text(path, found)} where {_text(path, wanted)} is expected"
            for path in differing
        ]
        raise ValueError(
            "checkpoint must have the leaves of expected, got "
            + first
            + (f" (and {len(others)} more, the last {others[-1]})" if others else "")
            + "; likely it has another model or another layout version, or was written with "
            "another block_size, max_precond_dim, merge_dims, precondition_1d, dimension_numbers, "
            "one_sided, factored, fold_factors, factor_estimator, grafting, mu_dtype, "
            "preconditioner_dtype or stack_multiple (which is the number of shards of "
            "stack_sharding where it is not given): use those of the run that wrote it"
        )


def _leaves_by_path(tree: Any) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _is_version(path: str, leaf: Any) -> bool:
    """Whether a leaf is a SOAP state's layout version and has a value."""
    has_value = isinstance(leaf, (jax.Array, np.ndarray, np.generic, int))
    # In `flax.nnx` the path continues after the name: every array is in a variable.
    return "layout_version" in path.split("/") and has_value and not isinstance(leaf, Tracer)


def _agrees(found: Any, wanted: Any) -> bool:
    """Whether a leaf has the expected shape and dtype, as far as a checkpoint stores them."""
    dtype = getattr(wanted, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.extended):
        return True  # A random key is stored as its data.
    if np.shape(found) != np.shape(wanted):
        return False
    has_fixed_dtype = dtype is not None and not getattr(wanted, "weak_type", False)
    return not has_fixed_dtype or getattr(found, "dtype", dtype) == dtype


def _text(path: str, leaves: dict[str, Any]) -> str:
    if path not in leaves:
        return "nothing"
    leaf = leaves[path]
    return f"{np.shape(leaf)} {getattr(leaf, 'dtype', type(leaf).__name__)}"
