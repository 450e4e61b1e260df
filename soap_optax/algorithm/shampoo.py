"""A Shampoo step for one block (Gupta et al., 2018), grafted to the norm of another method.

Every function takes one block and returns new values; `jax.vmap` maps it over a stack. For a
matrix `G` of shape `(m, n)` with factors `L = E[G G^T]` and `R = E[G^T G]`, a step is

    M = b1 M + (1 - b1) G                   first moment
    P_L = (L + eps I)^-p                    inverse roots, refreshed now and then; P_R likewise
    U = P_L M P_R                           the direction
    N = U |A| / |U|                         the update, grafted to the norm of `A`

`A` is the direction of the grafting method: Adam's, RMSprop's, or the gradient.

With KL factors, eigenvectors `Q` and estimates `l` of the factors' eigenvalues replace the roots:
`P_L = Q_L diag((l_L + eps)^-p) Q_L^T`. The estimates include the step's gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.lax import PrecisionLike

from soap_optax.algorithm.kl_factors import LARGEST_INVERSE_ROOT
from soap_optax.algorithm.roots import default_exponent
from soap_optax.algorithm.step import (
    Hyperparameters,
    adam_direction,
    average_moments,
    bias_correction,
    rotate,
    rotate_back,
)
from soap_optax.linalg import frobenius_norm, largest_magnitude, multiply_along
from soap_optax.state import ShampooStackState

Grafting = Literal["adam", "rmsprop", "sgd"]
# The methods whose direction is divided by the root of a second moment.
WITH_SECOND_MOMENT: tuple[Grafting, ...] = ("adam", "rmsprop")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ShampooHyperparameters(Hyperparameters):
    """The numbers of a step; those of `Hyperparameters` are for grafting and Adam's leaves.

    Attributes:
      factor_eps: added to every eigenvalue of a factor.
      exponent: the exponent `p` of each side; None means 1/(2k) for k preconditioned axes.
      grafting: the method that gives an update its norm; None leaves the norm of the direction.
    """

    factor_eps: Array
    exponent: Array | None
    grafting: Grafting | None = field(metadata={"static": True})


def step_block(
    grad: Array,
    accepted: Array,
    state: ShampooStackState,
    axes: Sequence[int],
    hyper: ShampooHyperparameters,
) -> tuple[Array, ShampooStackState]:
    """Updates the moments by one gradient and returns the update.

    Factors, roots and bases do not change. A rejected gradient changes nothing and returns a zero
    update. The first accepted gradient also returns a zero update: it only fills the factors.
    Without grafting, so does every gradient before the first roots, whose size only roots give.

    Args:
      grad: the block's gradient, `(*block)`, in the dtype of the statistics.
      accepted: whether the gradient may enter the state, a boolean scalar.
      state: the block's state, whose `eigenvalues` include the gradient.
      axes: the preconditioned axes of the block, ascending.
      hyper: the numbers of the step.

    Returns:
      The update, `(*block)`, to be scaled by the (negative) learning rate, and the new state.
    """
    applied = accepted & (state.accepted_gradients > 0)
    moved = applied if hyper.grafting is not None else applied & (state.refreshes > 0)
    grad = jnp.where(accepted, grad, jnp.zeros_like(grad))
    nu = state.nu if _has_second_moment(hyper) else jnp.zeros_like(grad)
    mu, nu = average_moments(state.mu, nu, grad, applied, hyper)  # M, V
    direction, sizes = precondition(mu, state, axes, hyper)  # U
    if hyper.grafting is None:
        scale = bias_correction(state.accepted_gradients, replace(hyper, b2=_zero(hyper)))
        update = direction * scale
        for size in sizes:
            update = update * size
    else:
        assert isinstance(nu, Array)
        grafted = grafting_direction(grad, mu, nu, state.accepted_gradients, hyper)  # A
        update = direction * _ratio(frobenius_norm(grafted), frobenius_norm(direction))
    is_finite = jnp.all(jnp.isfinite(update))
    return jnp.where(moved & is_finite, update, 0), state._replace(
        accepted_gradients=state.accepted_gradients + accepted.astype(jnp.int32),
        mu=mu.astype(state.mu.dtype),
        nu=nu if _has_second_moment(hyper) else (),
        age=state.age + applied.astype(jnp.int32),
    )


def precondition(
    x: Array, state: ShampooStackState, axes: Sequence[int], hyper: ShampooHyperparameters
) -> tuple[Array, list[Array]]:
    """`P_L x P_R` up to its size, from the inverse roots or from the bases and eigenvalues.

    Each root is divided by its size. So nothing overflows or underflows, whatever the size of the
    gradients. Grafting needs no sizes.

    Returns:
      The direction, `(*block)`, and the size of each root, scalars. Their product is `P_L x P_R`.
    """
    if state.roots:
        scaled = [_scaled(root.astype(x.dtype)) for root in state.roots]
        roots = [root for root, _ in scaled]
        return multiply_by_roots(x, roots, axes, hyper.precision), [size for _, size in scaled]
    bases = [basis.astype(x.dtype) for basis in state.bases]
    x = rotate(x, bases, axes, hyper.precision)
    exponent = default_exponent(axes) if hyper.exponent is None else hyper.exponent
    sizes = []
    for axis, estimates in zip(axes, state.eigenvalues, strict=True):
        bounded = jnp.maximum(estimates, LARGEST_INVERSE_ROOT**-2)
        powers, size = _scaled((bounded + hyper.factor_eps) ** -exponent)
        sizes.append(size)
        x = x * powers.reshape([-1 if other == axis else 1 for other in range(x.ndim)])
    return rotate_back(x, bases, axes, hyper.precision), sizes


def multiply_by_roots(
    x: Array, roots: Sequence[Array], axes: Sequence[int], precision: PrecisionLike = None
) -> Array:
    """`P_L x P_R` for given roots, one for each preconditioned axis."""
    for axis, root in zip(axes, roots, strict=True):
        x = multiply_along(root.astype(x.dtype), x, axis, precision)
    return x


def grafting_direction(
    grad: Array, mu: Array, nu: Array, applied_update: Array, hyper: ShampooHyperparameters
) -> Array:
    """The direction `A` of the grafting method, at applied update `s`, `(*block)`."""
    if hyper.grafting == "sgd":
        return grad
    if hyper.grafting == "rmsprop":  # Adam without a first moment.
        mu, hyper = grad, replace(hyper, b1=_zero(hyper))
    return adam_direction(mu, nu, hyper) * bias_correction(applied_update, hyper)


def _ratio(wanted: Array, found: Array) -> Array:
    """The factor from one norm to another, 0 for a direction of zeros."""
    return jnp.where(found > 0, wanted / jnp.where(found > 0, found, 1), 0)


def _scaled(array: Array) -> tuple[Array, Array]:
    """An array divided by its largest magnitude, and that; the derivative is exact for both."""
    size = lax.stop_gradient(largest_magnitude(array))
    size = jnp.where(size > 0, size, 1)
    return array / size, size


def _has_second_moment(hyper: ShampooHyperparameters) -> bool:
    return hyper.grafting in WITH_SECOND_MOMENT


def _zero(hyper: Hyperparameters) -> Array:
    return jnp.zeros_like(hyper.b1)
