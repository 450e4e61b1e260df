"""The loss: mean squared residual, with causal weights if there are any, and the conditions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from physics.problems import Field, Problem

CHUNKS = 32  # jaxpi's number of chunks in time


def sample_points(problem: Problem, count: int, dtype: jnp.dtype, key: Array) -> Array:
    """Draws points of the domain, `(count, 2)`. The points of an evolution are sorted by time."""
    lower, upper = (jnp.asarray(corner, dtype) for corner in (problem.lower, problem.upper))
    points = lower[None] + (upper - lower)[None] * jax.random.uniform(key, (count, 2), dtype)
    return points.at[:, 0].set(jnp.sort(points[:, 0])) if problem.evolves else points


def residual_loss(problem: Problem, field: Field, points: Array, causal_tolerance: float) -> Array:
    """Returns the mean squared residual.

    With a positive tolerance, the points are sorted by time and form `CHUNKS` chunks. The weight of
    a chunk is `exp(-tolerance * s)`, where `s` is the sum of the mean squared residuals before it.

    References:
      Wang, Sankaran and Perdikaris, Respecting Causality Is All You Need for Training
        Physics-Informed Neural Networks, https://arxiv.org/abs/2203.07404, 2022
    """
    squares = problem.residual(field, points) ** 2
    if not causal_tolerance:
        return squares.mean()
    chunks = squares.reshape(CHUNKS, -1).mean(1)
    before = jnp.cumsum(chunks) - chunks
    return (jax.lax.stop_gradient(jnp.exp(-causal_tolerance * before)) * chunks).mean()


def condition_loss(field: Field, points: Array, values: Array) -> Array:
    """Returns the mean squared error of the initial and boundary conditions."""
    return ((field(points) - values) ** 2).mean()


def relative_l2(prediction: Array, reference: Array) -> Array:
    """Returns the norm of the error, relative to the norm of the reference."""
    return jnp.linalg.norm(prediction - reference) / jnp.linalg.norm(reference)
