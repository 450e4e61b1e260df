"""Meshes of eight simulated devices, and training runs on them and on a single device."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import soap_optax
from soap_optax.algorithm import RefreshMethod as Method

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

# How many leaves there are of each shape, and how the mesh's first and last axis split them. Every
# first gradient has full rank along its preconditioned axes, so that rounding does not decide what
# the first basis is. Eight blocks of a kind need no padding, five leave three and one leaves seven.
SHAPES: dict[str, tuple[int, tuple[int, ...], tuple[str | None, ...]]] = {
    "by rows": (3, (8, 8), ("first", None)),
    "by columns": (3, (8, 8), (None, "last")),
    "by both": (2, (8, 8), ("last", "first")),
    "whole": (1, (8, 24), (None, None)),
    "one-sided": (5, (8, 16), (None, "first")),
    "vector": (1, (8,), ("first",)),
    "scalar": (1, (), ()),
}
OPTIONS: dict[str, Any] = {"precondition_frequency": 2, "max_precond_dim": 8}
STEPS = 7  # The first basis, two refreshes and plain steps between them.

# As in the checks of meshes: a program for eight devices adds in another order, in float64, and a
# wrong or missing part of a gradient moves a parameter by a share of the learning rate, 0.1.
TOLERANCE = 1e-9


def mesh_of(name: str, kind: AxisType) -> Mesh:
    shape, axes = (MESHES | WITH_SHORT_AXES)[name]
    return jax.make_mesh(shape, axes, axis_types=(kind,) * len(axes))


def all_axes(mesh: Mesh) -> NamedSharding:
    """Stacks divided among all devices."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def draw() -> Tree:
    rng = np.random.default_rng(0)
    return {
        name: [np.asarray(rng.normal(size=shape)) for _ in range(count)]
        for name, (count, shape, _) in SHAPES.items()
    }


def place(tree: Tree, mesh: Mesh) -> Tree:
    names = {"first": mesh.axis_names[0], "last": mesh.axis_names[-1], None: None}

    def sharding(axes: tuple[str | None, ...]) -> NamedSharding:
        spec = [names[axis] for axis in axes]
        if len({axis for axis in spec if axis}) < sum(axis is not None for axis in spec):
            spec[1] = None  # On a mesh of one axis.
        if mesh.axis_types[0] == AUTO:  # The spelling of a program's results: no Nones at the end.
            while spec and spec[-1] is None:
                spec.pop()
        return NamedSharding(mesh, PartitionSpec(*spec))

    return {
        name: [jax.device_put(leaf, sharding(SHAPES[name][2])) for leaf in leaves]
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
    """The parameters and the state after all steps, and how many programs they took."""
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


def places_of_blocks(blocks: int, length: int) -> list[int]:
    """Where the blocks are in a stack with padding."""
    return [number * length // blocks for number in range(blocks)]
