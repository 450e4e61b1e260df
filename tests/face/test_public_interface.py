"""The public interface: names, signatures, types, paths of the state, examples, and imports."""

import doctest
import inspect
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import soap_optax

KEYWORD_ONLY = {
    "shampoo_beta": None,
    "precondition_frequency": 10,
    "max_precond_dim": None,
    "precondition_1d": False,
    "merge_dims": False,
    "normalize_grads": False,
    "correct_bias": True,
    "first_update": "zero",
    "mu_dtype": None,
    "block_size": None,
    "dimension_numbers": None,
    "stack_sharding": None,
    "stack_multiple": None,
    "param_shardings": None,
    "refresh": "qr",
    "refresh_tolerance": None,
    "refresh_order": "before_gradient",
    "stagger": False,
    "one_sided": False,
    "factored": False,
    "preconditioner_dtype": None,
    "fold_factors": False,
    "factor_estimator": "gram",
    "precision": None,
}
REQUIRED = inspect.Parameter.empty
SIGNATURES: dict[str, dict[str, Any]] = {
    "soap": {
        "learning_rate": REQUIRED,
        "b1": 0.95,
        "b2": 0.95,
        "eps": 1e-8,
        "weight_decay": 0.01,
        "mask": None,
        **KEYWORD_ONLY,
    },
    "scale_by_soap": {"b1": 0.95, "b2": 0.95, "eps": 1e-8, **KEYWORD_ONLY},
}

PARAMS = {"dense": {"bias": jnp.ones(3), "kernel": jnp.ones((4, 3))}, "scale": jnp.ones(())}


def factory(name: str) -> Callable[..., optax.GradientTransformationExtraArgs]:
    return getattr(soap_optax, name)


def build(name: str, **options: Any) -> optax.GradientTransformationExtraArgs:
    return factory(name)(**({"learning_rate": 0.1} if name == "soap" else {}), **options)


# Signatures.


@pytest.mark.parametrize("name", SIGNATURES)
def test_arguments_have_these_names_defaults_and_order(name: str) -> None:
    parameters = inspect.signature(factory(name)).parameters
    assert {key: value.default for key, value in parameters.items()} == SIGNATURES[name]
    assert list(parameters) == list(SIGNATURES[name])
    by_keyword = [key for key, value in parameters.items() if value.kind is value.KEYWORD_ONLY]
    assert by_keyword == list(KEYWORD_ONLY)
    others = {value.kind for key, value in parameters.items() if key not in KEYWORD_ONLY}
    assert others == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


@pytest.mark.parametrize("name", SIGNATURES)
def test_transformations_are_optax_s_and_take_extra_arguments(name: str) -> None:
    optimizer = build(name)
    assert isinstance(optimizer, optax.GradientTransformationExtraArgs)
    bias = {"bias": jnp.ones(3)}
    updates, _ = optimizer.update(bias, optimizer.init(bias), bias, value=1.0, unheard_of="extra")
    assert jax.tree.structure(updates) == jax.tree.structure(bias)


def test_every_public_name_is_exported_once_and_documented() -> None:
    names = soap_optax.__all__
    assert len(set(names)) == len(names)
    assert {"soap", "scale_by_soap", "STATIC_ARGS", "ScaleBySoapState"} <= set(names)
    for name in names:
        assert hasattr(soap_optax, name)
        if name != "STATIC_ARGS":
            assert inspect.getdoc(getattr(soap_optax, name))


@pytest.mark.usefixtures("implicit_promotion")
@pytest.mark.parametrize("name", soap_optax.__all__)
def test_examples_in_public_docstrings_run(name: str) -> None:
    examples = doctest.DocTestFinder(recurse=False).find(
        getattr(soap_optax, name), name, globs={}, module=False
    )
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for example in examples:
        assert runner.run(example).failed == 0
    if name in SIGNATURES:
        assert runner.summarize(verbose=False).attempted >= 5


# `optax.inject_hyperparams`.


def test_static_arguments_are_named_in_the_order_of_the_signatures() -> None:
    in_order = [key for key in SIGNATURES["soap"] if key in soap_optax.STATIC_ARGS]
    assert list(soap_optax.STATIC_ARGS) == in_order
    assert set(soap_optax.STATIC_ARGS[1:]) <= set(SIGNATURES["scale_by_soap"])
    # All other arguments may be traced.
    rest = SIGNATURES["soap"].keys() - set(soap_optax.STATIC_ARGS)
    assert rest == {
        "learning_rate",
        "b1",
        "b2",
        "eps",
        "weight_decay",
        "shampoo_beta",
        "precondition_frequency",
        "refresh_tolerance",
    }


