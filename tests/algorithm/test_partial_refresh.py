"""The partial refresh: a quarter of the columns at a time, every pair of columns in one cycle."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.bases import ROUNDING, factor_of, mass, near, random_basis

from soap_optax.algorithm import partial_refresh
from soap_optax.linalg import orthonormality


def columns_in(d: int, starts: jax.Array) -> np.ndarray:
    return np.asarray(partial_refresh.take_chunks(jnp.arange(d), 0, starts))


@pytest.mark.parametrize("d", [2, 31, 32, 37, 39, 64, 71])
def test_partial_refreshes_meet_every_pair_of_columns(d: int) -> None:
    met = np.zeros((d, d), bool)
    chunks_of = jax.jit(partial_refresh.scheduled_chunks, static_argnums=0)
    rounds = 5 if d % partial_refresh.CHUNKS else 1
    for number in range(len(partial_refresh.PAIRS) * rounds):
        columns = columns_in(d, chunks_of(d, number))
        assert len(set(columns)) == len(columns) == (d if d < 32 else d // 8 * 2)
        assert columns.min() >= 0
        assert columns.max() < d
        met[np.ix_(columns, columns)] = True
    assert met.all()


@pytest.mark.long
@pytest.mark.parametrize("number", [3, 28 * 4 + 20])
def test_a_partial_refresh_rotates_its_columns_and_leaves_the_others_alone(number: int) -> None:
    d = 43
    vectors = random_basis(d)
    factor = factor_of(vectors, 2.0 ** -np.linspace(0, 6, d))
    basis = near(vectors, 0.05)
    starts = partial_refresh.scheduled_chunks(d, jnp.int32(number))
    columns = columns_in(d, starts)
    new = partial_refresh.rotate_chunks(factor, basis, starts)
    others = np.setdiff1d(np.arange(d), columns)
    np.testing.assert_array_equal(new.basis[:, others], basis[:, others])
    assert new.permutation[others].tolist() == others.tolist()
    # The columns span the same subspace as before. There they diagonalize the factor, by descending
    # Rayleigh quotient.
    old_columns, new_columns = basis[:, columns], new.basis[:, columns]
    np.testing.assert_allclose(
        new_columns @ new_columns.T, old_columns @ old_columns.T, atol=ROUNDING
    )
    assert mass(factor, new_columns) < ROUNDING
    quotients = np.diag(basis.T @ factor @ basis)[new.permutation[columns]]
    assert (np.diff(quotients) <= 0).all()
    mu = jnp.asarray(np.random.default_rng(0).normal(size=(3, d)), jnp.float32)
    rotated = partial_refresh.rotate_moment(mu, 1, starts, new.rotation)
    np.testing.assert_allclose(rotated @ new.basis.T, mu @ basis.T, atol=ROUNDING)


@pytest.mark.long
def test_partial_refreshes_find_the_eigenvectors_of_a_still_factor() -> None:
    vectors = random_basis(40)
    factor = factor_of(vectors, 2.0 ** -np.linspace(0, 6, 40))
    basis = near(vectors, 0.05)
    masses = [mass(factor, basis)]

    @jax.jit
    def refresh_once(basis: jax.Array, number: Any) -> jax.Array:
        starts = partial_refresh.scheduled_chunks(40, number)
        return partial_refresh.rotate_chunks(factor, basis, starts).basis

    for number in range(4 * len(partial_refresh.PAIRS)):
        basis = refresh_once(basis, number)
        masses.append(mass(factor, basis))
    assert masses[28] < 0.5 * masses[0]
    assert masses[-1] < 1e-3
    assert orthonormality.is_orthonormal(basis)
