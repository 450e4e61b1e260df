"""The program that measures training runs reports correct numbers."""

import argparse
import contextlib
import csv
import io
import math
import os
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import variants
from variants import read_variant

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Warnings of other packages at import are not under test.
    import quality
    import quality_results
    import training
from quality_results import Run
from training import Evaluation

# Variants as a command line names them ------------------------------------------------------------


def test_a_comma_in_brackets_does_not_end_an_option() -> None:
    variant = read_variant("a:precondition_frequency=thinning(20, 10),block_size=32", ["adamw"])
    assert variant.name == "a"
    assert variant.text == "block_size=32,precondition_frequency=thinning(20,10)"
    assert variant.options["block_size"] == 32


@pytest.mark.parametrize(
    ("text", "intervals"),
    [("thinning(20,4)", [1, 1, 2, 4, 4]), ("thinning(20)", [1, 1, 2, 5, 10])],
)
def test_thinning_is_a_schedule_of_frequencies(text: str, intervals: list[int]) -> None:
    schedule = variants.value_of(text)
    assert [int(schedule(count)) for count in (0, 20, 40, 100, 1000)] == intervals


def test_a_name_alone_means_defaults() -> None:
    variant = read_variant("soap", ["adamw"])
    assert (variant.name, dict(variant.options), variant.text) == ("soap", {}, "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adamw", "a name other than adamw"),
        (":refresh=eigh", "name:option=value"),
        ("a:refresh", "name:option=value"),
        ("a:precondition_frequency=thinning(0,3)", "dense must be at least 1"),
        ("a:precondition_frequency=thinning()", "missing 1 required"),
    ],
)
def test_an_unreadable_variant_is_an_error(text: str, message: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        read_variant(text, ["adamw"])


# A run --------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("name", ["soap", "adamw"])
def test_an_optimizer_is_that_of_the_example(name: str) -> None:
    import pretrain_lm

    steps, rate = 20, 0.1
    flags: Any = SimpleNamespace(steps=steps, precondition_frequency=10, max_precond_dim=10000)
    flags.stack_multiple = None
    nowhere: Any = SimpleNamespace(stacks=None, of_params=None)
    theirs = pretrain_lm.make_optimizer(name, rate, flags, nowhere)
    ours = {
        "soap": lambda: training.soap(rate, steps, {}),
        "adamw": lambda: training.adamw(rate, steps),
    }[name]()
    params = {"kernel": jnp.arange(6.0).reshape(3, 2), "bias": jnp.ones(2)}
    results = []
    for optimizer in (ours, theirs):
        state, update = optimizer.init(params), jax.jit(optimizer.update)
        for factor in (1.0, -3.0, 2.0, 5.0):
            grads = jax.tree.map(lambda leaf, factor=factor: factor * jnp.cos(leaf), params)
            updates, state = update(grads, state, params)
            results.append(updates)
    half = len(results) // 2
    assert jax.tree.all(jax.tree.map(np.array_equal, results[:half], results[half:]))
    assert jnp.any(results[-1]["kernel"] != 0)


@pytest.mark.parametrize("steps", [1, 6, 20, 610])
def test_a_run_is_evaluated_at_its_ends_and_at_about_twenty_steps(steps: int) -> None:
    evaluated = training.evaluated_steps(steps)
    assert (evaluated[0], evaluated[-1]) == (0, steps)
    assert len(evaluated) - 1 <= min(steps, training.EVALUATIONS + 1)


def test_nothing_is_measured_more_often_just_after_a_refresh_than_just_before() -> None:
    places = [training.place_of(number, 30) for number in range(20)]
    assert {1 <= place <= 30 for place in places} == {True}
    phases = np.bincount(np.mod(places, 10), minlength=10)
    assert np.all((phases >= 1) & (phases <= 3))


def test_a_run_waits_at_least_every_fifty_steps() -> None:
    assert training.stretches(10, 75, 140) == [10, 60, 75, 110, 140]


# Summaries ----------------------------------------------------------------------------------------


def run_with(
    variant: str, seed: int, losses: list[float], seconds: float = 1.0, **last: float
) -> Run:
    rows = [
        Evaluation(step, 2.0, loss, step, 0.25 * step, 0.0, 0.0, 0.0, 0.0, seconds)
        for step, loss in enumerate(losses)
    ]
    counters: dict[str, Any] = {name: float(value) for name, value in last.items()}
    rows[-1] = rows[-1]._replace(**counters)
    return Run(variant, "", seed, 1000, rows)


RUNS = [
    run_with("one", 0, [5.0, 3.0, 1.0], adopted=2, adoptable=10, rejected_refreshes=1),
    run_with("two", 0, [5.0, 3.0, 1.5], adopted=10, adoptable=10, seconds=2.0),
    run_with("one", 1, [5.0, 3.0, 2.0], adopted=4, adoptable=10, rejected_refreshes=2),
    run_with("two", 1, [5.0, 3.0, 2.7], adopted=10, adoptable=10, seconds=4.0),
    run_with("two", 2, [5.0, math.nan], seconds=4.0),
]


def test_variants_are_compared_seed_by_seed() -> None:
    one, two = quality_results.summarize(RUNS)
    assert one.losses == {0: 1.0, 1: 2.0}
    assert one.difference == {0: 0.0, 1: 0.0}
    assert two.difference == pytest.approx({0: 0.5, 1: 0.7})
    assert (one.adopted, two.adopted) == (0.3, 1.0)
    assert one.off_diagonal_mass == 0.375  # the mean of steps 1 and 2; step 0 has none
    assert (one.rejected_refreshes, one.state_bytes) == (3, 1000)
    assert (one.seconds_per_step, two.seconds_per_step) == (1.0, 4.0)
    assert (one.diverged, two.diverged) == (0, 1)


def test_the_table_has_means_noise_and_diverged_runs() -> None:
    table = quality_results.quality_table("title", quality_results.summarize(RUNS))
    lines = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")]
    one, two = lines[2:]
    assert one[2:5] == ["1.5000 ± 0.7071", "-", "0: 1.0000, 1: 2.0000"]
    assert two[2] == "2.1000 ± 0.8485; 1 of 3 diverged"
    assert two[3] == "+0.6000 ± 0.1000"
    assert two[4] == "0: 1.5000, 1: 2.7000, 2: diverged"
    assert one[5:] == ["0.300", "0.375", "3", "0.0", "1,000.0 |"]


def test_only_complete_runs_with_the_same_settings_are_read(tmp_path: Path) -> None:
    path = tmp_path / "quality.csv"
    short, diverged = RUNS[0], RUNS[-1]
    interrupted = run_with("one", 1, [5.0, 3.0])
    for run in (short, interrupted, diverged):
        quality_results.append_run(path, run, {"steps": "2", "width": "16"})
    quality_results.append_run(path, RUNS[2], {"steps": "2", "width": "32"})
    read = quality_results.read_runs(path, lambda _: {"steps": "2", "width": "16"}, 2)
    assert [run.key for run in read] == [short.key, diverged.key]
    assert str(read[0]) == str(short)
    again = run_with("one", 1, [5.0, 4.0, 3.0])
    quality_results.append_run(path, again, {"steps": "2", "width": "16"})
    read = quality_results.read_runs(path, lambda _: {"steps": "2", "width": "16"}, 2)
    assert str(read[1]) == str(again)


# The whole program --------------------------------------------------------------------------------

TINY = ["--steps", "6", "--width", "16", "--layers", "1", "--context", "16", "--batch-size", "4"]
SOAP = "soap:max_precond_dim=16"
ARGUMENTS = [*TINY, "--seeds", "0", "1", "--variant", SOAP]
ARGUMENTS += ["--variant", "every:precondition_frequency=1,max_precond_dim=16", "--adamw"]
ARGUMENTS += ["--adamw-learning-rate", "1e38"]


def output_of(*arguments: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert quality.main(arguments) == 0
    return output.getvalue()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the standard output of a run with the smallest settings."""
    out = tmp_path_factory.mktemp("quality") / "made" / "here"
    # Compiling takes most of the time by far.
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        return out, output_of(*ARGUMENTS, "--out", str(out))
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def rows(run: tuple[Path, str]) -> list[dict[str, str]]:
    with (run[0] / "quality.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.long
def test_a_run_writes_every_evaluation_with_its_settings(rows: list[dict[str, str]]) -> None:
    for variant in ("soap", "every"):
        for seed in "01":
            own = [row for row in rows if (row["variant"], row["seed"]) == (variant, seed)]
            assert [row["step"] for row in own] == list("0123456")
            assert {row["width"] for row in own} == {"16"}
            assert float(own[-1]["held_out_loss"]) < float(own[0]["held_out_loss"])


@pytest.mark.long
def test_a_seed_decides_the_start_and_the_variant_the_rest(rows: list[dict[str, str]]) -> None:
    starts = {(row["seed"], row["held_out_loss"]) for row in rows if row["step"] == "0"}
    ends = {row["held_out_loss"] for row in rows if row["step"] == "6"}
    assert len(starts) == 2
    assert len(ends) == 4


@pytest.mark.long
def test_frequency_one_adopts_all_that_there_is_to_adopt(rows: list[dict[str, str]]) -> None:
    for row in rows:
        if row["step"] == "6":
            once = float(row["adoptable"]) / 5  # The second of six steps makes the first bases.
            assert float(row["adopted"]) == (once if row["variant"] == "soap" else 5 * once)


@pytest.mark.long
def test_a_diverged_run_ends_and_is_shown(
    run: tuple[Path, str], rows: list[dict[str, str]]
) -> None:
    own = [row for row in rows if row["variant"] == "adamw"]
    assert own[-1]["held_out_loss"] == "nan"
    assert int(own[-1]["step"]) < 6
    assert "| adamw | `learning_rate=1e+38` | 2 of 2 diverged |" in run[1]


@pytest.mark.long
def test_a_run_prints_where_and_how_and_draws(run: tuple[Path, str]) -> None:
    options = "`max_precond_dim=16,precondition_frequency=1`"
    for text in ("device: ", "quality.py --steps 6", f"| every | {options} |"):
        assert text in run[1]
    assert (run[0] / "quality.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.long
def test_runs_in_the_file_are_not_trained_again(
    run: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "compile_program", None)
    table = run[1].partition("###")[2]
    piece = [*TINY, "--seeds", "1", "--variant", SOAP, "--adamw-learning-rate", "1e38"]
    assert output_of(*ARGUMENTS, "--out", str(run[0])).partition("###")[2] == table
    assert output_of(*piece, "--out", str(run[0])).partition("###")[2] == table


@pytest.mark.long
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name something to train"),
        (["--variant", "a:refresh=nope"], "refresh must be"),
        (["--variant", "a:refrsh=qr"], "refrsh"),
        (["--variant", "a", "--variant", "a"], "a name of its own"),
        (["--adamw", "--heads", "3"], "must divide the width, 64"),
    ],
)
def test_a_mistake_is_found_before_anything_is_trained(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        quality.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.long
def test_a_file_of_something_else_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "quality.csv").write_text(f"a,b{os.linesep}1,2{os.linesep}")
    with pytest.raises(SystemExit):
        quality.main(["--variant", "soap", "--out", str(tmp_path)])
    assert "quality.csv has no column" in capsys.readouterr().err
