"""`soap_adamw`: the partition of SOAP and AdamW, what it decides, and how to override it."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers.cases import mostly_long
from helpers.models import TREES, D
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers

import soap_optax
from soap_optax import (
    Description,
    default_dimension_numbers,
    default_labels,
    partitioned,
    soap_adamw,
    thinning_frequency,
)

RATE = 1e-2
STEPS = 4
# Attention's kernel is square as a matrix, so that the first basis does not depend on rounding.
SHAPES = {
    "wte": {"embedding": (9, 8)},
    "attention": {"query": {"kernel": (8, 2, 4), "bias": (2, 4)}},
    "mlp": {"kernel": (8, 8), "bias": (8,)},
}
OF_SOAP = {"attention/query/kernel", "mlp/kernel"}


def draw(seed: int, shapes: Any = SHAPES) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


PARAMS = draw(0)
GRADS = [draw(seed) for seed in range(1, STEPS + 1)]


def run(
    optimizer: optax.GradientTransformation, grads: list[Any] = GRADS, params: Any = PARAMS
) -> tuple[list[Any], Any]:
    """The updates of all steps, with parameters that stay, and the last state."""
    update = jax.jit(optax.with_extra_args_support(optimizer).update)
    state, history = optimizer.init(params), []
    for grad in grads:
        updates, state = update(grad, state, params)
        history.append(updates)
    return history, state


@functools.cache
def default_run() -> tuple[list[Any], Any]:
    return run(soap_adamw(RATE))


def soap_of(state: Any) -> Any:
    return state.inner_states["soap"].inner_state[0]


def adam_of(state: Any) -> Any:
    return state.inner_states["adamw"].inner_state[0]


def by_hand(**options: Any) -> optax.GradientTransformationExtraArgs:
    """What `soap_adamw` stands for."""
    soap = soap_optax.soap(
        RATE,
        precondition_frequency=thinning_frequency(20, 10),
        refresh_order="after_gradient",
        dimension_numbers=default_dimension_numbers,
    )
    adamw = optax.adamw(RATE, b1=0.9, b2=0.95, weight_decay=0.01)
    return optax.partition({"soap": soap, "adamw": adamw, **options}, default_labels)


# Arguments --------------------------------------------------------------------------------------

SOAP = inspect.signature(soap_optax.soap).parameters
SOAP_ADAMW = inspect.signature(soap_adamw).parameters
OTHER_DEFAULTS = {"precondition_frequency": None, "refresh_order": "after_gradient"}


def test_it_has_all_options_of_soap_with_the_same_defaults_but_for_refreshes() -> None:
    assert SOAP.keys() <= SOAP_ADAMW.keys()
    for name, parameter in SOAP.items():
        assert SOAP_ADAMW[name].default == OTHER_DEFAULTS.get(name, parameter.default), name
    own = [name for name in SOAP_ADAMW if name not in SOAP]
    assert own[:3] == ["adamw_learning_rate", "adamw_b1", "adamw_b2"]
    assert own[3:] == ["labels", "report", "max_norm_ratio"]
    first, *others = SOAP_ADAMW.values()
    assert first.name == "learning_rate"
    assert {parameter.kind for parameter in others} == {inspect.Parameter.KEYWORD_ONLY}


def test_it_hands_every_option_on_to_soap(monkeypatch: pytest.MonkeyPatch) -> None:
    handed_on: list[dict[str, Any]] = []

    def record(learning_rate: Any, **options: Any) -> optax.GradientTransformation:
        handed_on.append({"learning_rate": learning_rate, **options})
        return optax.identity()

    monkeypatch.setattr(partitioned, "soap", record)
    monkeypatch.setattr(partitioned, "scale_by_guarded_adam", lambda *_: optax.identity())
    # No option is computed with on the way, so that any object serves as its value.
    wanted: dict[str, Any] = {name: object() for name in SOAP}
    numbers = {"mlp": MuonDimensionNumbers(), "wte": None, "attention": None}
    wanted |= {"dimension_numbers": numbers, "learning_rate": RATE}
    wanted |= {"weight_decay": 0.1, "mask": None}  # Of AdamW as well, which checks them.
    soap_adamw(**wanted).init(PARAMS)
    assert handed_on == [wanted] * 2  # When built, and by `init`.


def test_a_misspelt_option_is_refused() -> None:
    misspelt: Any = {"blok_size": 8}
    with pytest.raises(TypeError, match="blok_size"):
        soap_adamw(RATE, **misspelt)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"adamw_learning_rate": "3e-3"}, TypeError, "adamw_learning_rate must be a number or a"),
        ({"adamw_learning_rate": np.nan}, ValueError, "adamw_learning_rate must be finite"),
        ({"adamw_b1": 1.0}, ValueError, "adamw_b1 must be in"),
        ({"adamw_b2": None}, TypeError, "adamw_b2 must be a number"),
        ({"labels": "soap"}, TypeError, "labels must be None, a tree of 'soap' and 'adamw'"),
        ({"report": True}, TypeError, "report must be None or a function of a Description"),
        ({"merge_dims": True}, ValueError, "merge_dims must be False where default_dimension"),
        ({"precondition_1d": True}, ValueError, "precondition_1d must be False where default_"),
        ({"block_size": 1}, ValueError, "block_size must be at least 2"),
        ({"precondition_frequency": 0}, ValueError, "precondition_frequency must be at least 1"),
        ({"b2": 1.0}, ValueError, "b2 must be in"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay must be finite"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments_raise_when_built(
    options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        soap_adamw(RATE, **options)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"labels": lambda _: "muon"}, ValueError, r"got 'muon' at \['attention'\].*partition"),
        ({"labels": {"wte": "soap"}}, ValueError, r"labels must be a tree .* got no entry for"),
        ({"labels": lambda _: None}, ValueError, r"'soap' or 'adamw', got None at"),
        ({"dimension_numbers": {"mlp": None}}, ValueError, "dimension_numbers must be a tree"),
    ],
)
def test_labels_and_numbers_that_do_not_fit_raise_at_init(
    options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        soap_adamw(RATE, **options).init(PARAMS)


@pytest.mark.parametrize("name", ["wte", "mlp"])
def test_an_integer_parameter_raises_at_init_whoever_would_update_it(name: str) -> None:
    params = {**PARAMS, name: {"kernel": jnp.ones((4, 3), jnp.int32)}}
    with pytest.raises(TypeError, match=rf"complex array, got int32 at \['{name}'\]"):
        soap_adamw(RATE).init(params)


@pytest.mark.long
@pytest.mark.usefixtures("implicit_promotion")
def test_complex_parameters_count_as_two_real_ones_in_either_optimizer() -> None:
    rng = np.random.default_rng(0)
    shapes: Any = {"mlp": {"kernel": (6, 4), "bias": (4,)}, "lm_head": {"kernel": (4, 5)}}

    def draw_complex() -> Any:
        real, imaginary = (draw(int(seed), shapes) for seed in rng.integers(99, size=2))
        return jax.tree.map(jax.lax.complex, real, imaginary)

    def pairs(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: {"re": leaf.real, "im": leaf.imag}, tree)

    params = draw_complex()
    optimizer: Any = soap_adamw(RATE, mu_dtype=jnp.bfloat16)
    state, state_of_pairs = optimizer.init(params), optimizer.init(pairs(params))
    for _ in range(3):
        grads = draw_complex()
        updates, state = optimizer.update(grads, state, params)
        wanted, state_of_pairs = optimizer.update(pairs(grads), state_of_pairs, pairs(params))
        # Parts of a pair may be stacked in another sequence, and round as the compiler pleases.
        chex.assert_trees_all_close(pairs(updates), wanted, rtol=1e-5)
    described = soap_optax.describe(params, labels=soap_optax.default_labels, mu_dtype=jnp.bfloat16)
    assert [row.optimizer for row in described.rows] == ["adamw"] * 4 + ["soap"] * 2
    assert described.state_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(state))


# What it is -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("implicit_promotion")
def test_it_is_the_partition_of_soap_and_adamw() -> None:
    history, state = default_run()
    wanted, wanted_state = run(by_hand())
    assert jax.tree.structure(state) == jax.tree.structure(wanted_state)
    # Two programs, which may round differently: updates are of the size of the learning rate.
    for updates, expected in zip([*history, state], [*wanted, wanted_state], strict=True):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), updates, expected
        )
    assert list(soap_of(state).stacks) == ["8x8"]
    assert not soap_of(state).adam
    assert [leaf.shape for leaf in jax.tree.leaves(adam_of(state).mu)] == [(2, 4), (8,), (9, 8)]


@pytest.mark.usefixtures("implicit_promotion")
def test_adamw_may_have_a_learning_rate_and_decays_of_its_own() -> None:
    schedule = optax.linear_schedule(0.1, 0.0, STEPS)
    own = {"adamw_learning_rate": schedule, "adamw_b1": 0.8, "adamw_b2": 0.7}
    history, _ = run(soap_adamw(RATE, **own))
    adamw = optax.adamw(schedule, b1=0.8, b2=0.7, weight_decay=0.01)
    wanted, _ = run(optax.masked(adamw, {"wte": True, "attention": False, "mlp": False}))
    plain, _ = default_run()
    for updates, expected, others in zip(history, wanted, plain, strict=True):
        # Two programs each, which may round differently.
        for found, said in (
            (updates["wte"]["embedding"], expected["wte"]["embedding"]),
            (updates["mlp"]["kernel"], others["mlp"]["kernel"]),
        ):
            np.testing.assert_allclose(found, said, rtol=1e-4, atol=1e-6)
    assert not np.allclose(history[0]["wte"]["embedding"], plain[0]["wte"]["embedding"])


@pytest.mark.long
@pytest.mark.usefixtures("implicit_promotion")
def test_a_schedule_and_a_mask_are_those_of_both() -> None:
    schedule = optax.linear_schedule(RATE, 0.0, STEPS)

    def mask(params: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    prefix = {"wte": True, "attention": {"query": True}, "mlp": False}
    for given in (mask, prefix):
        optimizer = soap_adamw(schedule, mask=given, weight_decay=0.5)
        updates, _ = jax.jit(optimizer.update)(
            jax.tree.map(jnp.zeros_like, PARAMS), optimizer.init(PARAMS), PARAMS
        )
        decayed = -0.5 * RATE * PARAMS["wte"]["embedding"]
        np.testing.assert_allclose(updates["wte"]["embedding"], decayed, rtol=1e-5)
        np.testing.assert_array_equal(updates["mlp"]["bias"], 0)
        is_decayed = bool(np.any(updates["mlp"]["kernel"]))
        assert is_decayed == (given is mask)


# Overrides --------------------------------------------------------------------------------------


def stacks_and_moments(params: Any = PARAMS, **options: Any) -> tuple[list[str], int]:
    """The block shapes of SOAP, and the number of AdamW's parameters."""
    state = jax.eval_shape(soap_adamw(RATE, **options).init, params)
    return sorted(soap_of(state).stacks), len(jax.tree.leaves(adam_of(state).mu))


