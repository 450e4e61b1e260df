"""Trains one run and returns its curve."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from physics.optimizers import OPTIMIZERS
from physics.problems import Reference
from physics.programs import Arrays, Program, arithmetic, compile_program, numbers_of
from physics.specs import Spec

EVALUATIONS = 50  # per run, besides the one before the first step
STEPS_AHEAD = 10  # steps between two reports, for which Python does not wait

WARMUP = 0.05  # fraction of the steps in which the learning rate rises
FINAL_RATE = 0.01  # last learning rate, relative to the highest


class Point(NamedTuple):
    """One evaluation. Seconds count training steps alone."""

    step: int
    loss: float
    relative_l2: float
    seconds: float


class Result(NamedTuple):
    """The curve of a run, and its last solution.

    Attributes:
      points: the evaluations.
      prediction: the solution on the reference grid.
      reference: the reference solution.
      compile_seconds: time to compile, 0 if an earlier run had the same program.
      parameters: the number of parameters.
      state_bytes: the size of the optimizer's state.
    """

    points: list[Point]
    prediction: np.ndarray
    reference: Reference
    compile_seconds: float
    parameters: int
    state_bytes: int

    @property
    def relative_l2(self) -> float:
        """The final error."""
        return self.points[-1].relative_l2

    @property
    def diverged(self) -> bool:
        """Whether the loss was not finite. The run ended there."""
        return not math.isfinite(self.points[-1].loss + self.relative_l2)


def rates_of(spec: Spec) -> np.ndarray:
    """The learning rates of all steps: linear warmup, then cosine decay."""
    if OPTIMIZERS[spec.setup.optimizer].line_search:
        return np.full(spec.steps, spec.learning_rate)
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=spec.learning_rate,
        warmup_steps=math.ceil(WARMUP * spec.steps),
        decay_steps=max(spec.steps, 2),
        end_value=FINAL_RATE * spec.learning_rate,
    )
    return np.asarray(jax.vmap(schedule)(np.arange(1, spec.steps + 1)))


def train(spec: Spec, report: Callable[[Point], Any] | None = None) -> Result:
    """Trains to the last step, or until the loss is not finite.

    Runs with equal `Spec.setup` share a compiled program: other numbers need no compilation.

    Args:
      spec: equation, optimizer, seed and all other settings.
      report: called every `STEPS_AHEAD` steps and after each evaluation, with the present step,
        loss and time, and the newest error.
    """
    with arithmetic(spec.setup.dtype):
        compiled = compile_program.cache_info().misses
        program = compile_program(spec.setup)
        seconds = program.compile_seconds * (compile_program.cache_info().misses - compiled)
        run = Run(spec, program)
        run.train(report or (lambda _: None))
        prediction, _ = program.evaluate(run.arrays)
        return Result(
            run.points,
            np.asarray(prediction),
            program.reference,
            seconds,
            sum(leaf.size for leaf in jax.tree.leaves(run.arrays.params)),
            sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(run.arrays.state)),
        )


class Run:
    """A run between two steps: its arrays, curve and time."""

    def __init__(self, spec: Spec, program: Program):
        self.spec, self.program = spec, program
        self.arrays: Arrays = program.init(spec.seed)
        self.points: list[Point] = []
        self.seconds = 0.0

    def train(self, report: Callable[[Point], Any]) -> None:
        """Takes all steps."""
        rates = rates_of(self.spec)
        evaluated = evaluated_steps(self.spec.steps)
        self.evaluate(0, math.nan)
        done = 0
        for until in stops(self.spec.steps, evaluated):
            loss = self.take(done, rates[done:until])
            done = until
            if not math.isfinite(loss):
                self.points.append(Point(done, loss, math.nan, self.seconds))
            elif done in evaluated:
                self.evaluate(done, loss)
            report(Point(done, loss, self.points[-1].relative_l2, self.seconds))
            if not math.isfinite(loss):
                return

    def take(self, done: int, rates: np.ndarray) -> float:
        """Takes the steps after the first `done`, and returns the loss of the last one."""
        spec = self.spec
        loss: Any = math.nan
        started = time.perf_counter()
        for number, rate in enumerate(rates, done):
            numbers = numbers_of(spec.setup.dtype, rate, spec.b1, spec.b2, spec.frequency)
            self.arrays, loss = self.program.step(self.arrays, np.int32(number), numbers)
        loss = float(loss)
        self.seconds += time.perf_counter() - started
        return loss

    def evaluate(self, step: int, loss: float) -> None:
        """Adds a point to the curve."""
        _, error = self.program.evaluate(self.arrays)
        self.points.append(Point(step, loss, float(error), self.seconds))


def evaluated_steps(steps: int) -> set[int]:
    """The steps after which the solution is evaluated, the last among them."""
    return {math.ceil(steps * number / EVALUATIONS) for number in range(1, EVALUATIONS + 1)}


def stops(steps: int, evaluated: set[int]) -> list[int]:
    """The steps after which Python waits for the device."""
    return sorted({*range(STEPS_AHEAD, steps, STEPS_AHEAD), *evaluated})
