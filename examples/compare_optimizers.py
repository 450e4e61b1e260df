"""Compare SOAP with other optimizers: one model, one sequence of batches, equal initial weights.

    python examples/compare_optimizers.py

takes at most ten minutes on two idle cores. It tunes eleven optimizers on a small byte-level GPT.
Then it prints their losses, and the number of steps in which SOAP and Shampoo reach AdamW's loss.
The text is the source code of Python's standard library, or the files of --data. The last tenth is
held out.

    python examples/compare_optimizers.py --preset cpu --study steps-to-loss frequency

runs two of the seven studies at a larger size, for a night on two cores. Add --dry-run to print the
number of runs and an estimate of their hours.

Every complete run is a row of runs.csv in the folder of --out. Complete runs are skipped when the
command is repeated. An interrupted one, by Ctrl-C for example, continues from its checkpoint.
docs/explanation/reproduction.md explains the studies and shows the results.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# On two cores, the threads of OpenBLAS and XLA compete. OpenBLAS reads this when it is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import numpy as np
from comparison.contenders import CONTENDERS
from comparison.flags import Settings, parse_arguments
from comparison.forecast import Clock, Forecast, left, losses_of
from comparison.plans import plan_of
from comparison.records import (
    Circumstances,
    Record,
    append,
    circumstances,
    read_records,
    write_times,
)
from comparison.running import Data, Hooks, Program, compile_program, train
from comparison.specs import Spec
from comparison.tables import tables_of
from comparison.timing import ROUNDS, time_steps, timed_specs
from flags import OneLineParser
from recipe import HELD_OUT_FRACTION, Text, load_text
from saving import Checkpoints
from tqdm import tqdm

BAR_FORMAT = "{desc} {n_fmt}/{total_fmt} |{bar}|{postfix}"


class Runner:
    """Trains one run after another.

    Attributes:
      records: the complete runs.
      programs: the newest compiled program, by `Spec.program`.
      stop: if set, training stops after the current step.
    """

    def __init__(self, settings: Settings, data: Data, where: Circumstances):
        self.settings, self.data, self.where = settings, data, where
        self.records = read_records(settings.folder, where.text)
        self.programs: dict[tuple, Program] = {}
        self.stop = threading.Event()
        self.started = time.monotonic()

    def forecast(self, worst: bool = False) -> Forecast:
        """The runs that are left."""
        clock = Clock(self.records.values(), jax.default_backend())
        settings = self.settings
        losses = losses_of(self.records)
        return left(settings.studies, settings.preset, losses, clock, worst)

    def next_run(self) -> Spec | None:
        """The first missing run; runs with the newest program go first."""
        plan = plan_of(self.settings.studies, self.settings.preset, losses_of(self.records))
        missing = plan.missing
        same = [spec for spec in missing if spec.program in self.programs]
        return (same or missing or [None])[0]

    def program(self, spec: Spec) -> Program:
        """Compiles the program of a run, or takes the newest one. Only one is kept."""
        if spec.program not in self.programs:
            self.programs = {spec.program: compile_program(spec, self.data)}
        return self.programs[spec.program]

    def run(self, spec: Spec) -> Record | None:
        """Trains one run and adds its row; returns None if the run was stopped."""
        folder = self.settings.folder / "checkpoints" / spec.name
        opened: list[Checkpoints] = []

        def open_checkpoints() -> Checkpoints:
            if not opened:
                opened.append(Checkpoints(folder))
            return opened[0]

        with self.bar(spec) as bar:
            hooks = Hooks(
                advance=lambda step, loss: self.advance(bar, step, loss),
                stop=self.stop,
                open_checkpoints=open_checkpoints,
                has_checkpoints=folder.exists(),
                seconds=self.settings.checkpoint_every,
            )
            try:
                result = train(spec, self.program(spec), self.data, hooks)
            finally:
                for checkpoints in opened:
                    checkpoints.close()
        if result is None:
            return None
        self.records[spec] = append(self.settings.folder, spec, result, self.where)
        shutil.rmtree(folder, ignore_errors=True)
        return self.records[spec]

    def bar(self, spec: Spec) -> tqdm:
        """The bar of a run, with its number, the runs that are left, and their end."""
        forecast = self.forecast()
        until = datetime.now() + timedelta(seconds=forecast.seconds)
        place = f"{len(self.records) + 1}, about {forecast.runs - 1} left until {until:%a %H:%M}"
        return tqdm(
            total=spec.steps,
            desc=f"run {place}: {title(spec)}",
            bar_format=BAR_FORMAT,
            disable=None,
            leave=False,
        )

    def advance(self, bar: tqdm, step: int, loss: float) -> None:
        """Moves the bar to a step, and stops when the time is over."""
        bar.set_postfix_str(f" loss={loss:.3f}", refresh=False)
        bar.update(step - bar.n)
        hours = self.settings.hours
        if hours and time.monotonic() - self.started > hours * 3600:
            self.stop.set()


def title(spec: Spec) -> str:
    """A run in a few words."""
    parts = [CONTENDERS[spec.contender].label]
    if spec.options:
        parts.append(spec.options)
    parts += [f"width {spec.model.width}", f"lr {spec.learning_rate:g}", f"b2 {spec.b2:g}"]
    parts += [f"decay {spec.weight_decay:g}"]
    if spec.frequency:
        parts.append(f"f {spec.frequency}")
    parts += [f"{spec.steps} steps", f"seed {spec.seed}"]
    return ", ".join(parts)


# Data ---------------------------------------------------------------------------------------------


def load_data(parser: argparse.ArgumentParser, settings: Settings) -> Data:
    """Reads the text, or the token ids of a preset with another vocabulary than bytes."""
    preset = settings.preset
    if preset.model.vocabulary == 256:
        text = load_text(parser, settings.data, preset.model.context)
    else:
        text = load_tokens(parser, settings)
    return Data(text, preset.evaluations, preset.held_out_batches, preset.micro_batch)


def load_tokens(parser: argparse.ArgumentParser, settings: Settings) -> Text:
    """Reads token ids from a .npy file, and holds out the last tenth."""
    vocabulary = settings.preset.model.vocabulary
    if not settings.data or len(settings.data) > 1 or settings.data[0].suffix != ".npy":
        parser.error(
            f"argument --data: {settings.preset_name} needs one .npy file of token ids below "
            f"{vocabulary:,}, such as C4 in T5's tokens"
        )
    path = settings.data[0]
    try:
        tokens = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        parser.error(f"argument --data: cannot read {path}: {error}")
    held_out = int(tokens.size * HELD_OUT_FRACTION)
    if (
        tokens.ndim != 1
        or tokens.dtype.kind not in "iu"
        or held_out <= settings.preset.model.context
    ):
        parser.error(
            f"argument --data: {path} must have one axis of more than "
            f"{10 * settings.preset.model.context:,} integers, got {tokens.dtype}{tokens.shape}"
        )
    description = f"{path}: {tokens.size:,} tokens, the last {held_out:,} held out"
    return Text(tokens[:-held_out], tokens[-held_out:], description)


def checksum(text: Text) -> str:
    """A checksum of the text, over its ends if it is long."""
    parts = (text.training[: 2**25], text.held_out[: 2**25])
    return f"{zlib.crc32(b''.join(np.asarray(part).tobytes() for part in parts)):08x}"


# Command line -------------------------------------------------------------------------------------


def open_runner(parser: argparse.ArgumentParser, settings: Settings, data: Data) -> Runner:
    """Reads the results so far. Exits with an error if that fails."""
    try:
        return Runner(settings, data, circumstances(checksum(data.text)))
    except (OSError, ValueError) as error:
        parser.error(f"argument --out: {error}")


def describe(settings: Settings, runner: Runner) -> str:
    """Reports the studies, the number of runs and their hours."""
    likely, worst = runner.forecast(), runner.forecast(worst=True)
    model = settings.preset.model
    return (
        f"{settings.preset_name}: {', '.join(settings.studies)}; {model.layers} layers of width "
        f"{model.width}, batches of {settings.preset.batch_size} x {model.context} tokens\n"
        f"{len(runner.records)} runs are complete in {settings.folder}. About {likely.runs} runs "
        f"and {hours(likely.seconds)} are left; {worst.runs} runs and {hours(worst.seconds)} if "
        "every search goes on as far as it may."
    )


def hours(seconds: float) -> str:
    """Seconds in a unit of fitting size."""
    return f"{seconds / 3600:.1f} hours" if seconds > 5400 else f"{seconds / 60:.0f} minutes"


def train_all(runner: Runner) -> str:
    """Trains the missing runs, and returns the problem if they were stopped."""
    while spec := runner.next_run():
        if runner.stop.is_set():
            return "stopped"
        record = runner.run(spec)
        if record is None:
            return "stopped"
        left_over = runner.forecast()
        tqdm.write(
            f"{title(spec)}: held-out loss {record.loss:.4f} in {record.seconds:.0f} s; about "
            f"{left_over.runs} runs and {hours(left_over.seconds)} left"
        )
    return ""


def write_step_times(parser: argparse.ArgumentParser, runner: Runner) -> int:
    """Times the best runs in turns, and returns the exit code."""
    settings = runner.settings
    specs = timed_specs(settings.studies, settings.preset, runner.records)
    if not specs:
        parser.error(f"argument --time-steps: no search is complete in {settings.folder}")
    with tqdm(total=(ROUNDS + 2) * len(specs), desc="timing steps", disable=None) as bar:
        times = time_steps(specs, runner.data, bar.update)
    write_times(settings.folder, times, runner.where)
    for spec, seconds in times.items():
        print(f"{title(spec)}: {1000 * seconds:.2f} ms a step")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    settings = parse_arguments(parser, arguments)
    data = load_data(parser, settings)
    runner = open_runner(parser, settings, data)
    print(data.text.description)
    print(describe(settings, runner), flush=True)
    if settings.dry_run:
        return 0
    try:
        settings.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: cannot write to {error.filename}: {error.strerror}")
    before = signal.signal(signal.SIGINT, lambda *_: stop_or_raise(runner.stop))
    try:
        with only_process(parser, settings.folder):
            if settings.time_steps:
                return write_step_times(parser, runner)
            problem = train_all(runner)
    finally:
        signal.signal(signal.SIGINT, before)
    for table in tables_of(settings.studies, settings.preset, runner.records):
        print(f"\n{table.markdown}")
    if problem:
        print(
            f"{parser.prog}: {problem}; repeat the command to go on (results so far: "
            f"{settings.folder})",
            file=sys.stderr,
        )
        return 130
    print(f"\nRows and curves are in {settings.folder}.")
    return 0


@contextmanager
def only_process(parser: argparse.ArgumentParser, folder: Path) -> Iterator[None]:
    """Locks the folder of results, on systems that can. Exits with an error if it is locked."""
    with (folder / "lock").open("w") as file:
        if fcntl:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                parser.error(f"argument --out: another process is writing to {folder}")
        yield


def stop_or_raise(stop: threading.Event) -> None:
    """Stops after the current step, or at once at the second signal."""
    if stop.is_set():
        raise KeyboardInterrupt
    stop.set()


if __name__ == "__main__":
    sys.exit(main())
