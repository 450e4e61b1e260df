"""Results of `pretrain_lm.py`: rows of metrics, plots, and the table at the end of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure


class Row(NamedTuple):
    """One evaluation. Times count training steps only, without compilation and evaluation."""

    step: int
    train_loss: float  # mean since the last row
    held_out_loss: float
    tokens_per_second: float  # since the last row
    seconds: float  # since the first step


@dataclasses.dataclass
class Run:
    """The record of training with one optimizer."""

    optimizer: str
    label: str  # the printed name of the optimizer
    learning_rate: float
    rows: list[Row] = dataclasses.field(default_factory=list)
    diagnostics: list[dict[str, float]] = dataclasses.field(default_factory=list)  # by row
    state_bytes: int = 0
    wall_clock: float = 0.0  # seconds, with compilation and evaluation
    losses: list[float] = dataclasses.field(default_factory=list)  # since the last row, by step
    durations: list[float] = dataclasses.field(default_factory=list)  # of these steps, in seconds
    training: dict[str, float] = dataclasses.field(default_factory=dict)  # flags that determine it

    @property
    def record(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_record(record: dict[str, Any]) -> Run:
        """Returns the run that has this record."""
        fields: dict[str, Any] = dict(record)
        fields["rows"] = [Row(*row) for row in record["rows"]]
        return Run(**fields)

    @property
    def best_loss(self) -> float:
        """The lowest held-out loss."""
        return min(row.held_out_loss for row in self.rows)

    def first_row_at_or_below(self, held_out_loss: float) -> Row | None:
        """Returns the first evaluation with this held-out loss or less, or None."""
        return next((row for row in self.rows if row.held_out_loss <= held_out_loss), None)


def draw_curves(runs: Sequence[Run], title: str, path: Path) -> None:
    """Draws training and held-out loss against steps and against training time."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    figure.suptitle(title)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, field, label in (
        (left, "step", "step"),
        (right, "seconds", "seconds of training (no compilation, no evaluation)"),
    ):
        for number, run in enumerate(runs):
            x = [getattr(row, field) for row in run.rows]
            held_out = [row.held_out_loss for row in run.rows]
            training = [row.train_loss for row in run.rows]
            axes.plot(x, held_out, f"C{number}-", label=f"{run.label}, held out")
            axes.plot(x, training, f"C{number}:", label=f"{run.label}, training")
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    left.set_ylabel("loss, nats per byte")
    left.legend()
    figure.savefig(path, dpi=120)


DIAGNOSTICS = {  # last part of a scalar's name: title and scale of its plot
    "off_diagonal_mass": ("off-diagonal mass of the factors in their bases", "linear"),
    "departure_from_orthonormality": ("departure of the bases from orthonormality", "log"),
    "condition_number": ("condition number of the factors", "log"),
    "direction_rms": ("root mean square of the direction", "linear"),
}


def draw_diagnostics(run: Run, path: Path) -> None:
    """Plots the diagnostics of each block shape against steps."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    figure.suptitle(f"Diagnostics of {run.label}, by block shape")
    for axes, (quantity, (title, scale)) in zip(
        figure.subplots(2, 2, sharex=True).flat, DIAGNOSTICS.items(), strict=True
    ):
        for name in run.diagnostics[0]:
            _, shape, *rest = name.split("/")  # soap/64x256/condition_number
            if rest == [quantity]:
                scalars = [evaluation[name] for evaluation in run.diagnostics]
                axes.plot([row.step for row in run.rows], scalars, label=shape)
        has_positive = any(value > 0 for line in axes.lines for value in line.get_ydata())
        axes.set(title=title, yscale=scale if has_positive else "linear")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.supxlabel("step")
    figure.savefig(path, dpi=120)


def progress(run: Run, steps: int) -> str:
    """Returns the last evaluation as one line, for logs without a progress bar."""
    row = run.rows[-1]
    line = f"{run.label:<5}  step {row.step:>5} of {steps}  held-out loss {row.held_out_loss:.3f}"
    if row.step == 0:
        return line
    left = row.seconds / row.step * (steps - row.step)
    speed = f"{row.tokens_per_second:>9,.0f} tokens/s"
    return f"{line}  training loss {row.train_loss:.3f}  {speed}  {left:>4.0f} s left"


def closing_table(runs: Sequence[Run], target: Run | None, tokens_per_step: int) -> str:
    """Returns a table of runs, with the step at which each matched the final loss of `target`."""

    def steps_to_target(run: Run) -> str:
        row = run.first_row_at_or_below(target.rows[-1].held_out_loss) if target else None
        return f"{row.step}" if row else "-"

    columns: dict[str, Callable[[Run], str]] = {
        "optimizer": lambda run: run.label,
        "learning rate": lambda run: f"{run.learning_rate:g}",
        "train loss": lambda run: f"{run.rows[-1].train_loss:.3f}",
        "held-out loss": lambda run: f"{run.rows[-1].held_out_loss:.3f}",
        "best held-out": lambda run: f"{run.best_loss:.3f}",
        "steps to AdamW's": steps_to_target,
        "tokens/s": lambda run: (
            f"{run.rows[-1].step * tokens_per_step / run.rows[-1].seconds:,.0f}"
        ),
        "state MB": lambda run: f"{run.state_bytes / 1e6:.1f}",
        "wall clock s": lambda run: f"{run.wall_clock:.0f}",
    }
    lines = [list(columns), *([cell(run) for cell in columns.values()] for run in runs)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


def counters(run: Run) -> str:
    """Reports the final numbers of adopted bases, rejected refreshes and rejected gradients."""
    last = {name.rpartition("/")[2]: value for name, value in run.diagnostics[-1].items()}
    refreshes, gradients = last["rejected_refreshes"], last["rejected_gradients"]
    return (
        f"{run.label} adopted {last['refreshes']:,.0f} bases and rejected {refreshes:,.0f}; "
        f"it rejected {gradients:,.0f} gradients."
    )


def verdict(run: Run, target: Run) -> str:
    """Reports the step at which `run` reached the final held-out loss of `target`."""
    goal = target.rows[-1]
    what = f"{target.label}'s final held-out loss ({goal.held_out_loss:.3f})"
    row = run.first_row_at_or_below(goal.held_out_loss)
    if row is None:
        best = f"its best was {run.best_loss:.3f}"
        return f"{run.label} did not reach {what} in {goal.step} steps: {best}."
    return (
        f"{run.label} reached {what} at step {row.step} of {goal.step} "
        f"({row.step / goal.step:.0%} of the steps, {row.seconds / goal.seconds:.0%} of the time)."
    )
