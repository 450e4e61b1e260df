"""The flags of `pretrain_lm.py`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from byte_gpt import Size
from meshes import AXES, Sizes


class Settings(argparse.Namespace):
    """The values of all flags, as `parse_arguments` returns them."""

    optimizer: list[str]
    learning_rate: list[float]
    steps: int
    batch_size: int
    precondition_frequency: int
    max_precond_dim: int
    layers: int
    width: int
    heads: int
    context: int
    seed: int
    data: list[Path] | None
    out: Path
    mesh: Sizes
    stack_multiple: int | None
    distributed: bool
    coordinator: str | None
    processes: int | None
    process: int | None
    checkpoint_every: int | None
    resume: bool

    @property
    def training(self) -> dict[str, float]:
        """The values that must not change when a run is resumed."""
        names = ("steps", "batch_size", "precondition_frequency", "max_precond_dim")
        names += ("layers", "width", "heads", "context", "seed")
        return {name: getattr(self, name) for name in names}

    @property
    def size(self) -> Size:
        """The size of the model."""
        return Size(self.layers, self.width, self.heads, self.context)

    @property
    def tokens_per_step(self) -> int:
        """The number of bytes in a batch."""
        return self.batch_size * self.context


class OneLineParser(argparse.ArgumentParser):
    """Reports an error in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Prints the line and exits with code 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def whole_number(text: str, least: int = 1) -> int:
    """Reads a whole number that is at least `least` and fits into 32 bits."""
    if not text.isdecimal() or len(text) > 10 or not least <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(
            f"must be a whole number from {least} to {2**31 - 1}, got {text!r}"
        )
    return int(text)


def positive_number(text: str) -> float:
    """Reads a positive finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return value


def mesh_sizes(text: str) -> Sizes:
    """Reads the sizes of the mesh axes."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in AXES or axis in sizes:
            raise argparse.ArgumentTypeError(
                f"must name axes among {', '.join(AXES)}, each once, as data=2,fsdp=4, got {text!r}"
            )
        sizes[axis] = whole_number(size)
    return Sizes(**dict.fromkeys(AXES, 1) | sizes)


def parse_arguments(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    learning_rates: Mapping[str, float],
) -> Settings:
    """Reads and checks the flags.

    Args:
      parser: receives the flags.
      arguments: the command line, or None for that of the process.
      learning_rates: the default learning rate of each optimizer, by name.

    Returns:
      The values, with one learning rate for each optimizer.
    """
    add_optimizers(parser, learning_rates)
    add_numbers(parser)
    add_paths(parser)
    add_mesh(parser)
    add_processes(parser)
    settings = parser.parse_args(arguments, Settings())
    set_learning_rates(parser, settings, learning_rates)
    if settings.width % settings.heads:
        parser.error(
            f"argument --heads: must divide the width, {settings.width}, got {settings.heads}"
        )
    check_devices(parser, settings)
    check_processes(parser, settings)
    return settings


# Flags --------------------------------------------------------------------------------------------


def add_optimizers(parser: argparse.ArgumentParser, learning_rates: Mapping[str, float]) -> None:
    """Adds the flags for optimizers and their learning rates."""
    parser.add_argument(
        "--optimizer",
        nargs="+",
        choices=learning_rates,
        default=["soap", "adamw"],
        metavar="NAME",
        help=f"one or more of {', '.join(learning_rates)}, trained one after another "
        "(default: soap adamw)",
    )
    parser.add_argument(
        "--learning-rate",
        nargs="+",
        type=positive_number,
        metavar="RATE",
        help="one rate for all optimizers, or one for each (default: tuned for the default model)",
    )


