"""Times the steps of several contenders alternately, and sums the times up.

A machine's speed drifts by more than the contenders differ. All of them therefore take a step in
every round, on the same gradients. Each time is relative to the floor of the same round.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from contenders import ALWAYS, NEVER, Contender
from jax import Array
from shapes import Model, params_of

FREQUENCIES = (1, 2, 5, 10, 100)
FLOOR = "floor"


@dataclasses.dataclass(frozen=True)
class Sample:
    """One step. Its `kind` is `plain` if no refresh was due, and `refresh` if all were due."""

    contender: str
    kind: str
    round: int
    seconds: float


class Runner:
    """A contender with its state."""

    def __init__(self, name: str, contender: Contender, params: Any) -> None:
        self.name = name
        self.contender = contender
        self.params = params
        self.state = contender.init(params)

    @property
    def kinds(self) -> tuple[str, ...]:
        return ("plain",) if self.contender.refreshes is None else ("plain", "refresh")

    def warm_up(self, grads: Any) -> None:
        """Compiles, and takes two steps. The second one computes the first bases."""
        for _ in range(2):
            self._step(self.contender.prepare(grads), NEVER)

    def time(self, grads: Any, kind: str) -> float:
        """The seconds of one step. Raises if the step's refreshes do not match its kind."""
        seconds, refreshed = self.time_at(grads, ALWAYS if kind == "refresh" else NEVER)
        if not np.all(refreshed == (kind == "refresh")):
            raise RuntimeError(f"{self.name}: a {kind} step refreshed its parts {refreshed} times")
        return seconds

    def time_at(self, grads: Any, frequency: int) -> tuple[float, np.ndarray]:
        """The seconds of one step at a frequency, and the refreshes of each part in it."""
        grads = jax.block_until_ready(self.contender.prepare(grads))
        before = self._refreshes()
        started = time.perf_counter()
        self._step(grads, frequency)
        return time.perf_counter() - started, self._refreshes() - before

    def _step(self, grads: Any, frequency: int) -> None:
        operand = jnp.asarray(frequency, jnp.int32)
        results = self.contender.update(grads, self.state, self.params, operand)
        _, self.state = jax.block_until_ready(results)

    def _refreshes(self) -> np.ndarray:
        count = self.contender.refreshes
        return count(self.state) if count else np.zeros((), np.int32)


def warmed_up(
    model: Model, layers: int, contenders: Mapping[str, Contender]
) -> tuple[list[Runner], Callable[[int], Any]]:
    """The contenders after a warm-up with seed 0, and a function that draws gradients."""
    shapes = params_of(model, layers)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    draw = gradients_of(shapes)
    runners = [Runner(name, contender, params) for name, contender in contenders.items()]
    for runner in runners:
        runner.warm_up(draw(0))
    return runners, draw


def rounds_of(
    model: Model, layers: int, contenders: Mapping[str, Contender], rounds: int
) -> Iterator[Sample]:
    """Times all contenders `rounds` times; every round begins with another contender."""
    runners, draw = warmed_up(model, layers, contenders)
    for number in range(rounds):
        first = number % len(runners)
        for kind in ("plain", "refresh"):
            grads = jax.block_until_ready(draw(2 * number + 1 + (kind == "refresh")))
            for runner in runners[first:] + runners[:first]:
                if kind in runner.kinds:
                    yield Sample(runner.name, kind, number, runner.time(grads, kind))


@dataclasses.dataclass(frozen=True)
class CycleStep:
    """One step of a refresh cycle, and the number of parts that it refreshed."""

    contender: str
    step: int
    seconds: float
    refreshed: int


def cycles_of(
    model: Model, layers: int, contenders: Mapping[str, Contender], frequency: int, cycles: int
) -> Iterator[CycleStep]:
    """Times every step of some refresh cycles.

    Before them, one and a half cycles are not timed: staggered blocks spread over the cycle there.
    The contenders take each step one after another.
    """
    runners, draw = warmed_up(model, layers, contenders)
    before = frequency + frequency // 2
    for number in range(before + cycles * frequency):
        grads = jax.block_until_ready(draw(number + 1))
        for runner in runners:
            seconds, refreshed = runner.time_at(grads, frequency)
            if number >= before:
                yield CycleStep(runner.name, number - before, seconds, int(np.sum(refreshed)))


def gradients_of(shapes: Any) -> Callable[[int], Any]:
    """Draws gradients, new ones for every seed.

    The eigenvalues of their factors span two decades and change from step to step. A refresh whose
    cost depends on its input then has work to do.
    """

    def draw(key: Array) -> Any:
        leaves, treedef = jax.tree.flatten(shapes)
        keys = jax.random.split(key, len(leaves))
        return treedef.unflatten(
            [draw_leaf(key, leaf) for key, leaf in zip(keys, leaves, strict=True)]
        )

    jitted = jax.jit(draw)
    return lambda seed: jitted(jax.random.key(seed))


def draw_leaf(key: Array, leaf: jax.ShapeDtypeStruct) -> Array:
    grad = 1e-2 * jax.random.normal(key, leaf.shape, leaf.dtype)
    for axis, length in enumerate(leaf.shape[-2:], max(0, len(leaf.shape) - 2)):
        scale = jnp.logspace(0, -1, length, dtype=leaf.dtype)
        grad *= jnp.expand_dims(scale, [other for other in range(grad.ndim) if other != axis])
    return grad


# Summaries ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Spread:
    """A median with its quartiles."""

    median: float
    lower: float
    upper: float


def spread_of(values: Sequence[float]) -> Spread:
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, lower, upper)


@dataclasses.dataclass(frozen=True)
class Summary:
    """One contender on one model: seconds, and ratios to the floor of the same round."""

    contender: str
    plain: Spread
    refresh: Spread | None
    plain_ratio: Spread | None
    refresh_ratio: Spread | None
    averages: Mapping[int, Spread]  # ratios by frequency; none if the floor was not timed


def summarize(samples: Sequence[Sample]) -> list[Summary]:
    """The summaries in the order in which the contenders first appear."""
    by_kind: dict[tuple[str, str], list[float]] = {}
    for sample in sorted(samples, key=lambda sample: sample.round):
        by_kind.setdefault((sample.contender, sample.kind), []).append(sample.seconds)
    names = dict.fromkeys(sample.contender for sample in samples)
    floors = by_kind.get((FLOOR, "plain"))
    return [
        summary_of(name, by_kind[name, "plain"], by_kind.get((name, "refresh")), floors)
        for name in names
    ]


def summary_of(
    name: str, plain: list[float], refresh: list[float] | None, floors: list[float] | None
) -> Summary:
    def ratios(times: list[float]) -> Spread | None:
        if floors is None:
            return None
        return spread_of([time / floor for time, floor in zip(times, floors, strict=True)])

    means = {
        frequency: averages_of(plain, refresh or plain, frequency) for frequency in FREQUENCIES
    }
    return Summary(
        name,
        plain=spread_of(plain),
        refresh=spread_of(refresh) if refresh else None,
        plain_ratio=ratios(plain),
        refresh_ratio=ratios(refresh) if refresh else None,
        averages={
            frequency: ratio
            for frequency, times in means.items()
            if (ratio := ratios(times)) is not None
        },
    )


def averages_of(plain: list[float], refresh: list[float], frequency: int) -> list[float]:
    """The mean step of each round, if one step in `frequency` steps is a refresh."""
    return [
        ((frequency - 1) * one + other) / frequency
        for one, other in zip(plain, refresh, strict=True)
    ]
