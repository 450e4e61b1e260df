"""`shampoo` and `scale_by_shampoo` as users see them: signatures, checks, injection, reference."""

import inspect
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers

import soap_optax
from soap_optax import shampoo_alias

REQUIRED = inspect.Parameter.empty
KEYWORD_ONLY: dict[str, Any] = {
    "exponent": None,
    "grafting": "adam",
    "shampoo_beta": None,
    "precondition_frequency": 10,
    "grafting_eps": 1e-8,
    "max_precond_dim": 10000,
    "precondition_1d": False,
    "merge_dims": False,
    "correct_bias": True,
    "mu_dtype": None,
    "block_size": None,
    "dimension_numbers": None,
    "stack_sharding": None,
    "stack_multiple": None,
    "param_shardings": None,
    "refresh": "eigh",
    "refresh_order": "after_gradient",
    "stagger": False,
    "one_sided": False,
    "preconditioner_dtype": None,
    "fold_factors": False,
    "factor_estimator": "gram",
    "precision": None,
}
SIGNATURES: dict[str, dict[str, Any]] = {
    "shampoo": {
        "learning_rate": REQUIRED,
        "b1": 0.95,
        "b2": 0.95,
        "eps": 1e-12,
        "weight_decay": 0.01,
        "mask": None,
        **KEYWORD_ONLY,
    },
    "scale_by_shampoo": {"b1": 0.95, "b2": 0.95, "eps": 1e-12, **KEYWORD_ONLY},
}
# Another value than the default for each argument.
OTHERS: dict[str, Any] = {
    "b1": 0.9,
    "b2": 0.99,
    "eps": 1e-6,
    "exponent": 0.4,
    "grafting": "rmsprop",
    "shampoo_beta": 0.8,
    "precondition_frequency": 3,
    "grafting_eps": 1e-7,
    "max_precond_dim": 7,
    "precondition_1d": True,
    "merge_dims": True,
    "correct_bias": False,
    "mu_dtype": jnp.bfloat16,
    "block_size": 5,
    "dimension_numbers": MuonDimensionNumbers(),
    "stack_sharding": NamedSharding(jax.make_mesh((1,), ("data",)), PartitionSpec("data")),
    "stack_multiple": 4,
    "param_shardings": NamedSharding(jax.make_mesh((1,), ("data",)), PartitionSpec()),
    "refresh": "qr",
    "refresh_order": "before_gradient",
    "stagger": True,
    "one_sided": True,
    "preconditioner_dtype": jnp.bfloat16,
    "fold_factors": True,
    "factor_estimator": "kl",
    "precision": "highest",
}
TRACED = {
    name: OTHERS[name]
    for name in ("b1", "b2", "eps", "exponent", "shampoo_beta", "precondition_frequency")
} | {"grafting_eps": 1e-7}
PARAMS = {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}


@pytest.mark.parametrize("name", SIGNATURES)
def test_arguments_have_these_names_defaults_and_order(name: str) -> None:
    parameters = inspect.signature(getattr(soap_optax, name)).parameters
    assert {key: value.default for key, value in parameters.items()} == SIGNATURES[name]
    assert list(parameters) == list(SIGNATURES[name])
    by_keyword = [key for key, value in parameters.items() if value.kind is value.KEYWORD_ONLY]
    assert by_keyword == list(KEYWORD_ONLY)


def test_shampoo_hands_every_argument_on(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = list(SIGNATURES["scale_by_shampoo"])
    assert list(OTHERS) == parameters
    handed_on: dict[str, Any] = {}

    def record(*args: Any, **kwargs: Any) -> optax.GradientTransformation:
        handed_on.update(zip(parameters, args, strict=False), **kwargs)
        return optax.identity()

    monkeypatch.setattr(shampoo_alias, "scale_by_shampoo", record)
    soap_optax.shampoo(0.1, **OTHERS)
    assert handed_on == OTHERS
    soap_optax.shampoo(0.1)
    assert handed_on == SIGNATURES["scale_by_shampoo"]


def test_shampoo_is_the_transformation_with_weight_decay_and_learning_rate() -> None:
    optimizer, alone = soap_optax.shampoo(0.1, weight_decay=0.2), soap_optax.scale_by_shampoo()
    state, state_alone = optimizer.init(PARAMS), alone.init(PARAMS)
    for _ in range(2):
        found, state = jax.jit(optimizer.update)(PARAMS, state, PARAMS)
        direction, state_alone = jax.jit(alone.update)(PARAMS, state_alone, PARAMS)
    jax.tree.map(
        lambda a, b, p: np.testing.assert_allclose(a, -0.1 * (b + 0.2 * p), rtol=1e-6),
        *(found, direction, PARAMS),  # pyright: ignore[reportPossiblyUnboundVariable]  # set above
    )


def test_every_other_argument_may_be_injected_in_one_program() -> None:
    names = soap_optax.SHAMPOO_STATIC_ARGS
    assert [name for name in SIGNATURES["shampoo"] if name in names] == list(names)
    static = {"grafting": "rmsprop", "refresh_order": "before_gradient", "stagger": True}
    traced = {**TRACED, "learning_rate": 0.1, "weight_decay": 0.2}
    optimizer = optax.inject_hyperparams(soap_optax.shampoo, static_args=names)(**traced, **static)
    state: Any = optimizer.init(PARAMS)
    assert state.hyperparams.keys() == traced.keys()
    assert set(names) | set(traced) == set(SIGNATURES["shampoo"])
    update = jax.jit(optimizer.update)
    plain = soap_optax.shampoo(**traced, **static)
    plain_state = plain.init(PARAMS)
    for _ in range(3):
        updates, state = update(PARAMS, state, PARAMS)
        wanted, plain_state = jax.jit(plain.update)(PARAMS, plain_state, PARAMS)
    np.testing.assert_allclose(updates["kernel"], wanted["kernel"], rtol=1e-4)  # pyright: ignore
    state.hyperparams["exponent"] = jnp.asarray(0.25, jnp.float32)
    update(PARAMS, state, PARAMS)
    assert update._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]  # jit has it