def test_labels_may_be_a_function_a_tree_or_a_prefix() -> None:
    assert stacks_and_moments() == (["8x8"], 3)

    def all_matrices(params: Any) -> Any:
        return jax.tree.map(lambda leaf: "soap" if leaf.ndim > 1 else "adamw", params)

    for labels in (all_matrices, all_matrices(PARAMS)):
        # The bias of attention has two axes, and no matrix in them.
        assert stacks_and_moments(labels=labels) == (["8x8", "9x8"], 1)
    prefix = {"wte": "soap", "attention": "adamw", "mlp": "adamw"}
    assert stacks_and_moments(labels=prefix) == (["9x8"], 4)
    assert stacks_and_moments(labels=lambda _: "adamw") == ([], 5)
    assert stacks_and_moments(labels=lambda _: "soap") == (["8x8", "9x8"], 0)


def test_dimension_numbers_may_be_a_function_a_tree_or_none_of_them() -> None:
    heads = MuonDimensionNumbers(-3, -1)  # Each head by itself.
    tree = {"wte": None, "attention": heads, "mlp": MuonDimensionNumbers()}
    assert stacks_and_moments(dimension_numbers=tree) == (["8x4", "8x8"], 3)

    def function(params: Any) -> Any:
        assert len(jax.tree.leaves(params)) == 5  # The whole tree, not only SOAP's part.
        return tree

    assert stacks_and_moments(dimension_numbers=function) == (["8x4", "8x8"], 3)
    assert stacks_and_moments(dimension_numbers=lambda _: None) == (["8x2x4", "8x8"], 3)
    merged = stacks_and_moments(dimension_numbers=lambda _: None, merge_dims=True)
    assert merged == (["64"], 3)


