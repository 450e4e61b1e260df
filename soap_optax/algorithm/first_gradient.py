"""The moments of a block after its first gradient, with `first_update="apply"`.

The first gradient fills the factors and makes the first bases. Then it enters the moments, rotated
into these bases.

The bases of a matrix `G = U S V^T` with two factors are `U` and `V`. So the rotated gradient `S` is
diagonal, and the update is the polar factor `U V^T`. The other entries of the computed rotated
gradient are errors of the bases. Divided by their own roots, they would become entries of full
size, and most of the update. They are set to zero here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import Precision
from jax.typing import DTypeLike

from soap_optax.algorithm.step import Hyperparameters, average_moments, rotate
from soap_optax.state import SecondMoment

# A Gram matrix resolves singular values down to about the root of the machine epsilon, relative to
# the largest. Rounding errors add up in its products and in its decomposition: hence this factor.
ADDED_UP = 4


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FirstGradient:
    """The gradient of a step, for a block whose first gradient makes an update.

    Attributes:
      grad: the gradient, `(*block)`, in the dtype of the statistics.
      is_first: whether the block has accepted no gradient before this one, a boolean scalar.
      hyper: the numbers of the step.
    """

    grad: Array
    is_first: Array
    hyper: Hyperparameters


def first_moments(
    mu: Array,
    nu: SecondMoment,
    first: FirstGradient,
    bases: Sequence[Array],
    axes: Sequence[int],
    stored: DTypeLike,
) -> tuple[Array, SecondMoment]:
    """Averages a gradient into the moments if it is the first one.

    The rotation uses the highest precision. On GPUs and TPUs, the default precision has larger
    errors than those that are set to zero here.

    Args:
      mu: the first moment before, `(*block)`, zero if the gradient is the first one.
      nu: the second moment before, `(*block)`, or its marginals.
      first: the gradient.
      bases: the bases that the gradient has just made, `(d, d)` each.
      axes: the preconditioned axes of the block, ascending.
      stored: the dtype in which the factors are stored, from which the bases were made.
    """
    rotated = rotate(first.grad, bases, axes, Precision.HIGHEST)
    if len(axes) > 1:  # Along one axis, small entries are no errors.
        size = jnp.abs(rotated)
        level = unresolved(rotated.dtype, stored) * jnp.max(size)
        rotated = jnp.where(size > level, rotated, 0)
    return average_moments(mu, nu, rotated, first.is_first, first.hyper)


def unresolved(dtype: DTypeLike, stored: DTypeLike) -> float:
    """The size, relative to the largest entry, up to which rotated entries may be errors of bases.

    It is 1.4e-3 in float32, and 0.09 if the factors are stored in bfloat16.

    Args:
      dtype: the dtype of the statistics.
      stored: the dtype in which the factors are stored.
    """
    computed, rounded = (float(jnp.finfo(each).eps) ** 0.5 for each in (dtype, stored))
    return max(ADDED_UP * computed, rounded)
