"""Predicts the number of runs that a plan still has, and their time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from comparison.contenders import CONTENDERS
from comparison.plans import Losses, plan_of
from comparison.presets import Preset
from comparison.records import Record
from comparison.specs import Model, Spec

# Floating-point operations in a second that forecasts expect before anything is measured. The first
# was measured on two CPU cores. The second is an assumption, a quarter of an H100's 990 TFLOPS in
# bfloat16: nothing has been measured.
CPU_SPEED = 22e9
GPU_SPEED = 250e12
COMPILE_SECONDS = {"cpu": 8.0, "gpu": 60.0}
STEP_OVERHEAD = 3e-3  # seconds of a step that do not depend on its size
# Seconds of a SOAP step on two CPU cores besides its model, for each cubed width and layer, plain
# and with a refresh.
PLAIN_STEP, REFRESH = 2e-9, 2.5e-7


class Forecast(NamedTuple):
    """The runs that are left and their seconds, if searches end as assumed."""

    runs: int
    seconds: float


class Clock:
    """Predicts the seconds of runs, from complete runs where there are similar ones."""

    def __init__(self, records: Iterable[Record], platform: str):
        self.platform = platform
        self.step_seconds: dict[tuple, float] = {}
        for record in records:
            if record.seconds > 0:
                self.step_seconds[self.key(record.spec)] = record.step_seconds

    @staticmethod
    def key(spec: Spec) -> tuple:
        """The settings that change the time of a step."""
        return (*spec.program, spec.frequency)

    def seconds(self, spec: Spec, data: Preset) -> float:
        """Seconds of training and of evaluating one run."""
        step = self.step_seconds.get(self.key(spec)) or self.estimate(spec)
        windows = math.prod(data.held_out_batches) * (data.evaluations + 1)
        forward = operations(spec.model, windows * spec.model.context) / 3 / self.speed
        return spec.steps * step + forward

    @property
    def speed(self) -> float:
        """Floating-point operations in a second."""
        return CPU_SPEED if self.platform == "cpu" else GPU_SPEED

    def estimate(self, spec: Spec) -> float:
        """Seconds of a step before anything is measured."""
        model = (
            operations(spec.model, spec.batch_size * spec.model.context) / self.speed
            + STEP_OVERHEAD
        )
        if not CONTENDERS[spec.contender].refreshes:
            return model
        cubes = spec.model.layers * spec.model.width**3
        own = cubes * (PLAIN_STEP + REFRESH / max(1, spec.frequency))
        return model + own * CPU_SPEED / self.speed

    def total(self, specs: Iterable[Spec], preset: Preset) -> float:
        """Seconds of runs one after another, each program compiled once."""
        specs = list(specs)
        programs = len({spec.program for spec in specs})
        compiling = programs * COMPILE_SECONDS["cpu" if self.platform == "cpu" else "gpu"]
        return compiling + sum(self.seconds(spec, preset) for spec in specs)


def parameters_of(model: Model) -> int:
    """The number of parameters in matrices, without embeddings of tokens and positions."""
    return 12 * model.layers * model.width**2 + model.width * model.vocabulary


def operations(model: Model, tokens: int) -> float:
    """Floating-point operations of forward and backward pass."""
    attention = 12 * model.layers * model.width * model.context
    return tokens * (6 * parameters_of(model) + attention)


def assumed_loss(spec: Spec, highest: float, worst: bool) -> float:
    """A loss that is lowest at the default rate or, at worst, as far away as possible.

    Args:
      spec: the settings of the run.
      highest: the highest known loss. No assumed loss is below it, except at worst.
      worst: whether the loss prolongs every search.
    """
    rate = math.log(spec.learning_rate / CONTENDERS[spec.contender].learning_rate)
    if worst:
        return float(spec.contender == "adamw") - rate  # SOAP needs far fewer steps.
    return highest + rate**2 + 1 / spec.steps


def left(
    studies: Iterable[str], preset: Preset, losses: Losses, clock: Clock, worst: bool = False
) -> Forecast:
    """The runs that are left if all searches end as assumed.

    Args:
      studies: names of studies.
      preset: the sizes of the studies.
      losses: losses of complete runs.
      clock: predicts seconds.
      worst: whether to assume that every search is extended as far as possible; otherwise the
        default rate is assumed to be best where no loss is known.
    """
    known: dict[Spec, float] = dict(losses)
    added: list[Spec] = []
    highest = max(filter(math.isfinite, known.values()), default=0.0)
    while missing := plan_of(studies, preset, known).missing:
        known |= {spec: assumed_loss(spec, highest, worst) for spec in missing}
        added += missing
    return Forecast(len(added), clock.total(added, preset))


def losses_of(records: Mapping[Spec, Record]) -> Losses:
    """The final held-out losses, infinite where a run diverged."""
    return {spec: record.loss for spec, record in records.items()}