def add_numbers(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for sizes of the model and of the training."""
    for flag, default, meaning in (
        ("--steps", 400, "number of training steps"),
        ("--batch-size", 128, "number of text windows in a batch"),
        (
            "--precondition-frequency",
            10,
            "number of steps from one of SOAP's refreshes to the next",
        ),
        ("--max-precond-dim", 10000, "longest axis that SOAP preconditions"),
        ("--layers", 3, "number of transformer blocks"),
        ("--width", 64, "length of the residual vectors"),
        ("--heads", 2, "number of attention heads, a divisor of the width"),
        ("--context", 64, "number of bytes in a text window"),
        ("--seed", 0, "seed of the initial weights and the batches"),
    ):
        parser.add_argument(
            flag,
            type=partial(whole_number, least=min(1, default)),
            default=default,
            metavar="N",
            help=f"{meaning} (default: %(default)s)",
        )


def add_paths(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for the text, the results and the checkpoints."""
    parser.add_argument(
        "--data",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="files or folders of text (default: Python's standard library)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out"),
        metavar="FOLDER",
        help="folder for results; earlier results are replaced (default: %(default)s)",
    )
    parser.add_argument(
        "--checkpoint-every",
        type=whole_number,
        metavar="N",
        help="number of steps between checkpoints, in FOLDER/checkpoints (default: none)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue from the newest checkpoint, if there is one",
    )


def add_mesh(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for the mesh."""
    parser.add_argument(
        "--mesh",
        type=mesh_sizes,
        default=Sizes(1, 1),
        metavar="AXES",
        help="mesh axes, as data=2,fsdp=4; batches are sharded over both, parameters over fsdp "
        "(default: one device)",
    )
    parser.add_argument(
        "--stack-multiple",
        type=whole_number,
        metavar="N",
        help="pad SOAP's stacks to a multiple of N, to resume checkpoints on another mesh "
        "(default: the number of devices in the mesh)",
    )


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for training in several processes."""
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="join the other processes of a TPU pod or of a Slurm job",
    )
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    parser.add_argument(
        "--processes", type=whole_number, metavar="N", help="number of all processes"
    )
    parser.add_argument(
        "--process",
        type=partial(whole_number, least=0),
        metavar="N",
        help="number of this process, from 0",
    )


# Checks -------------------------------------------------------------------------------------------


def set_learning_rates(
    parser: argparse.ArgumentParser, settings: Settings, learning_rates: Mapping[str, float]
) -> None:
    """Sets one learning rate for each optimizer."""
    names, rates = settings.optimizer, settings.learning_rate
    if len(set(names)) < len(names):
        parser.error("argument --optimizer: name each optimizer once")
    if rates is None:
        rates = [learning_rates[name] for name in names]
    elif len(rates) == 1:
        rates = rates * len(names)
    if len(rates) != len(names):
        parser.error(
            f"argument --learning-rate: got {len(rates)} for {len(names)} optimizers, "
            "give one for all or one for each"
        )
    settings.learning_rate = rates


def check_devices(parser: argparse.ArgumentParser, settings: Settings) -> None:
    """Exits with an error if a number is no multiple of the number of devices."""
    devices = math.prod(settings.mesh)
    if settings.batch_size % devices:
        parser.error(
            f"argument --batch-size: must be a multiple of the {devices} devices of --mesh, "
            f"got {settings.batch_size}"
        )
    if settings.stack_multiple and settings.stack_multiple % devices:
        parser.error(
            f"argument --stack-multiple: must be a multiple of the {devices} devices of --mesh, "
            f"got {settings.stack_multiple}"
        )


def check_processes(parser: argparse.ArgumentParser, settings: Settings) -> None:
    """Exits with an error if the flags for processes contradict each other or the mesh."""
    flags = ("coordinator", "processes", "process")
    given = [flag for flag in flags if getattr(settings, flag) is not None]
    if given and len(given) < len(flags):
        parser.error(f"argument --{given[0]}: --coordinator, --processes and --process go together")
    if given and settings.distributed:
        parser.error(
            f"argument --{given[0]}: --distributed reads it from the cluster, pass only one of them"
        )
    if settings.processes is None or settings.process is None:
        return
    if settings.process >= settings.processes:
        parser.error(
            f"argument --process: must be below --processes, {settings.processes}, "
            f"got {settings.process}"
        )
    devices = math.prod(settings.mesh)
    if devices % settings.processes:
        parser.error(
            f"argument --mesh: its {devices} devices must be a multiple of --processes, "
            f"{settings.processes}"
        )
