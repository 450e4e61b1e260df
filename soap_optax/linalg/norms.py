"""Frobenius norms of many matrices of one array; no square overflows or underflows."""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike


def norm_along(array: Array, axes: tuple[int, ...]) -> Array:
    """The Frobenius norm over these axes, which become 1 long; differentiable at zero."""
    scaled, scale = scaled_along(array, axes)
    return scale * norm_of_scaled(scaled, axes)


def scaled_along(array: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """An array divided by its largest part over these axes, and that part, or 1 for zeros.

    The parts of a complex entry are its real and its imaginary one.
    """
    parts = jnp.maximum(jnp.abs(jnp.real(array)), jnp.abs(jnp.imag(array)))
    largest = lax.stop_gradient(jnp.max(parts, axis=axes, keepdims=True))
    scale = jnp.where(largest > 0, largest, 1)
    return array / scale.astype(array.dtype), scale


def norm_of_scaled(array: Array, axes: tuple[int, ...]) -> Array:
    """The norm of an array whose squares neither overflow nor underflow; see `norm_along`."""
    square = jnp.sum(jnp.real(array * jnp.conj(array)), axis=axes, keepdims=True)
    is_zero = square == 0
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, square)))


def widened(array: ArrayLike) -> Array:
    """The array in float32 or wider, in which its square is computed."""
    # NumPy's promotion: JAX's raises in its strict mode.
    return jnp.asarray(array, np.promote_types(jnp.result_type(array), np.float32))
