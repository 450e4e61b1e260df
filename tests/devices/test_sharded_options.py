"""Sharded updates with all options, on eight simulated devices."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.meshes import (
    AUTO,
    EXPLICIT,
    TOLERANCE,
    all_axes,
    assert_close,
    mesh_of,
    positions_of_blocks,
)
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers

import soap_optax

pytestmark = pytest.mark.usefixtures("x64")

# Leaves by name: their number, shape and sharding on a mesh 4x2. The fewer block shapes they have,
# the faster a program compiles. No factor has a null space of several dimensions apart from rows
# without gradients: its basis would depend on rounding errors.
LEAVES: dict[str, tuple[int, tuple[int, ...], PartitionSpec]] = {
    "query": (3, (8, 8), PartitionSpec("x", "y")),
    "out": (2, (8, 8), PartitionSpec("y", "x")),
    "up": (1, (8, 16), PartitionSpec(None, ("x", "y"))),
    "layers": (2, (8, 8, 6), PartitionSpec(("x", "y"))),
    "experts": (1, (4, 8, 6), PartitionSpec("x", None, "y")),
    # These have the sharding of the state, over both mesh axes and over one.
    "stacked": (1, (8, 6, 8), PartitionSpec(("x", "y"))),
    "stacked in part": (1, (16, 6, 4), PartitionSpec("x")),
    "embedding": (1, (1024, 64), PartitionSpec(("x", "y"))),
    "vector": (2, (8,), PartitionSpec("x")),
    "replicated": (1, (8, 8), PartitionSpec()),
    "scalar": (1, (), PartitionSpec()),
}
DIMENSION_NUMBERS = {
    name: MuonDimensionNumbers(-2, -1) if len(shape) > 1 else None
    for name, (_, shape, _) in LEAVES.items()
}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "cholesky_qr_staggered": {
        "refresh": "cholesky_qr",
        "stagger": True,
        "precondition_frequency": 3,
    },
    "eigh_after_gradient_one_sided": {
        "refresh": "eigh",
        "refresh_order": "after_gradient",
        "one_sided": True,
    },
    "jacobi_precondition_1d": {"refresh": "jacobi", "precondition_1d": True},
    "partial_narrow": {
        "refresh": "partial",
        "mu_dtype": jnp.float32,
        "preconditioner_dtype": jnp.float32,
    },
    "auto_tolerance_factored": {
        "refresh": "auto",
        "refresh_tolerance": 0.1,
        "normalize_grads": True,
        "correct_bias": False,
        "factored": True,
        "fold_factors": True,
    },
    "dimension_numbers": {"dimension_numbers": DIMENSION_NUMBERS},
    "tiles_of_layers": {"dimension_numbers": DIMENSION_NUMBERS, "block_size": 4},
    "merge_dims": {"merge_dims": True, "max_precond_dim": 16},
    "apply": {"first_update": "apply", "factored": True},
    "apply_kl": {"first_update": "apply", "factor_estimator": "kl", "stagger": True},
    "kl_all": {
        "factor_estimator": "kl",
        "refresh_order": "after_gradient",
        "fold_factors": True,
        "stagger": True,
        "stack_multiple": 24,
    },
    "stack_multiple": {"stack_multiple": 24, "stagger": True},
}
STEPS = 6


def draw(step: int) -> Any:
    rng = np.random.default_rng(step)
    tree = {
        name: [rng.normal(size=shape) for _ in range(count)]
        for name, (count, shape, _) in LEAVES.items()
    }
    for vector in tree["vector"]:
        vector[np.arange(8) % 4 != 0] = 0  # Two entries, on different devices.
    return tree


def options_of(name: str) -> dict[str, Any]:
    return {"precondition_frequency": 2, "max_precond_dim": 8} | OPTIONS[name]


def gradients(step: int) -> Any:
    """The gradients of a step, of which one in the middle has a NaN and an infinity."""
    grads = draw(step)
    if step == 3:
        grads["out"][1][0, 0] = np.nan
        grads["embedding"][0][5, 7] = np.inf
    return grads


@functools.cache
def run_on_one_device(name: str) -> tuple[list[Any], Any]:
    """The updates of all steps, and the last state."""
    optimizer = soap_optax.scale_by_soap(**options_of(name))
    update, state = jax.jit(optimizer.update), optimizer.init(draw(0))
    all_updates = []
    for step in range(STEPS):
        updates, state = update(gradients(step), state)
        all_updates.append(updates)
    return all_updates, state


def padding_of(stack: Any) -> int:
    """The number of positions in a stack that never had a gradient."""
    return int(np.sum(np.asarray(stack.accepted_gradients + stack.rejected_gradients) == 0))


# Options that "tiles_of_layers", "apply_kl" and "kl_all" combine with others.
IN_OTHER_CASES = ["dimension_numbers", "apply", "stack_multiple"]
CASES = [
    *(
        pytest.param(name, AUTO, True, id=f"{name}-specified")
        for name in OPTIONS
        if name not in IN_OTHER_CASES
    ),
    *(
        pytest.param(name, AUTO, False, id=f"{name}-left_to_xla")
        for name in ("tiles_of_layers", "stack_multiple")
    ),
    *(
        pytest.param(name, EXPLICIT, False, id=f"{name}-explicit")
        for name in ("default", "tiles_of_layers")
    ),
]


@pytest.mark.long
@pytest.mark.parametrize(("name", "kind", "specified"), CASES)
def test_sharded_updates_equal_those_of_one_device_with_any_options(
    name: str, kind: AxisType, specified: bool
) -> None:
    mesh = mesh_of("4x2", kind)
    shardings = {name: NamedSharding(mesh, spec) for name, (_, _, spec) in LEAVES.items()}
    sharded = soap_optax.scale_by_soap(
        stack_sharding=all_axes(mesh),
        param_shardings=shardings if specified else None,
        **options_of(name),
    )
    all_wanted, wanted_state = run_on_one_device(name)
    first = {name: jax.device_put(draw(0)[name], shardings[name]) for name in LEAVES}
    state: Any = sharded.init(first)
    shardings_of_results = jax.tree.map(lambda leaf: leaf.sharding, (first, state))
    update = jax.jit(sharded.update, out_shardings=shardings_of_results)
    for step, wanted in enumerate(all_wanted):
        grads = gradients(step)
        placed = {name: jax.device_put(grads[name], shardings[name]) for name in LEAVES}
        updates, state = update(placed, state)
        assert_close(updates, wanted)
    assert update._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]  # jit has it
    for stack, wanted in zip(state.stacks.values(), wanted_state.stacks.values(), strict=True):
        found_of = positions_of_blocks(int(wanted.age.size) - padding_of(wanted), stack.age.size)
        alone_of = positions_of_blocks(len(found_of), wanted.age.size)
        for one, other in zip(jax.tree.leaves(stack), jax.tree.leaves(wanted), strict=True):
            assert {len(shard.data) for shard in one.addressable_shards} == {len(one) // 8}
            one, other = np.asarray(one)[found_of], np.asarray(other)[alone_of]
            np.testing.assert_allclose(one, other, rtol=0, atol=TOLERANCE)
    for part, wanted in zip(state.adam.values(), wanted_state.adam.values(), strict=True):
        np.testing.assert_array_equal(part.rejected_gradients, wanted.rejected_gradients)
        for one, other in ((part.mu, wanted.mu), (part.nu, wanted.nu)):
            assert {len(shard.data) for shard in one.addressable_shards} == {len(one) // 8}
            np.testing.assert_allclose(np.asarray(one)[: len(other)], other, atol=TOLERANCE)