TRACED = {
    "b1": 0.9,
    "b2": 0.8,
    "eps": 1e-6,
    "shampoo_beta": 0.7,
    "precondition_frequency": 2,
    "refresh_tolerance": 0.0,
}
STATIC: dict[str, Any] = {
    "max_precond_dim": 5,
    "precondition_1d": True,
    "merge_dims": False,
    "normalize_grads": True,
    "correct_bias": False,
    "first_update": "apply",
    "mu_dtype": jnp.bfloat16,
    "block_size": 4,
    "refresh": "eigh",
    "refresh_order": "after_gradient",
    "stagger": True,
    "one_sided": True,
    "factored": True,
    "preconditioner_dtype": jnp.float32,
    "fold_factors": True,
    "factor_estimator": "kl",
    "precision": "highest",
}


def test_every_other_argument_may_be_injected_and_changed_between_steps() -> None:
    traced = {**TRACED, "learning_rate": 0.1, "weight_decay": 0.2}
    static_args = soap_optax.STATIC_ARGS
    injected = optax.inject_hyperparams(soap_optax.soap, static_args=static_args)
    optimizer = injected(**traced, **STATIC)
    params = {"kernel": jnp.ones((4, 3))}
    rng = np.random.default_rng(0)
    grads = [{"kernel": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)} for _ in range(5)]
    traces = []

    @jax.jit
    def step(grads: Any, state: Any) -> Any:
        traces.append(None)
        return optimizer.update(grads, state, params)

    @jax.jit
    def plain_step(grads: Any, state: Any, traced: dict[str, Any]) -> Any:
        return soap_optax.soap(**traced, **STATIC).update(grads, state, params)

    state: Any = optimizer.init(params)
    plain_state = soap_optax.soap(**traced, **STATIC).init(params)
    assert {key: float(value) for key, value in state.hyperparams.items()} == pytest.approx(traced)
    for call, grad in enumerate(grads):
        if call == 3:  # With the new frequency, call 3 no longer refreshes.
            traced |= {"b1": 0.5, "precondition_frequency": 3}
            # Optax gave them these types: a weakly typed integer, and a float32.
            state.hyperparams["precondition_frequency"] = jnp.asarray(3)
            state.hyperparams["b1"] = jnp.asarray(0.5, jnp.float32)
        updates, state = step(grad, state)
        wanted, plain_state = plain_step(grad, plain_state, traced)
        # Two programs compute updates of size 1. Both round the first moment by 2^-9 of itself.
        np.testing.assert_allclose(updates["kernel"], wanted["kernel"], rtol=0, atol=0.02)
    refreshes = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if jax.tree_util.keystr(path).endswith(".refreshes")
    ]
    # Calls 1 and 4 refresh. At frequency 2, calls 1 and 3 would.
    assert [leaf.tolist() for leaf in refreshes] == [[2]]
    assert len(traces) == 1


def test_static_arguments_of_scale_by_soap_are_all_but_the_first() -> None:
    with pytest.raises(ValueError, match="mask"):
        optax.inject_hyperparams(soap_optax.scale_by_soap, static_args=soap_optax.STATIC_ARGS)
    static_args = soap_optax.STATIC_ARGS[1:]
    injected = optax.inject_hyperparams(soap_optax.scale_by_soap, static_args=static_args)
    optimizer = injected(**TRACED, **STATIC)
    state: Any = optimizer.init(PARAMS)
    assert set(state.hyperparams) == set(TRACED)
    shapes = jax.eval_shape(optimizer.update, PARAMS, state)
    assert jax.tree.structure(shapes) == jax.tree.structure((PARAMS, state))


@pytest.mark.parametrize("name", SIGNATURES)
def test_defaults_need_no_static_arguments(name: str) -> None:
    required = {"learning_rate": 0.1} if name == "soap" else {}
    injected = optax.inject_hyperparams(factory(name))(**TRACED, **required)
    state: Any = injected.init(PARAMS)
    assert set(state.hyperparams) == {*TRACED, *required, *({"weight_decay"} & {*SIGNATURES[name]})}
    plain = factory(name)(**TRACED, **required).init(PARAMS)
    assert jax.tree.structure(state.inner_state) == jax.tree.structure(plain)
    shapes = jax.eval_shape(injected.update, PARAMS, state, PARAMS)
    assert jax.tree.structure(shapes) == jax.tree.structure((PARAMS, state))


@pytest.mark.parametrize("name", SIGNATURES)
@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("max_precond_dim", 5),
        ("block_size", 4),
        ("stack_multiple", 2),
        ("mu_dtype", jnp.bfloat16),
        ("preconditioner_dtype", jnp.bfloat16),
    ],
)
def test_forgetting_the_static_arguments_raises_with_the_way_out(
    name: str, argument: str, value: Any
) -> None:
    # Optax treats all numbers as hyperparameters, and all classes as schedules.
    required = {"learning_rate": 0.1} if name == "soap" else {}
    injected = optax.inject_hyperparams(factory(name))(**required, **{argument: value})
    with pytest.raises(TypeError, match=rf"{argument} must .* static_args=soap_optax"):
        injected.init(PARAMS)