@pytest.mark.long
@pytest.mark.usefixtures("implicit_promotion")
def test_refreshes_may_be_those_of_soap() -> None:
    _, state = run(soap_adamw(RATE, precondition_frequency=50, refresh_order="before_gradient"))
    _, default = default_run()
    assert soap_of(state).stacks["8x8"].refreshes.tolist() == [1, 1]  # The first bases.
    # With the first gradient in them, first bases are not refreshed in the second call again.
    assert soap_of(default).stacks["8x8"].refreshes.tolist() == [STEPS - 1] * 2


# The report -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("implicit_promotion")
def test_init_reports_what_each_parameter_gets_and_update_does_not() -> None:
    reports: list[Description] = []
    options: dict[str, Any] = {"block_size": 4, "mu_dtype": jnp.bfloat16}
    optimizer = soap_adamw(RATE, report=reports.append, **options)
    state = jax.eval_shape(optimizer.init, PARAMS)  # It also reports if it is traced.
    jax.eval_shape(optimizer.update, GRADS[0], state, PARAMS)
    assert reports == [soap_optax.describe(PARAMS, labels=default_labels, **options)]
    assert {row.path for row in reports[0].rows if row.optimizer == "soap"} == OF_SOAP
    allocated = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert reports[0].state_bytes == allocated


