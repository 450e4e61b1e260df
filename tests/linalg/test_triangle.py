"""Symmetric matrices, stored as one triangle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cases import mostly_long

from soap_optax.linalg import triangle


@pytest.mark.parametrize("d", mostly_long(range(1, 12), [1, 2, 5, 6]))
def test_folding_stores_a_symmetric_matrix_in_half_of_the_numbers(d: int) -> None:
    lower = np.tril(np.arange(1.0, d * d + 1, dtype=np.float32).reshape(d, d))
    symmetric = lower + np.tril(lower, -1).T
    fold, unfold = jax.jit(triangle.fold), jax.jit(triangle.unfold, static_argnums=1)
    folded = fold(symmetric)
    assert folded.shape == triangle.folded_shape(d)
    entries = d * (d + 1) // 2
    # With an odd number of rows, half a row is left over.
    assert folded.size == entries + (d + 1) // 2 * (d % 2)
    assert set(lower[lower > 0]) <= set(np.ravel(folded).tolist())
    np.testing.assert_array_equal(unfold(folded, d), symmetric)
    np.testing.assert_array_equal(triangle.unfolded(jnp.asarray(symmetric), d), symmetric)


def test_folding_takes_the_lower_triangle_of_a_matrix_that_rounding_made_unsymmetric() -> None:
    matrix = np.random.default_rng(0).normal(size=(5, 5)).astype(np.float32)
    unfolded = np.asarray(triangle.unfold(triangle.fold(jnp.asarray(matrix)), 5))
    np.testing.assert_array_equal(np.tril(unfolded), np.tril(matrix))
    np.testing.assert_array_equal(unfolded, unfolded.T)