# The state.


def test_paths_of_the_state_read_well() -> None:
    state = build("scale_by_soap").init(PARAMS)
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(state)
    ]
    assert paths == [
        "layout_version",
        "count",
        "stacks/4x3/accepted_gradients",
        "stacks/4x3/rejected_gradients",
        "stacks/4x3/factors/0",
        "stacks/4x3/factors/1",
        "stacks/4x3/mu",
        "stacks/4x3/nu",
        "stacks/4x3/bases/0",
        "stacks/4x3/bases/1",
        "stacks/4x3/age",
        "stacks/4x3/refreshes",
        "stacks/4x3/rejected_refreshes",
        "adam/float32/accepted_gradients",
        "adam/float32/rejected_gradients",
        "adam/float32/mu",
        "adam/float32/nu",
    ]


@pytest.mark.usefixtures("x64")
def test_stacks_are_named_by_shape_and_by_dtype_of_statistics_where_it_is_not_float32() -> None:
    params = {
        name: jax.ShapeDtypeStruct((4, 3), name) for name in ("bfloat16", "float32", "float64")
    }
    params["vector"] = jax.ShapeDtypeStruct((3,), "float64")
    state = jax.eval_shape(build("scale_by_soap").init, params)
    assert state.stacks.keys() == {"4x3", "4x3_float64"}
    assert len(state.stacks["4x3"].accepted_gradients) == 2
    assert state.adam.keys() == {"float64"}
    for name, stack in state.stacks.items():
        floats = {leaf.dtype.name for leaf in jax.tree.leaves(stack) if leaf.dtype.kind == "f"}
        assert floats == {"float64" if name.endswith("float64") else "float32"}


def assert_plain_arrays(node: Any, path: str) -> None:
    """Raises unless a tree consists of NamedTuples, dictionaries by name, tuples and arrays."""
    if isinstance(node, dict):
        for key, value in node.items():
            assert isinstance(key, str)
            assert_plain_arrays(value, f"{path}/{key}")
    elif isinstance(node, tuple):
        assert type(node) is tuple or hasattr(node, "_fields"), path
        for key, value in enumerate(node):
            assert_plain_arrays(value, f"{path}/{key}")
    else:
        assert isinstance(node, jax.Array), f"{path} is {node!r}"
        assert node.size > 0, path
        assert node.dtype.kind in "if", path
        assert not node.weak_type, path


@pytest.mark.parametrize(
    "params",
    [PARAMS, {}, {"empty": jnp.ones((0, 3)), "scalar": 1.0}, {"kernel": jnp.ones((4, 3))}],
    ids=["model", "nothing", "oddities", "one matrix"],
)
def test_state_holds_plain_arrays_and_nothing_else(params: Any) -> None:
    optimizer = build("scale_by_soap")
    state = optimizer.init(params)
    assert type(state) is soap_optax.ScaleBySoapState
    assert_plain_arrays(state, "")
    grads = jax.tree.map(jnp.ones_like, params)
    _, after = jax.eval_shape(optimizer.update, grads, state)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
        assert (new.shape, new.dtype, new.weak_type) == (old.shape, old.dtype, old.weak_type)


# Imports.


def printed_by(program: str) -> list[str]:
    """The words that a program prints in a process of its own."""
    repository = str(pathlib.Path(__file__).parents[2])
    inherited = os.environ.get("PYTHONPATH", "")
    path = os.pathsep.join(filter(None, [repository, inherited]))
    process = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.split()


def test_the_import_changes_no_setting_and_warns_of_nothing() -> None:
    program = """
import warnings
import jax, optax
before = dict(jax.config.values)
with warnings.catch_warnings():
    warnings.simplefilter("error")
    import soap_optax
changed = [name for name, value in jax.config.values.items() if before[name] != value]
print("changed", *changed)
"""
    assert printed_by(program) == ["changed"]


def test_nothing_but_jax_optax_and_numpy_is_imported_at_run_time() -> None:
    # Imports of those three packages do not count. Every later import counts, during updates too.
    program = """
import sys
import jax, jax.numpy, numpy, optax
optax.tree_utils  # Some of them import lazily.
before = set(sys.modules)
import soap_optax
tree = {"kernel": jax.numpy.ones((4, 3)), "bias": jax.numpy.ones(3)}
optimizer = soap_optax.soap(0.1)
state = jax.eval_shape(optimizer.init, tree)
jax.eval_shape(optimizer.update, tree, state, tree)
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""
    imported = printed_by(program)
    allowed = {"soap_optax", "jax", "jaxlib", "numpy", "optax", *sys.stdlib_module_names}
    assert "soap_optax" in imported
    assert set(imported) <= allowed
