"""Optax's Adam with SOAP's treatment of narrow dtypes, complex and non-finite gradients."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from soap_optax import blocks
from soap_optax.linalg import widened


def scale_by_guarded_adam(
    b1: ArrayLike, b2: ArrayLike, eps: ArrayLike, mu_dtype: DTypeLike | None
) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_adam`, made safe for narrow dtypes, complex and non-finite gradients.

    Parameters narrower than float32 have float32 moments. A complex parameter counts as two real
    ones, as in `soap`. If any gradient, or its square, is not finite, all updates are zero and the
    state does not change.

    Args:
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: number added to the square root of the second moment.
      mu_dtype: dtype of the first moment; None, or float64, means that of the second.

    Returns:
      A transformation whose state is that of `optax.scale_by_adam`. Updates have the dtypes of the
      gradients.
    """
    is_narrow = mu_dtype is not None and jnp.dtype(mu_dtype).itemsize < 8
    adam = optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype if is_narrow else None)

    def init_fn(params: optax.Params) -> optax.OptState:
        return adam.init(jax.tree.map(widened, blocks.split_complex(params)))

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del params, extra_args
        parts = blocks.split_complex(updates)
        grads = jax.tree.map(widened, parts)
        is_sound = _all_finite(grads)
        new_updates, new_state = adam.update(grads, state)
        new_updates = jax.tree.map(
            lambda new, old: jnp.where(is_sound, new, 0).astype(jnp.result_type(old)),
            new_updates,
            parts,
        )
        return blocks.join_complex(new_updates), jax.tree.map(
            lambda new, old: jnp.where(is_sound, new, old), new_state, state
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _all_finite(grads: optax.Updates) -> Array:
    """Whether all gradients and their squares are finite."""
    sound = (jnp.all(jnp.isfinite(jnp.square(grad))) for grad in jax.tree.leaves(grads))
    return functools.reduce(jnp.logical_and, sound, jnp.asarray(True))
