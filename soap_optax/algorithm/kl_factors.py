"""KL factors of one block: averages of gradients that are whitened along the other axes.

For a matrix `G` of shape `(m, n)` with bases `Q_L`, `Q_R` and estimates `l_L`, `l_R` of the
factors' eigenvalues, a step is

    P   = Q_L^T G Q_R
    L   = b L + (1 - b) / n (G Q_R) diag(1 / l_R) (G Q_R)^T
    R   = b R + (1 - b) / m (Q_L^T G)^T diag(1 / l_L) (Q_L^T G)
    l_L = b l_L + (1 - b) mean_j(P_ij^2 / l_R,j)
    l_R = b l_R + (1 - b) mean_i(P_ij^2 / l_L,i)

with the old `l` on all right-hand sides. `1 / sqrt(l)` is at most `LARGEST_INVERSE_ROOT`, and less
in blocks of more than five axes. The first gradient enters with weight one and is not whitened:
`L = G G^T / n`.

In a block of more dimensions, the gradient is whitened along all other preconditioned axes. With
one preconditioned axis nothing is whitened.

References:
  Lin et al., `Understanding and Improving Shampoo and SOAP via Kullback-Leibler Minimization
  <https://arxiv.org/abs/2509.03378>`_, 2025.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.lax import Precision, PrecisionLike
from jax.typing import DTypeLike

from soap_optax.algorithm.step import rotate
from soap_optax.linalg import gram_matrix

FactorEstimator = Literal["gram", "kl"]

# The eigenvalue estimates before the first gradient, and the bound of `1 / sqrt(l)`, both as in the
# code of the paper.
INITIAL_EIGENVALUE = 0.1
LARGEST_INVERSE_ROOT = 4000.0
# The product of more inverse roots of that size would overflow in float32 with ordinary gradients.
# After many gradients of zero, a block of more axes would then reject every gradient.
MOST_LARGEST_ROOTS = 4


class Rotations(NamedTuple):
    """A gradient, rotated in part and in whole.

    Attributes:
      by_others: for each preconditioned axis, the gradient rotated along all other preconditioned
        axes, `(*block)`: `G Q_R` and `Q_L^T G` for a matrix.
      whole: the gradient rotated along all preconditioned axes, `(*block)`.
    """

    by_others: tuple[Array, ...]
    whole: Array


def rotations(
    grad: Array, bases: Sequence[Array], axes: Sequence[int], precision: PrecisionLike = None
) -> Rotations:
    """The rotations of a gradient that a step and its KL factors need.

    For a matrix these are three products, one more than a step needs without KL factors. The whole
    rotation continues the one that lacks the shortest axis, because its product costs least.

    Args:
      grad: the block's gradient, `(*block)`.
      bases: the basis of each preconditioned axis, `(d, d)`, in the dtype of the gradient.
      axes: the preconditioned axes of the block, ascending.
      precision: precision of the last product, whose result feeds no factor.
    """
    by_others = rotations_by_others(grad, bases, axes)
    last = min(range(len(axes)), key=lambda number: len(bases[number]))
    whole = rotate(by_others[last], [bases[last]], [axes[last]], precision)
    return Rotations(by_others, whole)


def rotations_by_others(
    grad: Array, bases: Sequence[Array], axes: Sequence[int]
) -> tuple[Array, ...]:
    """For each preconditioned axis, the gradient rotated along all other preconditioned axes.

    These products feed factors and use the highest precision.
    """

    def rotated(number: int) -> Array:
        others = [other for other in range(len(axes)) if other != number]
        other_bases, other_axes = [bases[i] for i in others], [axes[i] for i in others]
        return rotate(grad, other_bases, other_axes, Precision.HIGHEST)

    return tuple(map(rotated, range(len(axes))))


def inverse_roots(eigenvalues: Sequence[Array]) -> tuple[Array, ...]:
    """`1 / sqrt(l)` for each preconditioned axis, `(d,)`, bounded by `largest_inverse_root`."""
    smallest = largest_inverse_root(len(eigenvalues)) ** -2
    return tuple(1 / jnp.sqrt(jnp.maximum(each, smallest)) for each in eigenvalues)


def largest_inverse_root(axes: int) -> float:
    """The bound of `1 / sqrt(l)` in a block of this number of preconditioned axes.

    A gradient is whitened along all axes but one. The product of these bounds is limited.
    """
    return LARGEST_INVERSE_ROOT ** min(1.0, MOST_LARGEST_ROOTS / max(axes - 1, 1))


def kl_gram_matrices(
    by_others: Sequence[Array],
    eigenvalues: Sequence[Array],
    axes: Sequence[int],
    is_first: Array | bool = False,
) -> tuple[Array, ...]:
    """The matrices that one gradient adds to the factors, `(d, d)` for each preconditioned axis.

    Args:
      by_others: the gradient rotated along all other preconditioned axes; see `Rotations`.
      eigenvalues: the eigenvalue estimates before this gradient, `(d,)` for each preconditioned
        axis.
      axes: the preconditioned axes of the block, ascending.
      is_first: whether this is the first gradient, which is not whitened, a boolean scalar.
    """
    roots = [jnp.where(is_first, 1, root) for root in inverse_roots(eigenvalues)]
    return tuple(
        gram_matrix(_whitened(rotated, roots, axes, skipped=axis), axis) / _others(rotated, axis)
        for axis, rotated in zip(axes, by_others, strict=True)
    )


def average_eigenvalues(
    eigenvalues: Sequence[Array], rotated_grad: Array, axes: Sequence[int], beta: Array
) -> tuple[Array, ...]:
    """Averages a rotated gradient, `(*block)`, into the eigenvalue estimates of all axes.

    Args:
      eigenvalues: the estimates before, `(d,)` for each preconditioned axis.
      rotated_grad: the gradient rotated along all preconditioned axes.
      axes: the preconditioned axes of the block, ascending.
      beta: the decay of the factors, a scalar.
    """
    roots = inverse_roots(eigenvalues)
    averages = []
    for axis, old in zip(axes, eigenvalues, strict=True):
        square = jnp.square(_whitened(rotated_grad, roots, axes, skipped=axis))
        others = [other for other in range(square.ndim) if other != axis]
        averages.append(beta * old + (1 - beta) * jnp.mean(square, others))
    return tuple(averages)


def kl_decay(beta: Array, is_first: Array) -> Array:
    """The decay of the factors at a gradient, a scalar: the first one gets a weight of one."""
    return jnp.where(is_first, 0, beta)


def is_whitenable(
    grad: Array, eigenvalues: Sequence[Array], stored: Sequence[DTypeLike] = ()
) -> Array:
    """Whether no entry of the whitened Gram matrices of a gradient can overflow.

    The gradient's sum of squares, times the largest `1 / l` of each axis but one, bounds every
    entry. See `step.is_acceptable`, which bounds the entries without whitening.
    """
    largest = min(float(jnp.finfo(dtype).max) for dtype in (grad.dtype, *stored))
    squared_roots = [jnp.max(jnp.square(roots)) for roots in inverse_roots(eigenvalues)]
    limit = jnp.asarray(largest / 4, grad.dtype)
    for whitening in jnp.sort(jnp.stack(squared_roots))[1:]:
        limit = limit / whitening
    return jnp.sum(jnp.square(grad)) <= limit


def _whitened(rotated: Array, roots: Sequence[Array], axes: Sequence[int], skipped: int) -> Array:
    """An array divided by the roots of the eigenvalue estimates of all axes but one."""
    for axis, root in zip(axes, roots, strict=True):
        if axis != skipped:
            shape = [-1 if other == axis else 1 for other in range(rotated.ndim)]
            rotated = rotated * root.reshape(shape)
    return rotated


def _others(array: Array, axis: int) -> int:
    """The number of entries of an array for each position along an axis."""
    return math.prod(array.shape) // array.shape[axis]