def test_overrides_are_in_the_report() -> None:
    reports: list[Description] = []
    optimizer = soap_adamw(
        RATE, report=reports.append, labels=lambda _: "soap", dimension_numbers=lambda _: None
    )
    jax.eval_shape(optimizer.init, PARAMS)
    rows = {row.path: (row.optimizer, row.blocks) for row in reports[0].rows}
    assert rows["wte/embedding"] == ("soap", "1 x 9x8")
    assert rows["attention/query/kernel"] == ("soap", "1 x 8x2x4")
    assert rows["mlp/bias"] == ("soap", "Adam")


def test_print_reports_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    jax.eval_shape(soap_adamw(RATE).init, PARAMS)
    assert capsys.readouterr().out == ""
    jax.eval_shape(soap_adamw(RATE, report=print).init, PARAMS)
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["parameter", "optimizer", "shape"]
    assert len(rows) == len(jax.tree.leaves(PARAMS)) + 2


# Safeguards -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("implicit_promotion")
def test_a_gradient_that_is_not_finite_changes_no_moment_and_only_decays() -> None:
    optimizer = soap_adamw(RATE, weight_decay=0.1)
    update = jax.jit(optimizer.update)
    _, state = update(GRADS[0], optimizer.init(PARAMS), PARAMS)
    for value in (np.nan, np.inf, -np.inf, 1e30):
        embedding = GRADS[1]["wte"]["embedding"].at[0, 0].set(value)
        updates, after = update({**GRADS[1], "wte": {"embedding": embedding}}, state, PARAMS)
        jax.tree.map(np.testing.assert_array_equal, adam_of(after), adam_of(state))
        for found, param in (
            (updates["wte"]["embedding"], PARAMS["wte"]["embedding"]),
            (updates["mlp"]["bias"], PARAMS["mlp"]["bias"]),
        ):
            np.testing.assert_allclose(found, -RATE * 0.1 * param, rtol=1e-5)
        # SOAP's blocks had sound gradients. The difference of the counts is that of rejections.
        assert soap_of(after).stacks["8x8"].rejected_gradients.tolist() == [0, 0]
        assert int(soap_of(after).count) == int(adam_of(after).count) + 1


