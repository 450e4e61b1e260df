"""The study of physics-informed networks plans, resumes and reports its runs."""

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Warnings of other packages at import are not under test.
    import physics_page
    import physics_records
    import physics_study
    from physics.problems import Reference
    from physics.training import Point, Result

SMALL = physics_study.Study(contenders=("adam", "soap-2-qr"), dtypes=("float32",), seeds=(0, 1))
NO_REFERENCE = Reference(np.zeros(1), np.zeros(1), np.zeros((1, 1)))


def invented(best: float, trained: list[Any] | None = None) -> Any:
    """A training whose error is lowest at the learning rate `best`."""

    def train(spec: Any) -> Result:
        if trained is not None:
            trained.append(spec)
        error = math.exp(-5 + abs(math.log(spec.learning_rate / best))) * (1 + spec.seed / 10)
        points = [Point(step, error, error, step / 1e3) for step in range(0, spec.steps + 1, 30)]
        return Result(points, np.zeros((1, 1)), NO_REFERENCE, 1.0, 10, 100)

    return train


@pytest.mark.parametrize("best", [1e-5, 3e-3, 1.0])
def test_the_search_ends_with_a_worse_rate_on_both_sides(tmp_path: Path, best: float) -> None:
    physics_study.run(SMALL, tmp_path, invented(best))
    records = physics_records.read_records(tmp_path)
    for base in SMALL.bases():
        own = {
            spec.learning_rate: record.error
            for spec, record in records.items()
            if spec == base.but(learning_rate=spec.learning_rate)
        }
        rates = sorted(own)
        lowest = min(rates, key=own.__getitem__)
        assert rates[0] < lowest < rates[-1]
        assert abs(math.log10(lowest / best)) < 0.26  # half of half a decade, rounded
        assert base.but(learning_rate=lowest, seed=1) in records


def test_a_repeated_run_replaces_its_row_and_its_curve(tmp_path: Path) -> None:
    physics_study.run(SMALL, tmp_path, invented(3e-3))
    before = physics_records.read_records(tmp_path)
    points = physics_records.read_curves(tmp_path)
    again: list[Any] = []
    physics_study.repeat(SMALL, tmp_path, invented(3e-3, again))
    assert len(again) == 2  # a contender each
    assert all(spec.seed == 1 for spec in again)  # Its error is the higher one of two.
    assert physics_records.read_records(tmp_path).keys() == before.keys()
    assert physics_records.read_curves(tmp_path) == points


def test_complete_runs_are_skipped(tmp_path: Path) -> None:
    first, second, third = [], [], []
    physics_study.run(SMALL._replace(contenders=("adam",)), tmp_path, invented(3e-3, first))
    physics_study.run(SMALL, tmp_path, invented(3e-3, second))
    physics_study.run(SMALL, tmp_path, invented(3e-3, third))
    assert {spec.setup.optimizer for spec in first} == {"adam"}
    assert {spec.setup.optimizer for spec in second} == {"soap"}
    assert not third
    records = physics_records.read_records(tmp_path)
    assert set(records) == {*first, *second}
    curves = physics_records.read_curves(tmp_path)
    assert set(curves) == {physics_records.name_of(spec) for spec in records}
    assert {len(curve) for curve in curves.values()} == {physics_records.CURVE_POINTS}
    row = next(iter(records.values())).values
    assert all(row[name] for name in ("device", "date", "jax", "soap_optax", "dtype", "seconds"))


@pytest.mark.long
@pytest.mark.usefixtures("implicit_promotion")
def test_the_contenders_are_trained_for_real(tmp_path: Path) -> None:
    flags = ["--contenders", "old-port", "--dtypes", "float32", "--seeds", "0", "--steps", "2"]
    flags += ["--layers", "1", "--width", "4", "--points", "32", "--out", str(tmp_path)]
    assert physics_study.main(flags) == 0
    records = physics_records.read_records(tmp_path)
    assert len(records) > 2
    assert all(math.isfinite(record.error) for record in records.values())
    assert {spec.setup.optimizer for spec in records} == {"old-port"}


@pytest.mark.long
def test_new_runs_change_the_page_and_draw(tmp_path: Path) -> None:
    contenders = ("adam", "soap-2-qr", "old-port")
    data = tmp_path / "data"
    physics_study.run(physics_study.Study(contenders=contenders), data, invented(3e-3))
    page = tmp_path / "page.md"
    page.write_text(
        "# Page\n\n<!-- begin burgers defects -->\n<!-- end -->\n\n"
        "<!-- begin kdv optimizers -->\n<!-- end -->\n"
    )
    arguments = ["--data", str(data), "--page", str(page), "--images", str(tmp_path)]
    assert physics_page.main([*arguments, "--check"]) == 1
    assert physics_page.main(arguments) == 0
    assert physics_page.main([*arguments, "--check"]) == 0
    text = page.read_text()
    assert text.count(physics_page.NOT_RUN) == 1
    assert "| SOAP, both defects, f=2 | 7.8e-03 [7.1e-03, 8.5e-03] | 0.0032 | 1.00 |" in text
    assert "Not complete yet: SOAP, counted first call, f=2 in float32" in text
    (picture,) = tmp_path.glob("*.png")
    assert f"](../images/{picture.name})" in text


def test_the_page_has_the_tables_of_the_committed_files() -> None:
    assert physics_page.main(["--check"]) == 0
