"""The runs of `physics_study.py` as rows of two CSVs, and the contenders."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).parents[2] / "examples"))

import optax
from comparison import records
from comparison.records import CURVES, RUNS
from old_port import scale_by_old_port
from physics.equations import EQUATIONS
from physics.network import Size
from physics.optimizers import OPTIMIZERS, Numbers, Optimizer
from physics.records import row_of
from physics.specs import Setup, Spec
from physics.training import Point, Result

CURVE_POINTS = 41
CURVE_COLUMNS = ("run", *Point._fields)
SOAP = OPTIMIZERS["soap"]


def old_port(label: str, **defects: bool) -> Optimizer:
    """SOAP with some of the old port's defects."""

    def make(numbers: Numbers, refresh: str) -> optax.GradientTransformation:
        return optax.chain(
            scale_by_old_port(
                numbers.b1,
                numbers.b2,
                precondition_frequency=numbers.frequency,
                refresh=refresh,
                **defects,
            ),
            optax.scale_by_learning_rate(numbers.learning_rate),
        )

    return SOAP._replace(label=label, make=make)


# The example trains these by name, as its own optimizers.
OPTIMIZERS |= {
    "old-port": old_port("SOAP, both defects"),
    "old-port-nu": old_port("SOAP, frozen second moment", counted_first_call=False),
    "old-port-count": old_port("SOAP, counted first call", frozen_nu=False),
}


class Contender(NamedTuple):
    """An optimizer, and the number of its collocation points relative to the others'."""

    label: str
    optimizer: str
    refresh: str = ""
    frequency: int = 0
    points: int = 1


def soap(refresh: str, frequency: int) -> Contender:
    return Contender(f"SOAP, f={frequency}, {refresh}", "soap", refresh, frequency)


# In the order of the study.
CONTENDERS = {
    "soap-2-qr": soap("qr", 2),
    "adam": Contender("Adam", "adam"),
    "old-port": Contender("SOAP, both defects, f=2", "old-port", "qr", 2),
    "old-port-nu": Contender("SOAP, frozen second moment, f=2", "old-port-nu", "qr", 2),
    "old-port-count": Contender("SOAP, counted first call, f=2", "old-port-count", "qr", 2),
    "soap-1-qr": soap("qr", 1),
    "muon": Contender("Muon", "muon"),
    "kl": Contender("SOAP, KL factors, f=2, qr", "soap-kl", "qr", 2),
    "hyperball": Contender("SOAP, hyperball, f=2, qr", "soap-hyperball", "qr", 2),
    "soap-10-qr": soap("qr", 10),
    "soap-2-eigh": soap("eigh", 2),
    "soap-1-eigh": soap("eigh", 1),
    "soap-10-eigh": soap("eigh", 10),
    # It draws its points once, and fits few of them without solving the equation.
    "lbfgs": Contender("L-BFGS", "lbfgs", points=4),
}


class Sizes(NamedTuple):
    """The sizes of a study: of the network, the points of a step, and the number of steps."""

    layers: int = 3
    width: int = 32
    points: int = 512
    steps: int = 1500


class Record(NamedTuple):
    """A complete run: its settings and all columns of its row."""

    spec: Spec
    values: Mapping[str, str]

    @property
    def error(self) -> float:
        """The final relative L2 error, infinite if the run diverged."""
        return float(self.values["relative_l2"]) if self.values["status"] == "done" else math.inf

    @property
    def step_seconds(self) -> float:
        return float(self.values["seconds"]) / max(int(self.values["steps_taken"]), 1)


def spec_of(equation: str, contender: str, dtype: str, sizes: Sizes) -> Spec:
    """A contender's run with seed 0 and the default learning rate of its optimizer."""
    problem, chosen = EQUATIONS[equation], CONTENDERS[contender]
    optimizer = OPTIMIZERS[chosen.optimizer]
    setup = Setup(
        equation,
        chosen.optimizer,
        chosen.refresh,
        Size(sizes.layers, sizes.width, problem.fourier_scale, True),
        chosen.points * sizes.points,
        problem.causal_tolerance,
        dtype,
    )
    numbers = (optimizer.learning_rate, optimizer.b1, optimizer.b2)
    return Spec(setup, *numbers, chosen.frequency, sizes.steps, seed=0)


def name_of(spec: Spec) -> str:
    """A short name that no other run has."""
    checksum = hashlib.sha1(repr(spec).encode()).hexdigest()[:8]
    return f"{spec.setup.equation}-{spec.setup.optimizer}-{checksum}"


# Files --------------------------------------------------------------------------------------------


def read_records(folder: Path) -> dict[Spec, Record]:
    """The complete runs in a folder, by settings."""
    rows = records.read(folder / RUNS)
    return {record.spec: record for record in (Record(parsed(row), row) for row in rows)}


def parsed(row: Mapping[str, str]) -> Spec:
    """The settings in a row."""
    size = Size(
        int(row["layers"]),
        int(row["width"]),
        float(row["fourier_scale"]),
        row["factorized"] == "True",
    )
    setup = Setup(
        row["equation"],
        row["optimizer"],
        row["refresh"],
        size,
        int(row["points"]),
        float(row["causal_tolerance"]),
        row["dtype"],
    )
    kinds = {field.name: field.type for field in dataclasses.fields(Spec)[1:]}
    numbers: dict[str, Any] = {
        name: (float if kind == "float" else int)(row[name]) for name, kind in kinds.items()
    }
    return Spec(setup, **numbers)


def read_curves(folder: Path) -> dict[str, list[Point]]:
    """The curves in a folder, by the names of runs."""
    curves: dict[str, list[Point]] = {}
    for row in records.read(folder / CURVES):
        values = [float(row[name]) for name in Point._fields[1:]]
        curves.setdefault(row["run"], []).append(Point(int(row["step"]), *values))
    return curves


def median_run(runs: Iterable[Record]) -> Record:
    """The run with the median error, which pictures show."""
    ordered = sorted(runs, key=lambda record: record.error)
    return ordered[len(ordered) // 2]


def append(folder: Path, spec: Spec, result: Result) -> Record:
    """Adds a complete run to both files, or replaces it.

    The row comes last, because it makes the run complete.
    """
    name = name_of(spec)
    last = len(result.points) - 1
    chosen = sorted({round(last * n / (CURVE_POINTS - 1)) for n in range(CURVE_POINTS)})
    points = [
        {"run": name}
        | {key: f"{value:.4g}" for key, value in result.points[number]._asdict().items()}
        | {"step": result.points[number].step}
        for number in chosen
    ]
    others = [row for row in records.read(folder / CURVES) if row["run"] != name]
    records.replace(folder / CURVES, CURVE_COLUMNS, [*others, *points])
    row = {"run": name, **row_of(spec, result)}
    row["cores"] = records.circumstances("").cores
    others = [other for other in records.read(folder / RUNS) if other["run"] != name]
    records.replace(folder / RUNS, list(row), [*others, row])
    return Record(spec, {key: str(value) for key, value in row.items()})
