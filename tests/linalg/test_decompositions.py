"""Eigenvectors, on every platform and without jit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from soap_optax.linalg import decompositions


@pytest.mark.skipif(
    not hasattr(jax.lax.linalg, "EighImplementation"), reason="JAX 0.8 cannot be asked for it"
)
@pytest.mark.parametrize("length", [256, 257, 1024])
def test_tpus_take_their_own_operation_for_eigenvectors_of_any_length(length: int) -> None:
    factor = jax.ShapeDtypeStruct((length, length), jnp.float32)
    rows = jax.ShapeDtypeStruct((length,), bool)
    eigenvectors = jax.jit(decompositions.descending_eigenvectors)
    exported = export.export(eigenvectors, platforms=["tpu"])(factor, rows)
    program = exported.mlir_module()
    assert "@Eigh" in program
    # Above a length of 256, JAX would call a loop with polar and QR decompositions.
    assert "stablehlo.while" not in program


def test_eigenvectors_are_found_without_jit() -> None:
    factor = jnp.asarray([[2.0, 1.0], [1.0, 2.0]])
    with jax.disable_jit():
        found = decompositions.descending_eigenvectors(factor, jnp.zeros(2, bool))
    np.testing.assert_allclose(found.T @ factor @ found, np.diag([3.0, 1.0]), atol=1e-6)
