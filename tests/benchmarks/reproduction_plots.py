"""The pictures of `reproduction.py`, one for each study."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

sys.path.append(str(Path(__file__).parents[2] / "examples"))

from comparison import plans
from comparison.contenders import CONTENDERS
from comparison.fits import fit
from comparison.plans import Plan, tuned
from comparison.presets import Preset
from comparison.records import Record
from comparison.running import Point
from comparison.specs import Spec
from comparison.tables import best_runs, finite_losses, losses, shorter_runs

Records = Mapping[Spec, Record]
Curves = Mapping[str, Sequence[Point]]
LOSS = "final held-out loss, nats per byte"


def points_of(records: Records, specs: Sequence[Spec]) -> tuple[list[float], list[float]]:
    """Means and standard deviations over seeds; runs that all diverged are NaN."""
    means, deviations = [], []
    for spec in specs:
        values = list(finite_losses(records, spec).values())
        means.append(mean(values) if values else math.nan)
        deviations.append(stdev(values) if len(values) > 1 else 0.0)
    return means, deviations


COLOURS = 10  # of Matplotlib's cycle; later lines are dashed


def style(number: int) -> str:
    return "--" if number >= COLOURS else "-"


def mark(
    axes: Axes, x: Sequence[float], records: Records, specs: Sequence[Spec], label: str
) -> None:
    """A line through the means, with bars of one standard deviation over seeds."""
    means, deviations = points_of(records, specs)
    line = style(len(axes.containers))
    axes.errorbar(x, means, deviations, ls=line, marker="o", ms=4, capsize=3, label=label)


def canvas(columns: int = 1, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(6.5 if columns == 1 else 11, 4.5), layout="constrained")
    axes = list(np.atleast_1d(figure.subplots(1, columns, sharey=sharey)))
    for one in axes:
        one.grid(alpha=0.3)
    return figure, axes


# Studies ------------------------------------------------------------------------------------------


def steps_to_loss(preset: Preset, records: Records, curves: Curves) -> Figure:
    """Final losses over the number of steps with fitted curves, and held-out loss over steps."""
    figure, (left, right) = canvas(2)
    plan = Plan(losses(records))
    for number, name in enumerate(preset.contenders):
        spec = tuned(plan, preset.spec(name), preset)
        if spec is None:
            continue
        label, colour = CONTENDERS[name].label, f"C{number % COLOURS}"
        curve = curves.get(spec.name, ())
        right.plot(
            [p.step for p in curve], [p.held_out_loss for p in curve], colour + style(number)
        )
        right.lines[-1].set_label(label)
        if name == "adamw":
            (level,), _ = points_of(records, [spec])
            left.axhline(level, color=colour, label="AdamW, all steps")
        elif name in preset.shortened:
            by_steps = shorter_runs(records, spec)
            means, deviations = points_of(records, list(by_steps.values()))
            x = np.array(list(by_steps)) / spec.steps
            left.errorbar(x, means, deviations, fmt=f"{colour}o", capsize=3, label=label)
            if len(x) > 2 and np.isfinite(means).all():
                dense = np.linspace(x[0], x[-1], 100)
                left.plot(dense, [fit(list(x), means).at(value) for value in dense], colour)
    left.set(xlabel="steps, relative to AdamW's", ylabel=LOSS)
    first = [p.held_out_loss for curve in curves.values() for p in curve if p.step > 0]
    top = np.nanquantile(first, 0.9) if first else None
    right.set(xlabel="step", ylabel="held-out loss, one seed", ylim=(None, top))
    left.legend(fontsize=8)
    right.legend(fontsize=7, ncols=2)
    return figure


def lines(
    axes: Axes,
    records: Records,
    specs: Sequence[Spec],
    key: Callable[[Spec], str],
    x: Callable[[Spec], float],
) -> None:
    """A line for each key."""
    groups: dict[str, list[Spec]] = {}
    for spec in sorted(specs, key=x):
        groups.setdefault(key(spec), []).append(spec)
    for label, own in groups.items():
        mark(axes, [x(spec) for spec in own], records, own, label)
    axes.legend(fontsize=8)


def frequency(preset: Preset, records: Records, curves: Curves) -> Figure:
    """The loss over the refresh frequency."""
    figure, (axes,) = canvas()
    best = best_runs("frequency", preset, records)
    for spec in best:
        if spec.contender == "adamw":
            axes.axhline(points_of(records, [spec])[0][0], color="gray", label="AdamW")

    def label(spec: Spec) -> str:
        name = CONTENDERS[spec.contender].label
        return f"{name}, thinned" if "dense" in spec.options else name

    refreshed = [spec for spec in best if spec.frequency]
    lines(axes, records, refreshed, label, lambda spec: spec.frequency)
    axes.set(xscale="log", xlabel="steps from one refresh to the next", ylabel=LOSS)
    return figure


def batch_size(preset: Preset, records: Records, curves: Curves) -> Figure:
    """The loss at equal tokens over the batch size."""
    figure, (axes,) = canvas()

    def tokens(spec: Spec) -> float:
        return spec.batch_size * spec.model.context

    best = best_runs("batch-size", preset, records)
    lines(axes, records, best, lambda spec: CONTENDERS[spec.contender].label, tokens)
    axes.set(xscale="log", xlabel="tokens in a batch", ylabel=LOSS)
    return figure


def learning_rate(preset: Preset, records: Records, curves: Curves) -> Figure:
    """The loss over the learning rate, relative to each contender's best."""
    figure, (axes,) = canvas()
    plan, lowest = Plan(losses(records)), math.inf
    for name in preset.contenders:
        grid = plans.valley(plan, preset.spec(name), preset, plans.MARGIN)
        if grid:
            best = plan.best(grid)
            x = [spec.learning_rate / best.learning_rate for spec in grid]
            label = f"{CONTENDERS[name].label}, best {best.learning_rate:g}"
            mark(axes, x, records, grid, label)
            lowest = min(lowest, plan.losses[best])
    axes.set(xscale="log", xlabel="learning rate, relative to the best", ylabel=LOSS)
    axes.set_ylim(lowest - 0.05, lowest + 1.0)
    axes.legend(fontsize=7)
    return figure


