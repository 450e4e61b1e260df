"""The programs that measure speed report correct numbers; nothing here asserts a time."""

import argparse
import csv
import os
import subprocess
import sys
from pathlib import Path

import contenders
import jax
import jax.numpy as jnp
import measure
import numpy as np
import pytest
import shapes
import speed
from compiling import operands_of
from helpers.cases import mostly_long, named
from shapes import MODELS, Model

ROOT = Path(__file__).parents[2]
ONE_MATRIX = shapes.of_matrices(lambda _: {"kernel": (24, 16), "bias": (16,)}, 1)


def test_the_floor_of_a_matrix_is_six_products() -> None:
    m, n = 24, 16
    assert contenders.floor_operations(ONE_MATRIX, shapes.params_of(ONE_MATRIX)) == (
        6 * m * n * (m + n)
    )


@pytest.mark.parametrize(
    "model", mostly_long(named({"one_matrix": ONE_MATRIX, **MODELS}), ["one_matrix", "tiny"])
)
def test_the_floor_computes_its_products_and_nothing_else(model: Model) -> None:
    lowered = contenders.floor(model).update.lower(
        *operands_of(contenders.floor(model), model, model.layers)
    )
    operations = contenders.floor_operations(model, shapes.params_of(model))
    # XLA counts in float32.
    assert lowered.cost_analysis()["flops"] == pytest.approx(operations, rel=1e-6)


@pytest.mark.parametrize("name", mostly_long(MODELS, ["tiny"]))
def test_the_floor_has_the_blocks_of_soap(name: str) -> None:
    params = shapes.params_of(MODELS[name])
    state = jax.eval_shape(contenders.soap(MODELS[name]).init, params)
    stacks = jax.eval_shape(contenders.floor(MODELS[name]).prepare, params)
    assert {name: stack.mu.shape for name, stack in contenders.soap_stacks(state).items()} == {
        name: stack.shape for name, stack in stacks.items()
    }


@pytest.mark.long
@pytest.mark.usefixtures("implicit_promotion")
@pytest.mark.parametrize("name", ["tiny", "gpt2", "resnet50"])
def test_every_optimizer_takes_every_model(name: str) -> None:
    model = MODELS[name]
    optimizers = contenders.contenders_of(
        model, [name for name in contenders.NAMES if name != "floor"], {}
    )
    params = shapes.params_of(model, 1)
    for optimizer in optimizers.values():
        updates, _ = jax.eval_shape(optimizer.update, *operands_of(optimizer, model, 1))
        assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)


@pytest.mark.long
@pytest.mark.parametrize("name", ["soap", "textbook", "shampoo", "kl_shampoo"])
def test_plain_steps_refresh_nothing_and_refresh_steps_everything(name: str) -> None:
    model = ONE_MATRIX
    contender = contenders.contenders_of(model, [name], {})[name]
    draw = measure.gradients_of(shapes.params_of(model))
    runner = measure.Runner(name, contender, draw(0))
    runner.warm_up(draw(1))
    bases = bases_of(runner.state)
    runner.time(draw(2), "plain")
    assert np.array_equal(bases_of(runner.state), bases)
    runner.time(draw(3), "refresh")
    assert not np.isclose(bases_of(runner.state), bases).all(axis=(-2, -1)).any()


def bases_of(state: object) -> np.ndarray:
    """The larger basis of the one matrix, or its root."""
    paths = jax.tree_util.tree_leaves_with_path(state)
    names = (".bases[0]", ".roots[0]")
    found = [leaf for path, leaf in paths if jax.tree_util.keystr(path).endswith(names)]
    (basis,) = found
    return np.array(basis)  # A copy: the state is donated.


@pytest.mark.long
def test_a_plain_step_that_refreshes_is_an_error() -> None:
    contender = contenders.soap(ONE_MATRIX)
    draw = measure.gradients_of(shapes.params_of(ONE_MATRIX))
    runner = measure.Runner("soap", contender, draw(0))
    # Without a warm-up the second step computes the first bases, so that it is no plain step.
    runner.time(draw(1), "plain")
    with pytest.raises(RuntimeError, match="soap: a plain step refreshed"):
        runner.time(draw(2), "plain")


@pytest.mark.parametrize("name", ["tiny", "tiny_moe"])
def test_the_blocks_of_a_leaf_come_back_in_their_places(name: str) -> None:
    for shape in jax.tree.leaves(shapes.params_of(MODELS[name])):
        leaf = jnp.asarray(np.arange(np.prod(shape.shape)).reshape(shape.shape))
        blocks = contenders.split_leaf(leaf, MODELS[name].blocks(leaf.shape))
        assert jnp.array_equal(contenders.join_leaf(leaf, blocks), leaf)


