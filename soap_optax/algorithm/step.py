"""A SOAP step for one block: Algorithm 3 of Vyas et al. (2024), in the paper's order.

Every function takes one block and returns new values; `jax.vmap` maps it over a stack. For a
matrix `G` of shape `(m, n)` with factors `L = E[G G^T]`, `R = E[G^T G]` and their eigenvectors
`Q_L`, `Q_R`, a step is

    G' = Q_L^T G Q_R                        the gradient, rotated into the eigenbasis
    M' = b1 M' + (1 - b1) G'                first moment
    V' = b2 V' + (1 - b2) G' * G'           second moment
    N' = M' / (sqrt(V') + eps)              Adam's direction
    N  = Q_L N' Q_R^T                       the update, times the bias correction
    L  = beta L + (1 - beta) G G^T          factors, and R likewise

An array of more dimensions has a factor and a basis for each of its preconditioned `axes`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import PrecisionLike
from jax.typing import DTypeLike

from soap_optax.algorithm import second_moment
from soap_optax.linalg import multiply_along
from soap_optax.state import SecondMoment, StackState

FirstUpdate = Literal["zero", "apply"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Hyperparameters:
    """The numbers of a step, scalars in the dtype of the statistics, and its static options.

    Attributes:
      b1: decay of the first moment.
      b2: decay of the second moment.
      shampoo_beta: decay of the factors.
      eps: added to the square root of the second moment, before any bias correction.
      normalize_grads: whether to divide an update by its root mean square.
      correct_bias: whether to multiply an update by Adam's bias correction.
      first_update: whether the first gradient makes an update.
      precision: precision of the products with bases.
    """

    b1: Array
    b2: Array
    shampoo_beta: Array
    eps: Array
    normalize_grads: bool = field(metadata={"static": True})
    correct_bias: bool = field(metadata={"static": True})
    first_update: FirstUpdate = field(metadata={"static": True})
    precision: PrecisionLike = field(metadata={"static": True})


def step_block(
    grad: Array,
    accepted: Array,
    state: StackState,
    axes: Sequence[int],
    hyper: Hyperparameters,
    rotated_grad: Array | None = None,
) -> tuple[Array, StackState]:
    """Updates the moments by one gradient and returns the update.

    Factors and bases do not change. A rejected gradient changes nothing and returns a zero update.
    With `first_update="zero"` the first accepted gradient also returns a zero update, as in the
    authors' code: it only fills the factors. With `"apply"` the moments contain it already if it
    has made bases (see `soap_optax.algorithm.first_gradient`).

    Args:
      grad: the block's gradient, `(*block)`, in the dtype of the statistics.
      accepted: whether the gradient may enter the state, a boolean scalar.
      state: the block's state.
      axes: the preconditioned axes of the block, ascending.
      hyper: the numbers of the step.
      rotated_grad: the gradient rotated into the eigenbasis, if the caller has it already.

    Returns:
      The update, `(*block)`, to be scaled by the (negative) learning rate, and the new state.
    """
    number = update_number(state.accepted_gradients, hyper)
    applied = accepted & (number > 0)
    bases = [basis.astype(grad.dtype) for basis in state.bases]
    if rotated_grad is None:
        rotated_grad = rotate(grad, bases, axes, hyper.precision)  # G'
    averaged = applied
    if hyper.first_update == "apply":
        averaged &= ~has_started(state)
    mu, nu = average_moments(state.mu, state.nu, rotated_grad, averaged, hyper)  # M', V'
    estimate = second_moment.estimate(nu)
    if hyper.first_update == "apply" and isinstance(nu, tuple):
        estimate = jnp.where(number == 1, second_moment_of_one(mu, hyper), estimate)
    direction = adam_direction(without_rounding(mu, estimate), estimate, hyper)  # N'
    scale = bias_correction(number, hyper) * normalization(direction, hyper)
    scaled = direction * jnp.where(applied, scale, 0)
    update = rotate_back(scaled, bases, axes, hyper.precision)  # N
    return update, state._replace(
        accepted_gradients=state.accepted_gradients + accepted.astype(jnp.int32),
        mu=mu.astype(state.mu.dtype),
        nu=nu,
        age=state.age + applied.astype(jnp.int32),
    )


def update_number(accepted_gradients: Array, hyper: Hyperparameters) -> Array:
    """The number of the update that a gradient makes, from 1 on; 0 if it makes none.

    Args:
      accepted_gradients: the number of gradients accepted before this one.
      hyper: the numbers of the step.
    """
    return accepted_gradients + 1 if hyper.first_update == "apply" else accepted_gradients


def has_started(state: StackState) -> Array:
    """Whether the moments of a block already contain this gradient, its first, a boolean scalar.

    They do not if the first bases were rejected: the first update is then Adam's.
    """
    return (state.accepted_gradients == 0) & (state.refreshes > 0)


def second_moment_of_one(mu: Array, hyper: Hyperparameters) -> Array:
    """The second moment after one gradient, from the first moment, `(*block)`.

    In its eigenbases a gradient is diagonal, and marginals underestimate its small entries. The
    update would contain the inverse of each singular value.
    """
    return (1 - hyper.b2) * jnp.square(mu / (1 - hyper.b1))


def is_acceptable(grad: Array, stored: Sequence[DTypeLike]) -> Array:
    """Whether a gradient may enter the statistics: it has no NaN, no infinity, and cannot overflow.

    Every entry of the Gram matrices and of the squared rotated gradient is at most the gradient's
    sum of squares, so this one number bounds them all. The factor 4 leaves room for rounding.

    Args:
      grad: the block's gradient, `(*block)`.
      stored: the dtypes in which statistics are stored.
    """
    largest = min(float(jnp.finfo(dtype).max) for dtype in (grad.dtype, *stored))
    return jnp.sum(jnp.square(grad)) <= largest / 4


def rotate(
    x: Array, bases: Sequence[Array], axes: Sequence[int], precision: PrecisionLike = None
) -> Array:
    """Rotates `x` into the eigenbasis: `Q_L^T x Q_R`."""
    for axis, basis in zip(axes, bases, strict=True):
        x = multiply_along(basis.T, x, axis, precision)
    return x


def rotate_back(
    x: Array, bases: Sequence[Array], axes: Sequence[int], precision: PrecisionLike = None
) -> Array:
    """Rotates `x` back from the eigenbasis: `Q_L x Q_R^T`."""
    for axis, basis in zip(axes, bases, strict=True):
        x = multiply_along(basis, x, axis, precision)
    return x


def average_moments(
    mu: Array, nu: SecondMoment, rotated_grad: Array, applied: Array, hyper: Hyperparameters
) -> tuple[Array, SecondMoment]:
    """Averages the gradient into both moments where it is applied, all in the same coordinates.

    Both results have the dtype of `nu`. The `where` keeps a rejected gradient's NaN out of them.
    """
    mu = mu.astype(rotated_grad.dtype)
    new_mu = hyper.b1 * mu + (1 - hyper.b1) * rotated_grad
    new_nu = second_moment.average(nu, rotated_grad, hyper.b2)
    return jax.tree.map(lambda new, old: jnp.where(applied, new, old), (new_mu, new_nu), (mu, nu))


def adam_direction(mu: Array, nu: Array, hyper: Hyperparameters) -> Array:
    """Adam's direction before bias correction; `eps` is added to the uncorrected root."""
    return mu / (_root(nu) + hyper.eps)


