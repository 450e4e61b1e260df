"""SOAP on meshes of eight simulated devices, explicit and automatic, and Optax's tests for them."""

import contextlib
import functools
import importlib.util
import unittest
from collections.abc import Callable, ItemsView, Mapping
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import soap_optax

pytestmark = pytest.mark.usefixtures("x64")

Tree = Any

# The shape and sharding of each leaf on a mesh of eight devices in one axis. Factors of the first
# gradient have full rank, so that rounding does not decide the first basis.
SHAPES: dict[str, tuple[tuple[int, ...], PartitionSpec]] = {
    "by rows": ((8, 8), PartitionSpec("x")),
    "by columns": ((8, 8), PartitionSpec(None, "x")),
    "by the middle axis": ((2, 8, 4), PartitionSpec(None, "x")),
    "replicated": ((8, 8), PartitionSpec()),
    "vector": ((8,), PartitionSpec("x")),
    "scalar": ((), PartitionSpec()),
}
STEPS = 5

# A program for eight devices adds in another order than one for a single device. In float64 that
# costs 1e-16 of numbers of size 1. Two cases amplify it some thousand times: Adam divides a small
# entry by its size, or two eigenvalues are close. A wrong or missing shard of a gradient moves a
# parameter by a share of the learning rate, 0.1.
TOLERANCE = 1e-9


def soap(**options: Any) -> optax.GradientTransformationExtraArgs:
    return soap_optax.soap(0.1, precondition_frequency=2, **options)


def mesh_of(*types: AxisType) -> Mesh:
    """A mesh of eight devices with one axis for each type; the last axis is x."""
    shapes = {1: ((8,), ("x",)), 2: ((2, 4), ("y", "x"))}
    return jax.make_mesh(*shapes[len(types)], axis_types=types)


def draw() -> Tree:
    rng = np.random.default_rng(0)
    return {name: np.asarray(rng.normal(size=shape)) for name, (shape, _) in SHAPES.items()}


def shard(tree: Tree, mesh: Mesh) -> Tree:
    return {
        name: jax.device_put(leaf, NamedSharding(mesh, spec_in(mesh, name)))
        for name, leaf in tree.items()
    }


def spec_in(mesh: Mesh, name: str) -> PartitionSpec:
    """A leaf's spec in the form that programs return: explicit specs name every axis."""
    shape, spec = SHAPES[name]
    missing = len(shape) - len(spec) if mesh.axis_types == (AxisType.Explicit,) else 0
    return PartitionSpec(*spec, *[None] * missing)


def make_step(optimizer: optax.GradientTransformation) -> Callable[[Tree, Tree], tuple[Tree, Tree]]:
    def step(params: Tree, state: Tree) -> tuple[Tree, Tree]:
        grads = jax.tree.map(jnp.cos, params)  # The derivative of the sum of sines.
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def train(optimizer: optax.GradientTransformation, params: Tree, state: Tree) -> tuple[Tree, int]:
    """The parameters after all steps, and the number of compiled programs."""
    step = jax.jit(make_step(optimizer))
    for _ in range(STEPS):
        params, state = step(params, state)
    return params, step._cache_size()  # pyright: ignore[reportAttributeAccessIssue]  # jit has it


@functools.cache
def single_device_run(block_size: int | None) -> Tree:
    optimizer = soap(block_size=block_size)
    params = jax.tree.map(jnp.asarray, draw())
    return jax.device_get(train(optimizer, params, optimizer.init(params))[0])


def assert_equals_single_device_run(params: Tree, block_size: int | None = None) -> None:
    for name, wanted in single_device_run(block_size).items():
        found = jax.device_get(params[name])
        np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE, err_msg=name)


def types(tree: Tree) -> Any:
    """Shape, dtype and, on an explicit mesh, sharding of every leaf."""
    return jax.tree.map(lambda leaf: str(jax.typeof(leaf)), tree)


def shardings(tree: Tree) -> list[Any]:
    return [leaf.sharding for leaf in jax.tree.leaves(tree)]


# Explicit axes: the sharding is part of an array's type.


@pytest.mark.long
def test_state_keeps_its_types_on_an_explicit_mesh() -> None:
    with jax.set_mesh(mesh := mesh_of(AxisType.Explicit)):
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), shard(draw(), mesh))
        optimizer = soap(block_size=4)
        state = optimizer.init(params)
        assert types(jax.jit(optimizer.init)(params)) == types(state)
        updates, after = jax.jit(optimizer.update)(params, state, params)
        assert types(after) == types(state)
        assert types(updates) == types(params)


@pytest.mark.long
def test_state_keeps_its_types_outside_jit_on_an_explicit_mesh() -> None:
    with jax.set_mesh(mesh := mesh_of(AxisType.Explicit)):
        params = shard(draw(), mesh)
        optimizer = soap()
        state = optimizer.init(params)
        updates, after = optimizer.update(params, state, params)
        assert types(after) == types(state)
        assert types(updates) == types(params)


@pytest.mark.long
def test_explicit_mesh_gives_the_single_device_run_from_one_program() -> None:
    with jax.set_mesh(mesh := mesh_of(AxisType.Explicit)):
        params, optimizer = shard(draw(), mesh), soap(block_size=4)
        params, programs = train(optimizer, params, optimizer.init(params))
        assert_equals_single_device_run(params, block_size=4)
        assert programs == 1


