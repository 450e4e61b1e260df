"""Random bases, factors with given eigenvectors, and the off-diagonal mass of a factor."""

import jax
import jax.numpy as jnp
import numpy as np

# For entries of orthonormal matrices and of their products, after some ten float32 operations.
ROUNDING = 1e-5


def random_basis(d: int, seed: int = 0) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]


def factor_of(basis: np.ndarray, eigenvalues: np.ndarray) -> jax.Array:
    return jnp.asarray(basis * eigenvalues @ basis.T, jnp.float32)


def near(basis: np.ndarray, distance: float, seed: int = 1) -> jax.Array:
    """The basis after a random rotation of about this size."""
    noise = distance * np.random.default_rng(seed).normal(size=basis.shape)
    return jnp.asarray(np.linalg.qr(basis + basis @ (noise - noise.T))[0], jnp.float32)


def mass(factor: jax.Array, basis: jax.Array) -> float:
    rotated = np.asarray(basis, np.float64).T @ np.asarray(factor, np.float64) @ basis
    off = rotated - np.diag(np.diag(rotated))
    return float(np.linalg.norm(off) / np.linalg.norm(rotated))
