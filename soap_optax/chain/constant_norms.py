"""The transformation `hyperball`: steps of a given angle that preserve the norm of every matrix."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from soap_optax import arguments, blocks, devices
from soap_optax.blocks import AxesMark
from soap_optax.linalg import norm_along, norm_of_scaled, scaled_along
from soap_optax.state import HyperballState

# A direction of smaller norm moves the weights by a smaller angle, as in the authors' code.
_SMALLEST_NORM = 1e-10

_NO_PARAMS = (  # Optax's message, which Optax does not export.
    "You are using a transformation that requires the current value of parameters, but you are not "
    "passing `params` when calling `update`."
)


def hyperball(
    learning_rate: optax.ScalarOrSchedule,
    *,
    dimension_numbers: Any | Callable[[Any], Any] | None = None,
    mask: Any | Callable[[optax.Params], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Moves each matrix by a given angle and preserves its Frobenius norm.

    Use it as the last transformation of a chain, in place of weight decay and the learning rate.
    The transformation before it gives the direction :math:`U`, such as `scale_by_soap`,
    `optax.contrib.scale_by_muon` or `optax.scale_by_adam`. For a matrix :math:`W` of norm
    :math:`R` and the learning rate :math:`\alpha`,

    .. math::

      \begin{align*}
        V_t &= W_{t-1} - \alpha_t \, R \, \frac{U_t}{\max(\|U_t\|_F, 10^{-10})} \\
        W_t &= R \, \frac{V_t}{\|V_t\|_F}
      \end{align*}

    The learning rate is about the angle between :math:`W_{t-1}` and :math:`W_t` in radians. It is
    the tangent of that angle if :math:`U_t` is orthogonal to :math:`W_{t-1}`. The size of
    :math:`U_t` has no effect.

    The state holds :math:`R`, as of the first call of ``update``. So rounding errors do not add up:
    the norms of float32 matrices stay within a relative 1e-6 of :math:`R`, for any number of
    updates. Norms in bfloat16 stay within the unit roundoff of :math:`2^{-8}`, and in float16 of
    :math:`2^{-11}`.

    Vectors, scalars and parameters outside of ``mask`` get the plain update
    :math:`-\alpha_t U_t`. So does a matrix of zeros, in all steps, because it has no direction. A
    direction that is zero or not finite leaves its matrix unchanged.

    Weight decay has no place beside this transformation, and ``update`` cannot detect it. Before
    it in the chain, weight decay only makes the angles smaller; after it, the next update undoes
    the decay.

    Example:
      >>> import jax, jax.numpy as jnp, optax, soap_optax
      >>> optimizer = optax.chain(
      ...     soap_optax.scale_by_soap(precondition_frequency=5),
      ...     soap_optax.hyperball(optax.cosine_decay_schedule(0.02, 1000)),
      ... )
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (4, 3)), "bias": jnp.zeros(3)}
      >>> start = jnp.linalg.norm(params["kernel"])
      >>> state = optimizer.init(params)
      >>> loss = lambda p: jnp.sum((jnp.ones(4) @ p["kernel"] + p["bias"] - 2.0) ** 2)
      >>> for _ in range(5):
      ...     updates, state = optimizer.update(jax.grad(loss)(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> bool(jnp.abs(jnp.linalg.norm(params["kernel"]) / start - 1) < 1e-6)
      True

    Args:
      learning_rate: the angle of a step in radians, a number or a schedule. 0.02 is a good start,
        or the root of learning rate times weight decay in a run with AdamW.
      dimension_numbers: the axes of each leaf that form a matrix, as for `scale_by_soap`. All other
        axes are batch axes: each slice, such as a layer or an expert, has its own norm. A leaf with
        an entry of None gets the plain update. Without dimension numbers, each leaf of at least two
        axes is one matrix.
      mask: the parameters whose norm is preserved: a tree of booleans with the structure of the
        parameters or a prefix of it, or a function of the parameters that returns one. None means
        all.

    Returns:
      A transformation whose state is a `HyperballState`. Its ``update`` needs the parameters and
      returns updates in the dtypes of the directions.

    Raises:
      TypeError, ValueError: when built, if an argument is out of range; at ``init`` and ``update``,
        if `dimension_numbers` or `mask` does not fit the parameters, or a leaf is not a floating
        point or complex array; at ``update``, if the parameters are missing, or the state or the
        directions belong to others.

    References:
      Wen et al., `Fantastic Pretraining Optimizers and Where to Find Them II: Hyperball
      Optimization <https://arxiv.org/abs/2606.16899>`_, 2026
    """
    arguments.check_hyperball(
        learning_rate=learning_rate, dimension_numbers=dimension_numbers, mask=mask
    )

    def init_fn(params: optax.Params) -> HyperballState:
        count: Any = jnp.zeros((), jnp.int32)
        if blocks.is_placeholder(params):
            return HyperballState(count, norms=count)
        return HyperballState(count, _norms_of(_leaves_of(params, dimension_numbers, mask)))

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, HyperballState]:
        del extra_args
        if params is None:
            raise ValueError(_NO_PARAMS)
        leaves = _leaves_of(params, dimension_numbers, mask)
        measured = _norms_of(leaves)
        old_state = _check_state(state, leaves, measured)
        norms = _norms_in_force(old_state, measured)
        rate = learning_rate(old_state.count) if callable(learning_rate) else learning_rate
        directions, treedef = _directions_of(updates, leaves)
        norm_of = dict(zip(_positions_of_matrices(leaves), norms, strict=True))
        new_updates = [
            _update(direction, leaf, rate, norm_of.get(position))
            for position, (direction, leaf) in enumerate(zip(directions, leaves, strict=True))
        ]
        count = jnp.asarray(optax.safe_increment(old_state.count))
        return jax.tree.unflatten(treedef, new_updates), HyperballState(count, norms)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class _Leaf(NamedTuple):
    """A parameter, and the axes of its matrices or None for the plain update."""

    path: str
    value: Array
    axes: tuple[int, ...] | None


