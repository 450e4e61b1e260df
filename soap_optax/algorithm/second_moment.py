"""The second moment of a block: one number for each entry, or factored as in Adafactor.

A factored second moment stores marginals: for each axis, `(d,)`, the mean of the squared rotated
gradient over all other axes. An entry's estimate is the product of its marginals, divided by the
overall mean to the power that preserves the scale. For a matrix that is `r c^T / mean(r)`.

References:
  Shazeer and Stern, Adafactor, 2018, section 3; Vyas et al., 2024, section 7.2.1.
"""

import jax.numpy as jnp
from jax import Array

from soap_optax.state import SecondMoment


def average(nu: SecondMoment, rotated_grad: Array, b2: Array) -> SecondMoment:
    """Averages the square of a rotated gradient, `(*block)`, into the second moment."""
    square = jnp.square(rotated_grad)
    if isinstance(nu, tuple):
        return tuple(
            b2 * old + (1 - b2) * new for old, new in zip(nu, marginals(square), strict=True)
        )
    return b2 * nu + (1 - b2) * square


def marginals(square: Array) -> tuple[Array, ...]:
    """For each axis, the mean over all other axes, `(d,)`."""
    axes = range(square.ndim)
    return tuple(jnp.mean(square, [other for other in axes if other != axis]) for axis in axes)


def estimate(nu: SecondMoment) -> Array:
    """The second moment of every entry, `(*block)`."""
    if not isinstance(nu, tuple):
        return nu
    first, *others = nu
    mean = jnp.mean(first)
    whole = _along(first, 0, len(nu))
    for axis, marginal in enumerate(others, start=1):
        # The quotient first: the product of two marginals may be too small for float32.
        whole = whole * _along(marginal / jnp.where(mean > 0, mean, 1), axis, len(nu))
    return whole


def permute(nu: SecondMoment, permutation: Array, axis: int) -> SecondMoment:
    """The second moment after the basis columns of one axis have been permuted."""
    if isinstance(nu, tuple):
        return (*nu[:axis], nu[axis][permutation], *nu[axis + 1 :])
    return jnp.take(nu, permutation, axis=axis)


def _along(vector: Array, axis: int, ndim: int) -> Array:
    return vector.reshape([-1 if other == axis else 1 for other in range(ndim)])
