"""Rows without a gradient do not move on a mesh either."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cases import mostly_long
from helpers.meshes import AUTO, mesh_of
from jax.sharding import NamedSharding, PartitionSpec

import soap_optax

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "jacobi": {"refresh": "jacobi"},
    "partial": {"refresh": "partial"},
    "tiles": {"block_size": 8},
    "folded": {"fold_factors": True},
}


@pytest.mark.parametrize("name", mostly_long(OPTIONS, ["tiles"]))
def test_rows_without_a_gradient_get_an_update_of_exactly_zero_on_a_mesh(name: str) -> None:
    mesh = mesh_of("4x2", AUTO)
    rows = NamedSharding(mesh, PartitionSpec("x"))
    stacks = NamedSharding(mesh, PartitionSpec(("x", "y")))
    optimizer = soap_optax.scale_by_soap(
        precondition_frequency=2, stack_sharding=stacks, **OPTIONS[name]
    )
    never = np.arange(16) % 3 == 0
    draws = np.random.default_rng(0).normal(size=(5, 3, 16, 24)).astype(np.float32)
    draws[:, :, never] = 0

    @jax.jit
    def step(grads: Any, state: Any) -> tuple[Any, Any]:
        return optimizer.update(grads, state)

    state = optimizer.init({str(n): jnp.zeros((16, 24)) for n in range(3)})
    for call, leaves in enumerate(draws):
        grads = {str(n): jax.device_put(leaf, rows) for n, leaf in enumerate(leaves)}
        updates, state = step(grads, state)
        for update in map(np.asarray, updates.values()):
            assert np.all(update[never] == 0)
            assert call == 0 or np.abs(update[~never]).max() > 0.1
