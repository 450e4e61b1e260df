"""The rows of a comparison: as CSV, as a table, and as a picture."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from vision.contenders import CONTENDERS
from vision.training import Point


class Run(NamedTuple):
    """A complete run."""

    contender: str
    learning_rate: float
    seed: int
    points: Sequence[Point]

    @property
    def is_finite(self) -> bool:
        """Whether all losses were finite."""
        last = self.points[-1]
        return math.isfinite(last.train_loss + last.validation_loss)

    @property
    def validation_loss(self) -> float:
        """The final validation loss, infinite if the run diverged."""
        return self.points[-1].validation_loss if self.is_finite else math.inf

    @property
    def step_milliseconds(self) -> float:
        """The mean time of a training step."""
        return 1000 * self.points[-1].seconds / self.points[-1].step


COLUMNS = ("contender", "learning_rate", "seed", *Point._fields)


def write_csv(path: Path, runs: Iterable[Run], circumstances: Mapping[str, object]) -> None:
    """Writes a row for every point of every run, with the versions and the device."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*COLUMNS, *circumstances])
        for run in runs:
            for point in run.points:
                settings = (run.contender, run.learning_rate, run.seed)
                numbers = (point.step, *(f"{number:.5g}" for number in point[1:]))
                writer.writerow([*settings, *numbers, *circumstances.values()])


def table(final: Mapping[str, Sequence[Run]]) -> str:
    """A Markdown table, one row for each optimizer.

    Args:
      final: the runs with the best learning rate, one for each seed, by the optimizer's name.
    """
    lines = [
        "| optimizer | learning rate | test error | error at half of the steps | ms per step |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, runs in final.items():
        ends = [100 * run.points[-1].test_error for run in runs]
        halves = [100 * run.points[len(run.points) // 2 - 1].test_error for run in runs]
        milliseconds = min(run.step_milliseconds for run in runs)
        lines.append(
            f"| {CONTENDERS[name].label} | {runs[0].learning_rate:.3g} | {spread(ends)} | "
            f"{spread(halves)} | {milliseconds:.1f} |"
        )
    return "\n".join(lines)


def spread(percents: Sequence[float]) -> str:
    """The mean and, with two or more numbers, the standard deviation."""
    mean = f"{statistics.mean(percents):.2f}%"
    return mean if len(percents) < 2 else f"{mean} ± {statistics.stdev(percents):.2f}"


def draw(final: Mapping[str, Sequence[Run]], path: Path) -> None:
    """Draws the mean test error against steps and against time."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    for name, runs in final.items():
        errors = np.array([[100 * point.test_error for point in run.points] for run in runs])
        steps = np.array([point.step for point in runs[0].points])
        milliseconds = min(run.step_milliseconds for run in runs)
        for axes, places in ((by_step, steps), (by_time, steps * milliseconds / 1000)):
            (line,) = axes.plot(places, errors.mean(axis=0), label=CONTENDERS[name].label)
            axes.fill_between(
                places, errors.min(axis=0), errors.max(axis=0), color=line.get_color(), alpha=0.15
            )
    by_step.set(xlabel="steps", ylabel="test error in percent", yscale="log")
    by_time.set(xlabel="seconds of training")
    for axes in (by_step, by_time):
        axes.grid(alpha=0.3, which="both")
    by_step.legend()
    figure.savefig(path, dpi=120)
