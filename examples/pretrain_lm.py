"""Pretrain a byte-level GPT (Flax NNX) with SOAP and with other Optax optimizers.

    python examples/pretrain_lm.py

trains SOAP and AdamW from the same initial weights on the same batches and says at which step SOAP
reached AdamW's final held-out loss. The text is the source of Python's standard library, or what
--data names; its last tenth is held out. --out receives metrics.csv, a row for each evaluation, and
diagnostics.csv, what SOAP's state said at that step, both written as they are measured; and the
pictures of them, loss.png and diagnostics.png.

    python examples/pretrain_lm.py --optimizer soap --mesh data=2,fsdp=4 --checkpoint-every 100

trains on eight devices, simulated ones where the machine has fewer, and writes checkpoints. The
same command with --resume goes on from the newest. On a cluster every process runs the same command
with --distributed, or with --coordinator, --processes and --process.
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

# On two cores OpenBLAS's threads and XLA's wait for each other: refreshing SOAP's small matrices
# took 1800 ms, and 120 ms with this setting, which OpenBLAS reads when it is first imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import numpy as np
import optax
import optax.contrib
from byte_gpt import (
    even_batches,
    files_in,
    make_model,
    random_batches,
    read_text,
    standard_library,
)
from flags import OneLineParser, Settings, parse_arguments
from flax import nnx
from meshes import Placement, Processes, join, make_mesh, simulate_devices
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


class Text(NamedTuple):
    """The bytes to learn from, and those to be tested on."""

    training: np.ndarray
    held_out: np.ndarray
    description: str


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
    make: Callable[[optax.Schedule, Settings, Placement], optax.GradientTransformation]
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
        lambda rate, settings, placement: soap(
            rate,
            weight_decay=WEIGHT_DECAY,
            precondition_frequency=settings.precondition_frequency,
            max_precond_dim=settings.max_precond_dim,
            stack_sharding=placement.stacks,
            stack_multiple=settings.stack_multiple,
            param_shardings=placement.of_params,
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
    name: str, learning_rate: float, settings: Settings, placement: Placement
) -> optax.GradientTransformation:
    """Returns clipping, then the optimizer with a rate of `warmed_up`."""
    schedule = warmed_up(learning_rate, settings.steps)
    return optax.chain(
        optax.clip_by_global_norm(CLIP_NORM),
        OPTIMIZERS[name].make(schedule, settings, placement),
    )


def warmed_up(learning_rate: float, steps: int) -> optax.Schedule:
    """Returns a learning rate that warms up for a tenth of the steps, then falls as a cosine."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=learning_rate,
        warmup_steps=steps // 10,
        decay_steps=steps,
        end_value=learning_rate / 10,
    )


# Training -----------------------------------------------------------------------------------------

HELD_OUT_FRACTION = 0.1
HELD_OUT_BATCHES = (8, 64)  # batches, windows in each: the same text whatever --batch-size is
EVALUATIONS = 40  # of a run, apart from the one before the first step
BAR_FORMAT = "{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}"


