"""Compares optimizers on physics-informed networks, each with its own tuned learning rate.

    python tests/benchmarks/physics_study.py
    python tests/benchmarks/physics_page.py

The first command trains all contenders on Burgers' equation in float32 and float64. It takes more
than an hour of one core. The second command draws the pictures and tables of
docs/explanation/physics.md.

The learning rate is searched by half decades with the first seed, until there is a worse rate on
both sides of the best. The best one is trained with all seeds. Every complete run is a row of
runs.csv, and complete runs are skipped: the same command continues an interrupted study.

The contenders are the optimizers of examples/physics_informed.py, and SOAP with two defects of an
old public port (old_port.py).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

sys.path.append(str(Path(__file__).parents[2] / "examples"))

from comparison.plans import Plan, valley
from comparison.presets import PRESETS
from physics.equations import EQUATIONS
from physics.specs import Spec
from physics.training import Result, train
from physics_records import (
    CONTENDERS,
    Record,
    Sizes,
    append,
    median_run,
    read_records,
    spec_of,
)

ROOT = Path(__file__).parents[2]
DATA = ROOT / "docs" / "data" / "physics"
DTYPES = ("float32", "float64")
# Three rates at first, and up to eight more.
SEARCH = PRESETS["quick"]._replace(rates=3, extensions=8)


class Study(NamedTuple):
    """The runs to compare."""

    equations: Sequence[str] = ("burgers",)
    contenders: Sequence[str] = tuple(CONTENDERS)
    dtypes: Sequence[str] = DTYPES
    seeds: Sequence[int] = (0, 1, 2)
    sizes: Sizes = Sizes()

    def bases(self) -> Iterable[Spec]:
        """The run of each contender from which its search starts."""
        for equation in self.equations:
            for contender in self.contenders:
                for dtype in self.dtypes:
                    base = spec_of(equation, contender, dtype, self.sizes)
                    yield base.but(seed=self.seeds[0])


def searched(base: Spec, errors: Mapping[Spec, float], plan: Any) -> Spec | None:
    """The best run of the search, or None while runs are missing; adds its runs to the plan."""
    search: Any = valley  # Its runs are of another kind, with the same methods.
    grid = search(plan, base, SEARCH)
    return min(grid, key=errors.__getitem__) if grid else None


def new_plan(errors: Mapping[Spec, float]) -> Any:
    make: Any = Plan
    return make(errors)


def plan_of(study: Study, errors: Mapping[Spec, float]) -> Any:
    """All runs that a study needs, as far as known errors tell."""
    plan = new_plan(errors)
    for base in study.bases():
        best = searched(base, errors, plan)
        if best is not None:
            plan.need(best.but(seed=seed) for seed in study.seeds)
    return plan


def errors_of(records: Mapping[Spec, Record]) -> dict[Spec, float]:
    return {spec: record.error for spec, record in records.items()}


def run(study: Study, folder: Path, trained: Callable[[Spec], Result] = train) -> None:
    """Trains all missing runs, and adds each to the files as it completes."""
    folder.mkdir(parents=True, exist_ok=True)
    records = read_records(folder)
    started, count = time.perf_counter(), 0
    while missing := plan_of(study, errors_of(records)).missing:
        spec = missing[0]
        result = trained(spec)
        records[spec] = append(folder, spec, result)
        count += 1
        print(
            f"{(time.perf_counter() - started) / 60:.1f} min, run {count}: "
            f"{spec.setup.equation} {spec.label} {spec.setup.refresh} f={spec.frequency} "
            f"{spec.setup.dtype} seed {spec.seed}, learning rate {spec.learning_rate:.3g}: "
            f"relative L2 error {records[spec].error:.2e}",
            flush=True,
        )


def repeat(study: Study, folder: Path, trained: Callable[[Spec], Result] = train) -> None:
    """Trains the runs of the pictures again, so that their seconds are comparable."""
    records = read_records(folder)
    errors = errors_of(records)
    for base in study.bases():
        best = searched(base, errors, new_plan(errors))
        own = [records.get(best.but(seed=seed)) for seed in study.seeds] if best else [None]
        complete = [record for record in own if record]
        if len(complete) == len(own):
            spec = median_run(complete).spec
            record = append(folder, spec, trained(spec))
            print(f"{record.values['run']}: {record.values['seconds']} s", flush=True)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def parse(arguments: Sequence[str] | None) -> tuple[Study, Path, bool]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, usual = parser.add_argument, Study()
    for flag, choices, default in (
        ("--equations", EQUATIONS, usual.equations),
        ("--contenders", CONTENDERS, usual.contenders),
        ("--dtypes", DTYPES, usual.dtypes),
    ):
        text = f"some of {', '.join(choices)} (default: {' '.join(default)})"
        add(flag, nargs="+", choices=choices, default=default, metavar="NAME", help=text)
    add("--seeds", nargs="+", type=int, default=usual.seeds, help="the first one is for tuning")
    for name, default in usual.sizes._asdict().items():
        add(f"--{name}", type=positive, default=default, help=f"(default: {default})")
    text = "train the runs of the pictures again, on an idle machine, to compare their seconds"
    add("--repeat", action="store_true", help=text)
    add("--out", type=Path, default=DATA, help="folder of the CSVs (default: docs/data/physics)")
    got = parser.parse_args(arguments)
    sizes = Sizes(*(getattr(got, name) for name in Sizes._fields))
    return Study(got.equations, got.contenders, got.dtypes, got.seeds, sizes), got.out, got.repeat


def main(arguments: Sequence[str] | None = None) -> int:
    study, folder, again = parse(arguments)
    (repeat if again else run)(study, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
