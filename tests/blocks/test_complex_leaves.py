"""Complex leaves: each is optimized as two real leaves, by every option and on every mesh."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from helpers.meshes import AUTO, EXPLICIT, all_axes, assert_close, mesh_of
from jax.sharding import NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers

import soap_optax
from soap_optax.blocks import join_complex, split_complex

STEPS = 5


def draw(seed: int, dtype: Any = np.complex64) -> Any:
    """Two complex leaves and a real one of one shape, a complex vector and a complex scalar."""
    rng = np.random.default_rng(seed)

    def leaf(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) + 1j * rng.normal(size=shape), dtype)

    return {
        "orbitals": [leaf(6, 4), leaf(6, 4)],
        "real": leaf(6, 4).real,
        "tensor": leaf(3, 4, 6),
        "phases": leaf(5),
        "shift": leaf(),
    }


LAYERS = {
    "orbitals": MuonDimensionNumbers(0, 1),
    "real": None,
    "tensor": MuonDimensionNumbers(-2, -1),
    "phases": None,
    "shift": None,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "dimension_numbers": {"dimension_numbers": LAYERS},
    "tiles": {"block_size": 3, "precondition_1d": True, "stagger": True},
    "merged": {"merge_dims": True, "max_precond_dim": 12, "refresh": "jacobi"},
    "stored narrow": {
        "preconditioner_dtype": jnp.bfloat16,
        "mu_dtype": jnp.bfloat16,
        "fold_factors": True,
    },
    "kl": {"factor_estimator": "kl", "refresh_order": "after_gradient", "refresh": "eigh"},
    "factored": {"factored": True, "one_sided": True, "normalize_grads": True},
    "applied": {"first_update": "apply", "refresh": "partial", "stack_multiple": 4},
}
SHAMPOO_OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "kl": {
        "factor_estimator": "kl",
        "refresh": "qr",
        "grafting": "sgd",
        "dimension_numbers": LAYERS,
    },
}


@functools.cache
def update_of(name: str = "defaults") -> Any:
    optimizer = soap_optax.scale_by_soap(precondition_frequency=2, **OPTIONS[name])
    return jax.jit(optimizer.update)


def run(update: Any, state: Any, grads: list[Any]) -> tuple[list[Any], Any]:
    updates = []
    for grad in grads:
        update_, state = update(grad, state)
        updates.append(update_)
    return updates, state


# The meaning --------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.usefixtures("implicit_promotion")  # For Optax's wrapper.
@pytest.mark.parametrize("name", OPTIONS)
def test_updates_equal_those_of_optaxs_wrapper_around_soap(name: str) -> None:
    inner = soap_optax.scale_by_soap(precondition_frequency=2, **OPTIONS[name])
    wrapped: Any = optax.contrib.split_real_and_imaginary(inner)
    grads = [draw(step) for step in range(STEPS)]
    found, state = run(update_of(name), inner.init(grads[0]), grads)
    wanted, wanted_state = run(jax.jit(wrapped.update), wrapped.init(grads[0]), grads)
    for one, other in zip(found, wanted, strict=True):
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), one) == jax.tree.map(
            lambda leaf: (leaf.shape, leaf.dtype), grads[0]
        )
        # The same equations in two programs.
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5), one, other)
    assert jax.tree.structure(state) == jax.tree.structure(wanted_state.inner_state)
    assert not any(jnp.iscomplexobj(leaf) for leaf in jax.tree.leaves(state))


@pytest.mark.usefixtures("implicit_promotion")  # For Optax's wrapper.
@pytest.mark.long
@pytest.mark.parametrize("name", SHAMPOO_OPTIONS)
def test_updates_of_shampoo_equal_those_of_optaxs_wrapper_around_it(name: str) -> None:
    inner = soap_optax.scale_by_shampoo(precondition_frequency=2, **SHAMPOO_OPTIONS[name])
    wrapped: Any = optax.contrib.split_real_and_imaginary(inner)
    grads = [draw(step) for step in range(STEPS)]
    found, state = run(jax.jit(inner.update), inner.init(grads[0]), grads)
    wanted, _ = run(jax.jit(wrapped.update), wrapped.init(grads[0]), grads)
    for one, other in zip(found, wanted, strict=True):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5), one, other)
    assert found[-1]["orbitals"][0].dtype == jnp.complex64
    assert np.all(np.abs(found[-1]["orbitals"][0]) > 0)
    assert not any(jnp.iscomplexobj(leaf) for leaf in jax.tree.leaves(state))


@pytest.mark.long
@pytest.mark.usefixtures("x64")
def test_complex128_has_statistics_in_float64() -> None:
    grads = [draw(step, np.complex128) for step in range(STEPS)]
    found, state = run(update_of(), soap_optax.scale_by_soap().init(grads[0]), grads)
    assert found[-1]["orbitals"][0].dtype == jnp.complex128
    assert found[-1]["real"].dtype == jnp.float64
    assert set(state.stacks) == {"6x4_float64", "3x4x6_float64"}
    single = [draw(step) for step in range(STEPS)]
    wanted, _ = run(update_of(), soap_optax.scale_by_soap().init(single[0]), single)
    np.testing.assert_allclose(found[-1]["tensor"], wanted[-1]["tensor"], rtol=0, atol=1e-3)


def test_conjugate_gradients_get_conjugate_updates_and_turned_ones_turned() -> None:
    grads = [{"w": draw(step)["orbitals"][0]} for step in range(3)]
    updates = []
    for change in (lambda leaf: leaf, jnp.conj, lambda leaf: 1j * leaf):
        changed = [jax.tree.map(change, grad) for grad in grads]
        found, _ = run(update_of(), soap_optax.scale_by_soap().init(grads[0]), changed)
        updates.append(np.asarray(found[-1]["w"]))
    plain, conjugate, turned = updates
    # Parts have the same bases whatever their signs, and in either block of the stack.
    np.testing.assert_allclose(conjugate, plain.conj(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(turned, 1j * plain, rtol=0, atol=1e-5)


@pytest.mark.long
def test_a_part_that_is_not_finite_is_rejected_alone() -> None:
    grads = draw(0)
    bad = grads | {"tensor": grads["tensor"].at[0, 0, 0].set(complex(np.nan, 1.0))}
    _, state = update_of()(grads, soap_optax.scale_by_soap().init(grads))
    updates, state = update_of()(bad, state)
    assert not np.any(updates["tensor"].real)
    assert np.all(updates["tensor"].imag != 0)
    assert state.stacks["3x4x6"].rejected_gradients.tolist() == [1, 0]


def test_splitting_and_joining_are_inverse_for_arrays_numbers_and_shapes() -> None:
    tree = {"array": draw(0)["shift"], "number": 1 + 2j, "numpy": np.complex64(3j), "real": 2.0}
    parts = split_complex(tree)
    assert len(jax.tree.leaves(parts)) == 7
    joined = join_complex(parts)
    assert {name: complex(leaf) for name, leaf in joined.items()} == {
        name: complex(leaf) for name, leaf in tree.items()
    }
    shape = split_complex(jax.ShapeDtypeStruct((3, 2), jnp.complex64))
    assert (shape.real.dtype, shape.imaginary.shape) == (jnp.float32, (3, 2))


# Training -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("implicit_promotion")  # For Optax's Adam.
def test_a_complex_model_trains_as_with_adamw() -> None:
    rng = np.random.default_rng(0)
    inputs, targets, start = (
        jnp.asarray(rng.normal(size=shape) + 1j * rng.normal(size=shape), jnp.complex64)
        for shape in ((32, 6), (6, 4), (6, 4))
    )

    def loss(params: Any) -> jax.Array:
        rows = jnp.abs(inputs @ (params["w"] - targets) + params["b"][None, :]) ** 2
        return jnp.mean(rows)

    def train(optimizer: Any) -> float:
        def step(carry: Any, _: None) -> tuple[Any, None]:
            params, state = carry
            grads = jax.tree.map(jnp.conj, jax.grad(loss)(params))
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        params = {"w": start, "b": jnp.zeros(4, jnp.complex64)}
        carry = (params, optimizer.init(params))
        (params, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=150))(carry)
        return float(loss(params))

    schedule = optax.linear_schedule(0.1, 0.0, 150)
    found = train(soap_optax.soap(schedule, weight_decay=0.0))
    wanted = train(optax.adamw(schedule, weight_decay=0.0))
    first = float(loss({"w": start, "b": jnp.zeros(4)}))
    assert wanted < 1e-2 * first
    assert found < 1e-2 * first


# Meshes -------------------------------------------------------------------------------------------

SPECS = {
    "orbitals": PartitionSpec("x", "y"),
    "real": PartitionSpec("y"),
    "tensor": PartitionSpec(None, "x"),
    "phases": PartitionSpec(),
    "shift": PartitionSpec(),
}


@pytest.mark.long
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("kind", "hinted"),
    [
        pytest.param(AUTO, True, id="hinted"),
        pytest.param(AUTO, False, id="automatic"),
        pytest.param(EXPLICIT, False, id="explicit"),
    ],
)
def test_sharded_updates_equal_those_of_one_device(kind: Any, hinted: bool) -> None:
    mesh = mesh_of("4x2", kind)
    grads = [large(draw(step, np.complex128)) for step in range(3)]
    shardings = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    seen = []

    def hints(params: Any) -> Any:
        seen.append(params["phases"].dtype)
        return shardings

    sharded: Any = soap_optax.scale_by_soap(
        stack_sharding=all_axes(mesh),
        param_shardings=hints if hinted else None,
        precondition_frequency=2,
    )
    placed = [
        {name: jax.device_put(leaf, shardings[name]) for name, leaf in grad.items()}
        for grad in grads
    ]
    found, _ = run(jax.jit(sharded.update), sharded.init(placed[0]), placed)
    wanted, _ = run(update_of(), soap_optax.scale_by_soap().init(grads[0]), grads)
    assert_close(found[-1], wanted[-1])
    if hinted or kind is EXPLICIT:  # Without a hint, XLA picks the sharding of results.
        assert found[-1]["orbitals"][0].sharding.is_equivalent_to(shardings["orbitals"], 2)
    assert set(seen) == ({np.dtype(np.complex128)} if hinted else set())


def large(tree: Any) -> Any:
    """A tree whose axes the mesh divides."""
    return jax.tree.map(lambda leaf: jnp.tile(leaf, [2] * leaf.ndim) if leaf.ndim else leaf, tree)


# Tools and arguments ------------------------------------------------------------------------------


def test_functions_of_the_parameters_get_complex_leaves() -> None:
    seen = []

    def numbers(params: Any) -> Any:
        seen.append({leaf.dtype for leaf in jax.tree.leaves(params)})
        return LAYERS

    optimizer = soap_optax.scale_by_soap(dimension_numbers=numbers)
    state: Any = jax.eval_shape(optimizer.init, draw(0))
    assert seen[0] == {np.dtype(np.complex64), np.dtype(np.float32)}
    assert {name: stack.age.shape for name, stack in state.stacks.items()} == {
        "6x4": (4,),
        "4x6": (6,),
    }


def test_a_real_gradient_of_a_complex_parameter_raises() -> None:
    params = draw(0)
    state = soap_optax.scale_by_soap().init(params)
    with pytest.raises(ValueError, match="dtype from or to float64 or complex"):
        soap_optax.scale_by_soap().update(jax.tree.map(jnp.real, params), state)


def test_describe_has_a_row_for_each_part_and_exact_bytes() -> None:
    params = draw(0)
    for tree in (params, jax.eval_shape(lambda: params)):
        description = soap_optax.describe(tree, block_size=3)
        rows = {row.path: (row.blocks, row.dtype.name) for row in description.rows}
        assert rows["tensor/real"] == rows["tensor/imaginary"] == ("4 x 3x2x3", "float32")
        assert rows["phases/real"] == ("Adam", "float32")
        assert rows["real"] == ("4 x 3x2", "float32")
        state = jax.eval_shape(soap_optax.scale_by_soap(block_size=3).init, params)
        leaves = jax.tree.leaves(state)
        assert description.state_bytes == sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


@pytest.mark.long
def test_labels_diagnostics_and_checkpoints_take_complex_models() -> None:
    params = {"dense": {"kernel": draw(0)["tensor"], "bias": draw(0)["phases"]}}
    labels = soap_optax.default_labels(params)
    assert labels == {"dense": {"kernel": "soap", "bias": "adamw"}}
    optimizer = soap_optax.soap(1e-2)
    state = jax.jit(optimizer.init)(params)
    training_state = {"params": params, "opt_state": state}
    expected = jax.eval_shape(lambda: {"params": params, "opt_state": optimizer.init(params)})
    soap_optax.check_checkpoint(training_state, expected)
    real = {"params": jax.tree.map(jnp.real, params), "opt_state": state}
    with pytest.raises(ValueError, match="complex64 is expected"):
        soap_optax.check_checkpoint(real, expected)
    assert all(np.isfinite(value) for value in soap_optax.diagnostics(state).values())
