"""The flags of `physics_informed.py`."""

from __future__ import annotations

import argparse
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
    fourier_features: bool
    weight_factorization: bool
    causal_weights: bool
    out: Path | None

    @property
    def folder(self) -> Path:
        """The folder of results."""
        return self.out or Path("out/physics") / self.equation

    @property
    def size(self) -> Size:
        """The settings of the network."""
        scale = EQUATIONS[self.equation].fourier_scale if self.fourier_features else 0.0
        return Size(self.layers, self.width, scale, self.weight_factorization)

    @property
    def causal_tolerance(self) -> float:
        """The tolerance of the causal weights, or 0 for equal weights."""
        return EQUATIONS[self.equation].causal_tolerance if self.causal_weights else 0.0

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
    add_numbers(parser)
    add_options(parser)
    settings = parser.parse_args(arguments, Settings())
    set_learning_rates(parser, settings)
    check(parser, settings)
    return settings


# Flags --------------------------------------------------------------------------------------------


def add_choices(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for the equation, the optimizers and their settings."""
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
        ("--points", 1024, "number of collocation points, drawn anew in each step"),
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
    """Adds the switches of the network and of the loss, and the folder."""
    for flag, default, meaning in (
        ("--fourier-features", True, "random Fourier features of the coordinates"),
        ("--weight-factorization", True, "random weight factorization of the kernels"),
        ("--causal-weights", True, "causal weights of the residual, if the solution evolves"),
    ):
        parser.add_argument(
            flag, action=argparse.BooleanOptionalAction, default=default, help=meaning
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


def check(parser: argparse.ArgumentParser, settings: Settings) -> None:
    """Exits with an error if flags contradict each other."""
    if len(set(settings.seeds)) < len(settings.seeds):
        parser.error("argument --seeds: name each seed once")
    if settings.size.fourier_scale and settings.width % 2:
        parser.error(
            f"argument --width: must be even with --fourier-features, got {settings.width}"
        )
    if settings.causal_tolerance and settings.points % CHUNKS:
        parser.error(
            f"argument --points: must be a multiple of {CHUNKS} with --causal-weights, "
            f"got {settings.points}"
        )
