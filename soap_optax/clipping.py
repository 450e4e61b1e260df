"""The transformation `clip_by_running_norm`: a limit on gradients relative to earlier ones."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike

from soap_optax import arguments
from soap_optax.linalg import norm_along
from soap_optax.state import ClipByRunningNormState


def clip_by_running_norm(
    max_ratio: ArrayLike = 3.0, decay: ArrayLike = 0.95
) -> optax.GradientTransformation:
    r"""Clips the global norm of gradients to a multiple of its mean over earlier steps.

    Use it as the first transformation of a chain, before `soap` or `scale_by_soap`. It keeps a
    gradient that is far too large out of the moments and the factors, where its square would count
    for hundreds of steps. Unlike `optax.clip_by_global_norm`, it needs no typical norm. With the
    norm :math:`n_t = \|G_t\|_F` of all gradients, ``max_ratio`` :math:`r` and ``decay``
    :math:`\beta`,

    .. math::

      \begin{align*}
        c_t &= \min(n_t, \, r \, \frac{m_{t-1}}{1 - \beta^{t-1}}) \\
        m_t &= \beta \, m_{t-1} + (1 - \beta) \, c_t
      \end{align*}

    and the gradients are multiplied by :math:`c_t / n_t`. The first gradient is not clipped, and
    gradients that are not clipped stay as they are, bit by bit. If norms grow for good, the limit
    follows them: by a factor of :math:`\beta + (1 - \beta) r` in each step, 1.1 by default.

    Parameters whose gradient is not finite do not count in the norm, and `soap` rejects their
    gradients. A step in which no parameter counts does not change the state.

    Example:
      >>> import jax.numpy as jnp, optax, soap_optax
      >>> optimizer = optax.chain(soap_optax.clip_by_running_norm(), soap_optax.soap(3e-3))
      >>> clip = soap_optax.clip_by_running_norm(max_ratio=2.0)
      >>> state = clip.init(jnp.zeros(2))
      >>> for grads in ([3.0, 4.0], [300.0, 400.0]):
      ...     updates, state = clip.update(jnp.asarray(grads), state)
      >>> updates
      Array([6., 8.], dtype=float32)

    Args:
      max_ratio: the largest norm relative to the mean of earlier ones, more than 1.
      decay: decay of the mean, in [0, 1).

    Returns:
      A transformation whose state is a `ClipByRunningNormState`. Updates have the dtypes of the
      gradients. On a mesh, the norm is that of whole gradients; within `jax.shard_map` it is that
      of the device's own ones.

    Raises:
      TypeError, ValueError: when built, if an argument is out of range.
    """
    arguments.check_clipping(max_ratio=max_ratio, decay=decay)

    def init_fn(params: optax.Params) -> ClipByRunningNormState:
        # As computed from the parameters, it has their mesh and the dtype of later norms.
        mean_norm = jnp.zeros_like(_global_norm(params))
        return ClipByRunningNormState(jnp.zeros((), jnp.int32), mean_norm)

    def update_fn(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ClipByRunningNormState]:
        del params
        count, mean_norm = state.count, state.mean_norm  # pyright: ignore[reportAttributeAccessIssue]
        norm = _global_norm(updates).astype(mean_norm.dtype)
        beta = jnp.asarray(decay, mean_norm.dtype)
        limit = jnp.asarray(max_ratio, mean_norm.dtype) * mean_norm
        limit = limit / (1 - beta ** count.astype(mean_norm.dtype))
        limit = jnp.where(count > 0, limit, jnp.inf)
        clipped = jnp.minimum(norm, limit)
        ratio = jnp.where(norm > limit, limit / norm, 1)
        counts = (clipped > 0) & jnp.isfinite(clipped)
        new_state = ClipByRunningNormState(
            jnp.where(counts, optax.safe_increment(count), count),
            jnp.where(counts, beta * mean_norm + (1 - beta) * clipped, mean_norm),
        )
        return jax.tree.map(lambda grad: _scaled(grad, ratio), updates), new_state

    return optax.GradientTransformation(init_fn, update_fn)


def _widened(leaf: ArrayLike) -> Array:
    # NumPy's promotion: JAX's raises in its strict mode.
    return jnp.asarray(leaf, np.promote_types(jnp.result_type(leaf), np.float32))


def _scaled(grad: ArrayLike, ratio: Array) -> Array:
    wide = _widened(grad)
    return (wide * ratio.astype(wide.dtype)).astype(jnp.result_type(grad))


def _global_norm(tree: Any) -> Array:
    """The norm of all leaves without those that are not finite, in the dtype of the widest."""
    leaves = [leaf for leaf in map(_widened, jax.tree.leaves(tree)) if leaf.size]
    norms = [
        norm_along(jnp.where(jnp.all(jnp.isfinite(leaf)), leaf, 0), tuple(range(leaf.ndim)))
        for leaf in leaves
    ]
    widest = np.result_type(np.float32, *[norm.dtype for norm in norms])
    stacked = jnp.stack([norm.reshape(()).astype(widest) for norm in norms] or [jnp.zeros(())])
    return norm_along(stacked, (0,)).reshape(())