def train(
    run: Run,
    settings: Settings,
    text: Text,
    placement: Placement,
    checkpoints: Checkpoints | None,
    bar: tqdm,
) -> Iterator[tuple[Row, dict]]:
    """Trains, and evaluates before the first step, at regular steps and after the last.

    It goes on from the newest checkpoint, if there is one.

    Yields:
      A row of metrics, and the diagnostics of the optimizer's state by name.

    Raises:
      FloatingPointError: a training loss is not finite.
    """
    params, loss = make_model(settings.size, settings.seed)
    params = placement.put(params, placement.of_params(params))
    optimizer = make_optimizer(run.optimizer, run.learning_rate, settings, placement)
    of_state = placement.of_state(jax.eval_shape(optimizer.init, params), params)
    state = jax.jit(optimizer.init, out_shardings=of_state)(params)
    run.state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    done = checkpoints.step if checkpoints else 0
    if checkpoints and done:
        params, state = checkpoints.arrays((params, state))

    def take_step(params: nnx.State, state: optax.OptState, windows: jax.Array) -> tuple:
        value, grads = jax.value_and_grad(loss)(params, windows)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    def observe(params: nnx.State, state: optax.OptState, batches: jax.Array) -> tuple:
        losses = jax.lax.map(lambda windows: loss(params, windows), batches)
        return losses.mean(), OPTIMIZERS[run.optimizer].diagnose(state)

    context, batch_size = settings.context, settings.batch_size
    batches = random_batches(text.training, batch_size, context, settings.seed)
    batches = map(placement.put_batches, islice(batches, done, None))
    held_out = placement.put_batches(even_batches(text.held_out, *HELD_OUT_BATCHES, context))
    windows = next(batches)
    places = (placement.of_params(params), of_state, placement.replicated)
    jitted = jax.jit(take_step, donate_argnums=(0, 1), out_shardings=places)
    step_once = jitted.lower(params, state, windows).compile()
    evaluate = jax.jit(observe, out_shardings=placement.replicated)
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
        bar.set_postfix_str(
            f"loss={run.losses[-1]:.3f}, held-out={run.rows[-1].held_out_loss:.3f}, "
            f"tok/s={batch_size * context / run.durations[-1]:,.0f}",
            refresh=False,
        )
        bar.update()
        last = step == settings.steps
        if last or step % max(1, settings.steps // EVALUATIONS) == 0:
            elapsed = sum(run.durations)
            held_out_loss, scalars = evaluate(params, state, held_out)
            row = Row(
                step,
                sum(run.losses) / len(run.losses),
                float(held_out_loss),
                batch_size * context * len(run.durations) / elapsed,
                run.rows[-1].seconds + elapsed,
            )
            run.losses, run.durations = [], []
            yield row, scalars
        if checkpoints and (last or step % (settings.checkpoint_every or settings.steps) == 0):
            checkpoints.save(step, (params, state), run)


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


def describe_devices(placement: Placement) -> str:
    """Returns the devices that are in use."""
    devices = placement.mesh.devices
    kind = devices.flat[0].device_kind
    if devices.size == 1:
        return kind
    sizes = ", ".join(f"{axis}={size}" for axis, size in placement.mesh.shape.items())
    return f"{devices.size} x {kind} ({sizes}; processes: {jax.process_count()})"


# Command line -------------------------------------------------------------------------------------


def training_of(name: str, settings: Settings, text: Text) -> dict[str, float]:
    """What a checkpoint of an optimizer must have been written with, to be gone on from."""
    training = settings.training | {
        "learning_rate": settings.learning_rate[settings.optimizer.index(name)],
        "data": zlib.crc32(text.training.tobytes() + text.held_out.tobytes()),
        "JAX_ENABLE_X64": float(jax.config.read("jax_enable_x64")),
    }
    if name == "soap":
        training["stack_multiple"] = settings.stack_multiple or math.prod(settings.mesh)
    return training


def start_jax(parser: argparse.ArgumentParser, settings: Settings) -> Placement:
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
        return Placement(make_mesh(settings.mesh))
    except ValueError as error:
        parser.error(f"argument --mesh: {error}")


def open_checkpoints(
    parser: argparse.ArgumentParser, settings: Settings, text: Text, stack: ExitStack
) -> dict[str, Checkpoints]:
    """Opens the checkpoints of each optimizer, and checks that they are wanted and fit."""
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
            check_same_training(parser, checkpoints.run(), training_of(name, settings, text))
    return opened


def check_same_training(
    parser: argparse.ArgumentParser, run: Run, training: dict[str, float]
) -> None:
    """Checks that a checkpoint is of the training that the flags describe."""
    for name, value in training.items():
        then = run.training.get(name)
        if then == value:
            continue
        written = f"--{name.replace('_', '-')} {then}, not {value}"
        if name == "data":
            written = "another text: give it the same --data (by default, the same Python)"
        if name == "JAX_ENABLE_X64":
            written = f"JAX_ENABLE_X64={then:g}, not {value:g}"
        parser.error(f"argument --resume: the checkpoint of {run.label} was written with {written}")


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
    description = (
        f"{source}: {len(files)} files, {len(text):,} bytes, the last {held_out:,} held out"
    )
    return Text(text[:-held_out], text[-held_out:], description)


def train_all(
    settings: Settings,
    text: Text,
    placement: Placement,
    checkpoints: dict[str, Checkpoints],
    runs: list[Run],
    metrics: TextIO,
    states: TextIO,
) -> None:
    """Trains with one optimizer after another, adding to `runs` and to the files as it goes."""
    write_row, write_scalar = csv.writer(metrics).writerow, csv.writer(states).writerow

    def write(name: str, row: Row, scalars: dict[str, float]) -> None:
        write_row((name, *row))
        for scalar in scalars.items():
            write_scalar((name, row.step, *scalar))
        metrics.flush()
        states.flush()

    write_row(("optimizer", *Row._fields))
    write_scalar(("optimizer", "step", "name", "value"))
    for name, rate in zip(settings.optimizer, settings.learning_rate, strict=True):
        saved = checkpoints.get(name)
        run = Run(name, OPTIMIZERS[name].label, rate)
        run.training = training_of(name, settings, text)
        if saved and saved.step:
            run = saved.run()
            print(f"{run.label}: going on from the checkpoint of step {saved.step}", flush=True)
            for row, scalars in zip(run.rows, run.diagnostics, strict=True):
                write(name, row, scalars)
        runs.append(run)
        started = time.perf_counter() - run.wall_clock
        with tqdm(
            total=settings.steps,
            initial=saved.step if saved else 0,
            desc=run.label,
            bar_format=BAR_FORMAT,
            disable=None if jax.process_index() == 0 else True,
        ) as bar:
            for row, arrays in train(run, settings, text, placement, saved, bar):
                scalars = {key: float(array) for key, array in arrays.items()}
                run.rows.append(row)
                run.diagnostics.append(scalars)
                run.wall_clock = time.perf_counter() - started
                write(name, row, scalars)
                if bar.disable:  # standard error is not a terminal
                    print(progress(run, settings.steps), flush=True)


def open_results(out: Path) -> tuple[TextIO, TextIO]:
    """Opens the files of metrics and of diagnostics; only the first process writes any."""
    if jax.process_index() > 0:
        return open(os.devnull, "w"), open(os.devnull, "w")
    out.mkdir(parents=True, exist_ok=True)
    metrics, states = (
        (out / name).open("w", newline="", encoding="utf-8")
        for name in ("metrics.csv", "diagnostics.csv")
    )
    return metrics, states


def close(
    parser: argparse.ArgumentParser, settings: Settings, runs: list[Run], problem: str
) -> str:
    """Prints what complete runs gave and draws what there is; returns the problem, if any."""
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
        draw_curves(runs, describe(settings), settings.out / "loss.png")
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
    """Runs the command line; returns the exit code."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    rates = {name: optimizer.learning_rate for name, optimizer in OPTIMIZERS.items()}
    settings = parse_arguments(parser, arguments, rates)
    text = load_text(parser, settings)
    placement = start_jax(parser, settings)
    leads = jax.process_index() == 0
    runs: list[Run] = []
    with ExitStack() as stack:
        if not leads:
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        try:
            checkpoints = open_checkpoints(parser, settings, text, stack)
            metrics, states = map(stack.enter_context, open_results(settings.out))
        except OSError as error:
            parser.error(f"argument --out: cannot write to {error.filename}: {error.strerror}")
        print(text.description)
        print(f"{describe(settings)}; on {describe_devices(placement)}", flush=True)
        problem, code = "", 0
        try:
            train_all(settings, text, placement, checkpoints, runs, metrics, states)
        except FloatingPointError as error:
            problem, code = f"error: {error}; try a lower --learning-rate", 1
        except KeyboardInterrupt:
            problem, code = "interrupted", 130
        if leads and close(parser, settings, runs, problem):
            code = code or 1
    return code


if __name__ == "__main__":
    sys.exit(main())
