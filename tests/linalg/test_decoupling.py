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
    with_rows_last,
)

ZERO = np.array([True, False, False, True, False, True, False, False])


def factor(rank: int = 8) -> jax.Array:
    grads = np.random.default_rng(0).normal(size=(8, rank))
    grads[ZERO] = 0
    return jnp.asarray(grads @ grads.T, jnp.float32)


@pytest.mark.parametrize("rank", [8, 2])
def test_eigenvectors_of_rows_of_zeros_are_their_unit_vectors_and_come_last(rank: int) -> None:
    vectors = np.asarray(descending_eigenvectors(factor(rank)))
    np.testing.assert_array_equal(vectors[:, 5:], np.eye(8)[:, ZERO])
    assert np.all(vectors[ZERO, :5] == 0)
    # A few roundings of float32.
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(8), atol=1e-6)


def test_a_matrix_of_zeros_has_the_identity_as_its_eigenvectors() -> None:
    np.testing.assert_array_equal(descending_eigenvectors(jnp.zeros((4, 4))), np.eye(4))


def test_eigenvectors_without_a_row_of_zeros_are_those_of_eigh() -> None:
    matrix = factor() + jnp.eye(8)
    np.testing.assert_array_equal(
        descending_eigenvectors(matrix), jax.lax.linalg.eigh(matrix)[0][:, ::-1]
    )


@pytest.mark.parametrize("rank", [8, 2, 1])
def test_a_qr_with_rows_of_zeros_last_keeps_them_decoupled_even_if_columns_vanish(
    rank: int,
) -> None:
    matrix = factor(rank)
    basis = descending_eigenvectors(matrix)
    rows = decoupled_rows(matrix, basis)
    columns = decoupled_columns(rows, basis)
    np.testing.assert_array_equal(rows, ZERO)
    np.testing.assert_array_equal(columns, np.arange(8) >= 5)
    product = matrix @ basis
    product = product.at[:, 3:].set(0)  # Null directions without a rounding error.
    last = jnp.argsort(columns, stable=True)
    found = np.asarray(with_rows_last(orthonormalize, product, rows, last))
    np.testing.assert_array_equal(found[:, 5:], np.eye(8)[:, ZERO])
    assert np.all(found[ZERO, :5] == 0)
    np.testing.assert_allclose(found.T @ found, np.eye(8), atol=1e-6)


def test_a_row_of_zeros_that_a_basis_mixes_with_others_is_not_decoupled() -> None:
    rotation, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(8, 8)))
    rows = decoupled_rows(factor(), jnp.asarray(rotation, jnp.float32))
    assert not np.any(rows)
