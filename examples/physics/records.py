"""The files of results: a row for every run, and the points of its curve."""

from __future__ import annotations

import csv
import datetime
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np
import optax

import soap_optax
from physics.specs import Spec
from physics.training import Result

RUNS, CURVES = "runs.csv", "curves.csv"


def circumstances() -> dict[str, Any]:
    """The device and the versions."""
    device = jax.devices()[0]
    return {
        "device": processor() if device.platform == "cpu" else device.device_kind,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "optax": optax.__version__,
        "flax": flax.__version__,
        "numpy": np.__version__,
        "soap_optax": soap_optax.__version__,
        "date": datetime.date.today().isoformat(),
    }


def processor() -> str:
    """The name of the processor, if the system reports one."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def row_of(spec: Spec, result: Result) -> dict[str, Any]:
    """The row of a run: settings, errors, costs, device and versions."""
    last = result.points[-1]
    return {
        **spec.columns,
        "status": "diverged" if result.diverged else "done",
        "steps_taken": last.step,
        "loss": f"{last.loss:.5g}",
        "relative_l2": f"{last.relative_l2:.5g}",
        "lowest_relative_l2": f"{min(point.relative_l2 for point in result.points):.5g}",
        "seconds": f"{last.seconds:.2f}",
        "compile_seconds": f"{result.compile_seconds:.2f}",
        "parameters": result.parameters,
        "state_bytes": result.state_bytes,
        **circumstances(),
    }


class Files:
    """Writes the files of a folder anew, and adds one run after another."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        for name in (RUNS, CURVES):
            (folder / name).write_text("", encoding="utf-8")

    def add(self, spec: Spec, result: Result) -> None:
        """Adds a run."""
        run = {"equation": spec.setup.equation, "optimizer": spec.setup.optimizer}
        run |= {"learning_rate": spec.learning_rate, "seed": spec.seed}
        points = [
            run | {name: f"{value:.6g}" for name, value in point._asdict().items()}
            for point in result.points
        ]
        append(self.folder / CURVES, points)
        append(self.folder / RUNS, [row_of(spec, result)])


def append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Adds rows to a CSV, after a header if it is empty."""
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        if not file.tell():
            writer.writeheader()
        writer.writerows(rows)
