"""Times the average step of optimizers on the small networks of physics-informed learning.

    python tests/benchmarks/small_networks.py

prints a table for each network: five hidden layers of width 64, and eight of width 256. *Alone* is
the optimizer's update of given gradients. *Whole* is a training step on Burgers' equation:
collocation points, loss, gradients, update. L-BFGS evaluates the loss in its line search, so it has
only whole steps.

All contenders take steps in every round, one after another. The table has medians over rounds, and
medians of the ratios within a round. A sample is the mean of some consecutive steps, so refreshes
are in it as often as they are due.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

sys.path.append(str(Path(__file__).parents[2] / "examples"))

import jax
import numpy as np
import optax
import results
from leafwise import scale_by_leafwise_soap
from physics.equations import EQUATIONS
from physics.network import Size, make_network
from physics.optimizers import OPTIMIZERS, Numbers, Optimizer
from physics.programs import arithmetic, compile_program, numbers_of
from physics.specs import Setup
from stalls import unless_stalled
from textbook import scale_by_textbook_soap

SOAP = OPTIMIZERS["soap"]


def port(label: str, scale_by: Callable[..., optax.GradientTransformation]) -> Optimizer:
    """Another SOAP, in the form of the example's optimizers."""

    def make(numbers: Numbers, _: str) -> optax.GradientTransformation:
        return optax.chain(
            scale_by(numbers.b1, numbers.b2, precondition_frequency=numbers.frequency),
            optax.scale_by_learning_rate(numbers.learning_rate),
        )

    return SOAP._replace(label=label, make=make)


# The example's training step takes these by name.
OPTIMIZERS |= {
    "textbook": port("textbook port", scale_by_textbook_soap),
    "leafwise": port("leafwise port", scale_by_leafwise_soap),
}
NAMES = ("adam", "soap", "textbook", "leafwise", "lbfgs")
NETWORKS = {"5x64": (5, 64), "8x256": (8, 256), "1x8": (1, 8)}
LEARNING_RATE = 1e-4
Step = Callable[[], Any]  # takes one step, without waiting for it


class Case(NamedTuple):
    """A contender at a refresh frequency; 0 if it does not refresh."""

    name: str
    frequency: int

    @property
    def label(self) -> str:
        return OPTIMIZERS[self.name].label


class Sample(NamedTuple):
    """The mean step of one contender in one round."""

    case: Case
    what: str
    seconds: float


class Settings(argparse.Namespace):
    """The flags."""

    networks: list[str]
    contenders: list[str]
    frequencies: list[int]
    points: int
    dtype: str
    refresh: str
    rounds: int
    steps: int
    stall_after: int

    def cases(self) -> list[Case]:
        return [
            Case(name, frequency)
            for name in self.contenders
            for frequency in (self.frequencies if OPTIMIZERS[name].refreshes else [0])
        ]

    def setup(self, network: str, name: str) -> Setup:
        size = Size(*NETWORKS[network], fourier_scale=1.0, factorized=False)
        return Setup("burgers", name, self.refresh, size, self.points, 0.0, self.dtype)


# Steps --------------------------------------------------------------------------------------------


def numbers_for(setup: Setup, frequency: int) -> Numbers:
    optimizer = OPTIMIZERS[setup.optimizer]
    return numbers_of(setup.dtype, LEARNING_RATE, optimizer.b1, optimizer.b2, max(frequency, 1))


def whole_step(setup: Setup, frequency: int) -> Step:
    """A training step, which continues from the last one."""
    program, numbers = compile_program(setup), numbers_for(setup, frequency)
    arrays, count = program.init(0), 0

    def take() -> Any:
        nonlocal arrays, count
        arrays, loss = program.step(arrays, np.int32(count), numbers)
        count += 1
        return loss

    return take


def update_alone(setup: Setup, frequency: int) -> Step:
    """An update by gradients that repeat."""
    numbers = numbers_for(setup, frequency)
    params, _, _ = make_network(setup.size, EQUATIONS[setup.equation], jax.random.key(0))
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), (4, len(leaves)))
    grads = [
        treedef.unflatten(
            [
                1e-2 * jax.random.normal(key, leaf.shape, leaf.dtype)
                for key, leaf in zip(row, leaves, strict=True)
            ]
        )
        for row in keys
    ]
    optimizer = OPTIMIZERS[setup.optimizer]

    def update(grads: Any, state: Any, params: Any, numbers: Numbers) -> Any:
        return optimizer.make(numbers, setup.refresh).update(grads, state, params)

    jitted = jax.jit(update, donate_argnums=1)
    state, count = optimizer.make(numbers, setup.refresh).init(params), 0
    state = jax.tree.map(lambda leaf: leaf.copy(), state)  # Equal arrays are not donated twice.

    def take() -> Any:
        nonlocal state, count
        updates, state = jitted(grads[count % len(grads)], state, params, numbers)
        count += 1
        return updates

    return take


