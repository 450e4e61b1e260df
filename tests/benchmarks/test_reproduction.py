"""The page of the reproduction has the tables of the committed CSVs, and its pictures are drawn."""

import math
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Warnings of other packages at import are not under test.
    import page_blocks
    import reproduction
    import reproduction_plots
    from comparison import plans, presets, records, running
    from comparison.contenders import CONTENDERS

WHERE = records.Circumstances("abcd", "a device", 2, "3.11", "0.10", "0.2", "0.1")
PRESET = presets.PRESETS["quick"]._replace(seeds=(0,), tunes=False)


def invented(study: str) -> dict[Any, running.Result]:
    """Results of all runs of a study, best at the default learning rates."""
    losses: dict[Any, float] = {}
    while missing := plans.plan_of([study], PRESET, losses).missing:
        for spec in missing:
            rate = math.log(spec.learning_rate / CONTENDERS[spec.contender].learning_rate)
            losses[spec] = 2 + rate**2 + 60 / spec.steps + 0.3 * (spec.contender == "adamw")
    return {
        spec: running.Result([running.Point(spec.steps, loss, loss, 0.1)], 1.0, 10, 1000, {})
        for spec, loss in losses.items()
    }


def write(folder: Path, study: str) -> None:
    """The CSVs of a study."""
    folder.mkdir(parents=True)
    results = invented(study)
    rows = [records.row_of(spec, result, WHERE) for spec, result in results.items()]
    records.replace(folder / "runs.csv", list(rows[0]), rows)
    points = [
        {"run": spec.name, **point._asdict()}
        for spec, result in results.items()
        for point in result.points
    ]
    records.replace(folder / "curves.csv", records.CURVE_COLUMNS, points)


def test_the_page_has_the_tables_of_the_committed_files() -> None:
    assert reproduction.main(["--check"]) == 0


def test_the_pictures_of_the_page_are_there() -> None:
    page = reproduction.PAGE.read_text()
    for name in re.findall(r"images/(reproduction_\w+\.png)", page):
        assert (page_blocks.IMAGES / name).exists(), f"run {reproduction.__file__}"


@pytest.mark.parametrize(
    "study",
    [pytest.param(s, marks=[pytest.mark.long] * (s != "steps-to-loss")) for s in plans.STUDIES],
)
def test_new_runs_change_the_page_and_draw(
    study: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(presets.PRESETS, "quick", PRESET)
    write(tmp_path / "data" / "quick", study)
    page = tmp_path / "page.md"
    page.write_text(
        f"# Page\n\n<!-- begin quick {study} -->\n<!-- end -->\n\n"
        "<!-- begin cpu memory -->\n<!-- end -->\n"
    )
    arguments = ["--data", str(tmp_path / "data"), "--page", str(page), "--images", str(tmp_path)]
    assert reproduction.main([*arguments, "--check"]) == 1
    assert reproduction.main(arguments) == 0
    assert reproduction.main([*arguments, "--check"]) == 0
    text = page.read_text()
    assert text.count(reproduction.NOT_RUN) == 1
    assert "a device, 2 cores" in text
    (picture,) = tmp_path.glob("*.png")
    assert f"]({Path('..') / 'images' / picture.name})" in text
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_block_of_nothing_is_an_error(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- begin quick nothing -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match="no block shows quick nothing"):
        reproduction.main(["--page", str(page), "--check"])


def test_every_study_has_a_picture() -> None:
    assert reproduction_plots.PICTURES.keys() == plans.STUDIES.keys()
