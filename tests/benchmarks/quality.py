"""Measures how options of SOAP change training runs of the byte-level GPT in examples/.

    pip install ".[benchmarks]"
    python tests/benchmarks/quality.py --variant soap --variant "often:precondition_frequency=1" \\
        --variant "thinning:precondition_frequency=thinning(20,10)" --adamw --out out/quality

trains each variant with every seed, and prints a Markdown table. It also writes every evaluation as
CSV, and the loss curves as a picture. A variant is a name, with or without options of
`soap_optax.soap`; the name alone means the defaults. `thinning(20,10)` is
`soap_optax.thinning_frequency(20, 10)`. Seeds decide the initial weights and the batches, so that
variants are compared seed by seed.

A run is not repeated if the CSV of --out has it with the same settings. A long list can therefore
run in pieces, or resume after an interruption. The table has all runs, and compares the other
variants with the first one.
"""

from __future__ import annotations

import argparse
import os
import sys
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

# OpenBLAS's threads and XLA's compete for the cores. OpenBLAS reads this when it is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import optax
import quality_results
import results
import training
from quality_plots import draw_quality
from quality_results import Run
from stalls import unless_stalled
from tqdm import tqdm
from training import LEARNING_RATES, Task
from variants import Variant, read_variant

# Found through `training`, which knows where the examples are.
from byte_gpt import Size  # isort: skip
from flags import positive_number, whole_number  # isort: skip

ADAMW = "adamw"


class Settings(argparse.Namespace):
    """The flags."""

    variant: list[Variant]
    adamw: bool
    seeds: list[int]
    steps: int
    batch_size: int
    layers: int
    width: int
    heads: int
    context: int
    learning_rate: float
    adamw_learning_rate: float
    out: Path | None
    stall_after: int

    def learning_rate_of(self, variant: str) -> float:
        return self.adamw_learning_rate if variant == ADAMW else self.learning_rate

    @property
    def csv(self) -> Path | None:
        return self.out / "quality.csv" if self.out else None


class Trainee(NamedTuple):
    """An optimizer, with its name and options in the table."""

    name: str
    options: str
    optimizer: optax.GradientTransformation


def trainees_of(settings: Settings) -> list[Trainee]:
    rate, steps = settings.learning_rate, settings.steps
    trainees = [
        Trainee(variant.name, variant.text, training.soap(rate, steps, variant.options))
        for variant in settings.variant
    ]
    if settings.adamw:
        rate = settings.adamw_learning_rate
        trainees.append(Trainee(ADAMW, f"learning_rate={rate:g}", training.adamw(rate, steps)))
    return trainees


def columns_of(settings: Settings, task: Task, variant: str) -> dict[str, str]:
    """The settings that a variant's rows need to be in this table."""
    columns = {
        "steps": task.steps,
        "batch_size": task.batch_size,
        **task.size._asdict(),
        "learning_rate": settings.learning_rate_of(variant),
        "text": f"{zlib.crc32(task.text.tobytes()):08x}",
        "device": jax.devices()[0].device_kind,
    }
    return {name: str(value) for name, value in columns.items()}


def train_all(
    settings: Settings, task: Task, trainees: Sequence[Trainee], runs: Sequence[Run]
) -> list[Run]:
    """Adds the missing runs, and writes each as soon as it is complete."""
    known = {run.key for run in runs}
    runs = list(runs)
    for trainee in trainees:
        missing = [s for s in settings.seeds if (trainee.name, trainee.options, s) not in known]
        for run in train_seeds(trainee, missing, task, settings.stall_after):
            runs.append(run)
            if settings.csv:
                columns = columns_of(settings, task, trainee.name)
                quality_results.append_run(settings.csv, run, columns)
    return runs


def train_seeds(
    trainee: Trainee, seeds: Sequence[int], task: Task, stall_after: int
) -> Iterator[Run]:
    """Trains with one seed after another, with the same compiled programs."""
    if not seeds:
        return
    program = training.compile_program(trainee.optimizer, task)
    for seed in seeds:
        bar = tqdm(total=task.steps, desc=f"{trainee.name}, seed {seed}", unit="step")
        with bar, unless_stalled(stall_after) as still_alive:

            def advance(steps: int, bar: tqdm = bar) -> None:
                still_alive()
                bar.update(steps)

            evaluations = list(training.train(program, task, seed, advance))
        yield Run(trainee.name, trainee.options, seed, program.state_bytes, evaluations)


def title_of(settings: Settings) -> str:
    return (
        f"{settings.layers} layers of width {settings.width}, {settings.steps} steps of "
        f"{settings.batch_size} x {settings.context} bytes, learning rate "
        f"{settings.learning_rate:g}"
    )


# Command line -------------------------------------------------------------------------------------


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> Settings:
    add = parser.add_argument
    variant = partial(read_variant, reserved=(ADAMW,))
    form = "NAME:OPTION=VALUE,..."
    add("--variant", type=variant, action="append", default=[], metavar=form, help="of SOAP")
    add("--adamw", action="store_true", help="train with AdamW as well")
    seed = partial(whole_number, least=0)
    add("--seeds", nargs="+", type=seed, default=[0, 1, 2], metavar="SEED")
    for flag, default, meaning in (
        ("--steps", 600, "training steps"),
        ("--batch-size", 32, "windows of text in a batch"),
        ("--layers", 3, "transformer blocks"),
        ("--width", 64, "length of the residual vectors"),
        ("--heads", 2, "attention heads, a divisor of the width"),
        ("--context", 64, "bytes in a window of text"),
    ):
        add(flag, type=whole_number, default=default, metavar="N", help=meaning)
    for flag, default in (
        ("--learning-rate", LEARNING_RATES["soap"]),
        ("--adamw-learning-rate", LEARNING_RATES["adamw"]),
    ):
        add(flag, type=positive_number, default=default, metavar="RATE", help="the highest")
    add("--out", type=Path, help="folder for CSV and picture, and of the runs to go on from")
    stall = "seconds without progress after which the run is ended"
    add("--stall-after", type=whole_number, default=1800, help=stall)
    settings = parser.parse_args(arguments, Settings())

    names = [variant.name for variant in settings.variant]
    if not names and not settings.adamw:
        parser.error("name something to train: --variant, --adamw, or both")
    if len(set(names)) < len(names):
        parser.error("argument --variant: give each variant a name of its own")
    if settings.width % settings.heads:
        parser.error(f"argument --heads: must divide the width, {settings.width}")
    return settings


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    settings = parse(parser, arguments)
    size = Size(settings.layers, settings.width, settings.heads, settings.context)
    task = Task(size, settings.steps, settings.batch_size, training.standard_text())
    try:
        trainees = trainees_of(settings)
    except (TypeError, ValueError) as error:
        parser.error(f"argument --variant: {error}")
    runs: list[Run] = []
    if settings.out and settings.csv:
        settings.out.mkdir(parents=True, exist_ok=True)
        try:
            columns = partial(columns_of, settings, task)
            runs = quality_results.read_runs(settings.csv, columns, settings.steps)
        except ValueError as error:
            parser.error(f"argument --out: {error}")
    print(f"{results.circumstances('quality.py', arguments)}\n", flush=True)
    runs = train_all(settings, task, trainees, runs)
    summaries = quality_results.summarize(runs)
    print(quality_results.quality_table(title_of(settings), summaries))
    if settings.out:
        draw_quality(runs, title_of(settings), settings.out / "quality.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
