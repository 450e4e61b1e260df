"""Trains a small network through faults, kills and restarts, and compares it with quiet runs.

    pip install ".[tests]"
    python tests/reliability/run_faults.py

It writes docs/data/reliability/faults.csv, one row for each run. A run that is in the file is
skipped, so that the command can be interrupted.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

# OpenBLAS's threads and XLA's fight over the cores; OpenBLAS reads this when it is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.append(str(Path(__file__).parents[1]))

import jax
from helpers import faulty_run
from helpers.faulty_run import Report, Settings

ROOT = Path(__file__).parents[2]
SEEDS = (0, 1, 2, 3, 4)
FIELDS = (
    "run",
    "seed",
    "steps",
    "loss",
    *("accepted_gradients", "rejected_gradients", "refreshes", "rejected_refreshes"),
    *faulty_run.KILLS,
    *("unreadable", "checkpoints", "repeated", "different", "programs"),
    *("memory_at_half", "memory_at_end", "seconds", "date", "python", "jax"),
)


def row_of(
    name: str, settings: Settings, report: Report, reference: Report | None, seconds: float
) -> dict[str, object]:
    """The row of a run.

    Args:
      name: of the run.
      settings: what it did.
      report: what happened.
      reference: the uninterrupted run, whose states are to be the same bit by bit.
      seconds: how long it took.
    """
    digests = report.digests
    return {
        "run": name,
        "seed": settings.seed,
        "steps": settings.steps,
        "loss": f"{report.end.loss:.6f}",
        **dict(report.end.counters),
        **{kill: report.ends[kill] for kill in faulty_run.KILLS},
        "unreadable": report.unreadable,
        "checkpoints": len(digests),
        "repeated": report.repeated,
        "different": ""
        if reference is None
        else sum(digests[step] != reference.digests[step] for step in digests),
        "programs": report.programs,
        "memory_at_half": round(report.memory[len(report.memory) // 2]),
        "memory_at_end": round(report.memory[-1]),
        "seconds": round(seconds),
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def append(path: Path, *rows: dict[str, object]) -> None:
    """Adds rows to the file, all of them or none."""
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if not file.tell():
            writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=50_000)
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/data/reliability")
    args = parser.parse_args()
    if args.steps < 1000:
        parser.error("--steps must be at least 1000")

    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "faults.csv"
    rows = list(csv.DictReader(path.open())) if path.exists() else []
    done = {(row["run"], int(row["seed"]), int(row["steps"])) for row in rows}

    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)

        def run(
            name: str,
            seed: int,
            faults: bool,
            kills: int = 0,
            devices: tuple[int, ...] = (1,),
            reference: Report | None = None,
        ) -> tuple[Report, dict[str, object]]:
            settings = Settings(
                args.steps, max(args.steps // 200, 50), seed, faults, directory / "compiled"
            )
            started = time.monotonic()
            report = faulty_run.drive(
                directory / f"{name}-{seed}",
                settings,
                kills,
                devices,
                lambda line: print(name, line),
            )
            return report, row_of(name, settings, report, reference, time.monotonic() - started)

        for seed in SEEDS:
            if ("quiet", seed, args.steps) not in done:
                append(path, run("quiet", seed, faults=False)[1])
        for seed in SEEDS[1:]:
            if ("uninterrupted", seed, args.steps) not in done:
                append(path, run("uninterrupted", seed, faults=True)[1])
        # The two runs that are compared bit by bit come together or not at all.
        if ("killed", 0, args.steps) not in done:
            uninterrupted, row = run("uninterrupted", 0, faults=True)
            _, row_of_killed = run("killed", 0, True, args.kills, reference=uninterrupted)
            append(path, row, row_of_killed)
        if ("devices", 0, args.steps) not in done:
            append(path, run("devices", 0, True, args.kills // 2, devices=(1, 2, 4, 8))[1])


if __name__ == "__main__":
    main()
