"""Checks that a basis is orthonormal, and the nearest orthonormal basis."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.bases import ROUNDING, random_basis
from helpers.cases import mostly_long

from soap_optax.linalg import orthonormality

# On CPUs, the maxima of optimized programs ignore NaN.
pytestmark = pytest.mark.usefixtures("optimized_programs")

is_finite = jax.jit(orthonormality.is_finite)
is_orthonormal = jax.jit(orthonormality.is_orthonormal)
nearest_orthonormal = jax.jit(orthonormality.nearest_orthonormal)
largest_magnitude = jax.jit(orthonormality.largest_magnitude)


@pytest.mark.parametrize("d", mostly_long([8, 32, 33, 64, 200, 256], short=[8, 33]))
def test_the_probed_departure_detects_every_fault(d: int) -> None:
    basis = jnp.asarray(random_basis(d), jnp.float32)
    tolerance = orthonormality.orthonormality_tolerance(basis)
    assert orthonormality.probed_departure(basis) < tolerance / 10
    for spoiled in (
        basis.at[-1, 0].set(jnp.nan),
        jnp.full_like(basis, jnp.nan),
        basis.at[0, -1].set(jnp.inf),
        basis * 1.001,
        basis.at[:, 0].set(basis[:, 1]),
        basis.at[:, 0].add(3 * tolerance * basis[:, 1]),
        jnp.zeros_like(basis),
    ):
        assert not is_orthonormal(spoiled)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("size", mostly_long([1, 31, 32, 4095, 4096, 100_000], [31, 4096]))
def test_the_largest_magnitude_of_any_number_of_entries_shows_a_nan(size: int, dtype: Any) -> None:
    array = jnp.linspace(-3, 2, size, dtype=dtype)
    assert largest_magnitude(array) == 3
    for spoiled in (array.at[0].set(jnp.nan), array.at[-1].set(jnp.nan), array * jnp.nan):
        assert jnp.isnan(largest_magnitude(spoiled))
        assert largest_magnitude(spoiled).dtype == dtype


@pytest.mark.parametrize("d", mostly_long([1, 8, 100], short=[8, 100]))
def test_a_factor_is_finite_up_to_the_largest_trace_of_accepted_gradients(d: int) -> None:
    # The factor of gradients with equal rows, whose sum of squares is a quarter of the largest
    # number.
    factor = jnp.full((d, d), float(jnp.finfo(jnp.float32).max) / 4 / d)
    assert is_finite(factor)
    for value in (jnp.nan, jnp.inf, -jnp.inf):
        assert not is_finite(factor.at[-1, 0].set(value))
        assert not is_finite(jnp.full_like(factor, value))


def test_a_large_factor_or_basis_with_a_nan_has_no_off_diagonal_mass() -> None:
    factor, basis = jnp.eye(80), jnp.asarray(random_basis(80), jnp.float32)
    for product, columns in (
        (factor.at[3, 3].set(jnp.nan) @ basis, basis),
        (factor @ basis, basis.at[:, 3].set(jnp.nan)),
    ):
        assert jnp.isnan(orthonormality.off_diagonal_mass(product, columns))


@pytest.mark.parametrize("scale", [0.1, 1.0, 1e3])
@pytest.mark.parametrize("d", [5, 40])
def test_the_nearest_orthonormal_matrix_is_that_of_the_singular_vectors(
    d: int, scale: float
) -> None:
    rng = np.random.default_rng(d)
    noise = 0.2 * rng.normal(size=(d, d))
    matrix = scale * random_basis(d) @ (np.eye(d) + noise - noise.T)
    left, _, right = np.linalg.svd(matrix)
    found = nearest_orthonormal(jnp.asarray(matrix, jnp.float32))
    assert is_orthonormal(found)
    # An eighth of the tolerance may remain, 4e-5, measured with several vectors of signs.
    np.testing.assert_allclose(found, left @ right, atol=1e-4)


@pytest.mark.parametrize("matrix", [jnp.zeros((40, 40)), jnp.full((256, 256), jnp.nan)])
def test_a_matrix_far_from_orthonormal_ends_and_is_not_orthonormal(matrix: jax.Array) -> None:
    assert not is_orthonormal(nearest_orthonormal(matrix))


def test_a_drifting_basis_is_made_orthonormal_and_another_one_not_touched() -> None:
    basis = jnp.asarray(random_basis(40), jnp.float32)
    np.testing.assert_array_equal(nearest_orthonormal(basis), basis)
    drifted = basis * (1 + 2e-4)
    assert orthonormality.departure_from_orthonormality(nearest_orthonormal(drifted)) < ROUNDING
