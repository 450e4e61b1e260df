"""The averages of one block's factors, and of their eigenvalue estimates, in their storage.

A block has eigenvalue estimates if `factor_estimator` is `"kl"`.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array
from jax.lax import PrecisionLike

from soap_optax import algorithm
from soap_optax.algorithm import Rotations
from soap_optax.linalg import folded_like, gram_matrix
from soap_optax.state import AnyStackState


def is_acceptable(grad: Array, state: AnyStackState) -> Array:
    """Whether a gradient, `(*block)`, may enter the state: it is finite and cannot overflow."""
    stored = [array.dtype for array in (*state.factors, state.mu)]
    acceptable = algorithm.is_acceptable(grad, stored)
    if state.eigenvalues:
        acceptable &= algorithm.is_whitenable(grad, state.eigenvalues, stored)
    return acceptable


def rotations(
    grad: Array, state: AnyStackState, axes: Sequence[int], precision: PrecisionLike
) -> Rotations | None:
    """The rotations of a gradient that a step with KL factors needs; None without KL factors."""
    if not state.eigenvalues:
        return None
    return algorithm.rotations(grad, _bases(state, grad), axes, precision)


def rotations_by_others(
    grad: Array, state: AnyStackState, axes: Sequence[int]
) -> tuple[Array, ...] | None:
    """The rotations of a gradient that KL factors need; None without KL factors."""
    if not state.eigenvalues:
        return None
    return algorithm.rotations_by_others(grad, _bases(state, grad), axes)


def average_factors(
    grad: Array,
    accepted: Array,
    state: AnyStackState,
    by_others: Sequence[Array] | None,
    axes: Sequence[int],
    beta: Array,
) -> tuple[Array, ...]:
    """Averages a gradient into the factors of its block.

    Args:
      grad: the gradient, `(*block)`.
      accepted: whether the gradient may enter the state, a boolean scalar.
      state: the state before this gradient.
      by_others: the gradient rotated along all other preconditioned axes, for each of them; None
        without KL factors.
      axes: the preconditioned axes of the block, ascending.
      beta: the decay of the factors, a scalar.
    """
    if by_others is None:
        grams = tuple(gram_matrix(grad, axis) for axis in axes)
        decay = beta
    else:
        is_first = state.accepted_gradients == 0
        grams = algorithm.kl_gram_matrices(by_others, state.eigenvalues, axes, is_first)
        decay = algorithm.kl_decay(beta, is_first)

    def average(factor: Array, gram: Array) -> Array:
        gram = folded_like(factor, gram)
        new = algorithm.average_factor(factor.astype(gram.dtype), gram, accepted, decay)
        return new.astype(factor.dtype)

    return tuple(map(average, state.factors, grams))


def average_eigenvalues(
    accepted: Array,
    state: AnyStackState,
    rotated: Rotations | None,
    axes: Sequence[int],
    beta: Array,
) -> tuple[Array, ...]:
    """Averages a gradient into the eigenvalue estimates of its block, if it has any.

    The first gradient comes before any basis and does not change them.

    Args:
      accepted: whether the gradient may enter the state, a boolean scalar.
      state: the state before this gradient.
      rotated: the rotations of the gradient; None without KL factors.
      axes: the preconditioned axes of the block, ascending.
      beta: the decay of the factors, a scalar.
    """
    if rotated is None:
        return ()
    applied = accepted & (state.accepted_gradients > 0)
    averages = algorithm.average_eigenvalues(state.eigenvalues, rotated.whole, axes, beta)
    return tuple(
        jnp.where(applied, new, old) for new, old in zip(averages, state.eigenvalues, strict=True)
    )


def _bases(state: AnyStackState, grad: Array) -> list[Array]:
    """The bases of a block, in the dtype of its gradient."""
    return [basis.astype(grad.dtype) for basis in state.bases]
