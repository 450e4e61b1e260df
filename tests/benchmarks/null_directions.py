"""What the two rules for null directions change in training runs of the byte-level GPT.

    pip install ".[benchmarks]"
    python tests/benchmarks/null_directions.py

docs/explanation/numerics.md has the rules: rows without a gradient are decoupled from a basis, and
entries below the floor of the second moment get no update. The benchmark trains every seed with
both rules and with neither, and compares the final held-out losses seed by seed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple
from unittest import mock

# OpenBLAS's threads and XLA's compete for the cores. OpenBLAS reads this when it is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import results
import training
from jax import Array
from tqdm import tqdm

from soap_optax.algorithm import eigenbasis, step

# Found through `training`, which knows where the examples are.
from byte_gpt import Size  # isort: skip
from flags import whole_number  # isort: skip


@contextmanager
def without_rules() -> Iterator[None]:
    """SOAP as it is without both rules, in everything that is traced."""

    def no_rows(matrix: Array, _basis: Array) -> Array:
        return jnp.zeros(matrix.shape[0], bool)

    def unchanged(mu: Array, _nu: Array) -> Array:
        return mu

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(eigenbasis, "decoupled_rows", no_rows))
        patches.enter_context(mock.patch.object(step, "without_rounding", unchanged))
        jax.clear_caches()  # JAX would reuse functions that it traced with the rules.
        yield
    jax.clear_caches()


def final_losses(task: training.Task, seeds: Sequence[int], label: str) -> list[float]:
    """The held-out losses after the last step, by seed."""
    optimizer = training.soap(training.LEARNING_RATES["soap"], task.steps, {})
    program = training.compile_program(optimizer, task)
    losses = []
    for seed in seeds:
        with tqdm(total=task.steps, desc=f"{label}, seed {seed}", unit="step") as bar:
            *_, last = training.train(program, task, seed, bar.update)
        losses.append(last.held_out_loss)
    return losses


class Comparison(NamedTuple):
    """Final losses with and without the rules, seed by seed."""

    rules: list[float]
    neither: list[float]

    @property
    def differences(self) -> list[float]:
        """The loss with the rules minus the one without."""
        return [ours - theirs for ours, theirs in zip(*self, strict=True)]

    def table(self) -> str:
        """Means with standard deviations over seeds."""
        rows: Mapping[str, list[float]] = {
            "both rules": self.rules,
            "neither": self.neither,
            "difference": self.differences,
        }
        columns = {
            "run": lambda row: row[0],
            "mean final loss": lambda row: f"{statistics.mean(row[1]):.4f}",
            "standard deviation over seeds": lambda row: f"{statistics.stdev(row[1]):.4f}",
        }
        return results.markdown(columns, rows.items())


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = partial(parser.add_argument, type=whole_number, metavar="N")
    add("--seeds", default=10, help="number of seeds, at least two")
    add("--steps", default=400, help="training steps")
    add("--layers", default=2, help="transformer blocks")
    add("--width", default=64, help="length of the residual vectors")
    settings = parser.parse_args(arguments)
    if settings.seeds < 2:
        parser.error("argument --seeds: must be at least 2, for a standard deviation")
    size = Size(settings.layers, settings.width, 2, 64)
    task = training.Task(size, settings.steps, 32, training.standard_text())
    seeds = range(settings.seeds)
    print(f"{results.circumstances('null_directions.py', arguments)}\n", flush=True)
    rules = final_losses(task, seeds, "both rules")
    with without_rules():
        neither = final_losses(task, seeds, "neither")
    print(Comparison(rules, neither).table())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
