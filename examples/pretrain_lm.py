"""Pretrain a byte-level GPT (Flax NNX) with SOAP and with other Optax optimizers.

    python examples/pretrain_lm.py

SOAP and AdamW start from the same weights and see the same batches. At the end, the program prints
the step at which SOAP reached AdamW's final held-out loss. It trains on the source code of Python's
standard library, or on the files of --data. The last tenth is held out.

The folder --out receives metrics.csv, with a row for each evaluation, and diagnostics.csv, with
SOAP's diagnostics at that step. Both grow during the run. The plots loss.png and diagnostics.png
follow at its end.

    python examples/pretrain_lm.py --optimizer soap --mesh data=2,fsdp=4 --checkpoint-every 100

trains on eight devices and writes checkpoints. Devices are simulated if the machine has fewer.
Repeat the command with --resume to continue from the newest checkpoint. On a cluster, run it in
every process with --distributed, or with --coordinator, --processes and --process.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, redirect_stdout
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TextIO

# On two cores, the threads of OpenBLAS and XLA compete: a refresh of SOAP's small matrices took
# 1800 ms, and 120 ms with this setting. OpenBLAS reads it when it is first imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import optax
import optax.contrib
from byte_gpt import even_batches, make_model, random_batches
from flags import OneLineParser, Settings, parse_arguments
from flax import nnx
from jax.sharding import Mesh
from meshes import Processes, Shardings, join, make_mesh, simulate_devices
from recipe import CLIP_NORM, HELD_OUT_BATCHES, Text, load_text, warmed_up
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
from saving import Checkpoints
from tqdm import tqdm

from soap_optax import diagnostics, soap

# Optimizers ---------------------------------------------------------------------------------------

WEIGHT_DECAY = 0.01


def no_diagnostics(state: optax.OptState) -> dict[str, jax.Array]:  # noqa: ARG001
    """Returns no scalars, for optimizers without diagnostics."""
    return {}


class Optimizer(NamedTuple):
    """The printed name of an optimizer, its default learning rate, and functions for its use."""

    label: str
    learning_rate: float
    make: Callable[[optax.Schedule, Settings, Shardings], optax.GradientTransformation]
    diagnose: Callable[[optax.OptState], dict[str, jax.Array]] = no_diagnostics


# Final held-out loss by learning rate, one run each (--optimizer NAME --learning-rate RATE):
#
#           3e-3   1e-2   3e-2   1e-1
#   SOAP    1.617  1.438  1.420  1.474
#   AdamW   1.876  1.743  2.445    -
#   Muon      -    1.489  1.409  1.439
#
# Each number is from one seed. Differences of a few hundredths mean little.
OPTIMIZERS = {
    "soap": Optimizer(
        "SOAP",
        3e-2,
        lambda rate, settings, shardings: soap(
            rate,
            weight_decay=WEIGHT_DECAY,
            precondition_frequency=settings.precondition_frequency,
            max_precond_dim=settings.max_precond_dim,
            stack_sharding=shardings.stacks,
            stack_multiple=settings.stack_multiple,
            param_shardings=shardings.of_params,
        ),
        diagnostics,
    ),
    "adamw": Optimizer(
        "AdamW",
        1e-2,
        lambda rate, *_: optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=WEIGHT_DECAY),
    ),
    "muon": Optimizer(
        "Muon",
        3e-2,
        lambda rate, *_: optax.contrib.muon(rate, adam_b2=0.95, weight_decay=WEIGHT_DECAY),
    ),
}


def make_optimizer(
    name: str, learning_rate: float, settings: Settings, shardings: Shardings
) -> optax.GradientTransformation:
    """Chains clipping and the optimizer, with the learning rate of `warmed_up`."""
    schedule = warmed_up(learning_rate, settings.steps)
    return optax.chain(
        optax.clip_by_global_norm(CLIP_NORM),
        OPTIMIZERS[name].make(schedule, settings, shardings),
    )


# Training -----------------------------------------------------------------------------------------

EVALUATIONS = 40  # per run, besides the one before the first step
BAR_FORMAT = "{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}"


class Training(NamedTuple):
    """The initial arrays of a run and its two programs."""

    params: nnx.State
    state: optax.OptState
    step: jax.stages.Wrapped
    evaluate: jax.stages.Wrapped


def prepare(run: Run, settings: Settings, shardings: Shardings) -> Training:
    """Creates the sharded parameters and state, and the programs that train and evaluate them."""
    params, loss = make_model(settings.size, settings.seed)
    of_params = shardings.of_params(params)
    params = shardings.put(params, of_params)
    optimizer = make_optimizer(run.optimizer, run.learning_rate, settings, shardings)
    of_state = shardings.of_state(jax.eval_shape(optimizer.init, params), params)
    state = jax.jit(optimizer.init, out_shardings=of_state)(params)

    def take_step(params: nnx.State, state: optax.OptState, windows: jax.Array) -> tuple:
        value, grads = jax.value_and_grad(loss)(params, windows)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    def observe(params: nnx.State, state: optax.OptState, batches: jax.Array) -> tuple:
        losses = jax.lax.map(lambda windows: loss(params, windows), batches)
        return losses.mean(), OPTIMIZERS[run.optimizer].diagnose(state)

    out_shardings = (of_params, of_state, shardings.replicated)
    return Training(
        params,
        state,
        jax.jit(take_step, donate_argnums=(0, 1), out_shardings=out_shardings),
        jax.jit(observe, out_shardings=shardings.replicated),
    )


def load_batches(
    settings: Settings, text: Text, shardings: Shardings, done: int
) -> tuple[Iterator[jax.Array], jax.Array]:
    """Returns the training batches after the first `done`, and the held-out batches."""
    context = settings.context
    batches = random_batches(text.training, settings.batch_size, context, settings.seed)
    held_out = even_batches(text.held_out, *HELD_OUT_BATCHES, context)
    batches = map(shardings.put_batches, islice(batches, done, None))
    return batches, shardings.put_batches(held_out)


def train(
    run: Run,
    settings: Settings,
    text: Text,
    shardings: Shardings,
    checkpoints: Checkpoints | None,
    bar: tqdm,
) -> Iterator[tuple[Row, dict]]:
    """Trains, and evaluates before the first step, at regular steps and after the last.

    Training continues from the newest checkpoint, if there is one.

    Yields:
      A row of metrics, and the diagnostics of the optimizer's state by name.

    Raises:
      FloatingPointError: a training loss is not finite.
    """
    params, state, step_once, evaluate = prepare(run, settings, shardings)
    run.state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    done = checkpoints.step if checkpoints else 0
    if checkpoints and done:
        params, state = checkpoints.arrays((params, state))
    batches, held_out = load_batches(settings, text, shardings, done)
    windows = next(batches)
    step_once = step_once.lower(params, state, windows).compile()
    evaluate = evaluate.lower(params, state, held_out).compile()

    if not done:
        held_out_loss, scalars = evaluate(params, state, held_out)
        yield Row(0, math.nan, float(held_out_loss), math.nan, 0.0), scalars
    for step in range(done + 1, settings.steps + 1):
        started = time.perf_counter()
        params, state, value = step_once(params, state, windows)
        windows = next(batches)  # while the device computes
        run.losses.append(float(value))
        run.durations.append(time.perf_counter() - started)
        if not math.isfinite(run.losses[-1]):
            raise FloatingPointError(f"{run.label}: the loss of step {step} is {run.losses[-1]}")
        advance(bar, run, settings.tokens_per_step)
        last = step == settings.steps
        if last or step % max(1, settings.steps // EVALUATIONS) == 0:
            held_out_loss, scalars = evaluate(params, state, held_out)
            yield close_row(run, step, float(held_out_loss), settings.tokens_per_step), scalars
        if checkpoints and (last or step % (settings.checkpoint_every or settings.steps) == 0):
            checkpoints.save(step, (params, state), run.record)


def advance(bar: tqdm, run: Run, tokens_per_step: int) -> None:
    """Advances the progress bar by one step, with the newest losses and the speed."""
    bar.set_postfix_str(
        f"loss={run.losses[-1]:.3f}, held-out={run.rows[-1].held_out_loss:.3f}, "
        f"tok/s={tokens_per_step / run.durations[-1]:,.0f}",
        refresh=False,
    )
    bar.update()


def close_row(run: Run, step: int, held_out_loss: float, tokens_per_step: int) -> Row:
    """Returns the metrics of the steps since the last row, and starts a new row."""
    elapsed = sum(run.durations)
    row = Row(
        step,
        sum(run.losses) / len(run.losses),
        held_out_loss,
        tokens_per_step * len(run.durations) / elapsed,
        run.rows[-1].seconds + elapsed,
    )
    run.losses, run.durations = [], []
    return row


# Results ------------------------------------------------------------------------------------------


class Results:
    """Writes the files of metrics and of diagnostics, one evaluation at a time."""

    def __init__(self, metrics: TextIO, scalars: TextIO):
        self.files = (metrics, scalars)
        self.write_row, self.write_scalar = (
            csv.writer(metrics).writerow,
            csv.writer(scalars).writerow,
        )
        self.write_row(("optimizer", *Row._fields))
        self.write_scalar(("optimizer", "step", "name", "value"))

    def write(self, name: str, row: Row, scalars: dict[str, float]) -> None:
        """Adds one evaluation of the optimizer `name`."""
        self.write_row((name, *row))
        for scalar in scalars.items():
            self.write_scalar((name, row.step, *scalar))
        for file in self.files:
            file.flush()


def open_results(out: Path) -> tuple[TextIO, TextIO]:
    """Opens the files for `Results`. Only process 0 writes any."""
    if jax.process_index() > 0:
        return open(os.devnull, "w"), open(os.devnull, "w")
    out.mkdir(parents=True, exist_ok=True)
    metrics, scalars = (
        (out / name).open("w", newline="", encoding="utf-8")
        for name in ("metrics.csv", "diagnostics.csv")
    )
    return metrics, scalars


def describe_training(settings: Settings) -> str:
    """Describes the size of the model, the number of steps and the batches."""
    params = jax.eval_shape(lambda: make_model(settings.size, settings.seed)[0])
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    return (
        f"Byte-level GPT, {settings.layers} layers of width {settings.width}, "
        f"{count:,} parameters; "
        f"{settings.steps} steps of {settings.batch_size} x {settings.context} bytes"
    )


def describe_devices(mesh: Mesh) -> str:
    """Describes the devices of the mesh."""
    devices = mesh.devices
    kind = devices.flat[0].device_kind
    if devices.size == 1:
        return kind
    sizes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    return f"{devices.size} x {kind} ({sizes}; processes: {jax.process_count()})"


# Command line -------------------------------------------------------------------------------------


def training_of(name: str, settings: Settings, text: Text) -> dict[str, float]:
    """Returns the settings that must be the same when a run is resumed."""
    training = settings.training | {
        "learning_rate": settings.learning_rate[settings.optimizer.index(name)],
        "data": zlib.crc32(text.training.tobytes() + text.held_out.tobytes()),
        "JAX_ENABLE_X64": float(jax.config.read("jax_enable_x64")),
    }
    if name == "soap":
        training["stack_multiple"] = settings.stack_multiple or math.prod(settings.mesh)
    return training


def start_jax(parser: argparse.ArgumentParser, settings: Settings) -> Shardings:
    """Joins the other processes, if there are any, and makes the mesh."""
    devices = math.prod(settings.mesh)
    try:
        if settings.coordinator and settings.processes and settings.process is not None:
            simulate_devices(devices // settings.processes)
            join(Processes(settings.coordinator, settings.processes, settings.process))
        elif settings.distributed:
            join(None)
        elif devices > 1:
            simulate_devices(devices)
    except (RuntimeError, ValueError) as error:
        flag = "--distributed" if settings.distributed else "--coordinator"
        reason = str(error).strip().partition("\n")[0]
        parser.error(f"argument {flag}: cannot join the other processes: {reason}")
    try:
        return Shardings(make_mesh(settings.mesh))
    except ValueError as error:
        parser.error(f"argument --mesh: {error}")


def open_checkpoints(
    parser: argparse.ArgumentParser, settings: Settings, text: Text, stack: ExitStack
) -> dict[str, Checkpoints]:
    """Opens the checkpoints of each optimizer.

    Exits with an error if there are any and --resume is missing, or if their settings differ.
    """
    if not (settings.checkpoint_every or settings.resume):
        return {}
    opened = {}
    for name in settings.optimizer:
        folder = settings.out / "checkpoints" / name
        opened[name] = checkpoints = Checkpoints(folder)
        stack.callback(checkpoints.close)
        if checkpoints.step and not settings.resume:
            parser.error(
                f"argument --out: {folder} holds a checkpoint of step {checkpoints.step}; "
                "go on from it with --resume, or name another folder"
            )
        if checkpoints.step:
            check_same_training(
                parser, Run.from_record(checkpoints.record()), training_of(name, settings, text)
            )
    return opened


def check_same_training(
    parser: argparse.ArgumentParser, run: Run, training: dict[str, float]
) -> None:
    """Exits with an error if a checkpoint was written with other settings."""
    for name, value in training.items():
        then = run.training.get(name)
        if then == value:
            continue
        written = f"--{name.replace('_', '-')} {then}, not {value}"
        if name == "data":
            written = "another text: pass the same --data (without --data, use the same Python)"
        if name == "JAX_ENABLE_X64":
            written = f"JAX_ENABLE_X64={then:g}, not {value:g}"
        parser.error(f"argument --resume: the checkpoint of {run.label} was written with {written}")


def train_all(
    settings: Settings,
    text: Text,
    shardings: Shardings,
    checkpoints: dict[str, Checkpoints],
    runs: list[Run],
    results: Results,
) -> None:
    """Trains with one optimizer after another, and appends to `runs` and `results` meanwhile."""
    for name, rate in zip(settings.optimizer, settings.learning_rate, strict=True):
        saved = checkpoints.get(name)
        done = saved.step if saved else 0
        if saved and done:
            run = Run.from_record(saved.record())
            print(f"{run.label}: going on from the checkpoint of step {done}", flush=True)
            for row, scalars in zip(run.rows, run.diagnostics, strict=True):
                results.write(name, row, scalars)
        else:
            run = Run(name, OPTIMIZERS[name].label, rate)
            run.training = training_of(name, settings, text)
        runs.append(run)
        started = time.perf_counter() - run.wall_clock
        with progress_bar(run, settings.steps, done) as bar:
            for row, arrays in train(run, settings, text, shardings, saved, bar):
                scalars = {key: float(array) for key, array in arrays.items()}
                run.rows.append(row)
                run.diagnostics.append(scalars)
                run.wall_clock = time.perf_counter() - started
                results.write(name, row, scalars)
                if bar.disable:  # standard error is not a terminal
                    print(progress(run, settings.steps), flush=True)


def progress_bar(run: Run, steps: int, done: int) -> tqdm:
    """Returns a bar that process 0 shows, if standard error is a terminal."""
    return tqdm(
        total=steps,
        initial=done,
        desc=run.label,
        bar_format=BAR_FORMAT,
        disable=None if jax.process_index() == 0 else True,
    )


def close(
    parser: argparse.ArgumentParser, settings: Settings, runs: list[Run], problem: str
) -> str:
    """Prints the results of complete runs, and plots all of them; returns the problem, if any."""
    if not problem:
        target = next((run for run in runs if run.optimizer == "adamw"), None)
        print(f"\n{closing_table(runs, target, settings.tokens_per_step)}\n")
        for run in runs:
            if target and run is not target:
                print(verdict(run, target))
        for run in runs:
            if any(run.diagnostics):
                print(counters(run))
    try:
        draw_curves(runs, describe_training(settings), settings.out / "loss.png")
        for run in runs:
            if any(run.diagnostics):
                draw_diagnostics(run, settings.out / "diagnostics.png")
    except OSError as error:
        problem = f"error: cannot draw {error.filename}: {error.strerror}"
    if problem:
        print(f"{parser.prog}: {problem} (results so far: {settings.out})", file=sys.stderr)
    else:
        print(f"Metrics and curves are in {settings.out}.")
    return problem


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    rates = {name: optimizer.learning_rate for name, optimizer in OPTIMIZERS.items()}
    settings = parse_arguments(parser, arguments, rates)
    text = load_text(parser, settings.data, settings.context)
    shardings = start_jax(parser, settings)
    leads = jax.process_index() == 0
    runs: list[Run] = []
    with ExitStack() as stack:
        if not leads:
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        try:
            checkpoints = open_checkpoints(parser, settings, text, stack)
            results = Results(*map(stack.enter_context, open_results(settings.out)))
        except OSError as error:
            parser.error(f"argument --out: cannot write to {error.filename}: {error.strerror}")
        print(text.description)
        devices = describe_devices(shardings.mesh)
        print(f"{describe_training(settings)}; on {devices}", flush=True)
        problem, code = "", 0
        try:
            train_all(settings, text, shardings, checkpoints, runs, results)
        except FloatingPointError as error:
            problem, code = f"error: {error}; try a lower --learning-rate", 1
        except KeyboardInterrupt:
            problem, code = "interrupted", 130
        if leads and close(parser, settings, runs, problem):
            code = code or 1
    return code


if __name__ == "__main__":
    sys.exit(main())