def _leaves_of(params: Any, dimension_numbers: Any, mask: Any) -> list[_Leaf]:
    """The parameters, checked, with the axes of their matrices."""
    leaves = []
    uses = blocks.axes_of_leaves(dimension_numbers, params)
    masks = _mask_of_leaves(mask, params)
    with_path = jax.tree_util.tree_leaves_with_path(params)
    for (path, leaf), use, is_in_mask in zip(with_path, uses, masks, strict=True):
        blocks.check_leaf(path, leaf, may_be_complex=True)
        name, value = jax.tree_util.keystr(path), jnp.asarray(leaf)
        axes = _matrix_axes(use, value.ndim) if is_in_mask and value.size else None
        leaves.append(_Leaf(name, value, axes))
    return leaves


def _directions_of(updates: Any, leaves: list[_Leaf]) -> tuple[list[Array], Any]:
    """The directions and the structure of their tree, checked against the parameters."""
    with_path, treedef = jax.tree_util.tree_flatten_with_path(updates)
    found = {jax.tree_util.keystr(path): jnp.shape(direction) for path, direction in with_path}
    if len(with_path) != len(leaves):
        missing = [leaf.path for leaf in leaves if leaf.path not in found]
        others = [path for path in found if path not in {leaf.path for leaf in leaves}]
        raise ValueError(
            "updates must have an array for each parameter and no other, got none for "
            f"{missing or 'no parameter'} and others at {others or 'no path'}; likely the gradient "
            "of a parameter is None, so leave it out with optax.masked, or pass params of the same "
            "tree"
        )
    for (path, direction), leaf in zip(with_path, leaves, strict=True):
        blocks.check_leaf(path, direction, may_be_complex=True)
        if jnp.shape(direction) != leaf.value.shape:
            raise ValueError(
                f"updates must have the shapes of the parameters, got {jnp.shape(direction)} at "
                f"{jax.tree_util.keystr(path)} and must have {leaf.value.shape}; pass gradients of "
                "the same parameters"
            )
    return [jnp.asarray(direction) for _, direction in with_path], treedef


def _matrix_axes(use: blocks.Axes, ndim: int) -> tuple[int, ...] | None:
    if isinstance(use, AxesMark):
        return tuple(range(ndim)) if use is AxesMark.DEFAULT and ndim > 1 else None
    return use.rows + use.columns


def _mask_of_leaves(mask: Any, params: Any) -> list[bool]:
    """Whether each leaf is in the mask."""
    if mask is None:
        return [True] * len(jax.tree.leaves(params))
    tree = blocks.tree_of(mask, params)
    entries = blocks.broadcast_prefix("mask", tree, params, lambda node: node is None)
    for entry in entries:
        if not isinstance(entry, (bool, np.bool_)):
            raise TypeError(
                f"mask must have True or False for each parameter, got {entry!r}; under "
                "optax.inject_hyperparams pass static_args=('mask', 'dimension_numbers')"
            )
    return entries


