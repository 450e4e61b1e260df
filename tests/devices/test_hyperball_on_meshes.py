"""`hyperball` on meshes of eight simulated devices: the same weights, and no gathered parameter."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.cases import mostly_long
from helpers.meshes import AUTO, EXPLICIT, mesh_of
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers

import soap_optax

pytestmark = pytest.mark.usefixtures("x64")

Tree = Any
STEPS = 4
# Rounding in float64. A wrong norm moves an entry by a share of the learning rate.
TOLERANCE = 1e-12

LEAVES: dict[str, tuple[tuple[int, ...], tuple[str | None, ...], Any]] = {
    "experts": ((4, 6, 8), ("x", None, "y"), MuonDimensionNumbers(1, 2)),
    "layers": ((3, 8, 6), (None, "x", None), MuonDimensionNumbers(1, 2)),
    "heads": ((6, 8, 4), ("y", "x", None), MuonDimensionNumbers(0, 2)),
    "dense": ((8, 8), ("y", "x"), MuonDimensionNumbers(0, 1)),
    "replicated": ((5, 3), (None, None), MuonDimensionNumbers(0, 1)),
    "vector": ((8,), ("x",), None),
}
# Shardings that differ from the parameters' shardings.
OTHER_AXES: dict[str, tuple[str | None, ...]] = {
    "experts": ("y", None, "x"),
    "layers": (None, "y", None),
    "heads": (None, "y", "x"),
    "dense": ("x", "y"),
    "replicated": (None, None),
    "vector": ("y",),
}
OPTIMIZER: Any = soap_optax.hyperball(
    optax.linear_schedule(0.3, 0.1, STEPS),
    dimension_numbers={name: numbers for name, (_, _, numbers) in LEAVES.items()},
)


def draw(seed: int) -> Tree:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) for name, (shape, _, _) in LEAVES.items()}


def shard(tree: Tree, mesh: Mesh) -> Tree:
    """The tree on the mesh, with specs in the form that programs return."""

    def sharding(axes: tuple[str | None, ...]) -> NamedSharding:
        if mesh.axis_types[0] == AUTO:
            while axes and axes[-1] is None:
                axes = axes[:-1]
        return NamedSharding(mesh, PartitionSpec(*axes))

    return {name: jax.device_put(leaf, sharding(LEAVES[name][1])) for name, leaf in tree.items()}


@jax.jit
def step(params: Tree, state: Any, directions: Tree) -> tuple[Tree, Any]:
    updates, state = OPTIMIZER.update(directions, state, params)
    return optax.apply_updates(params, updates), state


@pytest.mark.parametrize("kind", mostly_long([AUTO, EXPLICIT], [EXPLICIT]))
def test_a_mesh_gives_the_single_device_run(kind: AxisType) -> None:
    wanted = jax.tree.map(jnp.asarray, draw(0))
    state = OPTIMIZER.init(wanted)
    for call in range(STEPS):
        wanted, state = step(wanted, state, draw(call + 1))
    mesh = mesh_of("4x2", kind)
    params = shard(draw(0), mesh)
    types = jax.tree.map(lambda leaf: str(jax.typeof(leaf)), params)
    with jax.set_mesh(mesh):
        state = jax.jit(OPTIMIZER.init)(params)
        types_of_state = jax.tree.map(lambda leaf: str(jax.typeof(leaf)), state)
        for call in range(STEPS):
            params, state = step(params, state, shard(draw(call + 1), mesh))
    assert jax.tree.map(lambda leaf: str(jax.typeof(leaf)), params) == types
    assert jax.tree.map(lambda leaf: str(jax.typeof(leaf)), state) == types_of_state
    for name, leaf in wanted.items():
        np.testing.assert_allclose(params[name], leaf, rtol=0, atol=TOLERANCE, err_msg=name)


@pytest.mark.long
def test_directions_may_be_sharded_in_another_way_than_parameters() -> None:
    """Transformations such as Muon may return such directions."""
    mesh = mesh_of("4x2", EXPLICIT)
    with jax.set_mesh(mesh):
        params = shard(draw(0), mesh)
        directions = {
            name: jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*OTHER_AXES[name])))
            for name, leaf in draw(1).items()
        }
        new, _ = step(params, OPTIMIZER.init(params), directions)
        wanted, _ = step(params, OPTIMIZER.init(params), shard(draw(1), mesh))
    for name, leaf in wanted.items():
        assert jax.typeof(new[name]) == jax.typeof(params[name])
        np.testing.assert_allclose(new[name], leaf, rtol=0, atol=TOLERANCE)


COLLECTIVE = re.compile(
    r"= (?P<result>.*?) (?P<name>all-gather|all-to-all|all-reduce|collective-permute|"
    r"reduce-scatter)(-start)?\("
)


@pytest.mark.parametrize("kind", mostly_long([AUTO, EXPLICIT], [EXPLICIT]))
def test_only_norms_are_communicated(kind: AxisType) -> None:
    mesh = mesh_of("4x2", kind)
    with jax.set_mesh(mesh):
        params = shard(draw(0), mesh)
        arguments = params, jax.jit(OPTIMIZER.init)(params), params
        program = step.lower(*arguments).compile().as_text() or ""
    found = list(COLLECTIVE.finditer(program))
    assert {match["name"] for match in found} == {"all-reduce"}
    numbers = [
        int(np.prod([int(n) for n in shape.split(",") if n]))
        for match in found
        for shape in re.findall(r"f64\[([\d,]*)\]", match["result"])
    ]
    # These are the norms of three layers, of three heads on a device, or of its one expert.
    assert max(numbers) <= 3


@pytest.mark.long
def test_norms_of_batch_axes_are_sharded_as_they_are() -> None:
    mesh = mesh_of("4x2", EXPLICIT)
    with jax.set_mesh(mesh):
        state = OPTIMIZER.init(shard(draw(0), mesh))
    specs = {norm.shape: norm.sharding.spec for norm in state.norms}
    assert specs[(4, 1, 1)] == PartitionSpec("x", None, None)
    assert specs[(1, 8, 1)] == PartitionSpec(None, "x", None)
