"""Makes the pictures and tables of docs/explanation/physics.md from the CSVs of `physics_study.py`.

    python tests/benchmarks/physics_page.py            draw, and update the page
    python tests/benchmarks/physics_page.py --check    write nothing; exit with 1 if it is stale

The page has a block for each question and equation, between `<!-- begin EQUATION QUESTION -->` and
`<!-- end -->`. A contender is in it once all its runs are complete.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

sys.path.append(str(Path(__file__).parents[2] / "examples"))

import page_blocks
from comparison.tables import Table
from matplotlib.figure import Figure
from page_blocks import ROOT, Maker, circumstances, image_name, values_of
from physics.equations import EQUATIONS
from physics.specs import Spec
from physics.training import Point
from physics_records import (
    CONTENDERS,
    Record,
    median_run,
    name_of,
    read_curves,
    read_records,
    spec_of,
)
from physics_study import DATA, DTYPES, Study, errors_of, new_plan, searched

PAGE = ROOT / "docs" / "explanation" / "physics.md"
NOT_RUN = "This study is not complete yet."
OLD = ("soap-2-qr", "old-port-count", "old-port-nu", "old-port")
REFRESHES = tuple(
    f"soap-{frequency}-{method}" for method in ("qr", "eigh") for frequency in (1, 2, 10)
)
MAIN = ("adam", "muon", "lbfgs", "soap-2-qr", "kl", "hyperball")


class Outcome(NamedTuple):
    """The runs of a contender at its best learning rate, one for each seed."""

    contender: str
    dtype: str
    records: Sequence[Record]

    @property
    def error(self) -> float:
        """The geometric mean of the final errors."""
        errors = [record.error for record in self.records]
        if not all(map(math.isfinite, errors)):
            return math.inf
        return math.exp(sum(map(math.log, errors)) / len(errors))

    @property
    def text(self) -> str:
        """The mean error, with the lowest and highest."""
        errors = [record.error for record in self.records]
        return f"{self.error:.1e} [{min(errors):.1e}, {max(errors):.1e}]"

    @property
    def rate(self) -> float:
        return self.records[0].spec.learning_rate


Outcomes = Mapping[tuple[str, str], Outcome]  # by contender and dtype


def outcomes_of(equation: str, records: Mapping[Spec, Record]) -> dict[tuple[str, str], Outcome]:
    """The complete contenders of an equation."""
    study, errors = Study((equation,)), errors_of(records)
    outcomes = {}
    for contender in CONTENDERS:
        for dtype in DTYPES:
            base = spec_of(equation, contender, dtype, study.sizes)
            best = searched(base, errors, new_plan(errors))
            runs = [best.but(seed=seed) for seed in study.seeds] if best else []
            if runs and all(spec in records for spec in runs):
                found = [records[spec] for spec in runs]
                outcomes[contender, dtype] = Outcome(contender, dtype, found)
    return outcomes


# Tables -------------------------------------------------------------------------------------------


def errors_table(names: Sequence[str], beside: str, outcomes: Outcomes) -> Table:
    """Errors and learning rates, and errors relative to those of the contender `beside`."""
    columns = ["optimizer"]
    for dtype in DTYPES:
        columns += [dtype, "learning rate", f"/ {CONTENDERS[beside].label.split(',')[0]}"]
    rows = []
    for name in names:
        row = [CONTENDERS[name].label]
        for dtype in DTYPES:
            own, other = outcomes.get((name, dtype)), outcomes.get((beside, dtype))
            row += [own.text, f"{own.rate:.2g}"] if own else ["-", "-"]
            row += [f"{own.error / other.error:.2f}" if own and other else "-"]
        if set(row[1:]) != {"-"}:
            rows.append(row)
    return Table("physics", columns, rows)


# Pictures -----------------------------------------------------------------------------------------

Curves = Mapping[str, Sequence[Point]]


def picture(names: Sequence[str], outcomes: Outcomes, curves: Curves, x: str) -> Figure:
    """Errors of each contender's median seed, a panel for each dtype."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, len(DTYPES), sharey=True)
    for axes, dtype in zip(panels, DTYPES, strict=True):
        for number, name in enumerate(names):
            outcome = outcomes.get((name, dtype))
            if outcome is None:
                continue
            curve = curves.get(name_of(median_run(outcome.records).spec), ())
            axes.plot(
                [getattr(point, x) for point in curve],
                [point.relative_l2 for point in curve],
                f"C{number}",
                label=CONTENDERS[name].label,
            )
        axes.set(title=dtype, xlabel={"step": "step", "seconds": "seconds"}[x], yscale="log")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    panels[0].set_ylabel("relative L2 error")
    return figure


class Question(NamedTuple):
    """A block of the page.

    Attributes:
      contenders: the contenders in its table and in its picture.
      beside: the contender to which the table compares.
      caption: of the picture.
      x: the horizontal axis of the picture.
    """

    contenders: Sequence[str]
    beside: str
    caption: str
    x: str = "step"


QUESTIONS = {
    "optimizers": Question(MAIN, "adam", "Errors of six optimizers against steps"),
    "four": Question(MAIN[:4], "adam", "Errors of four optimizers against steps"),
    "time": Question(MAIN, "adam", "Errors of six optimizers against training time", "seconds"),
    "defects": Question(OLD, "soap-2-qr", "Errors of SOAP with and without the defects"),
    "refreshes": Question(REFRESHES, "soap-2-qr", "Errors of SOAP at several frequencies"),
}


# Page ---------------------------------------------------------------------------------------------


def block_of(equation: str, question: str, data: Path) -> str:
    """The text of one block."""
    if equation not in EQUATIONS or question not in QUESTIONS:
        raise ValueError(f"no block shows {equation} {question}")
    asked = QUESTIONS[question]
    outcomes = outcomes_of(equation, read_records(data))
    table = errors_table(asked.contenders, asked.beside, outcomes)
    if not table.rows:
        return NOT_RUN
    used = [o for o in outcomes.values() if o.contender in asked.contenders]
    image = image_name("physics", equation, question)
    parts = [f"![{asked.caption}](../images/{image})"]
    if question != "time":
        runs = [record for outcome in used for record in outcome.records]
        settings = f"Seeds {values_of(runs, 'seed')}, {values_of(runs, 'steps')} steps."
        where = circumstances(runs, ("JAX", "Optax", "Flax"))
        parts += [table.markdown, f"{settings} {where}"]
    missing = [
        f"{CONTENDERS[name].label} in {dtype}"
        for name in asked.contenders
        for dtype in DTYPES
        if (name, dtype) not in outcomes
    ]
    if missing:
        parts.append(f"Not complete yet: {'; '.join(missing)}.")
    return "\n\n".join(parts)


def picture_of(equation: str, question: str, data: Path) -> Figure | None:
    """The picture of one block, if a contender is complete."""
    if block_of(equation, question, data) == NOT_RUN:
        return None
    asked, outcomes = QUESTIONS[question], outcomes_of(equation, read_records(data))
    return picture(asked.contenders, outcomes, read_curves(data), asked.x)


MAKER = Maker("physics_page.py", "physics", [PAGE], DATA, block_of, picture_of)


def main(arguments: Sequence[str] | None = None) -> int:
    return page_blocks.main(arguments, __doc__, MAKER)


if __name__ == "__main__":
    sys.exit(main())
