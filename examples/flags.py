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
    """The flags, as `parse_arguments` leaves them."""

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
        """The flags that must stay as they are where a run is resumed."""
        names = ("steps", "batch_size", "precondition_frequency", "max_precond_dim")
        names += ("layers", "width", "heads", "context", "seed")
        return {name: getattr(self, name) for name in names}

    @property
    def size(self) -> Size:
        """The size of the model."""
        return Size(self.layers, self.width, self.heads, self.context)


class OneLineParser(argparse.ArgumentParser):
    """Reports a mistake in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Prints the line and exits with code 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def whole_number(text: str, least: int = 1) -> int:
    """Reads a whole number from `least` to what fits into 32 bits."""
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


def parse_arguments(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    learning_rates: Mapping[str, float],
) -> Settings:
    """Reads and checks the flags; each optimizer that can be named has a learning rate."""
    parser.add_argument(
        "--optimizer",
        nargs="+",
        choices=learning_rates,
        default=["soap", "adamw"],
        metavar="NAME",
        help=f"one or more of {', '.join(learning_rates)}, trained in turn (default: soap adamw)",
    )
    parser.add_argument(
        "--learning-rate",
        nargs="+",
        type=positive_number,
        metavar="RATE",
        help="one for all optimizers or one for each (default: the best that was tried)",
    )
    for flag, default, meaning in (
        ("--steps", 400, "training steps"),
        ("--batch-size", 128, "windows of text in a batch"),
        ("--precondition-frequency", 10, "steps from one of SOAP's refreshes to the next"),
        ("--max-precond-dim", 10000, "longest axis of a matrix that SOAP preconditions"),
        ("--layers", 3, "transformer blocks"),
        ("--width", 64, "length of the residual vectors"),
        ("--heads", 2, "attention heads, a divisor of the width"),
        ("--context", 64, "bytes in a window of text"),
        ("--seed", 0, "decides the initial weights and the batches"),
    ):
        parser.add_argument(
            flag,
            type=partial(whole_number, least=min(1, default)),
            default=default,
            metavar="N",
            help=f"{meaning} (default: %(default)s)",
        )
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
        help="where results go, replacing earlier ones (default: %(default)s)",
    )
    parser.add_argument(
        "--mesh",
        type=mesh_sizes,
        default=Sizes(1, 1),
        metavar="AXES",
        help="axes over which batches (all) and parameters (fsdp) are split, as data=2,fsdp=4 "
        "(default: one device)",
    )
    parser.add_argument(
        "--checkpoint-every",
        type=whole_number,
        metavar="N",
        help="steps from one checkpoint to the next, in FOLDER/checkpoints (default: none)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint, if there is one",
    )
    parser.add_argument(
        "--stack-multiple",
        type=whole_number,
        metavar="N",
        help="what SOAP's stacks are padded to a multiple of, for checkpoints that are to be "
        "resumed on another mesh (default: the devices of the mesh)",
    )
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="join the other processes of a TPU pod or of a Slurm job",
    )
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    parser.add_argument("--processes", type=whole_number, metavar="N", help="how many there are")
    parser.add_argument(
        "--process", type=partial(whole_number, least=0), metavar="N", help="which of them this is"
    )
    settings = parser.parse_args(arguments, Settings())

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
    if settings.width % settings.heads:
        parser.error(
            f"argument --heads: must divide the width, {settings.width}, got {settings.heads}"
        )
    settings.learning_rate = rates
    check_devices(parser, settings)
    return settings


def mesh_sizes(text: str) -> Sizes:
    """Reads the axes of a mesh."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in AXES or axis in sizes:
            raise argparse.ArgumentTypeError(
                f"must name axes among {', '.join(AXES)}, each once, as data=2,fsdp=4, got {text!r}"
            )
        sizes[axis] = whole_number(size)
    return Sizes(**dict.fromkeys(AXES, 1) | sizes)


def check_devices(parser: argparse.ArgumentParser, settings: Settings) -> None:
    """Checks what depends on the number of devices or of processes."""
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
    flags = ("coordinator", "processes", "process")
    given = [flag for flag in flags if getattr(settings, flag) is not None]
    if given and len(given) < len(flags):
        parser.error(f"argument --{given[0]}: --coordinator, --processes and --process go together")
    if given and settings.distributed:
        parser.error(f"argument --{given[0]}: --distributed finds it by itself; leave one out")
    if settings.processes is None or settings.process is None:
        return
    if settings.process >= settings.processes:
        parser.error(
            f"argument --process: must be below --processes, {settings.processes}, "
            f"got {settings.process}"
        )
    if devices % settings.processes:
        parser.error(
            f"argument --mesh: its {devices} devices must be a multiple of --processes, "
            f"{settings.processes}"
        )