@pytest.mark.parametrize(
    ("argument", "value", "error", "rule"),
    [
        ("exponent", 0, ValueError, r"exponent must be in \(0, 1\], got 0; .* None means 1/\(2k\)"),
        ("exponent", 1.5, ValueError, r"exponent must be in \(0, 1\], got 1.5"),
        ("exponent", np.nan, ValueError, r"exponent must be in \(0, 1\], got nan"),
        ("exponent", 1e-50, ValueError, r"exponent must be in \(0, 1\], got 1e-50"),
        ("exponent", "1/4", TypeError, r"exponent must be None or a number in \(0, 1\], got '1/4'"),
        ("exponent", True, TypeError, "exponent must be None or a number"),
        ("eps", 0, ValueError, "eps must be positive .* pass 1e-12, the .* have no inverse root"),
        ("grafting_eps", 0, ValueError, "grafting_eps must be positive .* pass 1e-8, the default"),
        ("grafting", "ADAM", ValueError, "None or one of 'adam', 'rmsprop', 'sgd', got 'ADAM'"),
        ("grafting", True, TypeError, "grafting must be None or .*soap_optax.SHAMPOO_STATIC_ARGS"),
        ("b1", 1.0, ValueError, r"b1 must be in \[0, 1\)"),
        ("shampoo_beta", -0.1, ValueError, r"shampoo_beta must be in \[0, 1\)"),
        ("precondition_frequency", 0, ValueError, "precondition_frequency must be at least 1"),
        ("block_size", 20000, ValueError, r"block_size must be at most max_precond_dim \(10000\)"),
        ("refresh", "qr", ValueError, "refresh must be 'eigh' where factor_estimator is 'gram'"),
        ("refresh", "newton", ValueError, "refresh must be one of 'qr', "),
        ("factor_estimator", "KL", ValueError, "factor_estimator must be one of 'gram', 'kl', go"),
        ("refresh_order", None, TypeError, "refresh_order must be one of"),
        ("param_shardings", lambda _: None, ValueError, "must be None where stack_sharding is"),
        ("stack_sharding", "data", TypeError, "stack_sharding must be None or a NamedSharding"),
    ],
)
def test_a_bad_value_raises_when_built(
    argument: str, value: Any, error: type[Exception], rule: str
) -> None:
    with pytest.raises(error, match=rule):
        soap_optax.scale_by_shampoo(**{argument: value})
    with pytest.raises(error, match=rule):
        jax.eval_shape(lambda: soap_optax.shampoo(0.1, **{argument: value}) and 0)


def test_merge_dims_and_dimension_numbers_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="merge_dims must be False where dimension_numbers"):
        soap_optax.scale_by_shampoo(merge_dims=True, dimension_numbers=MuonDimensionNumbers())


def test_an_alias_only_argument_out_of_range_raises() -> None:
    with pytest.raises(ValueError, match="weight_decay must be finite and not negative"):
        soap_optax.shampoo(0.1, weight_decay=-1.0)


def test_a_placeholder_maps_no_parameter() -> None:
    optimizer = soap_optax.scale_by_shampoo()
    state = optimizer.init(PARAMS)
    mapped = optax.tree_map_params(optimizer, lambda leaf: leaf + 1, state)
    jax.tree.map(np.testing.assert_array_equal, mapped, state)


@pytest.mark.usefixtures("x64")
def test_paths_and_dtypes_of_the_state_read_well() -> None:
    state = soap_optax.scale_by_shampoo().init(PARAMS | {"wide": jnp.ones((3, 2), jnp.float64)})
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(state.stacks)  # pyright: ignore[reportAttributeAccessIssue]  # a tree
    ]
    names = ["accepted_gradients", "rejected_gradients", "factors/0", "factors/1", "mu", "nu"]
    names += ["roots/0", "roots/1", "age", "refreshes", "rejected_refreshes"]
    assert paths == [f"{shape}/{name}" for shape in ("3x2_float64", "4x3") for name in names]


def test_the_reference_lists_every_argument_with_its_default() -> None:
    page = pathlib.Path(__file__).parents[2] / "docs" / "reference.md"
    section = page.read_text().partition("## Options of shampoo\n")[2].partition("\n## ")[0]
    rows = [re.split(r"\s*\|\s*", row.strip("| ")) for row in re.findall("^\\| `.*", section, re.M)]
    soap = inspect.signature(soap_optax.soap).parameters
    different = {
        name: "required" if default is REQUIRED else f"`{default!r}`"
        for name, default in SIGNATURES["shampoo"].items()
        if name not in soap or soap[name].default != default
    }
    assert {row[0].strip("`"): row[1] for row in rows} == different
    static = [row[0].strip("`") for row in rows if row[3] == "static"]
    assert static == [name for name in different if name in soap_optax.SHAMPOO_STATIC_ARGS]
