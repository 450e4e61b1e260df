"""Gram matrices, computed at once and in parts."""

from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from soap_optax.linalg import products


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((5, 7), 0), ((5, 7), 1), ((512, 3), 0), ((2, 515), 1), ((2, 518, 3), 1), ((3, 4, 600), 2)],
)
def test_a_gram_matrix_is_the_same_in_pieces(shape: tuple[int, ...], axis: int) -> None:
    array = np.random.default_rng(0).normal(size=shape)
    others = [other for other in range(len(shape)) if other != axis]
    wanted = np.tensordot(array, array, (others, others))
    for gram in (products.gram_matrix, jax.jit(products.gram_matrix, static_argnums=1)):
        found = gram(jnp.asarray(array, jnp.float32), axis)
        np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


def test_large_gram_matrices_are_multiplied_in_pieces_on_cpus_alone() -> None:
    def flops(rows: int, columns: int) -> float:
        matrix = jax.ShapeDtypeStruct((rows, columns), jnp.float32)
        lowered = jax.jit(products.gram_matrix, static_argnums=1).trace(matrix, 0)
        analysis: Any = lowered.lower(lowering_platforms=("cpu",)).compile().cost_analysis()
        return analysis["flops"] / (2 * rows**2 * columns)

    assert flops(256, 64) == pytest.approx(1, abs=0.05)
    assert flops(512, 64) == pytest.approx(10 / 16, abs=0.05)
    matrix = jax.ShapeDtypeStruct((512, 64), jnp.float32)
    for platform in ("cuda", "tpu"):
        exported = jax.export.export(
            jax.jit(products.gram_matrix, static_argnums=1), platforms=[platform]
        )(matrix, 0)
        assert exported.mlir_module().count("stablehlo.dot_general") == 1
