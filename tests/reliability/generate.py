"""Runs the checks of test_generated.py on many random cases, and records the run.

    pip install ".[tests]"
    python tests/reliability/generate.py --examples 10000

An example is a tree, an optimizer and a history of gradients. It adds a row to
docs/data/reliability/generated.csv.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import math
import os
import platform
import sys
import time
import traceback
from pathlib import Path
from typing import Any

# OpenBLAS's threads and XLA's fight over the cores; OpenBLAS reads this when it is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.append(str(Path(__file__).parents[1]))

import hypothesis
import jax
from helpers import generated
from helpers.generated import Case
from hypothesis.errors import UnsatisfiedAssumption
from test_generated import CHECKS, Check
from tqdm import tqdm

FILE = Path(__file__).parents[2] / "docs/data/reliability/generated.csv"


def cases_of(check: Check, examples: int) -> int:
    """The number of cases with which a check has its share of all examples."""
    histories, share = CHECKS[check]
    return math.ceil(share * examples / histories)


def failures_of(check: Check, cases: int, seed: int, progress: tqdm[Any]) -> int:
    """Runs a check on random cases, and returns how many failed; prints each failure."""
    histories, _ = CHECKS[check]
    failures = 0

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=cases,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=[
            hypothesis.HealthCheck.too_slow,
            hypothesis.HealthCheck.filter_too_much,
        ],
    )
    @hypothesis.given(case=generated.cases(), seed=generated.SEEDS)
    def run(case: Case, seed: int) -> None:
        nonlocal failures
        try:
            check(case, seed, histories)
        except UnsatisfiedAssumption:
            raise
        except Exception:
            failures += 1
            tqdm.write(f"{check.__name__}, seed {seed}: {case}\n{traceback.format_exc()}")
        jax.clear_caches()
        progress.update(histories)

    run()
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--examples", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=None, help="drawn at random by default")
    args = parser.parse_args()
    if args.examples < 1:
        parser.error("--examples must be at least 1")

    jax.config.update("jax_disable_most_optimizations", True)  # Compiling takes most of the time.
    seed = int.from_bytes(os.urandom(4)) if args.seed is None else args.seed
    cases = {check: cases_of(check, args.examples) for check in CHECKS}
    total = sum(cases[check] * histories for check, (histories, _) in CHECKS.items())
    started = time.monotonic()
    with tqdm(total=total, unit="example") as progress:
        failures = sum(failures_of(check, cases[check], seed, progress) for check in CHECKS)
        examples = int(progress.n)
    row = {
        "date": datetime.date.today().isoformat(),
        "seed": seed,
        "examples": examples,
        "failures": failures,
        "seconds": round(time.monotonic() - started),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }
    print(row)
    FILE.parent.mkdir(parents=True, exist_ok=True)
    with FILE.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if not file.tell():
            writer.writeheader()
        writer.writerow(row)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
