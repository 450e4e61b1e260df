"""Solve a differential equation by a physics-informed network (Flax NNX), with several optimizers.

    python examples/physics_informed.py

trains a network on Burgers' equation with SOAP, then with Adam. It takes less than five minutes on
two idle cores. All optimizers start from the same weights and see the same collocation points. The
errors are relative to a reference solution that the program computes.

    python examples/physics_informed.py --equation kdv --optimizer soap lbfgs --dtype float64

solves another equation with other optimizers, in float64. The equations are burgers, allen-cahn,
kdv and helmholtz.

The folder --out receives runs.csv, with a row for each run, and curves.csv, with the loss and the
error at regular steps. The pictures solution.png and error.png follow at the end.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence

# On two cores, the threads of OpenBLAS and XLA compete. OpenBLAS reads this when it is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from flags import OneLineParser
from physics.equations import EQUATIONS
from physics.flags import Settings, parse_arguments
from physics.pictures import draw_errors, draw_solutions
from physics.records import Files, circumstances
from physics.specs import Spec
from physics.training import Point, Result, train
from tqdm import tqdm

BAR_FORMAT = "{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}"


def train_all(settings: Settings, files: Files, results: dict[Spec, Result]) -> str:
    """Trains all runs, and adds them to `files` and `results`; returns the problem, if any."""
    problem = ""
    for spec in settings.specs():
        result = train_one(spec)
        results[spec] = result
        files.add(spec, result)
        if result.diverged:
            step = result.points[-1].step
            problem = f"error: {spec.label}: the loss of step {step} is not finite"
            problem += "; try a lower --learning-rate"
    return problem


def train_one(spec: Spec) -> Result:
    """Trains one run behind a progress bar, or prints one line if there is no terminal."""
    title = f"{spec.label}, seed {spec.seed}"
    with tqdm(total=spec.steps, desc=title, bar_format=BAR_FORMAT, disable=None) as bar:

        def report(point: Point) -> None:
            numbers = f"loss={point.loss:.2e}, relative L2={point.relative_l2:.2e}"
            bar.set_postfix_str(numbers, refresh=False)
            bar.update(point.step - bar.n)

        result = train(spec, report)
        if bar.disable:
            last = result.points[-1]
            print(
                f"{title}: relative L2 error {last.relative_l2:.2e} after {last.step} steps, "
                f"{last.seconds:.0f} s",
                flush=True,
            )
    return result


# Reports ------------------------------------------------------------------------------------------


def describe(settings: Settings) -> str:
    """Describes the equation, the network and the device."""
    size = settings.size
    options = {
        "Fourier features": bool(size.fourier_scale),
        "weight factorization": size.factorized,
        "causal weights": bool(settings.causal_tolerance),
    }
    used = "".join(f", {name}" for name, on in options.items() if on)
    return (
        f"{EQUATIONS[settings.equation].label}: {size.layers} layers of width {size.width}{used}; "
        f"{settings.steps} steps of {settings.points} points in {settings.dtype}; "
        f"on {circumstances()['device']}"
    )


def closing_table(results: dict[Spec, Result]) -> str:
    """Returns a table of all runs."""
    lines = [["optimizer", "seed", "learning rate", "loss", "relative L2", "seconds", "ms/step"]]
    for spec, result in results.items():
        last = result.points[-1]
        lines.append(
            [
                spec.label,
                f"{spec.seed}",
                f"{spec.learning_rate:g}",
                f"{last.loss:.2e}",
                f"{last.relative_l2:.2e}",
                f"{last.seconds:.0f}",
                f"{1e3 * last.seconds / max(last.step, 1):.1f}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


def verdict(results: dict[Spec, Result]) -> str:
    """Divides Adam's error by that of each optimizer, as geometric means over seeds."""
    errors: dict[str, list[float]] = {}
    for spec, result in results.items():
        errors.setdefault(spec.label, []).append(result.relative_l2)
    means = {
        label: math.exp(sum(map(math.log, values)) / len(values))
        for label, values in errors.items()
    }
    return "\n".join(
        f"Adam's error is {means['Adam'] / mean:.2g} times {label}'s."
        for label, mean in means.items()
        if label != "Adam" and "Adam" in means and math.isfinite(mean + means["Adam"])
    )


def close(
    parser: argparse.ArgumentParser, settings: Settings, results: dict[Spec, Result], problem: str
) -> str:
    """Prints and draws the results of complete runs; returns the problem, if any."""
    if results:
        print(f"\n{closing_table(results)}\n{verdict(results)}")
        equation = EQUATIONS[settings.equation]
        try:
            draw_solutions(equation, results, settings.folder / "solution.png")
            draw_errors(equation, results, settings.folder / "error.png")
        except OSError as error:
            problem = problem or f"error: cannot draw {error.filename}: {error.strerror}"
    if problem:
        print(f"{parser.prog}: {problem} (results so far: {settings.folder})", file=sys.stderr)
    else:
        print(f"Rows, curves and pictures are in {settings.folder}.")
    return problem


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    settings = parse_arguments(parser, arguments)
    try:
        files = Files(settings.folder)
    except OSError as error:
        parser.error(f"argument --out: cannot write to {error.filename}: {error.strerror}")
    print(describe(settings), flush=True)
    results: dict[Spec, Result] = {}
    try:
        problem = train_all(settings, files, results)
        code = 1 if problem else 0
    except KeyboardInterrupt:
        problem, code = "interrupted", 130
    if close(parser, settings, results, problem):
        code = code or 1
    return code


if __name__ == "__main__":
    sys.exit(main())
