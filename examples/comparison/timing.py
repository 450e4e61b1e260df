"""Times the steps of several contenders in turns, so that other programs disturb all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any

import numpy as np
from byte_gpt import random_batches

from comparison.contenders import numbers_of
from comparison.presets import Preset
from comparison.running import Data, Program, compile_program, model_of
from comparison.specs import Spec
from comparison.tables import Records, best_runs

ROUNDS = 9
SHORTEST_TURN = 10  # steps


class Racer:
    """A contender that takes a number of steps whenever it is its turn.

    Attributes:
      spec: its settings.
      turn: number of steps in a turn; with fixed frequencies each turn has the same refreshes.
      seconds: the mean seconds of a step in each turn.
    """

    def __init__(self, spec: Spec, program: Program, data: Data):
        self.spec, self.program = spec, program
        self.turn = max(spec.frequency, SHORTEST_TURN)
        self.seconds: list[float] = []
        batches = random_batches(data.text.training, spec.batch_size, spec.model.context, 0)
        self.windows: np.ndarray = next(batches)
        self.numbers = numbers_of(spec, 1e-4)
        params, _ = model_of(spec.model, 0)
        self.carry: tuple[Any, Any] = (params, program.init(params))

    def run(self) -> None:
        """Takes the steps of one turn."""
        (params, state), loss = self.carry, None
        started = time.perf_counter()
        for _ in range(self.turn):
            params, state, loss = self.program.step(params, state, self.windows, self.numbers)
            float(loss)  # training reads it too
        self.seconds.append((time.perf_counter() - started) / self.turn)
        self.carry = (params, state)


def timed_specs(studies: Iterable[str], preset: Preset, records: Records) -> list[Spec]:
    """The best runs of some studies, one for each program and frequency."""
    found: dict[tuple, Spec] = {}
    for study in studies:
        for spec in best_runs(study, preset, records):
            found.setdefault((*spec.program, spec.frequency), spec)
    return list(found.values())


def time_steps(
    specs: Sequence[Spec], data: Data, advance: Callable[[], Any] = lambda: None
) -> dict[Spec, float]:
    """The median seconds of a step, with refreshes and without evaluation.

    Every contender takes a turn before any takes the next one. The first turns, in which memory is
    allocated, do not count.

    Args:
      specs: the contenders. Each keeps its parameters and its state in memory.
      data: the text, from which every contender gets one batch.
      advance: called after each compilation and each turn, `(ROUNDS + 2) * len(specs)` times.
    """
    programs: dict[tuple, Program] = {}
    racers = []
    for spec in specs:
        if spec.program not in programs:
            programs[spec.program] = compile_program(spec, data)
        racers.append(Racer(spec, programs[spec.program], data))
        advance()
    for _ in range(ROUNDS + 1):
        for racer in racers:
            racer.run()
            advance()
    return {racer.spec: median(racer.seconds[1:]) for racer in racers}
