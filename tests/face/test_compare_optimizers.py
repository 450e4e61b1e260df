"""The comparison of optimizers: its plans, its files, and short runs with tiny models."""

import dataclasses
import importlib
import itertools
import math
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

ROOT = Path(__file__).parents[2]
with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
    warnings.simplefilter("ignore")  # warnings of other packages at import are not under test
    patch.setenv("OPENBLAS_NUM_THREADS", "1")  # the example sets it; the patch restores it
    patch.syspath_prepend(str(ROOT / "examples"))
    program = importlib.import_module("compare_optimizers")
    claims, fits, forecast, plans, presets, records, running, specs, tables, widths = (
        importlib.import_module(f"comparison.{name}")
        for name in (
            *("claims", "fits", "forecast", "plans", "presets"),
            *("records", "running", "specs", "tables", "widths"),
        )
    )
    contenders = importlib.import_module("comparison.contenders")
    byte_gpt = importlib.import_module("byte_gpt")

pytestmark = [pytest.mark.timeout(500), pytest.mark.usefixtures("implicit_promotion")]

QUICK = presets.PRESETS["quick"]
TINY = QUICK._replace(
    model=specs.Model("byte", 1, 16, 2, 16),
    batch_size=4,
    steps=12,
    rates=1,
    evaluations=4,
    held_out_batches=(1, 4),
    fractions=(0.75, 0.5),
    tunes=False,
)


def known_losses(plan: Callable[[dict], Any], loss: Callable[[Any], float]) -> dict[Any, float]:
    """The losses of all runs of a plan, which is made again until no run is missing."""
    losses: dict[Any, float] = {}
    for _ in range(100):
        made = plan(losses)
        if not made.missing:
            return losses
        losses |= {spec: loss(spec) for spec in made.missing}
    raise AssertionError("the plan never ends")


# Plans --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decades", [-1.0, -0.6, 0.0, 0.1, 0.9])
def test_a_search_goes_on_until_the_best_rate_has_a_worse_one_on_both_sides(decades: float):
    base = QUICK.spec("soap")
    best = base.learning_rate * 10**decades

    def loss(spec: Any) -> float:
        return abs(math.log10(spec.learning_rate / best))

    def search(losses: dict) -> Any:
        plan = plans.Plan(losses)
        plans.valley(plan, base, QUICK._replace(extensions=4))
        return plan

    losses = known_losses(search, loss)
    grid = sorted(losses, key=lambda spec: spec.learning_rate)
    lowest = min(grid, key=losses.__getitem__)
    assert grid[0] != lowest != grid[-1]
    steps = [b.learning_rate / a.learning_rate for a, b in itertools.pairwise(grid)]
    assert steps == pytest.approx([math.sqrt(10)] * len(steps), rel=0.01)


def test_a_rate_that_is_unstable_with_another_seed_is_not_the_best():
    preset = QUICK._replace(extensions=4)
    base = preset.spec("adamw")

    def loss(spec: Any) -> float:
        distance = math.log10(spec.learning_rate / base.learning_rate)
        unstable = spec.seed == 1 and distance > -0.2
        return abs(distance) + 3.0 * unstable

    def search(losses: dict) -> Any:
        plan = plans.Plan(losses)
        plan.found = plans.best_rate(plan, base, preset)
        return plan

    losses = known_losses(search, loss)
    assert search(losses).found == base.but(learning_rate=plans.half_decade(base.learning_rate, -1))
    # Not more: other seeds only where the mean of a better rate has turned out worse.
    with_all = {spec.learning_rate for spec in losses if spec.seed == 2}
    assert len(with_all) == 3


def test_a_search_that_finds_no_bottom_ends_at_its_limit():
    def search(losses: dict) -> Any:
        plan = plans.Plan(losses)
        plans.valley(plan, QUICK.spec("soap"), QUICK._replace(extensions=3))
        return plan

    assert len(known_losses(search, lambda spec: -spec.learning_rate)) == 3 + 3


