"""One exported program for CPUs, GPUs and TPUs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export

import soap_optax
from soap_optax.linalg import decompositions

PLATFORMS = ["cpu", "cuda", "tpu"]


def test_one_exported_step_is_lowered_for_all_platforms_and_equals_the_jitted_one() -> None:
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), soap_optax.soap(1e-2, precondition_frequency=2)
    )
    params = {
        name: jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)
        for seed, (name, shape) in enumerate({"up": (8, 6), "long": (300, 6), "bias": (6,)}.items())
    }

    def step(params: Any, state: Any) -> Any:
        updates, state = optimizer.update(jax.tree.map(jnp.cos, params), state, params)
        return optax.apply_updates(params, updates), state

    jitted = jax.jit(step)
    exported = export.export(jitted, platforms=PLATFORMS)(params, optimizer.init(params))
    assert list(exported.platforms) == PLATFORMS

    one, other = (params, optimizer.init(params)), (params, optimizer.init(params))
    for _ in range(5):  # The first basis, and a refresh.
        one, other = exported.call(*one), jitted(*other)
    for found, wanted in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.skipif(
    not hasattr(jax.lax.linalg, "EighImplementation"), reason="JAX 0.8 cannot be asked for it"
)
@pytest.mark.parametrize("length", [256, 257, 1024])
def test_tpus_take_their_own_operation_for_eigenvectors_of_any_length(length: int) -> None:
    factor = jax.ShapeDtypeStruct((length, length), jnp.float32)
    exported = export.export(jax.jit(decompositions.descending_eigenvectors), platforms=["tpu"])(factor)
    program = exported.mlir_module()
    assert "@Eigh" in program
    # What JAX calls beyond a length of 256 loops, and has polar and QR decompositions besides.
    assert "stablehlo.while" not in program


def test_eigenvectors_are_found_without_jit() -> None:
    factor = jnp.asarray([[2.0, 1.0], [1.0, 2.0]])
    with jax.disable_jit():
        found = decompositions.descending_eigenvectors(factor)
    np.testing.assert_allclose(found.T @ factor @ found, np.diag([3.0, 1.0]), atol=1e-6)
