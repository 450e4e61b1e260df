"""The pictures: solutions beside the reference, and errors against steps and time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from physics.problems import Problem
from physics.specs import Spec
from physics.training import Result

Results = Mapping[Spec, Result]


def draw_solutions(problem: Problem, results: Results, path: Path) -> None:
    """Draws the reference, and the solution and absolute error of each optimizer's first run."""
    firsts: dict[str, Result] = {}
    for spec, result in results.items():
        firsts.setdefault(spec.label, result)
    reference = next(iter(firsts.values())).reference
    figure = Figure(figsize=(12, 3 * len(firsts)), layout="constrained")
    rows = figure.subplots(len(firsts), 3, squeeze=False, sharex=True, sharey=True)
    bound = np.abs(reference.values).max()
    for axes, (label, result) in zip(rows, firsts.items(), strict=True):
        error = np.abs(result.prediction - reference.values)
        title = f"{label}: relative L2 error {result.relative_l2:.1e}"
        for one, values, text, limits, colors in (
            (axes[0], reference.values, "reference", (-bound, bound), "RdBu_r"),
            (axes[1], result.prediction, title, (-bound, bound), "RdBu_r"),
            (axes[2], error, f"{label}: absolute error", (0.0, error.max()), "viridis"),
        ):
            draw_field(one, problem, values, limits, colors)
            one.set_title(text, fontsize="medium")
    figure.suptitle(problem.label)
    figure.savefig(path, dpi=120)


def draw_field(
    axes: Axes, problem: Problem, values: np.ndarray, limits: tuple[float, float], colors: str
) -> None:
    """Draws one solution, with a color bar."""
    extent = (problem.lower[0], problem.upper[0], problem.lower[1], problem.upper[1])
    image = axes.imshow(
        values.T, origin="lower", aspect="auto", extent=extent, cmap=colors, clim=limits
    )
    axes.set(xlabel=problem.axes[0], ylabel=problem.axes[1])
    axes.label_outer()
    figure = axes.get_figure()
    assert figure is not None
    figure.colorbar(image, ax=axes)


def draw_errors(problem: Problem, results: Results, path: Path) -> None:
    """Draws the relative L2 errors of all runs against steps and against training time."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    figure.suptitle(problem.label)
    left, right = figure.subplots(1, 2, sharey=True)
    labels = list(dict.fromkeys(spec.label for spec in results))
    for axes, field, title in (
        (left, "step", "step"),
        (right, "seconds", "seconds of training (no compilation, no evaluation)"),
    ):
        shown = set()
        for spec, result in results.items():
            x = [getattr(point, field) for point in result.points]
            y = [point.relative_l2 for point in result.points]
            color = f"C{labels.index(spec.label)}"
            label = None if spec.label in shown else spec.label
            axes.plot(x, y, color, label=label)
            shown.add(spec.label)
        axes.set(xlabel=title, yscale="log")
        axes.grid(alpha=0.3)
    left.set_ylabel("relative L2 error")
    left.legend()
    figure.savefig(path, dpi=120)
