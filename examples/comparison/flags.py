"""The flags of `compare_optimizers.py`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from comparison.plans import STUDIES
from comparison.presets import PRESETS, Preset

from flags import positive_number, whole_number  # isort: skip


class Settings(argparse.Namespace):
    """The values of all flags."""

    preset_name: str
    study: list[str] | None
    contender: list[str] | None
    seeds: int | None
    data: list[Path] | None
    out: Path
    dry_run: bool
    time_steps: bool
    checkpoint_every: float
    hours: float | None
    preset: Preset

    @property
    def studies(self) -> list[str]:
        """The studies to run."""
        return list(self.study or self.preset.studies)

    @property
    def folder(self) -> Path:
        """The folder of the preset's results."""
        return self.out / self.preset_name


def parse_arguments(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> Settings:
    """Reads and checks the flags."""
    add = parser.add_argument
    add(
        "--preset",
        dest="preset_name",
        choices=PRESETS,
        default="quick",
        metavar="NAME",
        help=f"sizes and grids, one of {', '.join(PRESETS)} (default: %(default)s)",
    )
    add(
        "--study",
        nargs="+",
        choices=STUDIES,
        metavar="NAME",
        help=f"one or more of {', '.join(STUDIES)} (default: the preset's)",
    )
    add(
        "--contender",
        nargs="+",
        metavar="NAME",
        help="optimizers for steps-to-loss and learning-rate, with adamw among them (default: the "
        "preset's)",
    )
    add(
        "--seeds",
        type=whole_number,
        metavar="N",
        help="number of seeds for every comparison (default: the preset's)",
    )
    add(
        "--data",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="files or folders of text (default: Python's standard library); for paper-360m and "
        "paper-660m, one .npy file of token ids",
    )
    add(
        "--out",
        type=Path,
        default=Path("out/compare"),
        metavar="FOLDER",
        help="FOLDER/PRESET has runs.csv, curves.csv and checkpoints; complete runs in it are "
        "skipped (default: %(default)s)",
    )
    add("--dry-run", action="store_true", help="print the number of runs and hours, train nothing")
    add(
        "--time-steps",
        action="store_true",
        help="write step_times.csv with the times of the best runs' steps, measured in turns on an "
        "idle machine; train nothing",
    )
    add(
        "--checkpoint-every",
        type=positive_number,
        default=60.0,
        metavar="SECONDS",
        help="seconds between two checkpoints of a run (default: %(default)g)",
    )
    add(
        "--hours",
        type=positive_number,
        metavar="HOURS",
        help="stop after this time with a checkpoint (default: run to the end)",
    )
    settings = parser.parse_args(arguments, Settings())
    settings.preset = chosen(parser, settings, PRESETS[settings.preset_name])
    return settings


def chosen(parser: argparse.ArgumentParser, settings: Settings, preset: Preset) -> Preset:
    """The preset with the contenders and the number of seeds of the flags."""
    if settings.contender:
        names = list(dict.fromkeys(settings.contender))
        for name in names:
            if name not in preset.contenders:
                parser.error(
                    f"argument --contender: {settings.preset_name} has "
                    f"{', '.join(preset.contenders)}, got {name!r}"
                )
        if "adamw" not in names:
            parser.error("argument --contender: add adamw, which the others are compared with")
        shortened = tuple(name for name in preset.shortened if name in names)
        preset = preset._replace(contenders=tuple(names), shortened=shortened)
    if settings.seeds:
        preset = preset._replace(seeds=tuple(range(settings.seeds)))
    return preset
