"""The flags of `physics_informed.py`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from physics.equations import EQUATIONS
from physics.losses import CHUNKS
from physics.network import Size
from physics.optimizers import OPTIMIZERS, REFRESH_METHODS
from physics.specs import Setup, Spec

from flags import positive_number, whole_number  # isort: skip


class Settings(argparse.Namespace):
    """The values of all flags."""

    equation: str
    optimizer: list[str]
    learning_rate: list[float]
    seeds: list[int]
    dtype: str
    steps: int
    points: int
    layers: int
    width: int
    precondition_frequency: int
    refresh: str
    fourier_scale: float
    causal_tolerance: float
    weight_factorization: bool
    out: Path | None

    @property
    def folder(self) -> Path:
        """The folder of results."""
        return self.out or Path("out/physics") / self.equation

    @property
    def size(self) -> Size:
        """The settings of the network."""
        return Size(self.layers, self.width, self.fourier_scale, self.weight_factorization)

    def spec(self, name: str, learning_rate: float, seed: int) -> Spec:
        """The settings of one run."""
        optimizer = OPTIMIZERS[name]
        setup = Setup(
            self.equation,
            name,
            self.refresh if optimizer.refreshes else "",
            self.size,
            self.points,
            self.causal_tolerance,
            self.dtype,
        )
        frequency = self.precondition_frequency if optimizer.refreshes else 0
        return Spec(setup, learning_rate, optimizer.b1, optimizer.b2, frequency, self.steps, seed)

    def specs(self) -> Iterator[Spec]:
        """The settings of all runs, one optimizer after another."""
        for name, rate in zip(self.optimizer, self.learning_rate, strict=True):
            for seed in self.seeds:
                yield self.spec(name, rate, seed)


def parse_arguments(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> Settings:
    """Reads and checks the flags."""
    add_choices(parser)
    add_variants(parser)
    add_numbers(parser)
    add_options(parser)
    settings = parser.parse_args(arguments, Settings())
    set_learning_rates(parser, settings)
    set_options(settings)
    check(parser, settings)
    return settings


def number_from_zero(text: str) -> float:
    """Reads a finite number that is not negative."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number from 0, got {text!r}")
    return value


# Flags --------------------------------------------------------------------------------------------


def add_choices(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for the equation, the optimizers and their learning rates."""
    add = parser.add_argument
    add(
        "--equation",
        choices=EQUATIONS,
        default="burgers",
        metavar="NAME",
        help=f"one of {', '.join(EQUATIONS)} (default: %(default)s)",
    )
    add(
        "--optimizer",
        nargs="+",
        choices=OPTIMIZERS,
        default=["soap", "adam"],
        metavar="NAME",
        help=f"one or more of {', '.join(OPTIMIZERS)}, trained one after another "
        "(default: soap adam)",
    )
    add(
        "--learning-rate",
        nargs="+",
        type=positive_number,
        metavar="RATE",
        help="one rate for all optimizers, or one for each (default: tuned for Burgers)",
    )


def add_variants(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for seeds, dtype and refresh method."""
    add = parser.add_argument
    add(
        "--seeds",
        nargs="+",
        type=partial(whole_number, least=0),
        default=[0],
        metavar="N",
        help="seeds of the initial weights and the points, one run for each (default: 0)",
    )
    add(
        "--dtype",
        choices=("float32", "float64"),
        default="float32",
        metavar="NAME",
        help="float32 or float64 (default: %(default)s)",
    )
    add(
        "--refresh",
        choices=REFRESH_METHODS,
        default="qr",
        metavar="NAME",
        help=f"SOAP's refresh method, one of {', '.join(REFRESH_METHODS)} (default: %(default)s)",
    )


def add_numbers(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for sizes of the network and of the training."""
    for flag, default, meaning in (
        ("--steps", 4000, "number of training steps"),
        ("--points", 1024, "number of collocation points, drawn anew in each step (by lbfgs once)"),
        ("--layers", 3, "number of hidden layers"),
        ("--width", 64, "width of the hidden layers"),
        ("--precondition-frequency", 2, "number of steps from one of SOAP's refreshes to the next"),
    ):
        parser.add_argument(
            flag,
            type=whole_number,
            default=default,
            metavar="N",
            help=f"{meaning} (default: %(default)s)",
        )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the network and of the loss, and the folder."""
    for flag, metavar, meaning in (
        ("--fourier-scale", "SCALE", "standard deviation of the random Fourier features"),
        ("--causal-tolerance", "TOLERANCE", "tolerance of the causal weights of the residual"),
    ):
        parser.add_argument(
            flag,
            type=number_from_zero,
            metavar=metavar,
            help=f"{meaning}, 0 for none (default: the equation's)",
        )
    parser.add_argument(
        "--no-weight-factorization",
        dest="weight_factorization",
        action="store_false",
        help="train kernels without random weight factorization",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="folder for results; earlier results are replaced (default: out/physics/EQUATION)",
    )


# Checks -------------------------------------------------------------------------------------------


def set_learning_rates(parser: argparse.ArgumentParser, settings: Settings) -> None:
    """Sets one learning rate for each optimizer."""
    names, rates = settings.optimizer, settings.learning_rate
    if len(set(names)) < len(names):
        parser.error("argument --optimizer: name each optimizer once")
    if rates is None:
        rates = [OPTIMIZERS[name].learning_rate for name in names]
    elif len(rates) == 1:
        rates = rates * len(names)
    if len(rates) != len(names):
        parser.error(
            f"argument --learning-rate: got {len(rates)} for {len(names)} optimizers, "
            "give one for all or one for each"
        )
    settings.learning_rate = rates


def set_options(settings: Settings) -> None:
    """Takes the options that are not given from the equation."""
    problem = EQUATIONS[settings.equation]
    if settings.fourier_scale is None:
        settings.fourier_scale = problem.fourier_scale
    if settings.causal_tolerance is None:
        settings.causal_tolerance = problem.causal_tolerance


def check(parser: argparse.ArgumentParser, settings: Settings) -> None:
    """Exits with an error if flags contradict each other."""
    if len(set(settings.seeds)) < len(settings.seeds):
        parser.error("argument --seeds: name each seed once")
    if settings.fourier_scale and settings.width % 2:
        parser.error(f"argument --width: must be even with Fourier features, got {settings.width}")
    if not settings.causal_tolerance:
        return
    if not EQUATIONS[settings.equation].evolves:
        parser.error(
            f"argument --causal-tolerance: must be 0, because {settings.equation} has no time"
        )
    if settings.points % CHUNKS:
        parser.error(
            f"argument --points: must be a multiple of {CHUNKS} with causal weights, "
            f"got {settings.points}"
        )