def _positions_of_matrices(leaves: list[_Leaf]) -> list[int]:
    return [position for position, leaf in enumerate(leaves) if leaf.axes is not None]


def _norms_of(leaves: list[_Leaf]) -> tuple[Array, ...]:
    """The norms of the matrices of each leaf; the axes of a matrix have length 1."""
    return tuple(
        norm_along(leaf.value.astype(_wide(leaf.value)), leaf.axes)
        for leaf in leaves
        if leaf.axes is not None
    )


def _check_state(state: Any, leaves: list[_Leaf], measured: tuple[Array, ...]) -> HyperballState:
    """Returns the state, or raises if `init` would make another one for these parameters."""
    if not isinstance(state, HyperballState):
        raise TypeError(
            f"state must be a HyperballState, got {type(state).__name__}; pass what init returned"
        )
    found = [jnp.shape(norm) for norm in state.norms]
    wanted = [norm.shape for norm in measured]
    if found != wanted:
        paths = [leaves[position].path for position in _positions_of_matrices(leaves)]
        raise ValueError(
            f"the state does not belong to these parameters: it has norms of the shapes {found} "
            f"and must have {dict(zip(paths, wanted, strict=True))}; likely the tree, a shape, "
            "dimension_numbers or mask changed after init, so call init again or restore the "
            "arguments"
        )
    return state


def _norms_in_force(state: HyperballState, measured: tuple[Array, ...]) -> tuple[Array, ...]:
    """The norms in the state; in the first update, the measured ones.

    The weights may have been loaded after `init`, as training frameworks do. A conditional would
    save one pass over the weights, but both of its branches would need equal shardings and, in a
    `shard_map`, equal varying axes.
    """
    is_first = state.count == 0
    return tuple(
        jnp.where(is_first, devices.reshard_to(new, norm), norm)
        for new, norm in zip(measured, state.norms, strict=True)
    )


def _update(given: Array, leaf: _Leaf, rate: Any, norm: Array | None) -> Array:
    """The update of one leaf, with the leaf's sharding and the direction's dtype."""
    dtype = np.promote_types(_wide(leaf.value), _wide(given))
    real_dtype = jnp.finfo(dtype).dtype
    rate = jnp.asarray(rate, real_dtype)
    wide = devices.reshard_to(given.astype(dtype), leaf.value)
    update = -rate.astype(dtype) * wide
    if leaf.axes is not None and norm is not None:
        step = _step(leaf.value.astype(dtype), wide, norm.astype(real_dtype), rate, leaf.axes)
        update = jnp.where(norm > 0, step, update)
    return update.astype(given.dtype)


def _step(
    weights: Array, direction: Array, norm: Array, rate: Array, axes: tuple[int, ...]
) -> Array:
    """The step from each matrix to another one of the given norm.

    Args:
      weights: one leaf.
      direction: the direction to descend.
      norm: the norm to preserve, with length 1 along the axes of a matrix.
      rate: the learning rate, a scalar.
      axes: the axes of a matrix.
    """
    # Squares of the scaled arrays neither overflow nor underflow.
    unit, scale = scaled_along(direction, axes)
    size = norm_of_scaled(unit, axes)
    # V = W - lr R U / |U|
    factor = rate * norm / jnp.maximum(size, _SMALLEST_NORM / scale)
    moved = weights - factor.astype(weights.dtype) * unit
    bound = norm * (1 + jnp.abs(rate))
    bound = jnp.where(bound == 0, 1, bound)
    moved = moved / bound.astype(weights.dtype)
    moved_size = norm_of_scaled(moved, axes)
    # Near the origin, the direction of V is rounding error.
    is_lost = moved_size * (1 + jnp.abs(rate)) <= 8 * jnp.finfo(weights.dtype).eps
    # W = R V / |V|
    factor = norm / jnp.where(is_lost, 1, moved_size)
    new_weights = factor.astype(weights.dtype) * moved
    is_unusable = is_lost | ~jnp.isfinite(size) | (size == 0)
    return jnp.where(is_unusable, jnp.zeros_like(weights), new_weights - weights)


def _wide(array: Array) -> np.dtype:
    """The dtype in which an array enters computations, at least float32."""
    return np.promote_types(array.dtype, np.float32)  # JAX's raises in its strict mode.
