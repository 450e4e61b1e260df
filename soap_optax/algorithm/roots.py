"""The inverse roots of one block's factors: `(L + eps I)^-p`, and the guard that may reject them.

Every function takes one block. `soap_optax.stacks` decides when a refresh runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from soap_optax.algorithm.refresh_methods import over_axes
from soap_optax.algorithm.step import ROUNDING
from soap_optax.linalg import (
    descending_eigenvectors,
    inverse_power,
    is_finite,
    is_orthonormal,
    largest_magnitude,
    matmul,
    rayleigh_quotients,
    with_unit_vectors,
    zero_rows,
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RootRule:
    """How inverse roots are computed from factors.

    Attributes:
      eps: added to every eigenvalue of a factor, a scalar.
      exponent: the exponent of each side, a scalar; None means 1/(2k) for k preconditioned axes.
      decay: the decay of the factors, a scalar.
      correct_bias: whether to correct for the factors' start at zero.
    """

    eps: Array
    exponent: Array | None
    decay: Array
    correct_bias: bool = field(metadata={"static": True})


class RootState(NamedTuple):
    """The fields of a block's state that a refresh of roots changes; see `ShampooStackState`.

    Attributes:
      averaged_gradients: the number of gradients in the factors, which a refresh only reads.
    """

    roots: tuple[Array, ...]
    age: Array
    refreshes: Array
    rejected_refreshes: Array
    averaged_gradients: Array


class InverseRoot(NamedTuple):
    """The inverse root of a factor, `(d, d)`, and whether it may be adopted, a boolean scalar."""

    root: Array
    is_sound: Array


def any_of_zeros(factors: Sequence[Array]) -> Array:
    """Whether any factor of a block has only zeros, a boolean scalar."""
    sums = [jnp.sum(jnp.abs(factor)) for factor in factors]
    return jnp.any(jnp.stack(sums) == 0)


def default_exponent(axes: Sequence[int]) -> float:
    """The exponent of each side of a block with these preconditioned axes."""
    return 1 / (2 * len(axes))


def refresh_roots(
    state: RootState, factors: Sequence[Array], axes: Sequence[int], rule: RootRule
) -> RootState:
    """Computes the inverse roots of a block's factors, and adopts them if all of them are sound.

    Args:
      state: the roots and counters before.
      factors: the Kronecker factors, `(d, d)` each, in the dtype of the statistics.
      axes: the preconditioned axes of the block, ascending.
      rule: how to compute a root.

    Returns:
      The new state. The refresh is rejected if a factor or a root is not finite, or a factor is not
      symmetric positive. The roots are then the old ones.
    """
    dtype = factors[0].dtype
    exponent = default_exponent(axes) if rule.exponent is None else rule.exponent
    weight = jnp.ones((), dtype)
    if rule.correct_bias:
        weight = 1 - rule.decay ** jnp.maximum(state.averaged_gradients, 1).astype(dtype)
    stored = jnp.finfo(state.roots[0].dtype)
    # The eigenvalues of stored factors are this uncertain, relative to the largest.
    uncertainty = max(ROUNDING * float(jnp.finfo(dtype).eps), float(stored.eps))

    def root_of(factor: Array) -> InverseRoot:
        return inverse_root(
            factor / weight,
            rule.eps,
            jnp.asarray(exponent, dtype),
            uncertainty,
            most_negative=float(stored.eps) ** 0.5,
        )

    found = over_axes(root_of, factors)
    sound = jnp.all(jnp.stack([one.is_sound for one in found]))
    adopted = state._replace(
        roots=tuple(
            jnp.where(sound, one.root.astype(old.dtype), old)
            for one, old in zip(found, state.roots, strict=True)
        )
    )
    return adopted._replace(
        age=jnp.zeros_like(state.age),
        refreshes=state.refreshes + sound.astype(jnp.int32),
        rejected_refreshes=state.rejected_refreshes + (~sound).astype(jnp.int32),
    )


def inverse_root(
    factor: Array, eps: Array, exponent: Array, uncertainty: float, most_negative: float
) -> InverseRoot:
    """The inverse root of one factor, and whether factor and root are sound.

    The unit vector of a row of zeros is an exact eigenvector. So this row of the root is zero off
    its diagonal, and a row without a gradient gets an update of exactly zero. Its eigenvalue is the
    mean of the others. With zero, its first gradients would move it much further than other rows.

    Args:
      factor: a symmetric positive matrix, `(d, d)`.
      eps: added to every eigenvalue, a scalar.
      exponent: the root is the power of minus this number, a scalar.
      uncertainty: eigenvalues of the damped factor below this share of the factor's largest are
        rounding errors, and are raised to it.
      most_negative: the share of the largest up to which a negative eigenvalue, or an asymmetry, is
        a rounding error. Beyond it the factor is not symmetric positive.
    """
    rows = zero_rows(factor)
    vectors = with_unit_vectors(descending_eigenvectors(factor, rows), rows)
    vectors = lax.stop_gradient(vectors)
    factor = _with_mean_eigenvalues(factor, rows)
    values = lax.stop_gradient(rayleigh_quotients(matmul(factor, vectors), vectors))
    largest = jnp.max(jnp.abs(values))
    root = inverse_power(factor, vectors, values, eps, uncertainty * largest, exponent)
    is_positive = jnp.min(values) >= -most_negative * largest
    asymmetry = largest_magnitude(factor - factor.T)
    is_symmetric = asymmetry <= most_negative * largest_magnitude(factor)
    # A factor with an entry that is not finite differs from its transpose by NaN.
    is_sound = is_finite(root) & is_symmetric & is_positive & is_orthonormal(vectors)
    return InverseRoot(root, is_sound)


def _with_mean_eigenvalues(factor: Array, rows: Array) -> Array:
    """A factor whose rows of zeros have the mean eigenvalue of the others on their diagonal."""
    others = jnp.maximum(jnp.sum((~rows).astype(factor.dtype)), 1)
    mean = jnp.trace(factor / others)  # The trace may overflow where the mean does not.
    return jnp.where(jnp.diag(rows), mean, factor)
