"""The transformation `clip_by_running_norm`: a limit on gradients relative to earlier ones."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike

from soap_optax import arguments
from soap_optax.linalg import norm_along, widened
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
        c_t &= \min(n_t, \, r \, m_{t-1}) \\
        w_t &= \beta \, w_{t-1} + 1 - \beta \\
        m_t &= m_{t-1} + \frac{1 - \beta}{w_t} \, (c_t - m_{t-1})
      \end{align*}

    from :math:`w_0 = 0`, and the gradients are multiplied by :math:`c_t / n_t`. The mean
    :math:`m_t` has no bias to correct. Gradients that are not clipped stay as they are, bit by bit.
    The first gradient is never clipped: if it is too large, so is the limit for some fifty steps.
    If norms grow for good, the limit follows them: by a factor of
    :math:`\beta + (1 - \beta) r` in each step, 1.1 by default.

    A parameter whose gradient, or its square, is not finite does not count in the norm and keeps
    its gradient, which `soap` rejects. A step with such a parameter does not change the mean, nor
    does one in which all gradients are zero.

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
        # As computed from the parameters, they have their mesh, and the dtype of later norms.
        zero = jnp.zeros_like(_norm_of(params).norm)
        return ClipByRunningNormState(weight=zero, mean_norm=zero)

    def update_fn(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ClipByRunningNormState]:
        del params
        weight, mean = state.weight, state.mean_norm  # pyright: ignore[reportAttributeAccessIssue]
        norm, counted, all_count = _norm_of(updates)
        limit = (jnp.asarray(max_ratio, mean.dtype) * mean).astype(norm.dtype)
        clips = (mean > 0) & (norm > limit)
        # Where nothing is clipped the denominator is 1, so that no derivative is NaN.
        ratio = jnp.where(clips, limit, 1) / jnp.where(clips, norm, 1)
        clipped = jnp.where(clips, limit, norm).astype(mean.dtype)
        share = 1 - jnp.asarray(decay, mean.dtype)
        new_weight = weight + share * (1 - weight)
        new_mean = mean + share / jnp.where(new_weight > 0, new_weight, 1) * (clipped - mean)
        is_sound = (new_mean > 0) & jnp.isfinite(new_mean) & (new_weight > 0)
        moves = all_count & (norm > 0) & is_sound
        new_state = ClipByRunningNormState(
            jnp.where(moves, new_weight, weight), jnp.where(moves, new_mean, mean)
        )
        leaves, treedef = jax.tree.flatten(updates)
        new_leaves = [
            leaf if counts is None else _scaled(leaf, ratio, clips & counts)
            for leaf, counts in zip(leaves, counted, strict=True)
        ]
        return jax.tree.unflatten(treedef, new_leaves), new_state

    return optax.GradientTransformation(init_fn, update_fn)


class _Norm(NamedTuple):
    """The norm of a tree.

    Attributes:
      norm: the norm of all leaves that count, a scalar in the dtype of the widest leaf.
      counted: for each leaf whether it counts, a boolean scalar; None for a leaf of integers.
      all_count: whether all leaves count, a boolean scalar.
    """

    norm: Array
    counted: list[Array | None]
    all_count: Array


def _norm_of(tree: Any) -> _Norm:
    """The norm of all leaves whose squares are finite."""
    leaves = jax.tree.leaves(tree)
    wide = [widened(leaf) if _is_inexact(leaf) else None for leaf in leaves]
    counted = [None if x is None else jnp.all(jnp.isfinite(x * jnp.conj(x))) for x in wide]
    norms = [
        norm_along(jnp.where(counts, leaf, 0), tuple(range(leaf.ndim))).reshape(())
        for leaf, counts in zip(wide, counted, strict=True)
        if leaf is not None and counts is not None and leaf.size
    ]
    widest = np.result_type(np.float32, *[norm.dtype for norm in norms])
    stacked = jnp.stack([norm.astype(widest) for norm in norms] or [jnp.zeros((), widest)])
    known = [counts for counts in counted if counts is not None]
    all_count = jnp.all(jnp.stack(known)) if known else jnp.asarray(True)
    return _Norm(norm_along(stacked, (0,)).reshape(()), counted, all_count)


def _is_inexact(leaf: Any) -> bool:
    return bool(jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), jnp.inexact))


def _scaled(grad: ArrayLike, ratio: Array, clips: Array) -> Array:
    """The gradient times the ratio where it is clipped, in its own dtype."""
    wide = widened(grad)
    narrow = (wide * ratio.astype(wide.dtype)).astype(jnp.result_type(grad))
    return jnp.where(clips, narrow, grad)