# The largest rounding error of a rotation, as a root of the second moment: this number of machine
# epsilons times the block's largest root. docs/explanation/numerics.md has the measurements.
ROUNDING = 32


def rounding_level(root: Array) -> Array:
    """The level up to which an entry of `root` may be a rounding error alone, a scalar.

    For gradients so small that the square of this level underflows, the level is 0. A sound entry
    may then have a root of 0, and the default `eps` exceeds every root.

    Args:
      root: the root of the second moment of a block, `(*block)`.
    """
    limits = jnp.finfo(root.dtype)
    level = ROUNDING * limits.eps * jnp.max(root)
    return jnp.where(jnp.square(level) >= limits.tiny, level, 0)


def without_rounding(mu: Array, nu: Array) -> Array:
    """The rotated first moment, with zeros where the second moment is a rounding error.

    In the null directions of a factor, a rotated gradient is a rounding error. Divided by its own
    root, it would become an update of full size.
    """
    root = _root(nu)
    level = rounding_level(root)
    return jnp.where((root > level) | (level == 0), mu, 0)


def _root(nu: Array) -> Array:
    has_size = nu > 0  # The root of 0 has no finite derivative.
    return jnp.where(has_size, jnp.sqrt(jnp.where(has_size, nu, 1)), 0)


def bias_correction(applied_update: Array, hyper: Hyperparameters) -> Array:
    """The factor that corrects for both moments' start at zero, at applied update `s`.

    Updates count from 1; see `update_number`.
    """
    if not hyper.correct_bias:
        return jnp.ones_like(hyper.b1)
    step = jnp.maximum(applied_update, 1).astype(hyper.b1.dtype)  # 0 is no update; avoid 0 / 0.
    return jnp.sqrt(1 - hyper.b2**step) / (1 - hyper.b1**step)


def normalization(direction: Array, hyper: Hyperparameters) -> Array:
    """The factor that gives a direction a root mean square of one, with `normalize_grads`.

    A rotation preserves the root mean square, so the direction may be rotated or not.
    """
    if not hyper.normalize_grads:
        return jnp.ones_like(hyper.b1)
    largest = jnp.max(jnp.abs(direction))
    is_zero = ~(largest > 0)
    safe = jnp.where(is_zero, 1, largest)
    mean_square = jnp.mean(jnp.square(direction / safe))  # Squares of tiny entries underflow.
    # The root of 0 has no finite derivative.
    root = safe * jnp.sqrt(jnp.where(is_zero, 1, mean_square))
    return jnp.where(is_zero, 0, 1 / (1e-30 + root))


def average_factor(factor: Array, gram: Array, accepted: Array, beta: Array) -> Array:
    """Averages a Gram matrix into its factor, `L` or `R`, where the gradient is accepted.

    Both are `(d, d)`, or both folded.
    """
    return jnp.where(accepted, beta * factor + (1 - beta) * gram, factor)
