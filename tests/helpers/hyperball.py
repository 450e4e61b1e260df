"""An independent reference of `hyperball` in NumPy: one matrix at a time, in float64."""

import itertools
from collections.abc import Sequence

import numpy as np


def step(
    weights: np.ndarray,
    direction: np.ndarray,
    rate: float,
    start: np.ndarray,
    axes: Sequence[int] | None,
) -> np.ndarray:
    """The weights after one step of one leaf.

    Args:
      weights: the weights before the step.
      direction: the direction to descend.
      rate: the learning rate.
      start: the weights before the first step, whose norms are preserved.
      axes: the axes of a matrix; None for a leaf that gets the plain update.
    """
    if axes is None:
        return weights - rate * direction
    new_weights = np.empty_like(weights)
    lengths = [1 if axis in axes else n for axis, n in enumerate(weights.shape)]
    for position in itertools.product(*map(range, lengths)):
        part = tuple(slice(None) if axis in axes else index for axis, index in enumerate(position))
        new_weights[part] = step_of_matrix(
            weights[part], direction[part], rate, float(np.linalg.norm(start[part].ravel()))
        )
    return new_weights


def step_of_matrix(
    weights: np.ndarray, direction: np.ndarray, rate: float, radius: float
) -> np.ndarray:
    """The step of one matrix, as an array of any number of axes."""
    size = np.linalg.norm(direction.ravel())
    if radius == 0:
        return weights - rate * direction
    if size == 0 or not np.isfinite(size):
        return weights
    moved = weights - rate * radius * direction / max(size, 1e-10)
    return radius * moved / np.linalg.norm(moved.ravel())
