"""Measures how far the norm of gradients rises above its mean in training without a spike.

    pip install ".[benchmarks]"
    python tests/benchmarks/gradient_norms.py

`clip_by_running_norm(3)` clips a gradient whose norm is more than three times the mean of earlier
ones. This trains the byte-level transformer of the examples, without any clipping, and counts the
steps that it would have clipped. A run in which it clips none is the same bit by bit.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

# OpenBLAS's threads and XLA's fight over the cores; OpenBLAS reads this when it is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from tqdm import tqdm
from training import WEIGHT_DECAY, Size, Task, make_model, standard_text, warmed_up

import soap_optax

LIMIT = 3.0
SEEDS = (0, 1, 2)
SIZE = Size(2, 32, 2, 32)
Maker = Callable[[optax.Schedule], optax.GradientTransformation]


def soap_adamw(rate: optax.Schedule) -> optax.GradientTransformation:
    return soap_optax.soap_adamw(rate, labels=labels_of_leaves, weight_decay=WEIGHT_DECAY)


def labels_of_leaves(_leaves: list[Array]) -> list[str]:
    """The labels of a model's leaves, from its tree with names: a `Task` has a list of leaves."""
    params = jax.eval_shape(lambda: make_model(SIZE, 0)[0])
    return jax.tree.leaves(soap_optax.default_labels(params))


def adamw(rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=WEIGHT_DECAY)


RUNS: dict[tuple[str, float], Maker] = {
    ("`soap_adamw`", 0.03): soap_adamw,
    ("`soap_adamw`", 0.1): soap_adamw,
    ("AdamW", 0.003): adamw,
    ("AdamW", 0.03): adamw,
}


class Norms(NamedTuple):
    """What a limit would have done to the gradients of a run.

    Attributes:
      largest: the largest norm relative to the mean of earlier ones.
      clipped: the number of steps beyond the limit.
    """

    largest: float
    clipped: int


def norms_of(
    optimizer: optax.GradientTransformation, task: Task, seeds: Sequence[int]
) -> Iterator[np.ndarray]:
    """The norms of all gradients of a run, `(steps,)`, one seed after another."""
    loss = task.loss()

    @jax.jit
    def step(params: Any, state: Any, windows: Array) -> tuple[Any, Any, Array]:
        grads = jax.grad(loss)(params, windows)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, optax.tree.norm(grads)

    for seed in seeds:
        params, norms = task.params(seed), []
        state, batches = jax.jit(optimizer.init)(params), task.batches(seed)
        for _ in range(task.steps):
            params, state, norm = step(params, state, next(batches))
            norms.append(float(norm))
        yield np.asarray(norms)


def beyond(norms: np.ndarray, limit: float) -> Norms:
    """What `clip_by_running_norm` with this limit would have done to gradients of these norms."""
    clip = soap_optax.clip_by_running_norm(limit)

    def step(state: Any, norm: Array) -> tuple[Any, tuple[Array, Array]]:
        mean = state.mean_norm
        clipped: Any
        clipped, state = clip.update(norm, state)
        return state, (jnp.where(mean > 0, norm / mean, 0), clipped < norm)

    first = clip.init(jnp.zeros(()))
    _, (ratios, clips) = jax.lax.scan(step, first, jnp.asarray(norms, jnp.float32))
    return Norms(float(ratios.max()), int(clips.sum()))


def table_of(task: Task, seeds: Sequence[int]) -> str:
    """A Markdown table with a row for each optimizer and learning rate."""
    lines = [
        "| optimizer | learning rate | largest norm, in means | clipped steps of each run |",
        "| --- | --- | --- | --- |",
    ]
    with tqdm(total=len(RUNS) * len(seeds), unit="run") as progress:
        for (name, rate), make in RUNS.items():
            found = []
            for norms in norms_of(make(warmed_up(rate, task.steps)), task, seeds):
                found.append(beyond(norms, LIMIT))
                progress.update()
            counts = ", ".join(str(one.clipped) for one in found)
            largest = max(one.largest for one in found)
            lines.append(f"| {name} | {rate:g} | {largest:.1f} | {counts} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=240)
    args = parser.parse_args()
    if args.steps < 2:
        parser.error("--steps must be at least 2")
    task = Task(SIZE, args.steps, batch_size=32, text=standard_text())
    print(table_of(task, SEEDS))


if __name__ == "__main__":
    main()
