"""Fits a curve to final losses, and finds the number of steps at which it crosses a target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

EXPONENTS = np.linspace(0.05, 4, 80)


class Fit(NamedTuple):
    """The curve `a + b N^-beta` through final losses after `N` steps."""

    a: float
    b: float
    beta: float

    def at(self, steps: float) -> float:
        """The loss after `steps`."""
        return self.a + self.b * steps**-self.beta


def fit(steps: Sequence[float], losses: Sequence[float]) -> Fit:
    """The curve of least squares with a positive `b`, over a grid of exponents.

    With two points, or with losses that do not fall, all exponents are equally good, and the first
    is taken.
    """
    x, y = np.asarray(steps, float), np.asarray(losses, float)
    found = []
    for beta in EXPONENTS:
        powers = (x / x.max()) ** -beta
        b, a = np.polyfit(powers, y, 1)
        b = max(float(b), 0.0)
        a = float(np.mean(y - b * powers))
        error = float(np.sum((a + b * powers - y) ** 2))
        found.append((error, Fit(a, b * float(x.max()) ** beta, float(beta))))
    return min(found, key=lambda pair: pair[0])[1]


def crossing(steps: Sequence[float], losses: Sequence[float], target: float) -> float | None:
    """The number of steps after which the fitted curve is at the target.

    Returns:
      None if that is outside of the trained range, by more than a rounding error. A curve is not
      extended beyond the trained steps.
    """
    curve = fit(steps, losses)
    low, high = min(steps), max(steps)
    if curve.b <= 0 or target <= curve.a:
        return None
    found = ((target - curve.a) / curve.b) ** (-1 / curve.beta)
    return found if low * (1 - 1e-9) <= found <= high * (1 + 1e-9) else None