def test_averages_are_of_plain_steps_and_one_refresh() -> None:
    samples = [
        measure.Sample("floor", "plain", 0, 2.0),
        measure.Sample("floor", "plain", 1, 4.0),
        measure.Sample("soap", "plain", 1, 8.0),  # In round 1 the machine was half as fast.
        measure.Sample("soap", "plain", 0, 4.0),
        measure.Sample("soap", "refresh", 0, 24.0),
        measure.Sample("soap", "refresh", 1, 48.0),
    ]
    floor, soap = measure.summarize(samples)
    assert soap.plain_ratio == measure.Spread(2.0, 2.0, 2.0)
    assert soap.refresh_ratio == measure.Spread(12.0, 12.0, 12.0)
    assert {frequency: spread.median for frequency, spread in soap.averages.items()} == {
        1: 12.0,
        2: 7.0,
        5: 4.0,
        10: 3.0,
        100: 2.1,
    }
    assert floor.refresh is None


def test_a_variant_of_soap_is_read_from_its_options() -> None:
    text = "tiles:block_size=256,mu_dtype=bfloat16,normalize_grads=True"
    assert speed.soap_variant(text) == (
        "tiles",
        {"block_size": 256, "mu_dtype": "bfloat16", "normalize_grads": True},
    )


@pytest.mark.parametrize("text", ["soap:block_size=2", ":block_size=2", "tiles:block_size"])
def test_a_variant_that_cannot_be_read_is_an_error(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="name:option=value"):
        speed.soap_variant(text)


# The whole program --------------------------------------------------------------------------------

COLUMNS = {
    "steps": ["model", "layers", "contender", "kind", "round", "seconds", "floors"],
    "cycles": ["model", "layers", "contender", "step", "seconds", "refreshed"],
    "compile": ["model", "contender", "layers", "trace_seconds", "compile_seconds"],
    "memory": [
        *("model", "contender", "layers", "state", "state_per_parameter"),
        *("temporaries", "in_use", "largest_stack"),
    ],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the standard output of a run with the smallest settings."""
    out = tmp_path_factory.mktemp("speed") / "made" / "here"
    arguments = ["--models", "tiny", "--layers", "1", "--rounds", "2", "--depths", "1"]
    arguments += ["--frequency", "3"]
    arguments += ["--contenders", "floor", "adamw"]
    arguments += ["--soap", "tiles:block_size=8", "--what", *COLUMNS, "--out", str(out)]
    process = subprocess.run(
        [sys.executable, "-W", "error", speed.__file__, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert process.returncode == 0, process.stderr
    return out, process.stdout


@pytest.mark.long
@pytest.mark.parametrize("what", COLUMNS)
def test_a_run_writes_its_numbers_as_csv(run: tuple[Path, str], what: str) -> None:
    with (run[0] / f"{what}.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == COLUMNS[what]
    expected = {"steps": (1 + 1 + 2) * 2, "cycles": 2 * 3, "compile": 3, "memory": 3}
    assert len(rows) == expected[what]


@pytest.mark.long
@pytest.mark.parametrize(("stagger", "most"), [(False, 4), (True, 1)])
def test_every_step_of_a_cycle_is_timed_with_what_it_refreshed(stagger: bool, most: int) -> None:
    model = shapes.of_matrices(lambda layers: {str(n): (24, 16) for n in range(layers)}, 4)
    variant = contenders.contenders_of(model, [], {"soap": {"stagger": stagger}})
    steps = list(measure.cycles_of(model, 4, variant, frequency=5, cycles=2))
    assert [step.step for step in steps] == list(range(10))
    refreshed = [step.refreshed for step in steps]
    assert refreshed[:5] == refreshed[5:]
    assert sum(refreshed[:5]) == 4
    assert max(refreshed) == most


@pytest.mark.long
@pytest.mark.parametrize("what", ["steps", "compile"])
def test_a_run_draws_pictures(run: tuple[Path, str], what: str) -> None:
    assert (run[0] / f"{what}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.long
def test_a_run_prints_where_and_how_it_was_measured(run: tuple[Path, str]) -> None:
    for text in (
        "device: ",
        "JAX ",
        "speed.py --models tiny",
        "OPENBLAS_NUM_THREADS=",
        "| tiles |",
    ):
        assert text in run[1]