@pytest.mark.usefixtures("implicit_promotion")
def test_narrow_parameters_have_float32_statistics_and_narrow_updates() -> None:
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    for mu_dtype, wanted in ((None, jnp.float32), (jnp.bfloat16, jnp.bfloat16)):
        optimizer = soap_adamw(RATE, mu_dtype=mu_dtype)
        state = jax.eval_shape(optimizer.init, narrow)
        updates, after = jax.eval_shape(optimizer.update, narrow, state, narrow)
        assert {leaf.dtype for leaf in jax.tree.leaves(adam_of(state).nu)} == {jnp.dtype("f4")}
        assert {leaf.dtype for leaf in jax.tree.leaves(adam_of(state).mu)} == {jnp.dtype(wanted)}
        assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
        assert after == state


@pytest.mark.usefixtures("implicit_promotion", "x64")
def test_float64_parameters_have_float64_statistics() -> None:
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), PARAMS)
    optimizer = soap_adamw(RATE)
    state = jax.eval_shape(optimizer.init, wide)
    assert {leaf.dtype for leaf in jax.tree.leaves(adam_of(state).nu)} == {jnp.dtype("f8")}
    assert list(soap_of(state).stacks) == ["8x8_float64"]
    assert jax.eval_shape(optimizer.update, wide, state, wide)[1] == state


# Wrappers ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("implicit_promotion")
def test_defaults_need_no_static_arguments_and_numbers_may_be_injected() -> None:
    optimizer = optax.inject_hyperparams(soap_adamw)(learning_rate=RATE)
    state: Any = optimizer.init(PARAMS)
    assert set(state.hyperparams) == {
        *("learning_rate", "adamw_b1", "adamw_b2", "b1", "b2", "eps", "weight_decay")
    }
    plain, _ = run(soap_adamw(RATE, weight_decay=0.0))
    update = jax.jit(optimizer.update)
    state.hyperparams["weight_decay"] = jnp.zeros_like(state.hyperparams["weight_decay"])
    for grad, factor, wanted in zip(GRADS, (1.0, 0.5, 0.0, 2.0), plain, strict=True):
        rate = jnp.full_like(state.hyperparams["learning_rate"], factor * RATE)
        state.hyperparams["learning_rate"] = rate
        updates, state = update(grad, state, PARAMS)
        jax.tree.map(
            lambda a, b, by=factor: np.testing.assert_allclose(a, by * b, rtol=1e-4, atol=1e-7),
            updates,
            wanted,
        )


@pytest.mark.usefixtures("implicit_promotion")
def test_static_arguments_are_those_of_soap_and_two_more() -> None:
    static = soap_optax.SOAP_ADAMW_STATIC_ARGS
    assert static == (*soap_optax.STATIC_ARGS, "labels", "report")
    reports: list[Description] = []
    optimizer = optax.inject_hyperparams(soap_adamw, static_args=static)(
        learning_rate=optax.constant_schedule(RATE),
        labels=default_labels,
        dimension_numbers=default_dimension_numbers,
        block_size=4,
        mu_dtype=jnp.bfloat16,
        report=reports.append,
    )
    state: Any = jax.eval_shape(optimizer.init, PARAMS)
    assert list(soap_of(state.inner_state).stacks) == ["4x4"]
    assert len(reports) == 1


