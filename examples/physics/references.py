"""The reference solutions, computed in NumPy float64."""

from __future__ import annotations

import numpy as np

from physics.problems import Reference
from physics.spectral import solve, wavenumbers

TIMES = np.linspace(0.0, 1.0, 101)
POSITIONS = np.linspace(-1.0, 1.0, 257)  # both ends of the interval

BURGERS_VISCOSITY = 0.01 / np.pi
ALLEN_CAHN_DIFFUSION = 1e-4
ALLEN_CAHN_REACTION = 5.0
KDV_DISPERSION = 0.022**2
HELMHOLTZ_WAVENUMBER = 1.0
HELMHOLTZ_MODES = (1.0, 4.0)

# Relative L2 errors, against twice as many nodes, modes and steps: Burgers 2e-15, Allen-Cahn 1e-6,
# KdV 1e-9. The periodic continuation of Allen-Cahn's initial condition has kinks, which slow down
# the convergence in the number of modes.
QUADRATURE_NODES = 100
ALLEN_CAHN_GRID, ALLEN_CAHN_STEPS = 2048, 10  # modes, and steps between two of the times
KDV_GRID, KDV_STEPS = 256, 80


def burgers(
    times: np.ndarray = TIMES, positions: np.ndarray = POSITIONS, nodes: int = QUADRATURE_NODES
) -> Reference:
    """Burgers' equation by the Cole-Hopf transform, with Gauss-Hermite quadrature.

    References:
      Basdevant et al., Spectral and Finite Difference Solutions of the Burgers Equation, 1986
    """
    z, weights = np.polynomial.hermite.hermgauss(nodes)
    width = np.sqrt(4 * BURGERS_VISCOSITY * times)
    y = positions[None, :, None] - width[:, None, None] * z  # (n, m, nodes)
    # The exponents are shifted, so that the largest is near zero.
    heat = weights * np.exp(-(np.cos(np.pi * y) + 1) / (2 * np.pi * BURGERS_VISCOSITY))
    values = -(heat * np.sin(np.pi * y)).sum(-1) / heat.sum(-1)
    values[times == 0] = -np.sin(np.pi * positions)
    return Reference(times, positions, values)


def initial_allen_cahn(x: np.ndarray) -> np.ndarray:
    """The initial condition of the Allen-Cahn equation."""
    return x**2 * np.cos(np.pi * x)


def allen_cahn(modes: int = ALLEN_CAHN_GRID, steps: int = ALLEN_CAHN_STEPS) -> Reference:
    """The Allen-Cahn equation by Fourier modes and ETDRK4."""
    x = np.linspace(-1, 1, modes, endpoint=False)
    k = wavenumbers(modes, 2.0)

    def nonlinear(u: np.ndarray) -> np.ndarray:
        return np.fft.rfft(-ALLEN_CAHN_REACTION * np.fft.irfft(u, modes) ** 3)

    linear = ALLEN_CAHN_REACTION - ALLEN_CAHN_DIFFUSION * k**2
    return on_grid(solve(linear, nonlinear, initial_allen_cahn(x), TIMES, steps))


def initial_kdv(x: np.ndarray) -> np.ndarray:
    """The initial condition of the Korteweg-de Vries equation."""
    return np.cos(np.pi * x)


def kdv(modes: int = KDV_GRID, steps: int = KDV_STEPS) -> Reference:
    """The Korteweg-de Vries equation by Fourier modes and ETDRK4."""
    x = np.linspace(-1, 1, modes, endpoint=False)
    return on_grid(solve_kdv(initial_kdv(x), TIMES, steps, 2.0, KDV_DISPERSION))


def solve_kdv(
    initial: np.ndarray, times: np.ndarray, steps: int, length: float, dispersion: float
) -> np.ndarray:
    """Solves `u_t + u u_x + dispersion u_xxx = 0` on a periodic interval."""
    modes = len(initial)
    k = wavenumbers(modes, length)
    k[-1] *= modes % 2  # The highest mode of an even number has no odd derivative.

    def nonlinear(u: np.ndarray) -> np.ndarray:
        return -0.5j * k * np.fft.rfft(np.fft.irfft(u, modes) ** 2)

    return solve(1j * dispersion * k**3, nonlinear, initial, times, steps)


def on_grid(values: np.ndarray) -> Reference:
    """Takes every n-th position, and repeats the first one at the end of the period."""
    stride = values.shape[1] // (len(POSITIONS) - 1)
    values = values[:, ::stride]
    return Reference(TIMES, POSITIONS, np.concatenate([values, values[:, :1]], 1))


def helmholtz(x: np.ndarray = POSITIONS[::2], y: np.ndarray = POSITIONS[::2]) -> Reference:
    """The solution from which the right side of the Helmholtz equation is made."""
    first, second = HELMHOLTZ_MODES
    return Reference(x, y, np.sin(first * np.pi * x)[:, None] * np.sin(second * np.pi * y)[None])
