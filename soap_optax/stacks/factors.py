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
from soap_optax.state import StackState


def is_acceptable(grad: Array, state: StackState) -> Array:
    """Whether a gradient, `(*block)`, may enter the state: it is finite and cannot overflow."""
    stored = [array.dtype for array in (*state.factors, state.mu)]
    acceptable = algorithm.is_acceptable(grad, stored)
    if state.eigenvalues:
        acceptable &= algorithm.is_whitenable(grad, state.eigenvalues, stored)
    return acceptable


def rotations(
    grad: Array, state: StackState, axes: Sequence[int], precision: PrecisionLike
) -> Rotations | None:
    """The rotations of a gradient that KL factors need; None without KL factors."""
    if not state.eigenvalues:
        return None
    bases = [basis.astype(grad.dtype) for basis in state.bases]
    return algorithm.rotations(grad, bases, axes, precision)


def average_factors(
    grad: Array,
    accepted: Array,
    state: StackState,
    rotated: Rotations | None,
    axes: Sequence[int],
    beta: Array,
) -> tuple[Array, ...]:
    """Averages a gradient into the factors of its block.

    Args:
      grad: the gradient, `(*block)`.
      accepted: whether the gradient may enter the state, a boolean scalar.
      state: the state before this gradient.
      rotated: what `rotations` returned.
      axes: the preconditioned axes of the block, ascending.
      beta: the decay of the factors, a scalar.
    """
    if rotated is None:
        grams = tuple(gram_matrix(grad, axis) for axis in axes)
        decay = beta
    else:
        is_first = state.accepted_gradients == 0
        grams = algorithm.kl_gram_matrices(rotated.by_others, state.eigenvalues, axes, is_first)
        decay = algorithm.kl_decay(beta, is_first)

    def average(factor: Array, gram: Array) -> Array:
        gram = folded_like(factor, gram)
        new = algorithm.average_factor(factor.astype(gram.dtype), gram, accepted, decay)
        return new.astype(factor.dtype)

    return tuple(map(average, state.factors, grams))


def average_eigenvalues(
    accepted: Array,
    state: StackState,
    rotated: Rotations | None,
    axes: Sequence[int],
    beta: Array,
) -> tuple[Array, ...]:
    """Averages a gradient into the eigenvalue estimates; the first one, before any basis, is not.

    The arguments are those of `average_factors`.
    """
    if rotated is None:
        return ()
    applied = accepted & (state.accepted_gradients > 0)
    averages = algorithm.average_eigenvalues(state.eigenvalues, rotated.whole, axes, beta)
    return tuple(
        jnp.where(applied, new, old) for new, old in zip(averages, state.eigenvalues, strict=True)
    )
