"""A run full of faults ends where a run without interruptions does: see `helpers.faulty_run`."""

import pathlib
import shutil

import pytest
from helpers import faulty_run
from helpers.faulty_run import KILLS, Settings

pytestmark = pytest.mark.long

STEPS = 500


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def settings(compiled: pathlib.Path) -> Settings:
    return Settings(STEPS, 50, seed=0, faults=True, compiled=compiled)


@pytest.fixture(scope="module")
def uninterrupted(directory: pathlib.Path, settings: Settings) -> faulty_run.Report:
    return faulty_run.drive(directory / "uninterrupted", settings, kills=0)


def test_faults_happen_and_the_loss_falls_all_the_same(
    directory: pathlib.Path, settings: Settings, uninterrupted: faulty_run.Report
) -> None:
    counters = dict(uninterrupted.end.counters)
    assert counters["rejected_gradients"] > 0
    assert counters["rejected_refreshes"] > 0
    initial = faulty_run.last_loss(faulty_run.initial_state())
    assert uninterrupted.end.loss < 0.8 * initial


def test_a_run_that_is_killed_again_and_again_is_the_uninterrupted_one(
    directory: pathlib.Path, settings: Settings, uninterrupted: faulty_run.Report
) -> None:
    report = faulty_run.drive(directory / "killed", settings, kills=len(KILLS))
    assert dict(report.ends) == dict.fromkeys(KILLS, 1)
    assert len(report.digests) > STEPS // 50 // 2
    for step, digests in report.digests.items():
        assert digests == uninterrupted.digests[step], step
    assert report.end == uninterrupted.end._replace(
        memory=report.end.memory, programs=report.end.programs
    )


def test_a_run_goes_on_from_an_older_checkpoint_if_the_newest_is_damaged(
    directory: pathlib.Path, settings: Settings, uninterrupted: faulty_run.Report
) -> None:
    damaged = directory / "damaged"
    shutil.copytree(directory / "uninterrupted", damaged)
    faulty_run.truncate_newest(damaged)
    report = faulty_run.drive(damaged, settings, kills=0)
    assert report.unreadable == 1
    assert sorted(report.digests) == [STEPS - 50, STEPS]
    for step, digests in report.digests.items():
        assert digests == uninterrupted.digests[step], step


def test_a_run_goes_on_with_other_numbers_of_devices(
    directory: pathlib.Path, settings: Settings, uninterrupted: faulty_run.Report
) -> None:
    report = faulty_run.drive(directory / "devices", settings, kills=1, devices=(2, 4))
    # Sums over a batch on several devices have other roundings, and so may reject other refreshes.
    assert report.end.loss == pytest.approx(uninterrupted.end.loss, rel=0.05)
