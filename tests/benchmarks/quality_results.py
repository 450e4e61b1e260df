"""Results of runs of `quality.py`, as CSV, as summaries by variant, and as a table."""

import csv
import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from results import MISSING, markdown, megabytes
from training import Evaluation

INTEGERS = ("step", "mass_step")

Curves = dict[int, list[float]]  # held-out losses by seed


@dataclasses.dataclass(frozen=True)
class Run:
    """One variant with one seed."""

    variant: str
    options: str
    seed: int
    state_bytes: int
    evaluations: Sequence[Evaluation]

    @property
    def last(self) -> Evaluation:
        return self.evaluations[-1]

    @property
    def diverged(self) -> bool:
        return not math.isfinite(self.last.held_out_loss)

    @property
    def key(self) -> tuple[str, str, int]:
        return self.variant, self.options, self.seed


# CSV ----------------------------------------------------------------------------------------------


def append_run(path: Path, run: Run, settings: Mapping[str, str]) -> None:
    """Adds the rows of a run, with the settings in separate columns."""
    constant = {"variant": run.variant, "options": run.options, **settings}
    constant |= {"seed": run.seed, "state_bytes": run.state_bytes}
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [*constant, *Evaluation._fields])
        if is_new:
            writer.writeheader()
        writer.writerows(constant | evaluation._asdict() for evaluation in run.evaluations)


def read_runs(path: Path, settings_of: Callable[[str], Mapping[str, str]], steps: int) -> list[Run]:
    """The complete runs with their variant's settings, in the order of the file.

    A run is complete if it reached its last step or diverged.

    Raises:
      ValueError: a column is missing from the file.
    """
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    grouped: dict[tuple[str, str, int], dict[int, dict[str, str]]] = {}
    for row in rows:
        settings = settings_of(row.get("variant", ""))
        if missing := {"variant", "seed", *settings, *Evaluation._fields} - row.keys():
            raise ValueError(f"{path} has no column {', '.join(sorted(missing))}")
        if all(row[name] == value for name, value in settings.items()):
            key = row["variant"], row["options"], int(row["seed"])
            grouped.setdefault(key, {})[int(row["step"])] = row
    runs = [run_of(key, list(by_step.values())) for key, by_step in grouped.items()]
    return [run for run in runs if run.diverged or run.last.step == steps]


def run_of(key: tuple[str, str, int], rows: Sequence[Mapping[str, str]]) -> Run:
    evaluations = [
        Evaluation._make(
            (int if name in INTEGERS else float)(row[name]) for name in Evaluation._fields
        )
        for row in rows
    ]
    return Run(*key, int(rows[-1]["state_bytes"]), evaluations)


# Summaries ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Summary:
    """A summary of the runs of a variant.

    Attributes:
      variant: its name.
      options: its options, as text.
      losses: the held-out loss after the last step, by seed; NaN if the run diverged.
      difference: the loss minus the first variant's, by seed, if neither run diverged.
      adopted: the number of adopted bases, relative to a refresh in every step.
      off_diagonal_mass: the mean over the runs.
      rejected_refreshes: the number in all runs together.
      state_bytes: the size of one state.
      seconds_per_step: the median over the runs.
    """

    variant: str
    options: str
    losses: Mapping[int, float]
    difference: Mapping[int, float]
    adopted: float
    off_diagonal_mass: float
    rejected_refreshes: float
    state_bytes: int
    seconds_per_step: float

    @property
    def finite_losses(self) -> list[float]:
        return [loss for loss in self.losses.values() if math.isfinite(loss)]

    @property
    def diverged(self) -> int:
        return len(self.losses) - len(self.finite_losses)


def summarize(runs: Sequence[Run]) -> list[Summary]:
    """The summaries in the order in which the variants first appear."""
    variants = by_variant(runs)
    first = next(iter(variants.values()), [])
    return [summary_of(of_variant, first) for of_variant in variants.values()]


def by_variant(runs: Sequence[Run]) -> dict[tuple[str, str], list[Run]]:
    grouped: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        grouped.setdefault((run.variant, run.options), []).append(run)
    return grouped


