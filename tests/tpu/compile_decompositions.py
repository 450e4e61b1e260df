"""Compiles decompositions and refreshes for a TPU, ahead of time and without one.

    pip install ".[tpu]"
    python tests/tpu/compile_decompositions.py --lengths 256 1024

Each row of the table has the compile time, the number of operations and the bytes of code of one
program. The programs are one QR, a batch of QRs, the same batch under `lax.map`, and every refresh
method for a stack of bases under `lax.map`.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import sys
import time
from collections.abc import Callable, Iterator

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # There is no TPU to query,
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # and none to share.

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from soap_optax.algorithm import partial_refresh, refresh_methods
from soap_optax.linalg import decoupled_rows, with_unit_vectors

Program = tuple[str, Callable[[jax.Array], jax.Array], tuple[int, ...]]


def qr(matrix: jax.Array) -> jax.Array:
    return jnp.linalg.qr(matrix)[0]


def decompositions(batch: int, d: int) -> Iterator[Program]:
    yield f"one QR of {d}x{d}", qr, (d, d)
    yield f"{batch} in one operation", qr, (batch, d, d)
    yield f"{batch} under `lax.map`", functools.partial(jax.lax.map, qr), (batch, d, d)


def refresh(method: str, matrix: jax.Array) -> jax.Array:
    """The new basis of a method that starts from the identity."""
    factor, basis = matrix @ matrix.T, jnp.eye(len(matrix))
    if method == "partial":
        starts = partial_refresh.scheduled_chunks(len(basis), jnp.int32(0))
        return partial_refresh.rotate_chunks(factor, basis, starts).basis
    rows = decoupled_rows(factor, basis)
    axis = refresh_methods.FactorInBasis(factor, basis, factor, rows)
    return with_unit_vectors(refresh_methods.METHODS[method](axis).basis, rows)


def methods(batch: int, d: int) -> Iterator[Program]:
    for method in ("qr", "cholesky_qr", "eigh", "jacobi", "partial"):
        function = functools.partial(jax.lax.map, functools.partial(refresh, method))
        yield f'`"{method}"`, {batch} of {d}x{d}', function, (batch, d, d)


def row_of(name: str, function: Callable[[jax.Array], jax.Array], shape: tuple[int, ...]) -> str:
    topology = topologies.get_topology_desc("v5e:2x2", "tpu")
    here = jax.sharding.SingleDeviceSharding(topology.devices[0])
    argument = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=here)
    lowered = jax.jit(function).lower(argument)
    started = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - started
    operations = re.findall(r"^ +(?:ROOT )?%\S+ = ", compiled.as_text() or "", re.MULTILINE)
    analysis = compiled.memory_analysis()
    assert analysis is not None
    code = analysis.generated_code_size_in_bytes
    return f"| {name} | {seconds:.0f} | {len(operations):,} | {code / 1e6:.1f} |"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--batch", type=int, default=8)
    arguments = parser.parse_args()
    print(f"JAX {jax.__version__}, Python {sys.version.split()[0]}, {os.cpu_count()} cores\n")
    print("| program | compile s | operations | code MB |\n| --- | --- | --- | --- |", flush=True)
    for programs in (decompositions, methods):
        for d in arguments.lengths:
            for program in programs(arguments.batch, d):
                print(row_of(*program), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
