"""The files of results: a row for every run, and the points of its curve.

`runs.csv` has the settings, losses, times and versions of each complete run. `curves.csv` has at
most `MOST_POINTS` points of each. `step_times.csv` has the times of steps that were measured in
turns. A new file is written beside the old one and then replaces it,
so that an interruption never leaves a part of a row.
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax

import soap_optax
from comparison.running import Point, Result
from comparison.specs import Spec, spec_of

RUNS, CURVES, TIMES = "runs.csv", "curves.csv", "step_times.csv"
MOST_POINTS = 100
CURVE_COLUMNS = ("run", *Point._fields)


@dataclasses.dataclass(frozen=True)
class Record:
    """A complete run, as its row in the CSV.

    Attributes:
      spec: its settings.
      values: the other columns.
      timed: seconds of a step that were measured in turns with other contenders, if they were.
    """

    spec: Spec
    values: Mapping[str, str]
    timed: float | None = None

    @property
    def loss(self) -> float:
        """The final held-out loss, infinite if the run diverged."""
        return float(self.values["held_out_loss"]) if self.values["status"] == "done" else math.inf

    @property
    def seconds(self) -> float:
        """Seconds of training steps."""
        return float(self.values["seconds"])

    @property
    def steps_taken(self) -> int:
        """The number of steps, fewer than planned if the run diverged."""
        return int(self.values["steps_taken"])

    @property
    def step_seconds(self) -> float:
        """The mean seconds of a step."""
        return self.seconds / self.steps_taken

    @property
    def state_bytes(self) -> int:
        """The size of the optimizer's state."""
        return int(self.values["state_bytes"])


class Circumstances(NamedTuple):
    """The machine, the text and the versions of a run."""

    text: str
    device: str
    cores: int
    python: str
    jax: str
    optax: str
    soap_optax: str


def circumstances(text: str) -> Circumstances:
    """The current circumstances; `text` is the checksum of the text."""
    device = jax.devices()[0]
    kind = processor() if device.platform == "cpu" else device.device_kind
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = (platform.python_version(), jax.__version__, optax.__version__)
    return Circumstances(text, kind, cores or 1, *versions, soap_optax.__version__)


def processor() -> str:
    """The name of the processor, if the system reports one."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def row_of(spec: Spec, result: Result, where: Circumstances) -> dict[str, Any]:
    """The row of a run."""
    last = result.points[-1]
    return {
        "run": spec.name,
        **spec.columns,
        "status": "diverged" if result.diverged else "done",
        "steps_taken": last.step,
        "tokens": last.step * spec.batch_size * spec.model.context,
        "train_loss": f"{last.train_loss:.5f}",
        "held_out_loss": f"{last.held_out_loss:.5f}",
        "seconds": f"{last.seconds:.2f}",
        "compile_seconds": f"{result.compile_seconds:.2f}",
        "parameters": result.parameters,
        "state_bytes": result.state_bytes,
        **{
            name: int(result.counters.get(name, 0))
            for name in ("rejected_refreshes", "rejected_gradients")
        },
        **where._asdict(),
        "date": datetime.date.today().isoformat(),
    }


# Files --------------------------------------------------------------------------------------------


def read_records(folder: Path, text: str | None = None) -> dict[Spec, Record]:
    """The complete runs in a folder, by settings.

    Args:
      folder: the folder of `runs.csv`, which need not exist.
      text: the checksum of the text; other runs are left out. None means all.

    Raises:
      ValueError: a column is missing, or does not have a number.
    """
    records, times = {}, read_times(folder)
    for row in read(folder / RUNS):
        try:
            spec = spec_of(row)
            record = Record(spec, row, times.get((*spec.program, spec.frequency)))
            _ = record.loss, record.seconds, record.steps_taken, record.state_bytes, row["text"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder / RUNS} is no file of runs: {error}") from error
        if text is None or row["text"] == text:
            records[spec] = record
    return records


def read_times(folder: Path) -> dict[tuple, float]:
    """The times of steps in a folder, by program and frequency."""
    try:
        rows = [(spec_of(row), float(row["step_seconds"])) for row in read(folder / TIMES)]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / TIMES} is no file of times: {error}") from error
    return {(*spec.program, spec.frequency): seconds for spec, seconds in rows}


def write_times(folder: Path, times: Mapping[Spec, float], where: Circumstances) -> None:
    """Replaces the times of steps."""
    rows = [
        spec.columns
        | {"step_seconds": f"{seconds:.6f}"}
        | where._asdict()
        | {"date": datetime.date.today().isoformat()}
        for spec, seconds in times.items()
    ]
    replace(folder / TIMES, list(rows[0]), rows)


def read_curves(folder: Path) -> dict[str, list[Point]]:
    """The curves in a folder, by the names of runs."""
    curves: dict[str, list[Point]] = {}
    for row in read(folder / CURVES):
        values = (float(row[name]) for name in Point._fields[1:])
        curves.setdefault(row["run"], []).append(Point(int(row["step"]), *values))
    return curves


def append(folder: Path, spec: Spec, result: Result, where: Circumstances) -> Record:
    """Adds a complete run to both files. The row comes last, because it makes the run complete."""
    name = spec.name
    points = [
        {"run": name, **{key: f"{value:.5g}" for key, value in point._asdict().items()}}
        | {"step": point.step}
        for point in thinned(result.points)
    ]
    others = [row for row in read(folder / CURVES) if row["run"] != name]
    replace(folder / CURVES, CURVE_COLUMNS, [*others, *points])
    row = row_of(spec, result, where)
    replace(folder / RUNS, list(row), [*read(folder / RUNS), row])
    return Record(spec, {key: str(value) for key, value in row.items()})


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most `MOST_POINTS` points, evenly spaced, with the first and the last."""
    if len(points) <= MOST_POINTS:
        return list(points)
    last = len(points) - 1
    return [points[round(last * number / (MOST_POINTS - 1))] for number in range(MOST_POINTS)]


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV, none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def replace(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a CSV beside the old one, then replaces the old one."""
    beside = path.with_suffix(".new")
    with beside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
