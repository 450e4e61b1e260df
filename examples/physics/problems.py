"""What a differential equation is to the training: residual, conditions and reference solution."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Field = Callable[[Array], Array]  # (N, 2) -> (N,)


class Face(NamedTuple):
    """One side of the domain, where the solution is given.

    Attributes:
      axis: the coordinate that is constant, 0 or 1.
      at: its value.
      values: the solution there, from the other coordinate.
    """

    axis: int
    at: float
    values: Callable[[np.ndarray], np.ndarray]


class Reference(NamedTuple):
    """A computed solution on a grid, in float64.

    Attributes:
      first: the values of the first coordinate, `(n,)`.
      second: the values of the second coordinate, `(m,)`.
      values: the solution, `(n, m)`.
    """

    first: np.ndarray
    second: np.ndarray
    values: np.ndarray

    @property
    def points(self) -> np.ndarray:
        """All points of the grid, `(n m, 2)`."""
        return np.stack(np.meshgrid(self.first, self.second, indexing="ij"), -1).reshape(-1, 2)


class Problem(NamedTuple):
    """A differential equation on a rectangle.

    Attributes:
      label: its printed name.
      axes: the names of the two coordinates. The first one is `t` if the solution evolves.
      lower: the lower corner of the domain.
      upper: the upper corner.
      periodic: whether the second coordinate is periodic.
      residual: left minus right side of the equation, from a field and points.
      faces: the initial and boundary conditions.
      reference: computes the solution.
      condition_weight: weight of the conditions in the loss. The weight of the residual is 1. Both
        are constant, unlike jaxpi's.
      fourier_scale: default standard deviation of the random Fourier features, or 0 for none.
      causal_tolerance: default tolerance of the causal weights, or 0 for equal weights.
    """

    label: str
    axes: tuple[str, str]
    lower: tuple[float, float]
    upper: tuple[float, float]
    periodic: bool
    residual: Callable[[Field, Array], Array]
    faces: tuple[Face, ...]
    reference: Callable[[], Reference]
    condition_weight: float
    fourier_scale: float
    causal_tolerance: float

    @property
    def evolves(self) -> bool:
        """Whether the first coordinate is time."""
        return self.axes[0] == "t"

    @property
    def period(self) -> float | None:
        """The period of the second coordinate, or None."""
        return self.upper[1] - self.lower[1] if self.periodic else None


def conditions(problem: Problem, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns `count` evenly spaced points on every face, `(N, 2)`, and the solution there."""
    points, values = [], []
    for face in problem.faces:
        other = 1 - face.axis
        along = np.linspace(problem.lower[other], problem.upper[other], count)
        coordinates = [along, np.full(count, face.at)]
        points.append(np.stack(coordinates if face.axis else coordinates[::-1], -1))
        values.append(face.values(along))
    return np.concatenate(points), np.concatenate(values)


def derivatives(field: Field, points: Array, axis: int, order: int) -> tuple[Array, ...]:
    """Differentiates a field along one coordinate, by nested forward mode.

    Returns:
      The field and its derivatives of order 1 to `order`, each `(N,)`.
    """
    direction = jnp.zeros_like(points).at[:, axis].set(1)

    def differentiated(function: Callable[[Array], tuple[Array, ...]]) -> Callable:
        def extended(points: Array) -> tuple[Array, ...]:
            values, tangents = jax.jvp(function, (points,), (direction,))
            return (*values, tangents[-1])

        return extended

    function = lambda points: (field(points),)  # noqa: E731
    for _ in range(order):
        function = differentiated(function)
    return function(points)
