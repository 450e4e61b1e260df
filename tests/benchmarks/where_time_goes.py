"""Profiles SOAP's update: the share of the time that each part of a step takes.

    pip install ".[benchmarks]"
    python tests/benchmarks/where_time_goes.py --models width_512 --layers 1

traces steps that refresh nothing and steps that refresh everything. It prints the share of each
part in the traced time: the products with bases, Gram matrices, decompositions, and so on. The
traced time is the time of all operations, added up over all threads or streams.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# OpenBLAS's threads and XLA's compete for the cores. OpenBLAS reads this when it is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import results
from compiling import operands_of
from contenders import ALWAYS, NEVER, contenders_of
from measure import gradients_of
from shapes import MODELS, params_of

INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%?(?P<name>[\w.-]+) = .*? (?P<opcode>[\w-]+)\(.*?"
    r'(?:custom_call_target="(?P<target>[^"]*)".*?)?(?:op_name="(?P<path>[^"]*)".*)?$'
)
# The operations inside these are traced separately.
CONTAINERS = ("while", "conditional", "call")
DECOMPOSITION = re.compile(r"geqrf|orgqr|householder|syevd|eigh|potrf|cholesky|trsm|triangular_sol")


def part_of(path: str, target: str, is_product: bool) -> str:
    """The part of a step to which an operation belongs, from its place in the traced program.

    Every product outside a refresh belongs to the step. XLA for CPUs fuses some with later
    operations, and forgets the origin of others.
    """
    if "/refresh/" in path:
        if DECOMPOSITION.search(path + target):
            return "refresh: decompositions"
        return "refresh: products" if is_product else "refresh: all else"
    if is_product:
        return "step: products"
    if "/step/" in path:
        return "step: all else"
    return "leaves to blocks and back, and what is around SOAP"


def parts_by_name(program: str) -> dict[str, str]:
    """The part of every operation in the text of a compiled program, by the operation's name."""
    with_products = computations_with_products(program)
    parts = {}
    for line in program.splitlines():
        match = INSTRUCTION.match(line)
        if match and match["opcode"] not in CONTAINERS:
            target = match["target"] or ""
            called = re.search(r"calls=%?([\w.-]+)", line)
            is_product = (
                match["opcode"] == "dot"
                or (called is not None and called[1] in with_products)
                or re.search("matmul|gemm", target) is not None
            )
            parts[match["name"]] = part_of(match["path"] or "", target, is_product)
    return parts


def computations_with_products(program: str) -> set[str]:
    """The computations of a program that multiply matrices, such as fused ones."""
    found, name = set(), ""
    for line in program.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.-]+) .*{$", line):
            name = header[1]
        elif " dot(" in line:
            found.add(name)
    return found


def operations_in(trace: Path) -> Iterator[tuple[str, float]]:
    """The operations in a trace of the profiler, and their microseconds."""
    (file,) = trace.rglob("*.trace.json.gz")
    for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]:
        name = event.get("args", {}).get("hlo_op")
        if name and event.get("ph") == "X":
            yield name, event["dur"]


def profile(
    name: str, layers: int, steps: int, options: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    """Microseconds by part, of plain steps and of refresh steps."""
    model = MODELS[name]
    (contender,) = contenders_of(model, [], {"soap": options}).values()
    draw = gradients_of(params_of(model, layers))
    params, update = draw(0), contender.update.lower(*operands_of(contender, model, layers))
    update = update.compile()
    parts = parts_by_name(update.as_text())
    state = jax.jit(contender.init)(params)
    for number in range(2):  # The second step computes the first bases.
        _, state = update(draw(number), state, params, jnp.asarray(NEVER))
    found = {}
    for kind, frequency in (("plain", NEVER), ("refresh", ALWAYS)):
        grads = [jax.block_until_ready(draw(number)) for number in range(steps)]
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                for grad in grads:
                    updates, state = update(grad, state, params, jnp.asarray(frequency))
                    jax.block_until_ready((updates, state))
            spent: dict[str, float] = defaultdict(float)
            for operation, duration in operations_in(Path(folder)):
                if operation in parts:
                    spent[parts[operation]] += duration / steps
        found[kind] = spent
    return found


def table_of(title: str, spent: Mapping[str, Mapping[str, float]]) -> str:
    """Milliseconds and shares by part, sorted by their time in a refresh step."""
    lines = [
        f"### {title}",
        "",
        f"| part | {' | '.join(f'{kind} ms | share' for kind in spent)} |",
        f"| --- |{' --- | --- |' * len(spent)}",
    ]
    total = {kind: sum(by_part.values()) for kind, by_part in spent.items()}
    for part in sorted(spent["refresh"], key=lambda part: -spent["refresh"][part]):
        cells = [
            f"{by_part.get(part, 0) / 1e3:,.1f} | {by_part.get(part, 0) / total[kind]:.0%}"
            for kind, by_part in spent.items()
        ]
        lines.append(f"| {part} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["width_512"])
    parser.add_argument("--layers", type=int, help="how deep a model is; each has a default")
    parser.add_argument("--steps", type=int, default=5, help="steps of each kind that are traced")
    parser.add_argument("--refresh", default="qr", help="the method")
    settings = parser.parse_args(arguments)
    jax.config.update("jax_default_matmul_precision", "highest")
    print(f"{results.circumstances('where_time_goes.py', arguments)}\n", flush=True)
    for name in settings.models:
        layers = settings.layers or MODELS[name].layers
        spent = profile(name, layers, settings.steps, {"refresh": settings.refresh})
        print(table_of(f"{name}, layers={layers}", spent), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
