"""Measures steps, compile times and memory of SOAP and its rivals on the shapes of real models.

    pip install ".[benchmarks]"
    python tests/benchmarks/speed.py --models width_512 gpt2 --rounds 5 --out out/speed

prints Markdown tables, and writes their numbers as CSV and as pictures. The time of a step is
relative to the six-product floor: the time of only the products that SOAP needs, in the same run,
on the same shapes. To add a variant of SOAP, give its options:

    python tests/benchmarks/speed.py --models width_512 --soap "tiles:block_size=256"

To time every step from one refresh to the next, with staggered blocks and without:

    python tests/benchmarks/speed.py --what cycles --models width_512 --contenders soap \\
        --soap "stagger:stagger=True"

To measure compile times over depth, and memory, without taking steps:

    python tests/benchmarks/speed.py --what compile memory --models gpt_256 --out out/compile

This does not use pytest-benchmark, which times one function after another. A machine's speed drifts
by more than the rivals differ, so that they must alternate in one run.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# OpenBLAS's threads and XLA's compete for the cores: a 256x256 QR has taken 500 ms with them, and
# 2 ms with this setting. OpenBLAS reads it when it is first imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import measure
import plots
import results
from compiling import CompileTime, compile_time, memory_of
from contenders import NAMES, USUAL, contenders_of, floor_operations
from measure import Summary
from results import Case
from shapes import MODELS, params_of
from stalls import unless_stalled
from tqdm import tqdm
from variants import read_variant


class Settings(argparse.Namespace):
    """The flags."""

    models: list[str]
    what: list[str]
    contenders: list[str]
    soap: list[tuple[str, dict[str, Any]]]
    rounds: int
    frequency: int
    layers: int | None
    depths: list[int]
    out: Path | None
    stall_after: int

    def layers_of(self, model: str) -> int:
        return self.layers or MODELS[model].layers

    def contenders_of(self, model: str) -> dict[str, Any]:
        return contenders_of(MODELS[model], self.contenders, dict(self.soap))


# Measurements -------------------------------------------------------------------------------------


def measure_steps(settings: Settings) -> None:
    """Times steps model by model, and writes the files after each model, so that none is lost."""
    by_model: dict[str, list[Summary]] = {}
    records: list[dict[str, Any]] = []
    for name in settings.models:
        model, case = MODELS[name], Case(name, settings.layers_of(name))
        contenders = settings.contenders_of(name)
        steps = measure.rounds_of(model, case.layers, contenders, settings.rounds)
        kinds = sum(1 if one.refreshes is None else 2 for one in contenders.values())
        with unless_stalled(settings.stall_after) as still_alive:
            bar = tqdm(steps, name, settings.rounds * kinds, unit="step", file=sys.stderr)
            samples = [sample for sample in bar if still_alive()]
        by_model[name] = measure.summarize(samples)
        records += results.sample_records(case, samples)
        operations = floor_operations(model, params_of(model, case.layers))
        print(results.steps_table(case, by_model[name], operations), flush=True)
        if settings.out:
            results.write_csv(settings.out / "steps.csv", records)
            plots.draw_steps(by_model, settings.out / "steps.png")


def measure_compile_times(settings: Settings) -> None:
    """Compiles updates at several depths."""
    by_model: dict[str, list[CompileTime]] = {}
    records: list[dict[str, Any]] = []
    for name in settings.models:
        pairs = [(depth, one) for depth in settings.depths for one in settings.contenders_of(name)]
        bar = tqdm(pairs, f"{name}, compile", unit="program", file=sys.stderr)
        by_model[name] = [
            compile_time(one, settings.contenders_of(name)[one], MODELS[name], depth)
            for depth, one in bar
        ]
        records += [{"model": name} | dataclasses.asdict(row) for row in by_model[name]]
        print(results.compile_table(name, by_model[name]), flush=True)
        if settings.out:
            results.write_csv(settings.out / "compile.csv", records)
            plots.draw_compile_times(by_model, settings.out / "compile.png")


def measure_memory(settings: Settings) -> None:
    """Asks the compiler for the memory of updates."""
    records: list[dict[str, Any]] = []
    for name in settings.models:
        case = Case(name, settings.layers_of(name))
        bar = tqdm(settings.contenders_of(name).items(), f"{name}, memory", file=sys.stderr)
        rows = [memory_of(one, contender, MODELS[name], case.layers) for one, contender in bar]
        records += [{"model": name} | dataclasses.asdict(row) for row in rows]
        print(results.memory_table(case, rows), flush=True)
        if settings.out:
            results.write_csv(settings.out / "memory.csv", records)


def measure_cycles(settings: Settings) -> None:
    """Times every step of two refresh cycles, for the contenders that refresh."""
    records: list[dict[str, Any]] = []
    for name in settings.models:
        model, case = MODELS[name], Case(name, settings.layers_of(name))
        contenders = settings.contenders_of(name)
        contenders = {one: it for one, it in contenders.items() if it.refreshes is not None}
        frequency = settings.frequency
        steps = measure.cycles_of(model, case.layers, contenders, frequency, cycles=2)
        with unless_stalled(settings.stall_after) as still_alive:
            total = 2 * frequency * len(contenders)
            bar = tqdm(steps, f"{name}, cycles", total, unit="step", file=sys.stderr)
            samples = [step for step in bar if still_alive()]
        print(results.cycles_table(case, samples, frequency), flush=True)
        records += [dataclasses.asdict(case) | dataclasses.asdict(step) for step in samples]
        if settings.out:
            results.write_csv(settings.out / "cycles.csv", records)


MEASURES = {
    "steps": measure_steps,
    "cycles": measure_cycles,
    "compile": measure_compile_times,
    "memory": measure_memory,
}


# Command line -------------------------------------------------------------------------------------


def soap_variant(text: str) -> tuple[str, dict[str, Any]]:
    variant = read_variant(text, NAMES)
    return variant.name, dict(variant.options)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def parse(arguments: Sequence[str]) -> Settings:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    real = [name for name in MODELS if not name.startswith("tiny")]
    add = parser.add_argument
    add(
        "--models", nargs="+", choices=MODELS, default=real, metavar="MODEL", help=", ".join(MODELS)
    )
    add("--what", nargs="+", choices=MEASURES, default=["steps"])
    add("--contenders", nargs="+", choices=NAMES, default=list(USUAL))
    variant = "NAME:OPTION=VALUE,..."
    add("--soap", type=soap_variant, action="append", default=[], metavar=variant)
    add("--rounds", type=positive, default=5, help="steps of each kind that are timed")
    add("--frequency", type=positive, default=10, help="of the refreshes in cycles")
    add("--layers", type=positive, help="how deep a model is; each has a default")
    add("--depths", nargs="+", type=positive, default=[4, 12, 24, 48], help="to compile at")
    add("--out", type=Path, help="folder for CSV and pictures")
    stall = "seconds without a step after which the run is ended"
    add("--stall-after", type=positive, default=1800, help=stall)
    return parser.parse_args(arguments, Settings())


def main(arguments: Sequence[str]) -> int:
    settings = parse(arguments)
    # On a GPU or TPU the default would give SOAP's rotations fewer digits than the floor's.
    jax.config.update("jax_default_matmul_precision", "highest")
    if settings.out:
        settings.out.mkdir(parents=True, exist_ok=True)
    print(f"{results.circumstances('speed.py', arguments)}\n", flush=True)
    for what in settings.what:
        MEASURES[what](settings)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