def memory(preset: Preset, records: Records, curves: Curves) -> Figure:
    """The loss over the bytes of the state."""
    figure, (axes,) = canvas()
    for spec in best_runs("memory", preset, records):
        state = next(
            record.state_bytes for other, record in records.items() if other.group == spec.group
        )
        label = spec.options or CONTENDERS[spec.contender].label
        mark(axes, [state / 1e6], records, [spec], label.replace(",", ",\n"))
    axes.set(xlabel="state, MB", ylabel=LOSS)
    axes.legend(fontsize=6)
    return figure


def tiles(preset: Preset, records: Records, curves: Curves) -> Figure:
    """The loss over the number of tiles along the width."""
    figure, (axes,) = canvas()

    def cuts(spec: Spec) -> float:
        size = spec.options.removeprefix("block_size=")
        return spec.model.width / int(size) if size else 1.0

    best = best_runs("tiles", preset, records)
    lines(axes, records, best, lambda spec: f"width {spec.model.width}", cuts)
    axes.set(xscale="log", xlabel="width / block_size", ylabel=LOSS)
    axes.set_xticks([1, 2, 4], ["no tiles", "2", "4"])
    axes.minorticks_off()
    return figure


def width(preset: Preset, records: Records, curves: Curves) -> Figure:
    """The loss over the learning rate at each width, one panel for each set of rules."""
    arms = plans.width_arms(preset)
    figure, panels = canvas(len(arms), sharey=True)
    plan = Plan(losses(records))
    needed = plans.plan_of(["width"], preset, plan.losses).needed
    for axes, (name, options) in zip(panels, arms.items(), strict=True):
        for value in preset.width.values:
            own = {
                spec.learning_rate: spec
                for spec in needed
                if (spec.model.width, spec.options) == (value, options) and spec in records
            }
            rates = sorted(own)
            mark(axes, rates, records, [own[rate] for rate in rates], f"width {value}")
        axes.set(xscale="log", xlabel="learning rate", title=name)
        axes.xaxis.set_minor_formatter(NullFormatter())
    panels[0].set_ylabel(LOSS)
    panels[0].legend(fontsize=8)
    return figure


class Picture(NamedTuple):
    caption: str
    draw: Callable[[Preset, Records, Curves], Figure]


PICTURES = {
    "steps-to-loss": Picture("Final loss over the number of steps", steps_to_loss),
    "frequency": Picture("Final loss over the refresh frequency", frequency),
    "batch-size": Picture("Final loss over the batch size at equal tokens", batch_size),
    "learning-rate": Picture("Final loss over the learning rate", learning_rate),
    "memory": Picture("Final loss over the size of the state", memory),
    "tiles": Picture("Final loss over the number of tiles", tiles),
    "width": Picture("Final loss over the learning rate at several widths", width),
}