def test_a_diverged_run_is_the_worst():
    base = QUICK.spec("adamw")
    plan = plans.Plan({base: math.inf, base.but(learning_rate=1.0): 9.0})
    assert plan.best(plan.losses) == base.but(learning_rate=1.0)


def test_b2_and_decay_are_tuned_and_then_the_rate_again():
    preset = presets.PRESETS["cpu"]
    base = preset.spec("soap")

    def loss(spec: Any) -> float:
        target = 3 * base.learning_rate if spec.weight_decay == 0.1 else base.learning_rate
        b2 = abs(spec.b2 - 0.99)
        return abs(math.log(spec.learning_rate / target)) + b2 - 20 * spec.weight_decay

    def tune(losses: dict) -> Any:
        plan = plans.Plan(losses)
        plan.found = plans.tuned(plan, base, preset)
        return plan

    losses = known_losses(tune, loss)
    found = tune(losses).found
    assert (found.b2, found.weight_decay) == (0.99, 0.1)
    assert found.learning_rate == pytest.approx(3.16 * base.learning_rate, rel=0.01)
    assert found == min(losses, key=losses.__getitem__)


def test_shorter_runs_are_added_until_they_are_worse_than_adamw():
    def loss(spec: Any) -> float:
        rate = math.log(spec.learning_rate / contenders.CONTENDERS[spec.contender].learning_rate)
        # SOAP is as good as AdamW's 240 steps after 80 of them, and Shampoo after 160.
        speed = {"soap": 3.0, "shampoo": 1.5}.get(spec.contender, 1.0)
        return rate**2 + 1 / (speed * spec.steps)

    losses = known_losses(lambda known: plans.plan_of(["steps-to-loss"], QUICK, known), loss)
    shortest = {
        name: min(spec.steps for spec in losses if spec.contender == name)
        for name in ("soap", "shampoo", "adamw")
    }
    assert shortest == {"soap": 60, "shampoo": 120, "adamw": 240}
    by_seed = {(spec.steps, spec.seed) for spec in losses if spec.contender == "soap"}
    assert {(60, seed) for seed in QUICK.seeds} <= by_seed


def test_runs_that_two_studies_share_are_planned_once():
    both, one, other = (
        forecast.left(studies, QUICK, {}, forecast.Clock([], "cpu")).runs
        for studies in (["steps-to-loss", "learning-rate"], ["steps-to-loss"], ["learning-rate"])
    )
    assert max(one, other) < both < one + other


@pytest.mark.parametrize("name", presets.PRESETS)
def test_a_preset_keeps_within_its_budget(name: str):
    preset = presets.PRESETS[name]
    clock = forecast.Clock([], "cpu" if name in ("quick", "cpu") else "gpu")
    likely = forecast.left(preset.studies, preset, {}, clock)
    assert 0 < likely.seconds <= 3600 * preset.budget_hours
    if name in ("quick", "cpu"):
        worst = forecast.left(preset.studies, preset, {}, clock, worst=True)
        assert likely.seconds < worst.seconds <= 3600 * preset.budget_hours


