"""SOAP for one block: the equations of Vyas et al. (2024), Algorithm 3, in the paper's order.

Every function takes one block and returns new values; a whole stack runs through `jax.vmap`. For a
matrix `G` of shape `(m, n)` with factors `L = E[G G^T]`, `R = E[G^T G]` and their eigenvectors
`Q_L`, `Q_R`, a step is

    G' = Q_L^T G Q_R                        the gradient in the eigenbasis' coordinates
    M' = b1 M' + (1 - b1) G'                first moment
    V' = b2 V' + (1 - b2) G' * G'           second moment
    N' = M' / (sqrt(V') + eps)              Adam's direction
    N  = Q_L N' Q_R^T                       the update, times the bias correction
    L  = beta L + (1 - beta) G G^T          factors, and R likewise

An array of more dimensions has a factor and a basis for each of its preconditioned `axes`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array
from jax.lax import Precision

from soap_optax.state import StackState


@dataclass(frozen=True)
class Hyperparameters:
    """The numbers of a step, as scalars in the dtype of the statistics, and its two switches.

    Attributes:
      b1: decay of the first moment.
      b2: decay of the second moment.
      shampoo_beta: decay of the factors.
      eps: added to the square root of the second moment, before any bias correction.
      normalize_grads: whether to divide an update by its root mean square.
      correct_bias: whether to multiply an update by Adam's bias correction.
    """

    b1: Array
    b2: Array
    shampoo_beta: Array
    eps: Array
    normalize_grads: bool
    correct_bias: bool


def step_block(
    grad: Array, accepted: Array, state: StackState, axes: Sequence[int], hyper: Hyperparameters
) -> tuple[Array, StackState]:
    """Takes one gradient in and gives the update.

    The bases are read and never written: they are those of the last refresh, made of factors that
    do not hold this gradient. A gradient that is not accepted changes no statistic and gives a
    zero update; the first accepted one only fills the factors, as in the authors' code.

    Args:
      grad: the block's gradient, `(*block)`, in the dtype of the statistics.
      accepted: whether the gradient may be taken in, a boolean scalar.
      state: the block's state.
      axes: the preconditioned axes of the block, ascending.
      hyper: the numbers of the step.

    Returns:
      The update, `(*block)`, to be scaled by the (negative) learning rate, and the new state.
    """
    applied = accepted & (state.accepted_gradients > 0)
    rotated_grad = rotate(grad, state.bases, axes)  # G'
    mu, nu = average_moments(state.mu, state.nu, rotated_grad, hyper)  # M', V'
    direction = rotate_back(adam_direction(mu, nu, hyper), state.bases, axes)  # N
    update = scale_update(direction, state.accepted_gradients, hyper)
    beta = hyper.shampoo_beta
    factors = tuple(
        beta * factor + (1 - beta) * gram_matrix(grad, axis)  # L, R
        for factor, axis in zip(state.factors, axes, strict=True)
    )
    return jnp.where(applied, update, 0), state._replace(
        accepted_gradients=state.accepted_gradients + accepted,
        refused_gradients=state.refused_gradients + ~accepted,
        factors=tuple(
            jnp.where(accepted, new, old) for new, old in zip(factors, state.factors, strict=True)
        ),
        mu=jnp.where(applied, mu.astype(state.mu.dtype), state.mu),
        nu=jnp.where(applied, nu, state.nu),
        age=state.age + applied,
    )


def is_acceptable(grad: Array) -> Array:
    """Whether a gradient may enter the statistics: no NaN, no infinity, no overflow to come.

    Every entry of the Gram matrices and of the squared rotated gradient is at most the sum of the
    squares, so that this one number answers for all of them. The factor 4 leaves room for rounding.
    """
    return jnp.sum(jnp.square(grad)) <= jnp.finfo(grad.dtype).max / 4


def rotate(x: Array, bases: Sequence[Array], axes: Sequence[int]) -> Array:
    """Expresses `x` in the coordinates of the eigenbases: `Q_L^T x Q_R`."""
    for axis, basis in zip(axes, bases, strict=True):
        x = multiply_along(basis.T, x, axis)
    return x


def rotate_back(x: Array, bases: Sequence[Array], axes: Sequence[int]) -> Array:
    """Expresses `x`, given in the coordinates of the eigenbases, in the original ones."""
    for axis, basis in zip(axes, bases, strict=True):
        x = multiply_along(basis, x, axis)
    return x


def multiply_along(matrix: Array, x: Array, axis: int, precision: Precision | None = None) -> Array:
    """Multiplies every vector along `axis` of `x` by `matrix`, from the left."""
    if axis == 0:  # The product already has its axes in place.
        return jnp.tensordot(matrix, x, axes=(1, 0), precision=precision)
    product = jnp.tensordot(x, matrix, axes=(axis, 1), precision=precision)
    return jnp.moveaxis(product, -1, axis)


def average_moments(
    mu: Array, nu: Array, rotated_grad: Array, hyper: Hyperparameters
) -> tuple[Array, Array]:
    """Takes the gradient into both moments, in the frame in which all three are given."""
    mu = hyper.b1 * mu.astype(nu.dtype) + (1 - hyper.b1) * rotated_grad
    nu = hyper.b2 * nu + (1 - hyper.b2) * jnp.square(rotated_grad)
    return mu, nu


def adam_direction(mu: Array, nu: Array, hyper: Hyperparameters) -> Array:
    """Adam's direction before bias correction; `eps` is added to the uncorrected root."""
    return mu / (jnp.sqrt(nu) + hyper.eps)


def scale_update(direction: Array, applied_before: Array, hyper: Hyperparameters) -> Array:
    """Normalises the direction if asked to, then multiplies it by the bias correction.

    Args:
      direction: the direction in the original coordinates, `(*block)`.
      applied_before: which applied update this is, counted from 1. This is the number of gradients
        accepted before, because the first of them was not applied.
      hyper: the numbers of the step.
    """
    if hyper.normalize_grads:
        direction = direction / (1e-30 + jnp.sqrt(jnp.mean(jnp.square(direction))))
    if hyper.correct_bias:
        # Where no gradient was accepted before, the update is discarded: 1 only avoids 0 / 0.
        step = jnp.maximum(applied_before, 1).astype(direction.dtype)
        correction = jnp.sqrt(1 - hyper.b2**step) / (1 - hyper.b1**step)
        direction = direction * correction
    return direction


def gram_matrix(grad: Array, axis: int) -> Array:
    """The Gram matrix of one axis, `(d, d)`: `G G^T` for axis 0 of a matrix, `G^T G` for axis 1."""
    others = [other for other in range(grad.ndim) if other != axis]
    return jnp.tensordot(grad, grad, axes=(others, others), precision=Precision.HIGHEST)
