"""Pretrain a byte-level GPT (Flax NNX) with SOAP and with other Optax optimizers.

    python examples/pretrain_lm.py

trains SOAP and AdamW from the same initial weights on the same batches and says at which step SOAP
reached AdamW's final held-out loss. The text is the source of Python's standard library, or what
--data names; its last tenth is held out. --out receives metrics.csv, a row for each evaluation, and
diagnostics.csv, what SOAP's state said at that step, both written as they are measured; and the
pictures of them, loss.png and diagnostics.png.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn, TextIO

# On two cores OpenBLAS's threads and XLA's wait for each other: refreshing SOAP's small matrices
# took 1800 ms, and 120 ms with this setting, which OpenBLAS reads when it is first imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import numpy as np
import optax
import optax.contrib
from byte_gpt import (
    Size,
    even_batches,
    files_in,
    make_model,
    random_batches,
    read_text,
    standard_library,
)
from flax import nnx
from reports import (
    Row,
    Run,
    closing_table,
    counters,
    draw_curves,
    draw_diagnostics,
    progress,
    verdict,
)
from tqdm import tqdm

from soap_optax import diagnostics, soap


class Settings(argparse.Namespace):
    """The flags, as `parse_arguments` leaves them."""

    optimizer: list[str]
    learning_rate: list[float]
    steps: int
    batch_size: int
    precondition_frequency: int
    layers: int
    width: int
    heads: int
    context: int
    seed: int
    data: list[Path] | None
    out: Path

    @property
    def size(self) -> Size:
        """The size of the model."""
        return Size(self.layers, self.width, self.heads, self.context)


class Text(NamedTuple):
    """The bytes to learn from, and those to be tested on."""

    training: np.ndarray
    held_out: np.ndarray


# Optimizers ---------------------------------------------------------------------------------------

CLIP_NORM = 1.0
WEIGHT_DECAY = 0.01


def nothing(state: optax.OptState) -> dict[str, jax.Array]:  # noqa: ARG001
    """What the state of an optimizer without diagnostics says."""
    return {}


class Optimizer(NamedTuple):
    """What an optimizer is called in print, and how it is made and observed."""

    label: str
    learning_rate: float  # by default
    make: Callable[[optax.Schedule, Settings], optax.GradientTransformation]
    diagnose: Callable[[optax.OptState], dict[str, jax.Array]] = nothing


# Final held-out loss by learning rate, one run each (--optimizer NAME --learning-rate RATE):
#
#           3e-3   1e-2   3e-2   1e-1
#   SOAP    1.617  1.438  1.420  1.474
#   AdamW   1.876  1.743  2.445    -
#   Muon      -    1.489  1.409  1.439
#
# One seed: differences of a few hundredths say little.
OPTIMIZERS = {
    "soap": Optimizer(
        "SOAP",
        3e-2,
        lambda rate, settings: soap(
            rate,
            weight_decay=WEIGHT_DECAY,
            precondition_frequency=settings.precondition_frequency,
        ),
        diagnostics,
    ),
    "adamw": Optimizer(
        "AdamW",
        1e-2,
        lambda rate, _: optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=WEIGHT_DECAY),
    ),
    "muon": Optimizer(
        "Muon",
        3e-2,
        lambda rate, _: optax.contrib.muon(rate, adam_b2=0.95, weight_decay=WEIGHT_DECAY),
    ),
}


def make_optimizer(
    name: str, learning_rate: float, settings: Settings
) -> optax.GradientTransformation:
    """Returns clipping, then the optimizer, warmed up for a tenth of the steps, cosine after."""
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=learning_rate,
        warmup_steps=settings.steps // 10,
        decay_steps=settings.steps,
        end_value=learning_rate / 10,
    )
    return optax.chain(
        optax.clip_by_global_norm(CLIP_NORM), OPTIMIZERS[name].make(schedule, settings)
    )


# Training -----------------------------------------------------------------------------------------

HELD_OUT_FRACTION = 0.1
HELD_OUT_BATCHES = (8, 64)  # batches, windows in each: the same text whatever --batch-size is
EVALUATIONS = 40  # of a run, apart from the one before the first step
BAR_FORMAT = "{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}"


def train(run: Run, settings: Settings, text: Text, bar: tqdm) -> Iterator[tuple[Row, dict]]:
    """Trains, and evaluates before the first step, at regular steps and after the last.

    Yields:
      A row of metrics, and the diagnostics of the optimizer's state by name.

    Raises:
      FloatingPointError: a training loss is not finite.
    """
    params, loss = make_model(settings.size, settings.seed)
    optimizer = make_optimizer(run.optimizer, run.learning_rate, settings)
    state = optimizer.init(params)
    run.state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))

    def take_step(params: nnx.State, state: optax.OptState, windows: jax.Array) -> tuple:
        value, grads = jax.value_and_grad(loss)(params, windows)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    def observe(params: nnx.State, state: optax.OptState, batches: jax.Array) -> tuple:
        losses = jax.lax.map(lambda windows: loss(params, windows), batches)
        return losses.mean(), OPTIMIZERS[run.optimizer].diagnose(state)

    context, batch_size = settings.context, settings.batch_size
    batches = random_batches(text.training, batch_size, context, settings.seed)
    held_out = even_batches(text.held_out, *HELD_OUT_BATCHES, context)
    windows = next(batches)
    step_once = jax.jit(take_step, donate_argnums=(0, 1)).lower(params, state, windows).compile()
    evaluate = jax.jit(observe).lower(params, state, held_out).compile()

    held_out_loss, scalars = evaluate(params, state, held_out)
    row = Row(0, math.nan, float(held_out_loss), math.nan, 0.0)
    yield row, scalars
    losses, durations = [], []
    for step in range(1, settings.steps + 1):
        started = time.perf_counter()
        params, state, value = step_once(params, state, windows)
        windows = next(batches)  # while the device computes
        losses.append(float(value))
        durations.append(time.perf_counter() - started)
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"{run.label}: the loss of step {step} is {losses[-1]}")
        bar.set_postfix_str(
            f"loss={losses[-1]:.3f}, held-out={row.held_out_loss:.3f}, "
            f"tok/s={batch_size * context / durations[-1]:,.0f}",
            refresh=False,
        )
        bar.update()
        if step % max(1, settings.steps // EVALUATIONS) == 0 or step == settings.steps:
            elapsed = sum(durations)
            held_out_loss, scalars = evaluate(params, state, held_out)
            row = Row(
                step,
                sum(losses) / len(losses),
                float(held_out_loss),
                batch_size * context * len(durations) / elapsed,
                row.seconds + elapsed,
            )
            yield row, scalars
            losses, durations = [], []


# Results ------------------------------------------------------------------------------------------


def describe(settings: Settings) -> str:
    """Returns the size of the model and of the training."""
    params = jax.eval_shape(lambda: make_model(settings.size, settings.seed)[0])
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    return (
        f"Byte-level GPT, {settings.layers} layers of width {settings.width}, "
        f"{count:,} parameters; "
        f"{settings.steps} steps of {settings.batch_size} x {settings.context} bytes"
    )


# Command line -------------------------------------------------------------------------------------


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


def parse_arguments(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> Settings:
    """Reads and checks the flags."""
    parser.add_argument(
        "--optimizer",
        nargs="+",
        choices=OPTIMIZERS,
        default=["soap", "adamw"],
        metavar="NAME",
        help=f"one or more of {', '.join(OPTIMIZERS)}, trained in turn (default: soap adamw)",
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
    settings = parser.parse_args(arguments, Settings())

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
    if settings.width % settings.heads:
        parser.error(
            f"argument --heads: must divide the width, {settings.width}, got {settings.heads}"
        )
    settings.learning_rate = rates
    return settings


def load_text(parser: argparse.ArgumentParser, settings: Settings) -> Text:
    """Reads the text and holds out its end."""
    source = ", ".join(map(str, settings.data or ["Python's standard library"]))
    try:
        if settings.data:
            files = [file for path in settings.data for file in files_in(path)]
        else:
            files = standard_library()
        text = read_text(files)
    except OSError as error:
        parser.error(f"argument --data: cannot read {error.filename}: {error.strerror}")
    held_out = int(len(text) * HELD_OUT_FRACTION)
    if held_out <= settings.context:
        parser.error(
            f"argument --data: {source} has {len(text)} bytes in {len(files)} files; a tenth is "
            f"held out and must be longer than the context, {settings.context}"
        )
    print(f"{source}: {len(files)} files, {len(text):,} bytes, the last {held_out:,} held out")
    return Text(text[:-held_out], text[-held_out:])


def train_all(
    settings: Settings, text: Text, runs: list[Run], metrics: TextIO, states: TextIO
) -> None:
    """Trains with one optimizer after another, adding to `runs` and to the files as it goes."""
    write_row, write_scalar = csv.writer(metrics).writerow, csv.writer(states).writerow
    write_row(("optimizer", *Row._fields))
    write_scalar(("optimizer", "step", "name", "value"))
    for name, rate in zip(settings.optimizer, settings.learning_rate, strict=True):
        started = time.perf_counter()
        run = Run(name, OPTIMIZERS[name].label, rate)
        runs.append(run)
        with tqdm(total=settings.steps, desc=run.label, bar_format=BAR_FORMAT, disable=None) as bar:
            for row, arrays in train(run, settings, text, bar):
                scalars = {key: float(array) for key, array in arrays.items()}
                run.rows.append(row)
                run.diagnostics.append(scalars)
                run.wall_clock = time.perf_counter() - started
                write_row((name, *row))
                for scalar in scalars.items():
                    write_scalar((name, row.step, *scalar))
                metrics.flush()
                states.flush()
                if bar.disable:  # standard error is not a terminal
                    print(progress(run, settings.steps), flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    settings = parse_arguments(parser, arguments)
    text = load_text(parser, settings)
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
        metrics, states = (
            (settings.out / name).open("w", newline="", encoding="utf-8")
            for name in ("metrics.csv", "diagnostics.csv")
        )
    except OSError as error:
        parser.error(f"argument --out: cannot write to {error.filename}: {error.strerror}")
    title = describe(settings)
    print(f"{title}; on {jax.devices()[0].device_kind}", flush=True)

    runs: list[Run] = []
    problem, code = "", 0
    try:
        with metrics, states:
            train_all(settings, text, runs, metrics, states)
    except FloatingPointError as error:
        problem, code = f"error: {error}; try a lower --learning-rate", 1
    except KeyboardInterrupt:
        problem, code = "interrupted", 130
    if not problem:
        target = next((run for run in runs if run.optimizer == "adamw"), None)
        print(f"\n{closing_table(runs, target, settings.batch_size * settings.context)}\n")
        for run in runs:
            if target and run is not target:
                print(verdict(run, target))
        for run in runs:
            if any(run.diagnostics):
                print(counters(run))
    try:
        draw_curves(runs, title, settings.out / "loss.png")
        for run in runs:
            if any(run.diagnostics):
                draw_diagnostics(run, settings.out / "diagnostics.png")
    except OSError as error:
        problem, code = f"error: cannot draw {error.filename}: {error.strerror}", 1
    if problem:
        print(f"{parser.prog}: {problem} (results so far: {settings.out})", file=sys.stderr)
    else:
        print(f"Metrics and curves are in {settings.out}.")
    return code


if __name__ == "__main__":
    sys.exit(main())
