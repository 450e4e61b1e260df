"""Checks of what the compiled update exchanges among eight devices, run by `test_exchanges.py`.

    python exchanges.py results.json

writes, for each name in `CHECKS`, null or the traceback of its failure.
"""

import functools
import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import eight

if __name__ == "__main__":
    eight.simulate_devices()
    # Programs are read and not run: what LLVM would make of them is compiled in vain.
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from sharded_state import AUTO, EXPLICIT, MESHES, all_axes, mesh_of

import soap_optax

KINDS = [*((mesh, AUTO) for mesh in MESHES), ("4x2", EXPLICIT)]

COLLECTIVE = re.compile(
    r"= (?P<result>.*?) (all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter)"
    r"(-start)?\("
)
SHAPE = re.compile(r"f64\[([\d,]+)\]")
LEAVES = 5


def program_of(
    mesh: Mesh, spec: tuple[Any, ...], leaf: tuple[int, ...], **options: Any
) -> tuple[str, Any]:
    """The compiled update of leaves that are split in one way, and the state."""
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    optimizer = soap_optax.scale_by_soap(
        stack_sharding=all_axes(mesh), precondition_frequency=2, **options
    )
    grads = [jax.device_put(jnp.ones(leaf), sharding) for _ in range(LEAVES)]
    state = optimizer.init(grads)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, (grads, state))
    program = jax.jit(optimizer.update, out_shardings=shardings).lower(grads, state).compile()
    return program.as_text() or "", state


def exchanges_once_each_way(
    mesh_name: str,
    kind: AxisType,
    leaf: tuple[int, ...],
    more: int = 0,
    times: int = 1,
    ahead: int = 0,
    **options: Any,
) -> None:
    mesh = mesh_of(mesh_name, kind)
    first, last, every = mesh.axis_names[0], mesh.axis_names[-1], mesh.axis_names
    specs = [(None, None), (first, None), (None, first), (last, None), (every, None)]
    if first != last:
        specs += [(first, last), (last, first), (every[1:], None), (None, every[1:])]
    for of_matrix in specs:
        spec = (*[None] * ahead, *of_matrix)
        text, state = program_of(mesh, spec, leaf, **options)
        [stack] = state.stacks.values()
        collectives = [line for line in text.splitlines() if COLLECTIVE.search(line)]
        # One exchange takes at most one collective for each axis of the mesh.
        assert 1 <= len(collectives) <= 2 * (len(every) + more), (spec, collectives)
        # Nothing is gathered that is not needed: of all gradients or updates a device has at most
        # what is its part of the leaves, a few times where tiles do not divide.
        ways = math.prod(mesh.shape[axis] for axis in jax.tree.leaves(spec))
        for line in collectives:
            match = COLLECTIVE.search(line)
            assert match
            shapes = [map(int, dims.split(",")) for dims in SHAPE.findall(match["result"])]
            assert sum(map(math.prod, shapes)) <= times * stack.mu.size / ways, (
                spec,
                ways,
                stack.mu.size,
                line[:200],
            )
        for part in ("/refresh/", "/step/"):  # What a device does with its own blocks.
            assert part in text
            assert not [line for line in collectives if part in line], (spec, collectives)
        # No device holds all factors or bases.
        for factor in stack.factors:
            blocks, d, _ = factor.shape
            assert f"[{blocks},{d},{d}]" not in text
            assert f"[{blocks // 8},{d},{d}]" in text


CHECKS: Mapping[str, Callable[[], None]] = (
    {
        f"{mesh}_{kind.name.lower()}": functools.partial(
            exchanges_once_each_way, mesh, kind, (16, 24)
        )
        for mesh, kind in KINDS
    }
    | {
        # Tiles take a second exchange each way, here over a mesh whose axes are cut into 2x2x2.
        f"tiles_{mesh}_{kind.name.lower()}": functools.partial(
            exchanges_once_each_way, mesh, kind, (16, 64), more=3, block_size=8
        )
        for mesh, kind in KINDS
    }
    | {
        # Leaves that are split within the columns of a tile are split within its rows first.
        f"tiles_split_within_columns_{mesh}": functools.partial(
            exchanges_once_each_way, mesh, AUTO, (64, 16), more=3, block_size=8
        )
        for mesh in ("8", "2x2x2")
    }
    | {
        # The rows of these tiles divide over the first axis and not over both: devices that share
        # the rows of a tile over the second gather them.
        "tiles_of_12_4x2": functools.partial(
            exchanges_once_each_way, "4x2", AUTO, (24, 48), more=3, times=2, block_size=12
        ),
        # The rows of these tiles divide over a part of the one axis that there is, which puts the
        # axis out of order: a permutation each way. Two devices gather rows that are split already.
        "tiles_of_12_split_by_rows": functools.partial(
            exchanges_once_each_way, "8", AUTO, (24, 96), more=5, times=2, block_size=12
        ),
        "tiles_of_12_split_by_columns": functools.partial(
            exchanges_once_each_way, "8", AUTO, (96, 24), more=4, block_size=12
        ),
        # Of these tiles, 3x3x16x16, only the last two axes divide.
        "tiles_of_kernels": functools.partial(
            exchanges_once_each_way, "8", AUTO, (3, 3, 64, 64), more=3, ahead=2, block_size=16
        ),
    }
)


if __name__ == "__main__":
    eight.run_checks(CHECKS)