def test_labels_that_inject_hyperparams_took_for_a_schedule_raise() -> None:
    optimizer = optax.inject_hyperparams(soap_adamw)(learning_rate=RATE, labels=default_labels)
    with pytest.raises(TypeError, match=r"labels must be None.*soap_optax.SOAP_ADAMW_STATIC_ARGS"):
        optimizer.init(PARAMS)


def test_an_injected_report_gets_a_description_and_never_a_number(
    capsys: pytest.CaptureFixture[str],
) -> None:
    static = soap_optax.SOAP_ADAMW_STATIC_ARGS
    factory = optax.inject_hyperparams(soap_adamw, static_args=static)
    jax.eval_shape(factory(learning_rate=RATE, report=print).init, PARAMS)
    assert capsys.readouterr().out.startswith("parameter")
    # A function that returns a number, called as a schedule, is an error.
    optimizer = optax.inject_hyperparams(soap_adamw)(learning_rate=RATE, report=lambda count: count)
    with pytest.raises(TypeError, match=r"report must be None.*soap_optax.SOAP_ADAMW_STATIC_ARGS"):
        optimizer.init(PARAMS)


@pytest.mark.long
@pytest.mark.usefixtures("implicit_promotion")
def test_multi_steps_accumulate_for_both() -> None:
    optimizer = optax.MultiSteps(soap_adamw(RATE), every_k_schedule=2)
    history, _ = run(optimizer.gradient_transformation())
    means = [jax.tree.map(lambda a, b: (a + b) / 2, *GRADS[first : first + 2]) for first in (0, 2)]
    wanted, _ = run(soap_adamw(RATE), means)
    for updates, expected in zip(history[1::2], wanted, strict=True):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), updates, expected
        )


@pytest.mark.usefixtures("implicit_promotion")
def test_it_works_under_a_mask_on_trees_without_leaves_and_in_tree_map_params() -> None:
    masked = optax.masked(soap_adamw(RATE), {"wte": False, "attention": True, "mlp": True})
    state: Any = jax.eval_shape(masked.init, PARAMS)
    shapes = jax.eval_shape(masked.update, PARAMS, state, PARAMS)
    assert jax.tree.structure(shapes) == jax.tree.structure((PARAMS, state))
    optimizer = soap_adamw(RATE)
    for empty in ({}, {"none": None, "empty": ()}):
        assert optimizer.update(empty, optimizer.init(empty), empty)[0] == empty
    state = optimizer.init(PARAMS)
    mapped: Any = optax.tree_map_params(optimizer, lambda leaf: leaf + 1, state)
    assert float(adam_of(mapped).mu["mlp"]["bias"][0]) == 1  # Adam's moments mirror parameters.
    jax.tree.map(np.testing.assert_array_equal, soap_of(mapped), soap_of(state))


@pytest.mark.long
@pytest.mark.usefixtures("implicit_promotion")
def test_it_compiles_once_and_runs_in_a_scan() -> None:
    optimizer = soap_adamw(RATE)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *GRADS)

    @jax.jit
    def scan(state: Any) -> Any:
        def step(state: Any, grad: Any) -> Any:
            updates, state = optimizer.update(grad, state, PARAMS)
            return state, updates

        return jax.lax.scan(step, state, stacked)[1]

    history, _ = run(optimizer)
    jax.tree.map(
        lambda found, *wanted: np.testing.assert_allclose(
            found, jnp.stack(wanted), rtol=1e-4, atol=1e-6
        ),
        scan(optimizer.init(PARAMS)),
        *history,
    )


