"""The QR decomposition made of products, and the matrices for which it is used."""

import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cases import mostly_long

from soap_optax.linalg import decompositions, householder, orthonormality

LENGTHS = mostly_long([1, 2, 5, 6, 7, 13, 36, 40], short=[1, 7, 40])

# For entries of orthonormal matrices, after some hundred operations in float64.
ROUNDING = 1e-13

orthonormal_factor = jax.jit(householder.q_from_panels)


def random_matrix(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def check_that_it_triangularizes(matrix: np.ndarray) -> None:
    found = np.asarray(orthonormal_factor(jnp.asarray(matrix)))
    d = len(matrix)
    np.testing.assert_allclose(found.T @ found, np.eye(d), rtol=0, atol=ROUNDING)
    # Each column is scaled, because their sizes may differ by many orders of magnitude.
    sizes = np.linalg.norm(matrix, axis=0)
    below = np.tril(found.T @ matrix, -1) / np.where(sizes > 0, sizes, 1)
    np.testing.assert_allclose(below, np.zeros((d, d)), rtol=0, atol=ROUNDING)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("d", LENGTHS)
def test_it_equals_lapacks_but_for_signs(d: int) -> None:
    matrix = random_matrix(d, d)
    found = np.asarray(orthonormal_factor(jnp.asarray(matrix)))
    wanted, _ = np.linalg.qr(matrix)
    signs = np.sign(np.sum(found * wanted, axis=0))
    # The condition number, below a thousand here, amplifies the rounding of the columns.
    np.testing.assert_allclose(found, signs * wanted, rtol=0, atol=1e-11)
    check_that_it_triangularizes(matrix)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("d", LENGTHS)
def test_every_matrix_has_an_orthonormal_factor(d: int) -> None:
    matrix = random_matrix(d, d)
    check_that_it_triangularizes(matrix * 10.0 ** -np.linspace(0, 30, d))
    check_that_it_triangularizes(10.0 ** -np.linspace(0, 30, d)[:, None] * matrix)
    check_that_it_triangularizes(random_matrix(d, 1) @ random_matrix(1, d))
    check_that_it_triangularizes(np.eye(d))
    check_that_it_triangularizes(np.zeros((d, d)))
    repeated = matrix.copy()
    repeated[:, d // 2 :] = matrix[:, :1]
    check_that_it_triangularizes(repeated)


@pytest.mark.parametrize("spoiled", [np.nan, np.inf])
def test_a_non_finite_matrix_gives_no_orthonormal_factor(spoiled: float) -> None:
    # The last entry of the matrix is not among them: it only affects the triangular factor.
    for place in [(0, 0), (39, 0), (39, 38), (20, 3), (3, 20)]:
        matrix = random_matrix(40, 40).astype(np.float32)
        matrix[place] = spoiled
        assert not orthonormality.is_orthonormal(orthonormal_factor(jnp.asarray(matrix)))


# The matrices for which it is used.


def program_of(length: int, platform: str) -> str:
    matrix = jax.ShapeDtypeStruct((length, length), jnp.float32)
    factor = jax.jit(decompositions.orthonormalize)
    return jax.export.export(factor, platforms=[platform])(matrix).mlir_module()


def test_long_matrices_are_decomposed_by_panels_on_cpus_and_only_there() -> None:
    long = decompositions.BLOCKED_FROM
    panels = re.findall(
        r"custom_call @lapack_sgeqrf_ffi.*-> \(tensor<(\d+)x(\d+)", program_of(long, "cpu")
    )
    assert {int(width) for _, width in panels} == {128}
    assert len(panels) == 4
    assert householder.panels_of(2048) == 6
    assert "orgqr" not in program_of(long, "cpu")
    assert "orgqr" in program_of(long - 1, "cpu")
    for platform in ("cuda", "tpu"):
        assert program_of(long, platform).count("stablehlo.dot_general") == 0


def test_a_batch_is_decomposed_one_matrix_after_another() -> None:
    batch = jnp.asarray(random_matrix(2, 512, 512), jnp.float32)
    together = jax.jit(jax.vmap(decompositions.orthonormalize))(batch)
    for matrix, found in zip(batch, together, strict=True):
        np.testing.assert_array_equal(found, jax.jit(decompositions.orthonormalize)(matrix))
    jaxpr = str(jax.make_jaxpr(jax.vmap(decompositions.orthonormalize))(batch))
    assert re.search(r"f32\[512,128\].* = geqrf", jaxpr)
    assert "f32[2,512,128]" not in jaxpr


@pytest.mark.usefixtures("x64")
def test_derivatives_equal_those_of_the_plain_decomposition() -> None:
    matrix, tangent = random_matrix(512, 512), random_matrix(512, 512, seed=1)
    _, found = jax.jvp(decompositions.orthonormalize, (matrix,), (tangent,))
    _, wanted = jax.jvp(lambda matrix: jnp.linalg.qr(matrix)[0], (matrix,), (tangent,))
    signs = np.sign(
        np.sum(decompositions.orthonormalize(matrix) * jnp.linalg.qr(matrix)[0], axis=0)
    )
    np.testing.assert_allclose(found, wanted * signs[None, :], atol=1e-8 * np.abs(wanted).max())