def seconds_of(step: Step, steps: int) -> float:
    """The mean seconds of consecutive steps."""
    started = time.perf_counter()
    result = None
    for _ in range(steps):
        result = step()
    jax.block_until_ready(result)
    return (time.perf_counter() - started) / steps


def samples_of(settings: Settings, network: str) -> Iterator[Sample]:
    """Times all contenders in every round, after a round that is not timed."""
    runs: list[tuple[Case, str, Step]] = []
    for case in settings.cases():
        setup = settings.setup(network, case.name)
        runs.append((case, "whole", whole_step(setup, case.frequency)))
        if not OPTIMIZERS[case.name].line_search:
            runs.append((case, "alone", update_alone(setup, case.frequency)))
    for _, _, step in runs:
        seconds_of(step, 3)
    for number in range(settings.rounds):
        first = number % len(runs)
        for case, what, step in runs[first:] + runs[:first]:
            yield Sample(case, what, seconds_of(step, settings.steps))


# Tables -------------------------------------------------------------------------------------------


def table_of(network: str, settings: Settings, samples: Sequence[Sample]) -> str:
    """Medians, and medians of ratios to SOAP at the same frequency and to Adam."""
    times: dict[tuple[Case, str], list[float]] = {}
    # Rounds start with different contenders, but each contender has its samples in their order.
    for sample in samples:
        times.setdefault((sample.case, sample.what), []).append(sample.seconds)

    def median(case: Case, what: str) -> str:
        values = times.get((case, what))
        return f"{1e3 * statistics.median(values):.2f}" if values else results.MISSING

    def ratio(case: Case, what: str, to: Case) -> str:
        values, others = times.get((case, what)), times.get((to, what))
        if not values or not others:
            return results.MISSING
        ratios = [one / other for one, other in zip(values, others, strict=True)]
        return f"{statistics.median(ratios):.2f}"

    def soap(case: Case) -> Case:
        return Case("soap", case.frequency)

    adam = Case("adam", 0)
    columns: dict[str, Callable[[Case], str]] = {
        "contender": lambda case: case.label,
        "f": lambda case: str(case.frequency or results.MISSING),
        "alone, ms": lambda case: median(case, "alone"),
        "alone / SOAP": lambda case: ratio(case, "alone", soap(case)),
        "whole, ms": lambda case: median(case, "whole"),
        "whole / SOAP": lambda case: ratio(case, "whole", soap(case)),
        "whole / Adam": lambda case: ratio(case, "whole", adam),
    }
    title = f"### {network}, {settings.dtype}, {settings.points} points"
    return f"{title}\n\n{results.markdown(columns, settings.cases())}\n"


# Command line -------------------------------------------------------------------------------------


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def parse(arguments: Sequence[str]) -> Settings:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--networks", nargs="+", choices=NETWORKS, default=["5x64", "8x256"])
    add("--contenders", nargs="+", choices=NAMES, default=list(NAMES))
    add("--frequencies", nargs="+", type=positive, default=[1, 2])
    add("--dtype", choices=("float32", "float64"), default="float32")
    add("--refresh", default="qr", help="SOAP's refresh method")
    for flag, default, text in (
        ("--points", 1024, "collocation points of a whole step"),
        ("--rounds", 11, "rounds in which each contender is timed"),
        ("--steps", 20, "steps of each contender in a round"),
        ("--stall-after", 600, "seconds without a sample after which the run is ended"),
    ):
        add(flag, type=positive, default=default, help=f"{text} (default: {default})")
    return parser.parse_args(arguments, Settings())


def main(arguments: Sequence[str]) -> int:
    settings = parse(arguments)
    print(f"{results.circumstances('small_networks.py', arguments)}\n", flush=True)
    with arithmetic(settings.dtype), unless_stalled(settings.stall_after) as still_alive:
        for network in settings.networks:
            samples = [sample for sample in samples_of(settings, network) if still_alive()]
            print(table_of(network, settings, samples), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
