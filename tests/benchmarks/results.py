"""Tables in Markdown, and the same numbers as CSV."""

import csv
import dataclasses
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jaxlib.version
import numpy as np
import optax
from compiling import CompileTime, Memory
from measure import FLOOR, FREQUENCIES, CycleStep, Sample, Spread, Summary

import soap_optax

THREAD_SETTINGS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "NPROC", "XLA_FLAGS")


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and its number of layers."""

    model: str
    layers: int


def circumstances(program: str, arguments: Sequence[str]) -> str:
    """The device, versions, command and settings of a run."""
    versions = {
        "Python": platform.python_version(),
        "JAX": jax.__version__,
        "jaxlib": jaxlib.version.__version__,
        "Optax": optax.__version__,
        "NumPy": np.__version__,
        "soap_optax": soap_optax.__version__,
    }
    precision = jax.config.values["jax_default_matmul_precision"]
    threads = [f"{name}={os.environ.get(name, '(unset)')}" for name in THREAD_SETTINGS]
    lines = {
        "device": f"{jax.devices()[0].device_kind} ({jax.default_backend()}); {processor()}, "
        f"{usable_cores()} cores usable",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "command": f"`python tests/benchmarks/{program} {' '.join(arguments)}`",
        "threads": ", ".join(threads),
        "products": f"jax_default_matmul_precision={precision}",
    }
    return "\n".join(f"- {name}: {text}" for name, text in lines.items())


def processor() -> str:
    """The name of the processor, if the system reports one."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def usable_cores() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# Markdown -----------------------------------------------------------------------------------------

MISSING = "-"


def markdown(columns: Mapping[str, Callable[[Any], str]], rows: Iterable[Any]) -> str:
    lines = [list(columns), ["---"] * len(columns)]
    lines += [[cell(row) for cell in columns.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def steps_table(case: Case, summaries: Sequence[Summary], operations: int) -> str:
    """Times in milliseconds and, after them, ratios to the floor."""

    def speed(summary: Summary) -> str:
        if summary.contender != FLOOR:
            return MISSING
        return f"{operations / summary.plain.median / 1e9:.0f}"

    columns: dict[str, Callable[[Summary], str]] = {
        "contender": lambda summary: summary.contender,
        "plain ms": lambda summary: milliseconds(summary.plain),
        "refresh ms": lambda summary: milliseconds(summary.refresh),
        "GFLOP/s": speed,
        "plain / floor": lambda summary: ratio(summary.plain_ratio),
        "refresh / floor": lambda summary: ratio(summary.refresh_ratio),
    }
    for frequency in FREQUENCIES:
        columns[f"f={frequency}"] = lambda summary, frequency=frequency: ratio(
            summary.averages.get(frequency), quartiles=False
        )
    title = f"### {case.model}, layers={case.layers}: {operations / 1e9:.1f} GFLOP in the floor"
    return f"{title}\n\n{markdown(columns, summaries)}\n\n{STEPS_NOTE}\n"


STEPS_NOTE = (
    "Medians, with quartiles in brackets. A plain step refreshes nothing, a refresh step everything"
    ". Ratios are to the floor of the same round; the floor gets its gradients stacked already. The"
    " columns f are average steps at that frequency, in floors, computed and not measured:"
    " ((f - 1) * plain + refresh) / f, round by round."
)


def milliseconds(spread: Spread | None) -> str:
    if spread is None:
        return MISSING
    median, lower, upper = (1e3 * value for value in dataclasses.astuple(spread))
    return f"{median:,.1f} [{lower:,.1f}, {upper:,.1f}]"


def ratio(spread: Spread | None, quartiles: bool = True) -> str:
    if spread is None:
        return MISSING
    brackets = f" [{spread.lower:.2f}, {spread.upper:.2f}]" if quartiles else ""
    return f"{spread.median:.2f}{brackets}"


def cycles_table(case: Case, steps: Sequence[CycleStep], frequency: int) -> str:
    """The longest step of the cycles, relative to the median step."""
    by_name: dict[str, list[CycleStep]] = {}
    for step in steps:
        by_name.setdefault(step.contender, []).append(step)
    columns: dict[str, Callable[[str], str]] = {
        "contender": lambda name: name,
        "median ms": lambda name: f"{1e3 * median_of(by_name[name]):,.1f}",
        "largest ms": lambda name: f"{1e3 * largest_of(by_name[name]):,.1f}",
        "largest / median": lambda name: (
            f"{largest_of(by_name[name]) / median_of(by_name[name]):.2f}"
        ),
        "refreshed in a step": lambda name: (
            f"{min(step.refreshed for step in by_name[name])} to "
            f"{max(step.refreshed for step in by_name[name])}"
        ),
    }
    title = f"### {case.model}, layers={case.layers}: every step at a frequency of {frequency}"
    return f"{title}\n\n{markdown(columns, by_name)}\n"


def median_of(steps: Sequence[CycleStep]) -> float:
    return statistics.median(step.seconds for step in steps)


def largest_of(steps: Sequence[CycleStep]) -> float:
    return max(step.seconds for step in steps)


def compile_table(model: str, rows: Sequence[CompileTime]) -> str:
    columns: dict[str, Callable[[CompileTime], str]] = {
        "layers": lambda row: str(row.layers),
        "contender": lambda row: row.contender,
        "trace s": lambda row: f"{row.trace_seconds:.1f}",
        "compile s": lambda row: f"{row.compile_seconds:.1f}",
    }
    title = f"### {model}: to compile `update` alone, every layer with leaves of its own"
    return f"{title}\n\n{markdown(columns, rows)}\n"


def memory_table(case: Case, rows: Sequence[Memory]) -> str:
    columns: dict[str, Callable[[Memory], str]] = {
        "contender": lambda row: row.contender,
        "state MB": lambda row: megabytes(row.state),
        "state bytes per parameter": lambda row: f"{row.state_per_parameter:.1f}",
        "temporaries MB": lambda row: megabytes(row.temporaries),
        "in use MB": lambda row: megabytes(row.in_use),
        "largest stack MB": lambda row: megabytes(row.largest_stack),
    }
    note = (
        "In use: gradients, parameters, state, updates and temporaries, what is donated counted"
        " once. The floor's state is its bases."
    )
    title = f"### {case.model}, layers={case.layers}: memory of `update` alone"
    return f"{title}\n\n{markdown(columns, rows)}\n\n{note}\n"


def megabytes(count: int | None) -> str:
    return MISSING if count is None else f"{count / 1e6:,.1f}"


# CSV ----------------------------------------------------------------------------------------------


def sample_records(case: Case, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """A record for each timed step, with its ratio to the floor of its round."""
    floors = {sample.round: sample.seconds for sample in samples if sample.contender == FLOOR}
    return [
        dataclasses.asdict(case)
        | dataclasses.asdict(sample)
        | {"floors": sample.seconds / floors[sample.round] if floors else None}
        for sample in samples
    ]


def write_csv(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)
