"""The four equations.

Domains and coefficients are those of jaxpi, apart from Helmholtz.

References:
  Wang, Sankaran, Wang and Perdikaris, An Expert's Guide to Training Physics-Informed Neural
    Networks, https://arxiv.org/abs/2308.08468, 2023: Allen-Cahn
  Wang, Li, Chen and Perdikaris, PirateNets, https://arxiv.org/abs/2402.00326, 2024: KdV
  Raissi, Perdikaris and Karniadakis, Physics-Informed Neural Networks, 2019: Burgers
  Wang, Teng and Perdikaris, Understanding and Mitigating Gradient Flow Pathologies in
    Physics-Informed Neural Networks, https://arxiv.org/abs/2001.04536, 2021: Helmholtz
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array

from physics import references
from physics.problems import Face, Field, Problem, derivatives


def burgers_residual(field: Field, points: Array) -> Array:
    """Burgers: `u_t + u u_x - v u_xx`."""
    _, u_t = derivatives(field, points, 0, 1)
    u, u_x, u_xx = derivatives(field, points, 1, 2)
    return u_t + u * u_x - references.BURGERS_VISCOSITY * u_xx


def allen_cahn_residual(field: Field, points: Array) -> Array:
    """Allen-Cahn: `u_t - D u_xx + 5 u^3 - 5 u`."""
    _, u_t = derivatives(field, points, 0, 1)
    u, _, u_xx = derivatives(field, points, 1, 2)
    reaction = references.ALLEN_CAHN_REACTION * (u**3 - u)
    return u_t - references.ALLEN_CAHN_DIFFUSION * u_xx + reaction


def kdv_residual(field: Field, points: Array) -> Array:
    """Korteweg-de Vries: `u_t + u u_x + m^2 u_xxx`."""
    _, u_t = derivatives(field, points, 0, 1)
    u, u_x, _, u_xxx = derivatives(field, points, 1, 3)
    return u_t + u * u_x + references.KDV_DISPERSION * u_xxx


def helmholtz_residual(field: Field, points: Array) -> Array:
    """Helmholtz: `u_xx + u_yy + k^2 u - q`, with `q` of the manufactured solution."""
    u, _, u_xx = derivatives(field, points, 0, 2)
    _, _, u_yy = derivatives(field, points, 1, 2)
    first, second = (mode * np.pi for mode in references.HELMHOLTZ_MODES)
    square = references.HELMHOLTZ_WAVENUMBER**2
    solution = jnp.sin(first * points[:, 0]) * jnp.sin(second * points[:, 1])
    return u_xx + u_yy + square * u - (square - first**2 - second**2) * solution


def initial_burgers(x: np.ndarray) -> np.ndarray:
    """The initial condition of Burgers' equation."""
    return -np.sin(np.pi * x)


EVOLUTION = {"axes": ("t", "x"), "lower": (0.0, -1.0), "upper": (1.0, 1.0)}

EQUATIONS = {
    "burgers": Problem(
        label="Burgers",
        **EVOLUTION,
        periodic=False,
        residual=burgers_residual,
        faces=(
            Face(0, 0.0, initial_burgers),
            Face(1, -1.0, np.zeros_like),
            Face(1, 1.0, np.zeros_like),
        ),
        reference=references.burgers,
        condition_weight=10.0,
        fourier_scale=1.0,
        causal_tolerance=0.0,
    ),
    "allen-cahn": Problem(
        label="Allen-Cahn",
        **EVOLUTION,
        periodic=True,
        residual=allen_cahn_residual,
        faces=(Face(0, 0.0, references.initial_allen_cahn),),
        reference=references.allen_cahn,
        condition_weight=100.0,
        fourier_scale=2.0,
        causal_tolerance=1.0,
    ),
    "kdv": Problem(
        label="Korteweg-de Vries",
        **EVOLUTION,
        periodic=True,
        residual=kdv_residual,
        faces=(Face(0, 0.0, references.initial_kdv),),
        reference=references.kdv,
        condition_weight=100.0,
        fourier_scale=1.0,
        causal_tolerance=0.1,
    ),
    "helmholtz": Problem(
        label="Helmholtz",
        axes=("x", "y"),
        lower=(-1.0, -1.0),
        upper=(1.0, 1.0),
        periodic=False,
        residual=helmholtz_residual,
        faces=tuple(Face(axis, at, np.zeros_like) for axis in (0, 1) for at in (-1.0, 1.0)),
        reference=references.helmholtz,
        condition_weight=100.0,
        fourier_scale=1.0,
        causal_tolerance=0.0,
    ),
}
