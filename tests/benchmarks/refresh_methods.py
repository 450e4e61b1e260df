"""Times every refresh method on bases that are a few steps older than their factors.

    pip install ".[benchmarks]"
    python tests/benchmarks/refresh_methods.py --out out/methods

The table has a row for each method, length of basis and number of blocks. It has the time to
refresh all blocks, one after another as in the library, and the off-diagonal mass after that. All
methods alternate on the same factors, with the floor of a plain step: six products for each block.
The bases are eigenvectors of older factors, which have since changed as in ten steps at a decay of
0.95.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# OpenBLAS's threads and XLA's compete for the cores. OpenBLAS reads this when it is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np
import results
from jax import Array, lax
from measure import FLOOR, Spread, spread_of
from tqdm import tqdm

from soap_optax.algorithm import partial_refresh, refresh_methods
from soap_optax.linalg import (
    decoupled_rows,
    descending_eigenvectors,
    matmul,
    orthonormality,
    with_unit_vectors,
)

METHODS = ("qr", "cholesky_qr", "eigh", "jacobi", "partial")
DECAY = 0.95**10  # of a factor, from one refresh to the next


@dataclasses.dataclass(frozen=True)
class Row:
    """One method on a number of equal blocks; seconds and floors are for all of them together."""

    length: int
    blocks: int
    method: str
    seconds: Spread
    floors: Spread
    mass: float


def factors_and_bases(key: Array, blocks: int, length: int) -> tuple[Array, Array]:
    """Factors, and the eigenvectors of older factors, `(blocks, d, d)` each.

    Both factors average a few gradients, whose covariance has eigenvalues over two decades.
    """
    scale = jnp.logspace(0, -1, length)

    def average(key: Array, steps: int) -> Array:
        grads = jax.random.normal(key, (steps, length, length)) * scale[:, None]
        return jnp.einsum("sij,skj->ik", grads, grads, precision="highest") / (steps * length)

    def one(key: Array) -> tuple[Array, Array]:
        old_key, new_key, rotation_key = jax.random.split(key, 3)
        rotation = jnp.linalg.qr(jax.random.normal(rotation_key, (length, length)))[0]
        old = average(old_key, 4)
        new = DECAY * old + (1 - DECAY) * average(new_key, 2)
        no_rows = jnp.zeros(length, bool)
        basis = descending_eigenvectors(rotation @ old @ rotation.T, no_rows)
        return rotation @ new @ rotation.T, basis

    return lax.map(one, jax.random.split(key, blocks))


def refresh(method: str, factor: Array, basis: Array) -> Array:
    """The new basis of a factor, `(d, d)`."""
    if method == "partial":
        starts = partial_refresh.scheduled_chunks(len(basis), jnp.int32(0))
        return partial_refresh.rotate_chunks(factor, basis, starts).basis
    rows = decoupled_rows(factor, basis)
    axis = refresh_methods.FactorInBasis(factor, basis, matmul(factor, basis), rows)
    return with_unit_vectors(refresh_methods.METHODS[method](axis).basis, rows)


def contenders() -> dict[str, Callable[[Array, Array], Array]]:
    """The functions of `(factors, bases)` to time, by name."""

    def each(method: str) -> Callable[[Array, Array], Array]:
        return lambda factors, bases: lax.map(lambda one: refresh(method, *one), (factors, bases))

    def floor(factors: Array, bases: Array) -> Array:
        for _ in range(6):
            factors = jnp.matmul(bases, factors, precision="highest")
        return factors

    return {FLOOR: jax.jit(floor)} | {method: jax.jit(each(method)) for method in METHODS}


def rows_of(length: int, blocks: int, rounds: int) -> Iterator[Row]:
    """Times all methods and the floor alternately, on new factors in every round."""
    draw = jax.jit(factors_and_bases, static_argnums=(1, 2))
    functions = contenders()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    masses: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 1):  # The first round compiles.
        factors, bases = jax.block_until_ready(draw(jax.random.key(number), blocks, length))
        for name, function in functions.items():
            started = time.perf_counter()
            new = jax.block_until_ready(function(factors, bases))
            seconds[name].append(time.perf_counter() - started)
            masses[name].append(mean_mass(factors, bases if name == FLOOR else new))
    floor = np.asarray(seconds[FLOOR][1:])
    for name in functions:
        times = np.asarray(seconds[name][1:])
        mass = float(np.mean(masses[name][1:]))
        yield Row(length, blocks, name, spread_of([*times]), spread_of([*(times / floor)]), mass)


@jax.jit
def mean_mass(factors: Array, bases: Array) -> Array:
    """The off-diagonal mass of the factors in the bases, averaged over blocks."""
    products = jnp.matmul(factors, bases, precision="highest")
    return jnp.mean(jax.vmap(orthonormality.off_diagonal_mass)(products, bases))


COLUMNS: Mapping[str, Callable[[Row], str]] = {
    "length": lambda row: str(row.length),
    "blocks": lambda row: str(row.blocks),
    "method": lambda row: "six products" if row.method == FLOOR else f'`"{row.method}"`',
    "ms": lambda row: results.milliseconds(row.seconds),
    "in floors": lambda row: results.ratio(row.floors),
    "off-diagonal mass": lambda row: f"{row.mass:.3f}",
}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--lengths", type=int, nargs="+", default=[16, 64, 256, 512])
    add("--blocks", type=int, nargs="+", default=[1, 16])
    add("--rounds", type=int, default=5)
    add("--out", type=Path, help="folder for the same as CSV")
    settings = parser.parse_args(arguments)
    print(f"{results.circumstances('refresh_methods.py', arguments)}\n")
    cases = [(length, blocks) for length in settings.lengths for blocks in settings.blocks]
    rows: list[Row] = []
    for case in tqdm(cases, "lengths and blocks", file=sys.stderr):
        rows += rows_of(*case, settings.rounds)
    print(results.markdown(COLUMNS, rows))
    print("\nMedians, with quartiles in brackets. Six products leave the mass as it was found.")
    if settings.out:
        settings.out.mkdir(parents=True, exist_ok=True)
        results.write_csv(settings.out / "methods.csv", [record_of(row) for row in rows])
    return 0


def record_of(row: Row) -> dict[str, Any]:
    medians = {"seconds": row.seconds.median, "floors": row.floors.median}
    return dataclasses.asdict(row) | medians


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
