"""Rows of zeros are decoupled from all other rows exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from soap_optax.linalg import (
    decoupled_columns,
    decoupled_rows,
    descending_eigenvectors,
    orthonormalize,
    with_unit_vectors,
    zero_rows,
)

ZERO = np.array([True, False, False, True, False, True, False, False])


def eigenvectors(matrix: jax.Array) -> np.ndarray:
    rows = zero_rows(matrix)
    return np.asarray(with_unit_vectors(descending_eigenvectors(matrix, rows), rows))


def factor(rank: int = 8) -> jax.Array:
    grads = np.random.default_rng(0).normal(size=(8, rank))
    grads[ZERO] = 0
    return jnp.asarray(grads @ grads.T, jnp.float32)


@pytest.mark.parametrize("rank", [8, 2])
def test_eigenvectors_of_rows_of_zeros_are_their_unit_vectors_and_come_first(rank: int) -> None:
    vectors = eigenvectors(factor(rank))
    np.testing.assert_array_equal(vectors[:, :3], np.eye(8)[:, ZERO])
    assert np.all(vectors[ZERO, 3:] == 0)
    # A few roundings of float32.
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(8), atol=1e-6)


def test_a_matrix_of_zeros_has_the_identity_as_its_eigenvectors() -> None:
    np.testing.assert_array_equal(eigenvectors(jnp.zeros((4, 4))), np.eye(4))


def test_eigenvectors_without_a_row_of_zeros_are_those_of_eigh() -> None:
    matrix = factor() + jnp.eye(8)
    np.testing.assert_array_equal(eigenvectors(matrix), jax.lax.linalg.eigh(matrix)[0][:, ::-1])


@pytest.mark.parametrize("length", [8, 600])
@pytest.mark.parametrize("vanishing", [5, 2, 0])
def test_a_qr_with_their_unit_vectors_first_decouples_them_even_if_columns_vanish(
    vanishing: int, length: int
) -> None:
    """CPUs decompose 600 columns by panels."""
    rng = np.random.default_rng(0)
    rows = np.arange(length) % 3 == 0
    unit_vectors = np.eye(length)[:, rows]
    others = np.where(rows[:, None], 0, rng.normal(size=(length, length - rows.sum())))
    others[:, vanishing:5] = 0  # These null directions have no rounding error.
    matrix = jnp.asarray(np.hstack([unit_vectors, others]), jnp.float32)
    found = np.asarray(with_unit_vectors(orthonormalize(matrix), jnp.asarray(rows)))
    np.testing.assert_array_equal(found[:, : rows.sum()], unit_vectors)
    assert np.all(found[rows, rows.sum() :] == 0)
    # Each column has a few roundings of float32.
    np.testing.assert_allclose(found.T @ found, np.eye(length), atol=1e-6 * length**0.5)


def test_decoupled_rows_have_their_unit_vectors_as_columns() -> None:
    basis = jnp.asarray(eigenvectors(factor()))
    rows = decoupled_rows(factor(), basis)
    np.testing.assert_array_equal(rows, ZERO)
    np.testing.assert_array_equal(decoupled_columns(rows, basis), np.arange(8) < 3)


def test_a_row_of_zeros_that_a_basis_mixes_with_others_is_not_decoupled() -> None:
    rotation, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(8, 8)))
    rows = decoupled_rows(factor(), jnp.asarray(rotation, jnp.float32))
    assert not np.any(rows)
