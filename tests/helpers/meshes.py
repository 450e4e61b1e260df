"""Meshes of eight simulated devices, and training runs on them and on a single device."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import soap_optax

Tree = Any

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
MESHES = {
    "8": ((8,), ("x",)),
    "4x2": ((4, 2), ("x", "y")),
    "2x2x2": ((2, 2, 2), ("x", "y", "z")),
}
WITH_SHORT_AXES = {
    "1x8": ((1, 8), ("x", "y")),
    "4x1x2": ((4, 1, 2), ("x", "y", "z")),
}


class Leaves(NamedTuple):
    """Equal parameters, and for each array axis the mesh axis that shards it, first or last."""

    count: int  # pyright: ignore[reportIncompatibleMethodOverride]  # hides tuple.count
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]


# Every first gradient has full rank along its preconditioned axes, so that rounding does not decide
# the first basis. Eight blocks of one shape need no padding, five need three, and one needs seven.
SHAPES = {
    "by rows": Leaves(3, (8, 8), ("first", None)),
    "by columns": Leaves(3, (8, 8), (None, "last")),
    "by both": Leaves(2, (8, 8), ("last", "first")),
    "replicated": Leaves(1, (8, 24), (None, None)),
    "one-sided": Leaves(5, (8, 16), (None, "first")),
    "vector": Leaves(1, (8,), ("first",)),
    "scalar": Leaves(1, (), ()),
}
OPTIONS: dict[str, Any] = {"precondition_frequency": 2, "max_precond_dim": 8}
STEPS = 7  # The first basis, two refreshes and plain steps between them.

# A program for eight devices adds in another order than one for a single device. In float64 that
# costs 1e-16 of numbers of size 1. Two cases amplify it some thousand times: Adam divides a small
# entry by its size, or two eigenvalues are close. A wrong or missing shard of a gradient moves a
# parameter by a share of the learning rate, 0.1.
TOLERANCE = 1e-9


def mesh_of(name: str, kind: AxisType) -> Mesh:
    shape, axes = (MESHES | WITH_SHORT_AXES)[name]
    return jax.make_mesh(shape, axes, axis_types=(kind,) * len(axes))


def all_axes(mesh: Mesh) -> NamedSharding:
    """Stacks sharded over all devices."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def draw() -> Tree:
    rng = np.random.default_rng(0)
    return {
        name: [np.asarray(rng.normal(size=leaves.shape)) for _ in range(leaves.count)]
        for name, leaves in SHAPES.items()
    }


def shard(tree: Tree, mesh: Mesh) -> Tree:
    """Puts a tree of `draw` on a mesh."""
    names = {"first": mesh.axis_names[0], "last": mesh.axis_names[-1], None: None}

    def sharding(axes: tuple[str | None, ...]) -> NamedSharding:
        spec = [names[axis] for axis in axes]
        if len({axis for axis in spec if axis}) < sum(axis is not None for axis in spec):
            spec[1] = None  # On a mesh with one axis.
        if (
            mesh.axis_types[0] == AUTO
        ):  # Spelled as in the results of programs: no Nones at the end.
            while spec and spec[-1] is None:
                spec.pop()
        return NamedSharding(mesh, PartitionSpec(*spec))

    return {
        name: [jax.device_put(leaf, sharding(SHAPES[name].axes)) for leaf in leaves]
        for name, leaves in tree.items()
    }


def make_step(optimizer: optax.GradientTransformation) -> Callable[[Tree, Tree], tuple[Tree, Tree]]:
    def step(params: Tree, state: Tree) -> tuple[Tree, Tree]:
        grads = jax.tree.map(jnp.cos, params)  # The derivative of the sum of sines.
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def train(
    optimizer: optax.GradientTransformation, params: Tree, steps: int = STEPS
) -> tuple[Tree, Any, int]:
    """The parameters and the state after all steps, and the number of compiled programs."""
    step = jax.jit(make_step(optimizer), donate_argnums=1)
    state = optimizer.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state, step._cache_size()  # pyright: ignore[reportAttributeAccessIssue]  # jit has it


@functools.cache
def single_device_run(**options: Any) -> tuple[Tree, Any]:
    optimizer = soap_optax.soap(0.1, **OPTIONS, **options)
    params, state, _ = train(optimizer, jax.tree.map(jnp.asarray, draw()))
    return jax.device_get(params), jax.device_get(state)


def assert_close(found: Tree, wanted: Tree) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE),
        jax.device_get(found),
        wanted,
    )


def positions_of_blocks(blocks: int, length: int) -> list[int]:
    """The positions of the blocks in a stack of this length; other positions are padding."""
    return [number * length // blocks for number in range(blocks)]