def summary_of(runs: Sequence[Run], first: Sequence[Run]) -> Summary:
    rows = [row for run in runs for row in run.evaluations if row.step > 0]
    lasts = [run.last for run in runs]
    return Summary(
        runs[0].variant,
        runs[0].options,
        losses={run.seed: run.last.held_out_loss for run in runs},
        difference={seed: pair[0][-1] - pair[1][-1] for seed, pair in paired(runs, first).items()},
        adopted=sum(row.adopted for row in lasts) / (sum(row.adoptable for row in lasts) or 1),
        off_diagonal_mass=mean_of_finite(row.off_diagonal_mass for row in rows),
        rejected_refreshes=sum(row.rejected_refreshes for row in lasts),
        state_bytes=runs[0].state_bytes,
        seconds_per_step=statistics.median(row.seconds_per_step for row in rows),
    )


def curves_of(runs: Iterable[Run]) -> Curves:
    """The losses at every evaluation, for runs that did not diverge."""
    return {
        run.seed: [row.held_out_loss for row in run.evaluations] for run in runs if not run.diverged
    }


def paired(runs: Iterable[Run], first: Iterable[Run]) -> dict[int, tuple[list[float], list[float]]]:
    """The curves of two variants, for the seeds that both have."""
    ours, theirs = curves_of(runs), curves_of(first)
    return {seed: (ours[seed], theirs[seed]) for seed in ours if seed in theirs}


def mean_of_finite(values: Iterable[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return statistics.fmean(finite) if finite else math.nan


def standard_error(values: Sequence[float]) -> float:
    if len(values) < 2:
        return math.nan
    return statistics.stdev(values) / math.sqrt(len(values))


# Markdown -----------------------------------------------------------------------------------------


def quality_table(title: str, summaries: Sequence[Summary]) -> str:
    columns: dict[str, Callable[[Summary], str]] = {
        "variant": lambda summary: summary.variant,
        "options": lambda summary: f"`{summary.options}`" if summary.options else MISSING,
        "held-out loss": mean_loss,
        "minus the first's": lambda summary: difference(summary, summaries[0]),
        "by seed": losses_by_seed,
        "bases adopted": lambda summary: number(summary.adopted, ".3f"),
        "off-diagonal mass": lambda summary: number(summary.off_diagonal_mass, ".3f"),
        "rejected": lambda summary: number(summary.rejected_refreshes, ",.0f"),
        "state MB": lambda summary: megabytes(summary.state_bytes),
        "ms a step": lambda summary: number(1e3 * summary.seconds_per_step, ",.1f"),
    }
    return f"### {title}\n\n{markdown(columns, summaries)}\n\n{NOTE}\n"


NOTE = (
    "Held-out loss: nats per byte after the last step, mean and sample standard deviation over the"
    " seeds that did not diverge. Minus the first's: the mean over seeds of the difference to the"
    " first variant with the same seed, hence the same initial weights and batches, and its"
    " standard error. Bases adopted: relative to a refresh of every block in every step. Off-"
    "diagonal mass: of the factors in their bases, the largest over block shapes and over the"
    " factors of the first block of each, measured after one step of each interval between two"
    " evaluations, with the bases of that step and its gradient in the factors; the mean over the"
    " run and the seeds. Rejected: refreshes of all runs. Ms a step: the median over the intervals"
    " between evaluations. Runs are not interleaved, so that this is no comparison: speed.py"
    " compares times."
)


def mean_loss(summary: Summary) -> str:
    losses = summary.finite_losses
    parts = []
    if losses:
        spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        parts.append(f"{statistics.fmean(losses):.4f}{spread}")
    if summary.diverged:
        parts.append(f"{summary.diverged} of {len(summary.losses)} diverged")
    return "; ".join(parts)


def difference(summary: Summary, first: Summary) -> str:
    values = list(summary.difference.values())
    if summary is first or not values:
        return MISSING
    error = standard_error(values)
    return f"{statistics.fmean(values):+.4f}" + (f" ± {error:.4f}" if len(values) > 1 else "")


def losses_by_seed(summary: Summary) -> str:
    return ", ".join(
        f"{seed}: {loss:.4f}" if math.isfinite(loss) else f"{seed}: diverged"
        for seed, loss in sorted(summary.losses.items())
    )


def number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else MISSING