def test_the_paper_presets_have_the_papers_sizes():
    for name, millions in (("paper-360m", 360), ("paper-660m", 660)):
        preset = presets.PRESETS[name]
        model = preset.model
        parameters = forecast.parameters_of(model) + model.vocabulary * model.width
        assert parameters == pytest.approx(millions * 1e6, rel=0.03)
        tokens = preset.steps * preset.batch_size * model.context
        assert tokens == pytest.approx(20 * millions * 1e6, rel=0.08)
        assert preset.batch_size * model.context == 2**21
        assert (model.layers, model.width // model.heads) == (24, 64)


def test_the_gpu_preset_has_the_size_that_its_page_names():
    preset = presets.PRESETS["gpu"]
    assert 30e6 < forecast.parameters_of(preset.model) < 125e6
    assert preset.batch_size * preset.model.context == 2**19


# Fits ---------------------------------------------------------------------------------------------


def test_the_fit_finds_a_power_law_and_its_crossing():
    curve = fits.Fit(a=2.0, b=30.0, beta=0.8)
    steps = [150, 225, 300]
    losses = [curve.at(step) for step in steps]
    assert fits.crossing(steps, losses, curve.at(200)) == pytest.approx(200, rel=1e-3)


@pytest.mark.parametrize("target", [0.0, 2.0, 5.0])
def test_a_target_beyond_the_runs_has_no_crossing(target: float):
    assert fits.crossing([150, 225, 300], [2.5, 2.3, 2.2], target) is None


def test_losses_that_rise_have_no_crossing():
    assert fits.crossing([150, 225, 300], [2.2, 2.3, 2.5], 2.3) is None


@pytest.mark.parametrize(
    ("differences", "beyond"),
    [
        ([-0.1, -0.11, -0.12], True),
        ([-0.1, -0.11], False),
        ([-0.1, -0.1, 0.001], False),
        ([-0.3, -0.001, -0.002], False),
    ],
)
def test_a_difference_is_a_claim_only_beyond_its_spread(differences: list[float], beyond: bool):
    assert tables.is_beyond_spread(differences) is beyond


# Files --------------------------------------------------------------------------------------------

WHERE = records.Circumstances("abcd", "a device, with a comma", 2, "3.11", "0.10", "0.2", "0.1")


def result_of(loss: float, points: int = 3) -> Any:
    curve = [running.Point(step, loss, loss, 0.5 * step) for step in range(points)]
    return running.Result(curve, 1.0, 100, 200, {"rejected_refreshes": 2.0})


def test_a_row_has_all_settings_and_reads_back(tmp_path: Path):
    spec = QUICK.spec("soap", "block_size=16,refresh=eigh", learning_rate=0.0316228, seed=2)
    records.append(tmp_path, spec, result_of(1.25), WHERE)
    records.append(tmp_path, spec.but(seed=1), result_of(math.nan), WHERE)
    read = records.read_records(tmp_path, "abcd")
    assert list(read) == [spec, spec.but(seed=1)]
    assert (read[spec].loss, read[spec].state_bytes, read[spec].steps_taken) == (1.25, 200, 2)
    assert read[spec.but(seed=1)].loss == math.inf
    assert read[spec].values["device"] == WHERE.device
    assert specs.options_of(spec.options) == {"block_size": 16, "refresh": "eigh"}
    assert records.read_records(tmp_path, "another text") == {}
    assert (tmp_path / "runs.csv").stat().st_size < 2000


def test_a_curve_is_thinned_and_replaces_an_older_one(tmp_path: Path):
    spec = QUICK.spec("adamw")
    records.append(tmp_path, spec, result_of(2.0, points=5), WHERE)
    records.append(tmp_path, spec, result_of(2.0, points=1001), WHERE)
    points = records.read_curves(tmp_path)[spec.name]
    assert len(points) == records.MOST_POINTS
    assert (points[0].step, points[-1].step) == (0, 1000)


def test_an_interruption_during_the_write_leaves_the_old_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    spec = QUICK.spec("adamw")
    records.append(tmp_path, spec, result_of(2.0), WHERE)
    before = (tmp_path / "runs.csv").read_bytes()

    def interrupt(_descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(records.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        records.append(tmp_path, spec.but(seed=1), result_of(2.0), WHERE)
    assert (tmp_path / "runs.csv").read_bytes() == before


def test_names_of_runs_differ_with_every_setting():
    spec = QUICK.spec("soap")
    model = spec.model._replace(layers=9)
    changes = {"learning_rate": 1.0, "options": "stagger=True", "b1": 0.5, "b2": 0.5, "seed": 9}
    changes |= {"weight_decay": 0.5, "frequency": 9, "model": model, "steps": 9, "batch_size": 9}
    changes |= {"contender": "adamw"}
    assert set(changes) == {field.name for field in dataclasses.fields(spec)}
    names = {spec.but(**{name: value}).name for name, value in changes.items()}
    assert len(names | {spec.name}) == len(changes) + 1


# Contenders ---------------------------------------------------------------------------------------


def structures() -> Iterator[Any]:
    """A run of every contender and of every set of options in a study.

    Those without a mark differ most in their construction.
    """
    for name in contenders.CONTENDERS:
        marks = [] if name in ("adamw", "soap-hyperball", "adafactor") else [pytest.mark.long]
        yield pytest.param(TINY.spec(name), id=name, marks=marks)
    options = {*plans.MEMORY_OPTIONS, "dense=20,most=10", "block_size=8"}
    for text in sorted(options | set(plans.width_arms(TINY).values()) - {""}):
        yield pytest.param(TINY.spec("soap", text), id=text, marks=pytest.mark.long)
    shampoo = TINY.spec("shampoo", "dense=20,most=10")
    yield pytest.param(shampoo, id="shampoo, thinned", marks=pytest.mark.long)


@pytest.mark.long
@pytest.mark.parametrize("spec", list(structures()))
def test_a_step_keeps_shapes_and_dtypes(spec: Any):
    step = running.step_of(spec, micro_batch=None)
    windows = jax.ShapeDtypeStruct((4, 17), jnp.uint8)
    numbers = contenders.numbers_of(spec, 0.1)
    params, state, loss = jax.eval_shape(step.take, step.params, step.state, windows, numbers)
    assert jax.tree.structure((params, state)) == jax.tree.structure((step.params, step.state))
    for new, old in zip(
        jax.tree.leaves((params, state)), jax.tree.leaves((step.params, step.state)), strict=True
    ):
        assert (new.shape, new.dtype) == (old.shape, old.dtype)
    assert loss.shape == ()


def test_hyperball_leaves_embeddings_head_and_vectors_out():
    params = running.step_of(TINY.spec("adamw"), None).params
    mask = contenders.between_embedding_and_head(params)
    chosen = {
        jax.tree_util.keystr(path)
        for path, is_chosen in jax.tree_util.tree_flatten_with_path(mask)[0]
        if is_chosen
    }
    names = {re.findall(r"'(\w+)'", path)[1] for path in chosen}
    assert names == {"query", "key", "value", "mix", "up", "down"}


def test_micro_batches_have_the_gradient_of_the_whole_batch():
    def loss(params: jax.Array, windows: jax.Array) -> jax.Array:
        return jnp.mean(jnp.sin(params * windows))

    windows = jnp.arange(24.0).reshape(8, 3)
    whole = running.mean_gradient(loss, jnp.float32(0.3), windows, None)
    parts = running.mean_gradient(loss, jnp.float32(0.3), windows, 2)
    np.testing.assert_allclose(whole, parts, rtol=1e-5)


# Widths -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [None, 16])
def test_rates_by_width_are_one_at_the_base_width(block_size: int | None):
    params = running.step_of(TINY.spec("adamw"), None).params
    assert set(jax.tree.leaves(widths.width_scales(params, 16, block_size))) == {1.0}


def test_rates_by_width_follow_the_rules():
    preset = TINY._replace(model=TINY.model._replace(width=64))
    params = running.step_of(preset.spec("adamw"), None).params
    for block_size, hidden, head in ((None, 1.0, 0.5), (16, 0.25, 0.25)):
        scales = widths.width_scales(params, 16, block_size)
        by_name = {
            re.findall(r"'(\w+)'", jax.tree_util.keystr(path))[-2]: scale
            for path, scale in widths.paths_of(scales)
        }
        assert by_name["query"] == by_name["up"] == by_name["down"] == hidden
        assert by_name["head"] == head
        assert by_name["embedding"] == by_name["positions"] == by_name["mlp_norm"] == 1.0


# The program --------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_text("pack my box with five dozen liquor jugs. " * 30)
    return folder


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the preset `quick` tiny."""
    monkeypatch.setitem(presets.PRESETS, "quick", TINY)


@pytest.mark.long
@pytest.mark.usefixtures("tiny")
def test_runs_are_written_skipped_and_continued(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    arguments = ["--contender", "adamw", "--data", str(folder), "--seeds", "1", "--out"]
    assert program.main([*arguments, str(tmp_path / "whole")]) == 0
    assert "| AdamW | 0.01 | 0.95, 0.0001 |" in capsys.readouterr().out
    whole = records.read_records(tmp_path / "whole" / "quick")
    (curve,) = records.read_curves(tmp_path / "whole" / "quick").values()
    assert [point.step for point in curve] == [0, 3, 6, 9, 12]
    assert curve[0].held_out_loss == pytest.approx(math.log(256), abs=0.1)
    assert curve[-1].held_out_loss < curve[0].held_out_loss

    assert program.main([*arguments, str(tmp_path / "whole")]) == 0
    assert "1 runs are complete" in capsys.readouterr().out
    assert records.read_records(tmp_path / "whole" / "quick").keys() == whole.keys()

    assert program.main([*arguments, str(tmp_path / "whole"), "--time-steps"]) == 0
    assert "ms a step" in capsys.readouterr().out
    timed = records.read_records(tmp_path / "whole" / "quick")
    assert all(record.timed and record.timed > 0 for record in timed.values())

    # The first step passes the time limit.
    pieces = [*arguments, str(tmp_path / "pieces"), "--hours", "1e-9"]
    assert program.main(pieces) == 130
    assert "stopped; repeat the command" in capsys.readouterr().err
    checkpoints = tmp_path / "pieces" / "quick" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == [next(iter(whole)).name]
    assert program.main(pieces[:-2]) == 0
    again = records.read_records(tmp_path / "pieces" / "quick")
    assert [record.loss for record in again.values()] == [r.loss for r in whole.values()]
    assert not any(checkpoints.iterdir())


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--preset", "huge"], ["--preset", "'huge'", "quick"]),
        (["--study", "speed"], ["--study", "'speed'", "steps-to-loss"]),
        (["--contender", "adamw", "sopa"], ["--contender", "'sopa'", "soap-kl"]),
        (["--contender", "soap"], ["--contender", "adamw"]),
        (["--seeds", "0"], ["--seeds", "from 1", "'0'"]),
        (["--hours", "-1"], ["--hours", "positive", "'-1'"]),
        (["--out", "{tmp}/none", "--time-steps"], ["--time-steps", "no search is complete"]),
        (["--checkpoint-every", "often"], ["--checkpoint-every", "positive", "'often'"]),
        (["--data", "{tmp}/absent"], ["--data", "cannot read", "absent"]),
        (["--preset", "paper-360m"], ["--data", ".npy", "32,128"]),
        (["--preset", "paper-360m", "--data", "{tmp}/no.npy"], ["--data", "cannot read", "no.npy"]),
        (["--preset", "paper-360m", "--data", "{tmp}/short.npy"], ["--data", "10,240", "(5,)"]),
        (["--out", "{tmp}/other"], ["--out", "runs.csv is no file of runs"]),
        (["--out", "{tmp}/short.npy"], ["--out", "cannot", "short.npy"]),
        (["--frequency", "3"], ["unrecognized arguments", "--frequency"]),
    ],
)
def test_a_mistake_gets_one_line(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: list[str],
):
    np.save(tmp_path / "short.npy", np.arange(5))
    (tmp_path / "other" / "quick").mkdir(parents=True)
    (tmp_path / "other" / "quick" / "runs.csv").write_text("a,b\n1,2\n")
    given = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    default = [] if "paper-360m" in arguments else ["--data", str(folder)]
    with pytest.raises(SystemExit) as stop:
        program.main([*default, *given])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert ": error: " in message
    for word in words:
        assert word in message


def test_a_dry_run_trains_nothing(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out"
    assert program.main(["--data", str(folder), "--out", str(out), "--dry-run"]) == 0
    assert re.search(r"About \d+ runs and \d+ minutes are left", capsys.readouterr().out)
    assert not out.exists()


# All studies --------------------------------------------------------------------------------------


def synthetic_records(studies: list[str], preset: Any) -> dict[Any, Any]:
    """Complete runs of studies with invented losses."""

    def loss(spec: Any) -> float:
        rate = math.log(spec.learning_rate / contenders.CONTENDERS[spec.contender].learning_rate)
        own = {"adamw": 0.5, "soap": 0.0}.get(spec.contender, 0.2)
        return 2 + own + rate**2 + 60 / spec.steps + 0.001 * spec.seed

    def record(spec: Any, value: float) -> Any:
        curve = [running.Point(step, value, value, 0.1 * step) for step in (0, spec.steps)]
        row = records.row_of(spec, running.Result(curve, 1.0, 10, 1000, {}), WHERE)
        return records.Record(spec, {name: str(cell) for name, cell in row.items()})

    losses = known_losses(lambda known: plans.plan_of(studies, preset, known), loss)
    return {spec: record(spec, value) for spec, value in losses.items()}


@pytest.mark.parametrize("study", plans.STUDIES)
def test_every_study_has_a_table_of_its_plan(study: str):
    preset = QUICK._replace(seeds=(0,))
    found = synthetic_records([study], preset)
    table = tables.TABLES[study](preset, found)
    assert len(table.rows) >= 2
    assert {len(row) for row in table.rows} == {len(table.columns)}
    assert len(table.columns) <= 8  # The most that a page may have.
    empty = tables.TABLES[study](preset, {})
    assert empty.markdown == f"There are no complete runs of `{study}`."


def test_the_claims_have_the_invented_crossing():
    found = synthetic_records(["steps-to-loss"], QUICK)
    table = claims.claims(QUICK, found)
    # 2.5 + 60 / 240 = 2 + 60 / N for N = 80, which is 33% of the steps.
    assert ["SOAP's steps to AdamW's final loss", "at least 40% fewer", "67 ± 0% fewer"] in [
        list(row) for row in table.rows
    ]


def test_times_that_were_measured_in_turns_replace_those_of_the_runs():
    found = {
        spec: dataclasses.replace(record, timed=0.15 if spec.contender == "soap" else 0.1)
        for spec, record in synthetic_records(["steps-to-loss"], QUICK).items()
    }
    rows = {row[0]: row[-1] for row in claims.claims(QUICK, found).rows}
    assert rows["a SOAP step, relative to AdamW's"] == "1.50 times"
    assert rows["SOAP's time to AdamW's final loss"] == "50 ± 0% less"  # a third of the steps


# Long ---------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "contender"),
    [("paper-360m", "shampoo"), ("paper-660m", "soap")],
)
def test_the_papers_step_lowers_from_shapes_alone(name: str, contender: str):
    preset = presets.PRESETS[name]
    spec = preset.spec(contender)
    step = running.step_of(spec, preset.micro_batch)
    windows = jax.ShapeDtypeStruct((preset.batch_size, preset.model.context + 1), jnp.uint16)
    numbers = contenders.numbers_of(spec, 0.1)
    lowered = jax.jit(step.take, donate_argnums=(0, 1)).lower(
        step.params, step.state, windows, numbers
    )
    params, state, _ = lowered.out_info
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (params, state))
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (step.params, step.state))


@pytest.mark.long
@pytest.mark.usefixtures("tiny")
def test_contenders_start_from_equal_weights_and_learn(folder: Path, tmp_path: Path):
    names = ("adamw", "soap-hyperball", "shampoo", "adafactor", "muon", "lion", "sgd")
    arguments = ["--data", str(folder), "--seeds", "1", "--contender", *names, "--out"]
    assert program.main([*arguments, str(tmp_path)]) == 0
    curves = records.read_curves(tmp_path / "quick")
    complete = records.read_records(tmp_path / "quick")
    assert {spec.contender for spec in complete} == set(names)
    assert len({curves[spec.name][0].held_out_loss for spec in complete}) == 1
    for spec in complete:
        if spec.steps == TINY.steps:
            assert curves[spec.name][-1].held_out_loss < curves[spec.name][0].held_out_loss


@pytest.mark.long
def test_a_stop_during_a_run_continues_with_the_same_losses(tmp_path: Path):
    """Also for SOAP, whose state has refresh counters and bases."""
    text = np.tile(np.arange(200, dtype=np.uint8), 20)
    data = running.Data(program.Text(text, text[:400], ""), 4, (1, 4), None)
    spec = TINY.spec("soap")
    compiled = running.compile_program(spec, data)
    stop = threading.Event()
    opened: list[Any] = []

    def open_checkpoints() -> Any:
        opened.append(program.Checkpoints(tmp_path / "checkpoints"))
        return opened[-1]

    def advance(step: int, loss: float) -> None:
        if step == 7:
            stop.set()

    def hooks(has_checkpoints: bool) -> Any:
        return running.Hooks(advance, stop, open_checkpoints, has_checkpoints, math.inf)

    assert running.train(spec, compiled, data, hooks(False)) is None
    opened[-1].close()
    stop.clear()
    rest = running.train(spec, compiled, data, hooks(True))
    opened[-1].close()
    stop.clear()
    whole = running.train(spec, compiled, data, hooks(False)._replace(advance=lambda *_: None))
    assert rest is not None
    assert whole is not None
    assert [p[:3] for p in rest.points[1:]] == [p[:3] for p in whole.points[1:]]


def change_of_activations(width: int, options: str) -> float:
    """The root mean square change of the residual vectors after ten steps of SOAP."""
    model = TINY.model._replace(kind="scaled", width=width, heads=width // 8)
    spec = TINY._replace(model=model).spec("soap", options, frequency=1)
    numbers = contenders.numbers_of(spec, 1e-3)
    optimizer = contenders.make_optimizer(spec, numbers)
    graph = nnx.graphdef(byte_gpt.GPT(byte_gpt.Size(*model[1:5]), nnx.Rngs(0)))
    start, loss = running.model_of(model, 0)
    windows = jnp.asarray(np.random.default_rng(0).integers(0, 64, (10, 8, 17)), jnp.uint8)

    def step(carry: Any, batch: jax.Array) -> tuple[Any, None]:
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, batch), state, params)
        return (optax.apply_updates(params, updates), state), None

    def residual(params: Any) -> jax.Array:
        return nnx.merge(graph, params).residual(windows[0, :, :-1].astype(jnp.int32))

    @jax.jit
    def change(params: Any) -> jax.Array:
        carry = (params, optimizer.init(params))
        (trained, _), _ = jax.lax.scan(step, carry, windows)
        return jnp.sqrt(jnp.mean((residual(trained) - residual(params)) ** 2))

    return float(change(start))


@pytest.mark.long
def test_the_coordinate_check_tells_the_rules_from_one_rate():
    """Activations change in ten steps by the same size at every width, but only with the rules."""
    growth = {}
    for name, options in (("one rate", ""), ("blocks", "block_size=16,width_rules=16")):
        narrow, wide = (change_of_activations(width, options) for width in (16, 128))
        growth[name] = wide / narrow
    assert growth["one rate"] > 1.3
    assert 0.8 < growth["blocks"] < 1.2