@pytest.mark.long
def test_scan_over_steps_runs_on_an_explicit_mesh() -> None:
    with jax.set_mesh(mesh := mesh_of(AxisType.Explicit)):
        params, optimizer = shard(draw(), mesh), soap()
        step = make_step(optimizer)

        @jax.jit
        def scan(params: Tree, state: Tree) -> tuple[Tree, Tree]:
            return jax.lax.scan(
                lambda carry, _: (step(*carry), None), (params, state), length=STEPS
            )[0]

        params, _ = scan(params, optimizer.init(params))
        assert_equals_single_device_run(params)


@pytest.mark.long
def test_explicit_mesh_needs_no_set_mesh() -> None:
    params, optimizer = shard(draw(), mesh_of(AxisType.Explicit)), soap()
    params, _ = train(optimizer, params, jax.jit(optimizer.init)(params))
    assert_equals_single_device_run(params)


@pytest.mark.long
def test_mesh_of_two_explicit_axes_gives_the_single_device_run() -> None:
    with jax.set_mesh(mesh := mesh_of(AxisType.Explicit, AxisType.Explicit)):
        params, optimizer = shard(draw(), mesh), soap()
        both = NamedSharding(mesh, PartitionSpec("y", "x"))
        params["by rows"] = jax.device_put(params["by rows"], both)
        wanted = types(params)
        params, _ = train(optimizer, params, optimizer.init(params))
        assert_equals_single_device_run(params)
        assert types(params) == wanted


@pytest.mark.long
def test_mesh_of_an_automatic_and_an_explicit_axis_gives_the_single_device_run() -> None:
    with jax.set_mesh(mesh := mesh_of(AxisType.Auto, AxisType.Explicit)):
        params, optimizer = shard(draw(), mesh), soap()
        params, _ = train(optimizer, params, optimizer.init(params))
        assert_equals_single_device_run(params)


@pytest.mark.long
def test_injected_hyperparameters_work_on_an_explicit_mesh() -> None:
    with jax.set_mesh(mesh := mesh_of(AxisType.Explicit)):
        params = shard(draw(), mesh)
        factory = optax.inject_hyperparams(soap_optax.soap, static_args=soap_optax.STATIC_ARGS)
        optimizer = factory(learning_rate=0.1, precondition_frequency=2)
        state = optimizer.init(params)
        _, after = jax.eval_shape(optimizer.update, params, state, params)
        assert types(after) == types(state)
        params, _ = train(optimizer, params, state)
        assert_equals_single_device_run(params)


# Automatic axes: the compiler chooses the shardings that are not specified.


@pytest.mark.long
@pytest.mark.parametrize("in_context", [False, True])
def test_automatic_mesh_gives_the_single_device_run_from_two_programs_at_most(
    in_context: bool,
) -> None:
    mesh = mesh_of(AxisType.Auto)
    with jax.set_mesh(mesh) if in_context else contextlib.nullcontext():
        params, optimizer = shard(draw(), mesh), soap()
        params, programs = train(optimizer, params, jax.jit(optimizer.init)(params))
        assert_equals_single_device_run(params)
        # As with AdamW, one program takes the first state, and one takes the returned state.
        assert programs <= 2


# Optax's own tests.


OPTIMIZERS = {
    "soap": soap_optax.soap(1.0),
    "scale_by_soap": soap_optax.scale_by_soap(block_size=4, merge_dims=True),
}


def sharding_test_of_the_installed_optax(name: str) -> type[unittest.TestCase]:
    """The test case in Optax's file, expanded over one of this library's optimizers."""
    spec = importlib.util.find_spec("optax._src.sharding_test")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    named_parameters = parameterized.named_parameters

    def our_optimizer(first: Any, *rest: Any) -> Any:
        is_optimizers = isinstance(first, Mapping | ItemsView) and "adamw" in dict(first)
        return named_parameters(*([(name, OPTIMIZERS[name])] if is_optimizers else [first, *rest]))

    with mock.patch.object(parameterized, "named_parameters", our_optimizer):
        spec.loader.exec_module(module)
    return module.ShardingTest


@pytest.mark.filterwarnings("ignore")  # Optax's file may call deprecated functions.
@pytest.mark.skipif(
    not importlib.util.find_spec("optax._src.sharding_test"), reason="Optax ships it from 0.2.7 on"
)
@pytest.mark.long
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_sharding_test_of_the_installed_optax_passes(name: str) -> None:
    case = sharding_test_of_the_installed_optax(name)
    names = [name for name in unittest.TestLoader().getTestCaseNames(case) if "soap" in name]
    result = unittest.TestResult()
    # The file compares versions as strings: "0.10" is below "0.7", and a test would be skipped.
    with mock.patch.object(jax, "__version__", "0.9"):
        unittest.TestSuite(map(case, names)).run(result)
    assert not result.failures + result.errors, "\n".join(
        trace for _, trace in result.failures + result.errors
    )
    assert not result.skipped, result.skipped
    assert result.testsRun == 3, names
