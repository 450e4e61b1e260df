"""Shampoo on meshes of eight simulated devices: updates, shardings, communication, compilation."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cases import mostly_long
from helpers.meshes import AUTO, EXPLICIT, TOLERANCE, all_axes, assert_close, mesh_of
from jax.sharding import NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers

import soap_optax

pytestmark = pytest.mark.usefixtures("x64")

# Leaves by name: their shape and sharding on a mesh 4x2.
LEAVES: dict[str, tuple[tuple[int, ...], PartitionSpec]] = {
    "query": ((8, 8), PartitionSpec("x", "y")),
    "out": ((8, 8), PartitionSpec("y", "x")),
    "up": ((8, 16), PartitionSpec(None, ("x", "y"))),
    "layers": ((8, 8, 6), PartitionSpec(("x", "y"))),
    "vector": ((8,), PartitionSpec("x")),
    "scalar": ((), PartitionSpec()),
}
DIMENSION_NUMBERS = {
    name: MuonDimensionNumbers(-2, -1) if len(shape) > 1 else None
    for name, (shape, _) in LEAVES.items()
}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "tiles of layers": {
        "dimension_numbers": DIMENSION_NUMBERS,
        "block_size": 4,
        "stagger": True,
        "stack_multiple": 24,
    },
    "no grafting": {"grafting": None, "refresh_order": "before_gradient", "fold_factors": True},
    "kl": {
        "factor_estimator": "kl",
        "refresh": "qr",
        "fold_factors": True,
        "block_size": 6,
        "stagger": True,
        "exponent": 0.5,
        "grafting": None,
    },
    "narrow": {"mu_dtype": jnp.float32, "preconditioner_dtype": jnp.float32, "grafting": "sgd"},
}
CASES = [
    *(pytest.param(name, AUTO, id=f"{name}-auto") for name in OPTIONS),
    *(pytest.param(name, EXPLICIT, id=f"{name}-explicit") for name in ("default", "no grafting")),
]


def draw(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    return {name: rng.normal(size=shape) for name, (shape, _) in LEAVES.items()}


@pytest.mark.parametrize(("name", "kind"), mostly_long(CASES, short=["kl-auto"]))
def test_sharded_updates_equal_those_of_one_device(name: str, kind: Any) -> None:
    mesh = mesh_of("4x2", kind)
    # A larger `eps` than the rounding of eigenvalues in a null space.
    options = {"precondition_frequency": 2, "eps": 1e-4, "max_precond_dim": 8} | OPTIONS[name]
    shardings = {name: NamedSharding(mesh, spec) for name, (_, spec) in LEAVES.items()}
    sharded = soap_optax.scale_by_shampoo(stack_sharding=all_axes(mesh), **options)
    alone = soap_optax.scale_by_shampoo(**options)
    placed = jax.device_put(draw(0), shardings)
    state: Any = sharded.init(placed)
    wanted_state: Any = alone.init(draw(0))
    assert soap_optax.state_shardings(state, all_axes(mesh)) == jax.tree.map(
        lambda leaf: leaf.sharding, state
    )
    results = jax.tree.map(lambda leaf: leaf.sharding, (placed, state))
    update, update_alone = jax.jit(sharded.update, out_shardings=results), jax.jit(alone.update)
    for step in range(6):
        grads = draw(step)
        grads["query"] *= step >= 3  # One block, and one layer of a stack, sleep at first.
        grads["layers"][2] *= step >= 3
        if step == 3:
            grads["out"][0, 0] = np.nan
        updates, state = update(jax.device_put(grads, shardings), state)
        wanted, wanted_state = update_alone(grads, wanted_state)
        # Roots stored in float32 are rounded anew on each device.
        tolerance = 1e-5 if name == "narrow" else TOLERANCE
        jax.tree.map(
            lambda a, b, atol=tolerance: np.testing.assert_allclose(a, b, rtol=0, atol=atol),
            *jax.device_get((updates, wanted)),
        )
    assert update._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]  # jit has it
    for stack, wanted in zip(state.stacks.values(), wanted_state.stacks.values(), strict=True):
        for leaf in jax.tree.leaves(stack):
            assert {len(shard.data) for shard in leaf.addressable_shards} == {len(leaf) // 8}
        for counter in ("refreshes", "rejected_refreshes", "rejected_gradients"):
            assert np.sum(getattr(stack, counter)) == np.sum(getattr(wanted, counter))


def test_roots_are_computed_without_communication() -> None:
    mesh = mesh_of("4x2", AUTO)
    optimizer = soap_optax.scale_by_shampoo(stack_sharding=all_axes(mesh))
    leaf = jax.device_put(jnp.ones((8, 6, 4)), NamedSharding(mesh, PartitionSpec(("x", "y"))))
    numbers = MuonDimensionNumbers(1, 2)
    optimizer = soap_optax.scale_by_shampoo(
        stack_sharding=all_axes(mesh), dimension_numbers=numbers, param_shardings=leaf.sharding
    )
    program = jax.jit(optimizer.update).lower(leaf, optimizer.init(leaf)).compile().as_text()
    assert program is not None
    assert "syevd" in program or "eigh" in program.lower()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in program


@pytest.mark.long
def test_a_users_shard_map_may_contain_init_and_update() -> None:
    mesh = mesh_of("8", AUTO)
    optimizer = soap_optax.scale_by_shampoo(precondition_frequency=2, eps=1e-4)
    grads = jnp.asarray(np.random.default_rng(0).normal(size=(4, 16, 4)))

    def run(grads: jax.Array) -> Any:
        state, updates = optimizer.init(grads[0]), []
        for grad in grads:
            update, state = optimizer.update(grad, state)
            updates.append(update)
        return jnp.stack(updates)

    spec = PartitionSpec(None, "x")
    found = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec))(grads)
    wanted = jnp.concatenate([run(part) for part in jnp.split(grads, 8, axis=1)], axis=1)
    assert_close(found, wanted)
