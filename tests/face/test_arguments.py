"""Input out of range, of the wrong type, or unusual works as in Optax, or raises an explanation."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import soap_optax

# Checks must give the same result in all three: they may not need values that tracing hides.
RUNNERS: dict[str, Callable[[Callable[[], Any]], Any]] = {
    "eager": lambda function: function(),
    "jit": lambda function: jax.jit(function)(),
    "eval_shape": jax.eval_shape,
}
every_runner = pytest.mark.parametrize("runner", RUNNERS.values(), ids=RUNNERS)


def soap(**options: Any) -> optax.GradientTransformation:
    return soap_optax.soap(**{"learning_rate": 0.1, **options})


def transform_with(argument: str, value: Any) -> optax.GradientTransformation:
    """The transformation that has this argument, with defaults for all others."""
    if argument in ("learning_rate", "weight_decay", "mask"):
        return soap(**{argument: value})
    return soap_optax.scale_by_soap(**{argument: value})


# Arguments out of range: names, values, the rule in the message, and the way out in the message.

OUT_OF_RANGE: list[tuple[tuple[str, ...], list[Any], str, str]] = [
    (
        ("b1", "b2", "shampoo_beta"),
        [-0.1, 1.0, 1, 1.5, np.nan, np.inf, -np.inf, np.float32(1), jnp.float32(-1)],
        "must be in [0, 1)",
        "0.95 is the usual value",
    ),
    (("b1", "b2", "shampoo_beta"), [1e300], "must be in [0, 1)", "0.95 is the usual value"),
    (("b1", "b2", "shampoo_beta"), [1 - 1e-9], "in [0, 1) as a float32", "0.95 is the usual value"),
    (
        ("eps",),
        [0, 0.0, -1e-8, np.nan, np.inf, jnp.float32(0), 1e-50, 1e300],
        "must be positive and finite",
        "pass 1e-8, the default, or 1e-30",
    ),
    (
        ("precondition_frequency",),
        [0, -1, np.nan, np.inf, 0.5, np.int32(0), jnp.int32(-3)],
        "must be at least 1",
        "for no preconditioning use optax.adamw",
    ),
    (("precondition_frequency",), [2.5, np.float32(1.5)], "must be a whole number", "round it"),
    (("max_precond_dim",), [0, -1], "must be at least 1", "use optax.adamw"),
    (("block_size",), [1, 0, -4], "must be at least 2", "None leaves every parameter whole"),
    (("stack_multiple",), [0, -8], "must be at least 1", "1 pads nothing"),
    (("block_size",), [10001], "must be at most max_precond_dim (10000)", "lower block_size"),
    (
        ("refresh_tolerance",),
        [-0.1, 1.5, np.nan, np.inf, jnp.float32(-1)],
        "must be in [0, 1]",
        "None skips none",
    ),
    (("refresh",), ["QR", "newton", ""], "must be one of 'qr', 'cholesky_qr', 'eigh'", ""),
    (("factor_estimator",), ["KL", "shampoo", ""], "must be one of 'gram', 'kl', got", ""),
    (("first_update",), ["Zero", "skip", ""], "must be one of 'zero', 'apply', got", ""),
    (("refresh_order",), ["before", "qr"], "must be one of 'before_gradient', 'after_", ""),
    (
        ("precision",),
        ["HIGHEST", "bogus", "F16_F16_F32", 3, True, jnp.float32, ("high",), ["high", "high"]],
        "must be None or one that jax.lax.dot takes",
        "pass 'highest'",
    ),
    (
        ("mu_dtype", "preconditioner_dtype"),
        [np.float16, jnp.float8_e4m3fn, "float8_e5m2"],
        "must be as wide in range as float32",
        "jnp.bfloat16",
    ),
    (
        ("mu_dtype", "preconditioner_dtype"),
        ["float8_e8m0fnu"],
        "must be as precise as bfloat16",
        "jnp.bfloat16",
    ),
    (("learning_rate",), [np.nan, np.inf, -np.inf], "must be finite", "3e-3 is a good start"),
    (
        ("weight_decay",),
        [-0.1, np.nan, np.inf],
        "must be finite and not negative",
        "0 decays nothing",
    ),
]

DECAY_TYPE = "must be a number in [0, 1)"
STATIC = "static_args=soap_optax.STATIC_ARGS"

WRONG_TYPE: list[tuple[tuple[str, ...], list[Any], str, str]] = [
    (("b1", "b2"), [None], DECAY_TYPE, ""),
    (("b1", "b2", "shampoo_beta"), ["0.9", True, 0.9j, [0.9], (0.9,)], DECAY_TYPE, ""),
    (("b1", "b2", "shampoo_beta"), [np.ones(1), np.full(2, 0.9)], DECAY_TYPE, ""),
    (("eps",), [None, "1e-8", False, 1e-8j, [1e-8]], "must be a positive number", ""),
    (
        ("precondition_frequency",),
        [None, "10", True, [10], np.ones(2)],
        "must be an integer or a schedule",
        "",
    ),
    (("max_precond_dim",), ["8", 8.0, True, [8]], "must be an integer of at least 1", STATIC),
    (("block_size",), ["8", 8.0, True, [8]], "must be an integer of at least 2", STATIC),
    (
        ("max_precond_dim", "block_size"),
        [jnp.int32(8), np.array([8])],
        "must be an integer",
        STATIC,
    ),
    (
        (
            *("precondition_1d", "merge_dims", "normalize_grads", "correct_bias"),
            *("stagger", "one_sided", "factored", "fold_factors"),
        ),
        [1, 0, None, "yes", np.True_, jnp.asarray(True)],
        "must be True or False",
        STATIC,
    ),
    (
        ("mu_dtype", "preconditioner_dtype"),
        [jnp.int32, np.complex64, bool],
        "must be None or a floating dtype",
        "",
    ),
    (
        ("mu_dtype", "preconditioner_dtype"),
        ["bfloat", 3],
        "must be None or a floating dtype",
        "bfloat16",
    ),
    (("refresh",), [None, 3, True, b"qr", ("qr",)], "must be one of 'qr', 'cholesky_qr'", STATIC),
    (("factor_estimator",), [None, 1, True, ("kl",)], "must be one of 'gram', 'kl', got", STATIC),
    (("first_update",), [None, 1, True], "must be one of 'zero', 'apply', got", STATIC),
    (("refresh_order",), [None, True], "must be one of 'before_gradient'", STATIC),
    (
        ("refresh_tolerance",),
        ["0.1", True, 0.1j, [0.1], np.ones(2)],
        "must be None or a number in [0, 1]",
        "",
    ),
    (("learning_rate",), [None, "3e-3", True, 0.1j, [0.1]], "must be a number or a schedule", ""),
    (("weight_decay",), [None, "0.1", True, [0.1]], "must be a number or a schedule", ""),
    (("stack_multiple",), ["8", 8.0, True, [8]], "must be an integer of at least 1", STATIC),
    (
        ("stack_sharding",),
        ["data", 8, PartitionSpec("data")],
        "must be None or a NamedSharding",
        "NamedSharding(mesh, P('data'))",
    ),
    (("mask",), ["bias", 1, 0.5], "must be None, a tree of booleans", "a function"),
    (("dimension_numbers",), [True, 3, "rows"], "must be None, a tree of objects", "a function"),
    (
        ("param_shardings",),
        [True, 3, "rows"],
        "must be None, a tree of NamedSharding",
        "a function",
    ),
]


def cases(table: list[tuple[tuple[str, ...], list[Any], str, str]]) -> list[Any]:
    return [
        pytest.param(argument, value, rule, way_out, id=f"{argument}={value!r}")
        for arguments, values, rule, way_out in table
        for argument in arguments
        for value in values
    ]


def assert_message(error: BaseException, argument: str, value: Any, rule: str, way: str) -> None:
    message = str(error)
    assert message.startswith(f"{argument} must be ")
    assert rule in message
    assert way in message
    names = [str(value), repr(value), getattr(value, "__name__", str(value))]
    assert any(f"got {name}" in message for name in names), message


@every_runner
@pytest.mark.parametrize(("argument", "value", "rule", "way_out"), cases(OUT_OF_RANGE))
def test_value_out_of_range_raises_when_built_with_the_rule_and_the_way_out(
    argument: str, value: Any, rule: str, way_out: str, runner: Callable[..., Any]
) -> None:
    with pytest.raises(ValueError, match=argument) as caught:
        runner(lambda: transform_with(argument, value) and 0)
    assert_message(caught.value, argument, value, rule, way_out)


@every_runner
@pytest.mark.parametrize(("argument", "value", "rule", "way_out"), cases(WRONG_TYPE))
def test_value_of_the_wrong_type_raises_when_built_with_the_rule_and_the_way_out(
    argument: str, value: Any, rule: str, way_out: str, runner: Callable[..., Any]
) -> None:
    with pytest.raises(TypeError, match=argument) as caught:
        runner(lambda: transform_with(argument, value) and 0)
    assert_message(caught.value, argument, value, rule, way_out)


@pytest.mark.parametrize(
    "spec",
    [(), (None,), (None, "data"), ("data", "model"), (PartitionSpec.UNCONSTRAINED,)],
    ids=str,
)
def test_sharding_of_another_axis_than_the_leading_one_raises(spec: tuple[Any, ...]) -> None:
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    rule = r"stack_sharding must shard axis 0 and no other, got .*\('data', 'fsdp'\)"
    with pytest.raises(ValueError, match=rule):
        soap_optax.scale_by_soap(stack_sharding=sharding)


def mesh_of_one(*kinds: AxisType) -> Mesh:
    """A mesh of axes `data` and `model` that has a single device."""
    device = np.array(jax.devices()[:1]).reshape(1, 1)
    return Mesh(device, ("data", "model"), axis_types=kinds or (AxisType.Auto,) * 2)


@pytest.mark.parametrize("spec", [("data",), (("data", "model"),)], ids=str)
def test_automatic_axes_of_a_mesh_with_explicit_ones_raise(spec: tuple[Any, ...]) -> None:
    mesh = mesh_of_one(AxisType.Auto, AxisType.Explicit)
    with pytest.raises(ValueError, match=r"must name explicit axes only .* 'data' is automatic"):
        soap_optax.scale_by_soap(stack_sharding=NamedSharding(mesh, PartitionSpec(*spec)))
    explicit = NamedSharding(mesh, PartitionSpec("model"))
    params = {"kernel": jax.device_put(jnp.ones((4, 3)), NamedSharding(mesh, PartitionSpec()))}
    optimizer = soap_optax.scale_by_soap(stack_sharding=explicit)
    updates, _ = jax.jit(optimizer.update)(params, optimizer.init(params))
    np.testing.assert_array_equal(updates["kernel"], 0)


def test_a_state_sharding_in_host_memory_raises() -> None:
    sharding = NamedSharding(mesh_of_one(), PartitionSpec("data"), memory_kind="pinned_host")
    with pytest.raises(ValueError, match="memory_kind='pinned_host'; move a state to the host"):
        soap_optax.scale_by_soap(stack_sharding=sharding)


def test_explicit_parameters_on_another_mesh_than_the_stacks_raise() -> None:
    explicit = mesh_of_one(AxisType.Explicit, AxisType.Explicit)
    params = {"kernel": jax.device_put(jnp.ones((4, 3)), NamedSharding(explicit, PartitionSpec()))}
    optimizer = soap_optax.scale_by_soap(
        stack_sharding=NamedSharding(mesh_of_one(), PartitionSpec("data"))
    )
    rule = r"stack_sharding must be on the mesh of the parameters .* at \['kernel'\]"
    with pytest.raises(ValueError, match=rule):
        optimizer.update(params, optimizer.init(params))


MESH = mesh_of_one()
OTHER_AXES = Mesh(MESH.devices, ("x", "y"))


@pytest.mark.parametrize(
    ("hint", "error", "rule"),
    [
        (
            {"kernel": PartitionSpec("data")},
            TypeError,
            r"a NamedSharding or None .* at \['kernel'\]",
        ),
        ({"other": None}, ValueError, "a tree with the structure of the parameters"),
        (
            {"kernel": NamedSharding(OTHER_AXES, PartitionSpec("x"))},
            ValueError,
            r"on the mesh of stack_sharding, with its .*'data'.*'x'.* at \['kernel'\]",
        ),
        (
            {"kernel": NamedSharding(MESH, PartitionSpec(None, None, "data"))},
            ValueError,
            r"specify how a parameter's axes are sharded, got .* at \['kernel'\], which has 2 axes",
        ),
        (
            {"kernel": None, "other": None},
            ValueError,
            r"got an entry for \['other'\], which is no parameter",
        ),
        ({}, ValueError, r"got no entry for the parameter \['kernel'\]"),
        (
            {"kernel": NamedSharding(MESH, PartitionSpec(PartitionSpec.UNCONSTRAINED))},
            ValueError,
            "specify how a parameter's axes are sharded, got .*UNCONSTRAINED",
        ),
    ],
)
def test_param_shardings_that_do_not_fit_the_parameters_raise(
    hint: Any, error: type[Exception], rule: str
) -> None:
    params = {"kernel": jnp.ones((4, 3))}
    optimizer = soap_optax.scale_by_soap(
        stack_sharding=NamedSharding(MESH, PartitionSpec("data")), param_shardings=hint
    )
    state = soap_optax.scale_by_soap().init(params)
    for function in (optimizer.init, lambda params: optimizer.update(params, state)):
        with pytest.raises(error, match="param_shardings must .*" + rule):
            function(params)


def test_param_shardings_without_a_stack_sharding_raise() -> None:
    with pytest.raises(ValueError, match="param_shardings must be None where stack_sharding is"):
        soap(param_shardings=NamedSharding(MESH, PartitionSpec("data")))


@pytest.mark.parametrize(
    ("sharding", "error", "rule"),
    [
        ("data", TypeError, "must be a NamedSharding of a Mesh"),
        (None, TypeError, "must be a NamedSharding of a Mesh"),
        (NamedSharding(MESH, PartitionSpec()), ValueError, "must shard axis 0"),
        (NamedSharding(MESH, PartitionSpec(None, "data")), ValueError, "must shard axis 0"),
    ],
)
def test_state_shardings_raises_for_a_bad_stack_sharding(
    sharding: Any, error: type[Exception], rule: str
) -> None:
    with pytest.raises(error, match="stack_sharding " + rule):
        soap_optax.state_shardings(soap().init({"kernel": jnp.ones((4, 3))}), sharding)


def test_a_stack_multiple_that_is_no_multiple_of_the_shards_raises() -> None:
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    with pytest.raises(ValueError, match="multiple of the 4 shards of stack_sharding, got 6"):
        soap_optax.scale_by_soap(stack_sharding=sharding, stack_multiple=6)


def test_soap_checks_the_arguments_of_scale_by_soap() -> None:
    with pytest.raises(ValueError, match=r"b2 must be in \[0, 1\)"):
        soap(b2=1.0)
    with pytest.raises(ValueError, match="block_size must be at most max_precond_dim"):
        soap(block_size=64, max_precond_dim=32)
    with pytest.raises(ValueError, match="merge_dims must be False where dimension_numbers"):
        soap(merge_dims=True, dimension_numbers=lambda _: None)
    with pytest.raises(ValueError, match=r"refresh_tolerance must be None .* 'partial', got 0\.1"):
        soap(refresh="partial", refresh_tolerance=0.1)


@pytest.mark.parametrize("factory", [soap, soap_optax.scale_by_soap])
def test_an_unknown_argument_raises_with_its_name(factory: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="nesterov"):
        factory(nesterov=True)


def test_options_cannot_be_given_by_position() -> None:
    with pytest.raises(TypeError, match="positional"):
        soap_optax.scale_by_soap(0.9, 0.9, 1e-8, 0.9)  # pyright: ignore[reportCallIssue]  # The claim.
    with pytest.raises(TypeError, match="positional"):
        soap_optax.soap(0.1, 0.9, 0.9, 1e-8, 0.0, None, 0.9)  # pyright: ignore[reportCallIssue]  # The claim.


@every_runner
@pytest.mark.parametrize(
    "argument",
    [
        "max_precond_dim",
        "block_size",
        "precondition_1d",
        "merge_dims",
        "normalize_grads",
        "correct_bias",
        "first_update",
        "stack_multiple",
        "refresh",
        "refresh_order",
        "stagger",
        "one_sided",
        "factored",
        "fold_factors",
        "factor_estimator",
    ],
)
def test_traced_value_of_a_static_argument_raises_with_the_way_out(
    argument: str, runner: Callable[..., Any]
) -> None:
    def build() -> int:
        jax.make_jaxpr(lambda value: transform_with(argument, value) and 0)(1)
        return 0

    with pytest.raises(TypeError, match=rf"{argument} must be .*{re.escape(STATIC)}"):
        runner(build)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("b1", 0),
        ("b1", np.float16(0.5)),
        ("b1", jnp.float32(0.9)),
        ("b1", 1 - 1e-7),
        ("b2", 0),
        ("b2", 1 - 1e-7),
        ("eps", 1e-30),
        ("eps", 1e-40),
        ("eps", 1),
        ("shampoo_beta", 0),
        ("shampoo_beta", 1 - 1e-7),
        ("precondition_frequency", 7.0),
        ("precondition_frequency", np.int64(7)),
        ("precondition_frequency", 2**31 - 1),
        ("precondition_frequency", 2**31),
        ("precondition_frequency", 1e10),
        ("max_precond_dim", np.int64(2)),
        ("max_precond_dim", 10**12),
        ("block_size", np.int64(2)),
        ("mu_dtype", "bfloat16"),
        ("mu_dtype", float),
        ("preconditioner_dtype", "bfloat16"),
        ("refresh_tolerance", 0),
        ("refresh_tolerance", np.float32(1)),
        ("precision", "BF16_BF16_F32"),
        ("precision", jax.lax.Precision.HIGH),
        ("precision", "highest"),
        ("learning_rate", 0),
        ("learning_rate", -0.1),
        ("learning_rate", np.float64(0.1)),
        ("weight_decay", 0),
        ("weight_decay", jnp.float32(0.1)),
    ],
    ids=str,
)
def test_value_at_the_edge_gives_finite_updates_or_raises_when_built(
    argument: str, value: Any
) -> None:
    try:
        optimizer = transform_with(argument, value)
    except ValueError as error:
        assert argument in str(error)  # noqa: PT017  # To raise is one of two correct results.
        return
    # Adam leaves use all arguments except the ones about bases, and they compile fast.
    params = {"vector": jnp.array([0.0, 1.0, -2.0]), "scalar": jnp.array(0.0)}
    state = optimizer.init(params)
    for _ in range(2):
        updates, state = optimizer.update(params, state, params)
        for leaf in jax.tree.leaves((updates, state)):
            assert np.isfinite(np.asarray(leaf, np.float64)).all()


# Leaves.

NOT_REAL = {
    "int32": jnp.ones((2, 2), jnp.int32),
    "uint8": np.ones(3, np.uint8),
    "bool": jnp.ones(3, bool),
    "int": 3,
    "key<fry>": jax.random.key(0),
}


@every_runner
@pytest.mark.parametrize("factory", [soap, soap_optax.scale_by_soap])
@pytest.mark.parametrize("dtype", NOT_REAL)
def test_a_leaf_that_is_not_real_raises_at_init_with_path_dtype_and_the_way_out(
    dtype: str, factory: Callable[..., Any], runner: Callable[..., Any]
) -> None:
    params = {"dense": {"kernel": jnp.ones((2, 2)), "odd": NOT_REAL[dtype]}}
    with pytest.raises(TypeError) as caught:
        runner(lambda: factory().init(params))
    message = str(caught.value)
    assert "every leaf must be a floating-point or complex array" in message
    assert f"got {dtype.replace('int', 'int32') if dtype == 'int' else dtype} at" in message
    assert "['dense']['odd']" in message
    assert "optax.masked" in message
    assert "optax.partition" in message


def test_ways_out_of_a_leaf_that_is_not_real_work() -> None:
    params = {"kernel": jnp.ones(3), "step": jnp.asarray(3)}
    masked = optax.masked(soap_optax.scale_by_soap(), {"kernel": True, "step": False})
    updates: Any
    updates, _ = masked.update(params, masked.init(params))
    assert updates["step"] is params["step"]
    partition = optax.partition(
        {"soap": soap_optax.soap(0.1), "freeze": optax.set_to_zero()},
        {"kernel": "soap", "step": "freeze"},
    )
    updates, _ = partition.update(params, partition.init(params), params)
    assert updates["step"] == 0
    np.testing.assert_allclose(updates["kernel"], -0.1 * 0.01, rtol=1e-6)  # It only decays.


@every_runner
def test_a_gradient_that_is_not_real_raises_at_update_with_path_and_dtype(
    runner: Callable[..., Any],
) -> None:
    optimizer = soap_optax.scale_by_soap()
    state = optimizer.init({"kernel": jnp.ones(3)})
    with pytest.raises(TypeError, match=r"got int32 at \['kernel'\]; leave it out"):
        runner(lambda: optimizer.update({"kernel": jnp.ones(3, jnp.int32)}, state))


def two_steps(params: Any, runner: Callable[..., Any], **options: Any) -> tuple[Any, Any]:
    """Updates of the second call with ones as gradients, and the state."""
    optimizer = soap_optax.scale_by_soap(**options)

    def run() -> tuple[Any, Any]:
        updates, state = params, optimizer.init(params)
        for _ in range(2):
            updates, state = optimizer.update(params, state)
        return updates, state

    return runner(run)


@every_runner
@pytest.mark.parametrize("empty", [{}, (), [], None, {"a": {}, "b": ()}], ids=repr)
def test_empty_tree_has_an_empty_state_and_an_empty_update(
    empty: Any, runner: Callable[..., Any]
) -> None:
    updates, state = two_steps(empty, runner)
    assert updates == empty
    assert not state.stacks
    assert not state.adam
    if empty is not None:  # Parameters of None are missing parameters to Optax.
        optimizer = soap()
        updates, _ = runner(lambda: optimizer.update(empty, optimizer.init(empty), empty))
        assert updates == empty


SCALARS = {
    "Python float": 1.0,
    "0-d array": jnp.ones(()),
    "NumPy scalar": np.float32(1),
    "0-d bfloat16": jnp.ones((), jnp.bfloat16),
}


@every_runner
@pytest.mark.parametrize("scalar", SCALARS.values(), ids=SCALARS)
@pytest.mark.parametrize("options", [{}, {"precondition_1d": True, "block_size": 2}], ids=str)
def test_scalar_is_a_leaf_like_any_other(
    options: dict[str, Any], scalar: Any, runner: Callable[..., Any]
) -> None:
    for tree in ({"scale": scalar}, scalar):
        updates, state = two_steps(tree, runner, **options)
        (update,) = jax.tree.leaves(updates)
        assert jax.tree.structure(updates) == jax.tree.structure(tree)
        assert (update.shape, update.dtype) == ((), jnp.result_type(scalar))
        assert not state.stacks
        if runner is not jax.eval_shape:
            # With equal gradients, Adam's update is 1, which a bfloat16 holds exactly.
            np.testing.assert_allclose(np.asarray(update, np.float32), 1, atol=1e-5)


@every_runner
@pytest.mark.parametrize(
    "options",
    [{}, {"block_size": 2}, {"precondition_1d": True}, {"merge_dims": True, "max_precond_dim": 3}],
    ids=str,
)
def test_leaf_without_entries_has_no_state_and_a_zero_size_update(
    options: dict[str, Any], runner: Callable[..., Any]
) -> None:
    shapes = [(0,), (0, 3), (3, 0, 2), (5, 0), (0, 9)]
    empty = {str(shape): jnp.zeros(shape, jnp.bfloat16) for shape in shapes}
    updates, state = two_steps(empty, runner, **options)
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in updates.items()} == {
        str(shape): (shape, jnp.bfloat16) for shape in shapes
    }
    assert not state.stacks
    assert not state.adam
    if runner is not jax.eval_shape:
        updates, state = two_steps({**empty, "bias": jnp.ones(1)}, runner, **options)
        np.testing.assert_allclose(updates["bias"], 1, atol=1e-5)
        assert all(leaf.size for leaf in jax.tree.leaves(state))


@every_runner
@pytest.mark.parametrize(
    "missing",
    [None, optax.MaskedNode(), {"deeper": None, "still": optax.MaskedNode()}],
    ids=["None", "MaskedNode", "nested"],
)
def test_missing_subtree_stays_missing_and_changes_nothing_else(
    missing: Any, runner: Callable[..., Any]
) -> None:
    updates, state = two_steps({"bias": jnp.ones(3), "missing": missing}, runner)
    wanted, wanted_state = two_steps({"bias": jnp.ones(3)}, runner)
    assert updates["missing"] == missing
    if runner is jax.eval_shape:
        assert (updates["bias"], state) == (wanted["bias"], wanted_state)
    else:
        jax.tree.map(np.testing.assert_array_equal, updates["bias"], wanted["bias"])
        jax.tree.map(np.testing.assert_array_equal, state, wanted_state)


# States and parameters of another model.

PARAMS = {"bias": jnp.ones(3), "kernel": jnp.ones((4, 3))}

# The parameters and options of a state, and its first leaf with a wrong shape.
MISMATCHES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "another shape": ({**PARAMS, "kernel": jnp.ones((3, 4))}, {}, "stacks['4x3']"),
    "another layer": ({**PARAMS, "other": jnp.ones((4, 3))}, {}, "stacks['4x3']"),
    "one leaf less": ({"kernel": PARAMS["kernel"]}, {}, "adam['float32']"),
    "longer bias": ({**PARAMS, "bias": jnp.ones(7)}, {}, "adam['float32'].mu"),
    "one leaf more": ({**PARAMS, "other": jnp.ones((2, 2))}, {}, "stacks['2x2']"),
    "nothing": ({}, {}, "stacks['4x3']"),
    "another block size": (PARAMS, {"block_size": 2}, "stacks['4x3']"),
    "another longest axis": (PARAMS, {"max_precond_dim": 3}, "stacks['4x3'].factors[0]"),
    "vectors": (PARAMS, {"precondition_1d": True}, "adam['float32']"),
    "merged": (PARAMS, {"merge_dims": True}, "stacks['4x3']"),
    "one side": (PARAMS, {"one_sided": True}, "stacks['4x3'].factors[0]"),
    "marginals": (PARAMS, {"factored": True}, "stacks['4x3'].nu"),
    "folded": (PARAMS, {"fold_factors": True}, "stacks['4x3'].factors[0]"),
    "KL factors": (PARAMS, {"factor_estimator": "kl"}, "stacks['4x3'].eigenvalues[0]"),
}


@every_runner
@pytest.mark.parametrize(("other", "options", "path"), MISMATCHES.values(), ids=MISMATCHES)
def test_a_state_of_another_model_raises_with_path_shapes_and_the_way_out(
    other: dict[str, Any], options: dict[str, Any], path: str, runner: Callable[..., Any]
) -> None:
    state = soap_optax.scale_by_soap(**options).init(other)
    with pytest.raises(ValueError, match="state does not belong to these gradients") as caught:
        runner(lambda: soap_optax.scale_by_soap().update(PARAMS, state))
    message = str(caught.value)
    assert f"state.{path}" in message
    assert re.search(r"has shape .* and must have .*", message)
    causes = ("block_size", "max_precond_dim", "merge_dims", "precondition_1d")
    for cause in (
        *causes,
        "one_sided",
        "factored",
        "fold_factors",
        "factor_estimator",
        "init again",
    ):
        assert cause in message


@every_runner
def test_a_state_of_another_optimizer_raises_with_its_type(runner: Callable[..., Any]) -> None:
    for other in (optax.scale_by_adam(), soap()):
        state = other.init(PARAMS)
        with pytest.raises(TypeError, match=f"got {type(state).__name__}; pass what init returned"):
            runner(lambda state=state: soap_optax.scale_by_soap().update(PARAMS, state))


@pytest.mark.usefixtures("implicit_promotion")
@every_runner
def test_missing_parameters_and_masks_that_do_not_fit_fail_as_in_optax(
    runner: Callable[..., Any],
) -> None:
    def message(function: Callable[[], Any]) -> str:
        with pytest.raises(ValueError, match=r".") as caught:
            runner(function)
        return str(caught.value)

    params = {"bias": jnp.ones(3)}
    optimizers = (soap_optax.soap(0.1), optax.adamw(0.1))
    ours, theirs = [message(lambda tx=tx: tx.update(params, tx.init(params))) for tx in optimizers]
    assert ours == theirs
    mask = {"no such leaf": True}
    optimizers = (soap_optax.soap(0.1, mask=mask), optax.adamw(0.1, mask=mask))
    ours, theirs = [message(lambda tx=tx: tx.init(params)) for tx in optimizers]
    assert ours == theirs


@pytest.mark.parametrize("make", [soap_optax.soap, soap_optax.shampoo, soap_optax.hyperball])
def test_numbers_that_injection_made_complex_name_the_remedy(make: Any) -> None:
    params = {"amplitudes": jnp.ones((3, 2), jnp.complex64), "kernel": jnp.ones((4, 3))}
    with pytest.raises(TypeError, match=re.escape("hyperparam_dtype=jnp.float32")):
        optax.inject_hyperparams(make)(learning_rate=0.01).init(params)
    injected = optax.inject_hyperparams(make, hyperparam_dtype=jnp.float32)
    jax.eval_shape(injected(learning_rate=0.01).init, params)
