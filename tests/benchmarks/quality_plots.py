"""The picture of the results of `quality.py`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from quality_results import Run, by_variant, curves_of, paired


def draw_quality(runs: Sequence[Run], title: str, path: Path) -> None:
    """Held-out loss over steps, and its difference from the first variant's."""
    variants = by_variant(runs)
    first = next(iter(variants.values()))
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    for index, of_variant in enumerate(variants.values()):
        curves = curves_of(of_variant)
        steps = [row.step for row in max((run.evaluations for run in of_variant), key=len)]
        label = of_variant[0].variant
        if len(curves) < len(of_variant):
            label += f" ({len(of_variant) - len(curves)} of {len(of_variant)} diverged)"
        draw_mean(left, steps, list(curves.values()), f"C{index}", label)
        pairs = paired(of_variant, first).values()
        differences = [np.subtract(ours, theirs) for ours, theirs in pairs]
        draw_mean(right, steps, differences, f"C{index}", label)
    left.set(xlabel="step", ylabel="held-out loss, nats per byte")
    right.set(xlabel="step", ylabel=f"the same minus that of {first[0].variant}, seed by seed")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend()
    figure.savefig(path, dpi=120)


def draw_mean(
    axes: Axes, steps: Sequence[int], curves: Sequence[Any], colour: str, label: str
) -> None:
    """The mean of curves; several curves also get a band of one standard deviation."""
    if not curves:
        axes.plot([], [], colour, label=label)
        return
    mean = np.mean(curves, axis=0)
    axes.plot(steps, mean, colour, label=label)
    if len(curves) > 1:
        spread = np.std(curves, axis=0, ddof=1)
        axes.fill_between(steps, mean - spread, mean + spread, color=colour, alpha=0.2, linewidth=0)