# Models -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("implicit_promotion")
@pytest.mark.parametrize(
    "name",
    mostly_long(TREES, ["Linen mixture of experts, scanned"]),
)
def test_gradients_of_a_model_get_what_its_parameters_got(name: str) -> None:
    params = TREES[name]()
    reports: list[Description] = []
    optimizer = soap_adamw(RATE, report=reports.append)
    state = jax.eval_shape(optimizer.init, params)
    updates, after = jax.eval_shape(optimizer.update, params, state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert jax.tree.leaves(after) == jax.tree.leaves(state)
    allocated = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert reports[0].state_bytes == allocated
    blocks = {row.path: row.blocks for row in reports[0].rows if row.optimizer == "soap"}
    assert all(count.split()[1] == "x" for count in blocks.values())  # None is left to Adam.


@pytest.mark.usefixtures("implicit_promotion")
def test_an_nnx_optimizer_trains_a_stack_with_metadata() -> None:
    """`nnx.Optimizer` passes metadata to `init`, and none to `update`."""

    class Layer(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("embed", "embed2"))
            self.linear = nnx.Linear(D, D, kernel_init=init, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return x + jnp.tanh(self.linear(x))

    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            metadata = {nnx.PARTITION_NAME: "layers"}
            vmap = nnx.vmap(in_axes=0, out_axes=0, transform_metadata=metadata)
            self.layers = nnx.split_rngs(splits=3)(vmap(Layer))(rngs)
            self.head = nnx.Linear(D, 2, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            scan = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            return self.head(scan(x, self.layers))

    kinds = (AxisType.Auto,) * 3
    with jax.set_mesh(jax.make_mesh((1, 1, 1), ("layers", "embed", "embed2"), axis_types=kinds)):
        model = Model(nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, soap_adamw(3e-2), wrt=nnx.Param)
        x = jnp.linspace(-1, 1, 6 * D).reshape(6, D)

        @nnx.jit
        def step(model: Model, optimizer: nnx.Optimizer) -> jax.Array:
            loss, grads = nnx.value_and_grad(lambda model: jnp.mean((model(x) - x[:, :2]) ** 2))(
                model
            )
            optimizer.update(model, grads)
            return loss

        losses = [float(step(model, optimizer)) for _ in range(15)]
    assert losses[-1] < losses[0] / 2
    state: Any = nnx.to_pure_dict(nnx.state(optimizer))
    assert optax.tree.get(state, "stacks")["8x8"]["mu"].shape == (3, D, D)


# Meshes -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("implicit_promotion")
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(AxisType.Auto, id="auto", marks=pytest.mark.long),
        pytest.param(AxisType.Explicit, id="explicit"),
    ],
)
def test_on_a_mesh_soap_s_state_is_sharded_and_adamw_s_like_its_parameters(kind: AxisType) -> None:
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    stacks = NamedSharding(mesh, PartitionSpec(("data", "model")))
    rows = NamedSharding(mesh, PartitionSpec(None, "model"))
    replicated = NamedSharding(mesh, PartitionSpec())

    def shard(tree: Any) -> Any:
        return jax.tree.map(
            lambda leaf: jax.device_put(leaf, rows if leaf.shape == (9, 8) else replicated), tree
        )

    optimizer = soap_adamw(RATE, stack_sharding=stacks, param_shardings=None)
    update: Callable[..., Any] = jax.jit(optimizer.update)
    params = shard(PARAMS)
    state = jax.jit(optimizer.init)(params)
    shardings = soap_optax.state_shardings(jax.eval_shape(optimizer.init, params), stacks, params)
    state = jax.device_put(state, shardings)
    assert adam_of(shardings).mu["wte"]["embedding"].spec == rows.spec
    assert soap_of(shardings).stacks["8x8"].mu.spec[0] == ("data", "model")
    wanted, _ = default_run()
    for grad, expected in zip(GRADS, wanted, strict=True):
        updates, state = update(shard(grad), state, params)
        # Eight devices add in another order; updates are of the size of the learning rate.
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(
                jax.device_get(a), b, rtol=1e-3, atol=1e-2 * RATE
            ),
            updates,
            expected,
        )
    assert soap_of(state).stacks["8x8"].mu.sharding.spec[0] == ("data", "model")
