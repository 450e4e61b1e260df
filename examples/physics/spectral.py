"""Periodic evolution equations by Fourier modes and ETDRK4, in NumPy float64.

Exponential time differencing of order 4 solves the linear part exactly. Its coefficients are means
over circles in the complex plane, because the formulas cancel near zero.

References:
  Cox and Matthews, Exponential Time Differencing for Stiff Systems, 2002
  Kassam and Trefethen, Fourth-Order Time-Stepping for Stiff PDEs, 2005
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

CONTOUR_POINTS = 32  # Kassam and Trefethen's choice


def wavenumbers(modes: int, length: float) -> np.ndarray:
    """Returns the wavenumbers of `np.fft.rfft` on a periodic interval."""
    return 2 * np.pi / length * np.arange(modes // 2 + 1)


class Coefficients(NamedTuple):
    """The coefficients of one step, each with one value for every mode."""

    whole: np.ndarray  # exp(h L)
    half: np.ndarray  # exp(h L / 2)
    stage: np.ndarray
    first: np.ndarray
    middle: np.ndarray
    last: np.ndarray


def coefficients(linear: np.ndarray, step: float) -> Coefficients:
    """Computes the coefficients of ETDRK4 for a diagonal linear part."""
    z = step * linear
    circle = np.exp(2j * np.pi * (np.arange(CONTOUR_POINTS) + 0.5) / CONTOUR_POINTS)
    r = z[:, None] + circle[None]
    e = np.exp(r)

    def mean(values: np.ndarray) -> np.ndarray:
        return step * values.mean(1)

    return Coefficients(
        whole=np.exp(z),
        half=np.exp(z / 2),
        stage=mean((np.exp(r / 2) - 1) / r),
        first=mean((-4 - r + e * (4 - 3 * r + r**2)) / r**3),
        middle=mean((2 + r + e * (r - 2)) / r**3),
        last=mean((-4 - 3 * r - r**2 + e * (4 - r)) / r**3),
    )


def solve(
    linear: np.ndarray,
    nonlinear: Callable[[np.ndarray], np.ndarray],
    initial: np.ndarray,
    times: np.ndarray,
    steps: int,
) -> np.ndarray:
    """Integrates `u_t = L u + N(u)` over evenly spaced times.

    Args:
      linear: the eigenvalues of L, one for every mode of `np.fft.rfft`.
      nonlinear: N, from modes to modes.
      initial: the solution at the first time, on an even grid, `(m,)`.
      times: the times of the result, `(n,)`.
      steps: the number of steps from one of these times to the next.

    Returns:
      The solution, `(n, m)`.
    """
    c = coefficients(linear, (times[1] - times[0]) / steps)
    modes = np.fft.rfft(initial)
    rows = [modes]
    for _ in times[1:]:
        for _ in range(steps):
            modes = one_step(modes, nonlinear, c)
        rows.append(modes)
    return np.fft.irfft(np.stack(rows), len(initial))


def one_step(
    modes: np.ndarray, nonlinear: Callable[[np.ndarray], np.ndarray], c: Coefficients
) -> np.ndarray:
    """Takes one step of ETDRK4."""
    at_start = nonlinear(modes)
    a = c.half * modes + c.stage * at_start
    at_a = nonlinear(a)
    b = c.half * modes + c.stage * at_a
    at_b = nonlinear(b)
    at_end = nonlinear(c.half * a + c.stage * (2 * at_b - at_start))
    return c.whole * modes + c.first * at_start + 2 * c.middle * (at_a + at_b) + c.last * at_end
