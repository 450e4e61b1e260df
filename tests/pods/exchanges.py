"""Checks of what the compiled update exchanges among eight devices, run by `test_exchanges.py`.

    python exchanges.py results.json

writes, for each name in `CHECKS`, null or the traceback of its failure.
"""

import functools
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import eight

if __name__ == "__main__":
    eight.simulate_devices()
    # Programs are read and not run: what LLVM would make of them is compiled in vain.
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers
from sharded_state import AUTO, EXPLICIT, MESHES, WITH_SHORT_AXES, all_axes, mesh_of

import soap_optax

KINDS = [*((mesh, AUTO) for mesh in MESHES), ("4x2", EXPLICIT)]

COLLECTIVE = re.compile(
    r"= (?P<result>.*?) (all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter)"
    r"(-start)?\("
)
SHAPE = re.compile(r"f64\[([\d,]+)\]")
LEAVES = 5
LAYERS = MuonDimensionNumbers(-2, -1)

Spec = tuple[Any, ...]
Leaf = tuple[tuple[int, ...], Spec]  # A shape, and how it is split.


def program_of(mesh: Mesh, leaves: Sequence[Leaf], known: bool, **options: Any) -> tuple[str, Any]:
    """The compiled update of leaves that are split in some ways, and the state."""
    shardings = [NamedSharding(mesh, PartitionSpec(*spec)) for _, spec in leaves]
    optimizer = soap_optax.scale_by_soap(
        stack_sharding=all_axes(mesh),
        param_shardings=shardings if known else None,
        precondition_frequency=2,
        **options,
    )
    grads = [
        jax.device_put(jnp.ones(shape), sharding)
        for (shape, _), sharding in zip(leaves, shardings, strict=True)
    ]
    state = optimizer.init(grads)
    results = jax.tree.map(lambda leaf: leaf.sharding, (grads, state))
    program = jax.jit(optimizer.update, out_shardings=results).lower(grads, state).compile()
    return program.as_text() or "", state


def received_of(program: str) -> list[tuple[int, str]]:
    """How many numbers a device has after each collective of a program, and the collective.

    Raises where one is in a branch or a loop, which is where bases are refreshed.
    """
    received, is_entry = [], False
    for line in program.splitlines():
        if line.endswith("{"):
            is_entry = line.startswith("ENTRY")
        match = COLLECTIVE.search(line)
        if match:
            assert is_entry, line
            for part in ("/refresh/", "/step/"):  # What a device does with its own blocks.
                assert part not in line, line
            shapes = [map(int, dims.split(",")) for dims in SHAPE.findall(match["result"])]
            received.append((sum(map(math.prod, shapes)), line[:200]))
    return received


def part_of(mesh: Mesh, leaves: Sequence[Leaf]) -> float:
    """A device's part of the leaves, in numbers."""
    return sum(
        math.prod(shape) / math.prod(mesh.shape[axis] for axis in jax.tree.leaves(spec))
        for shape, spec in leaves
    )


def specs_of(mesh: Mesh) -> list[Spec]:
    """Ways to split matrices over a mesh: not at all, by rows, by columns, by both."""
    first, last, every = mesh.axis_names[0], mesh.axis_names[-1], mesh.axis_names
    specs = [(None, None), (first, None), (None, first), (last, None), (every, None)]
    if first != last:
        specs += [(first, last), (last, first), (every[1:], None), (None, every[1:])]
    return specs


def exchanges_once_each_way(
    mesh_name: str,
    kind: AxisType,
    leaf: tuple[int, ...],
    more: int = 0,
    times: int = 1,
    ahead: int = 0,
    known: bool = False,
    **options: Any,
) -> None:
    mesh = mesh_of(mesh_name, kind)
    for of_matrix in specs_of(mesh):
        spec = (*[None] * ahead, *of_matrix)
        leaves = [(leaf, spec)] * LEAVES
        text, state = program_of(mesh, leaves, known, **options)
        [stack] = state.stacks.values()
        received = received_of(text)
        # One exchange takes at most one collective for each axis of the mesh.
        assert 1 <= len(received) <= 2 * (len(mesh.axis_names) + more), (spec, received)
        # Nothing is gathered that is not needed: of all gradients or updates a device has at most
        # what is its part of the leaves, a few times where tiles do not divide.
        most = times * part_of(mesh, leaves) * stack.mu.size / (LEAVES * math.prod(leaf))
        for size, line in received:
            assert size <= most, (spec, most, line)
        for part in ("/refresh/", "/step/"):
            assert part in text
        holds_no_factor_of_another(text, state, any(spec))


def holds_no_factor_of_another(text: str, state: Any, is_split: bool) -> None:
    """No device holds all factors or bases."""
    for stack in state.stacks.values():
        for factor in stack.factors:
            blocks, d, _ = factor.shape
            assert f"[{blocks // 8},{d},{d}]" in text
            if is_split or factor.shape != stack.mu.shape:  # Or else all updates look like factors.
                assert f"[{blocks},{d},{d}]" not in text


def receives_little(
    mesh_name: str,
    kind: AxisType,
    leaves: Callable[[tuple[str, ...]], Sequence[Sequence[Leaf]]],
    times: float = 1,
    known: bool = False,
    blocks: int = 0,
    **options: Any,
) -> None:
    """In no collective a device gets more than `times` its part of the leaves.

    Args:
      mesh_name: the mesh.
      kind: of what type its axes are.
      leaves: from the names of its axes, several trees to try.
      times: the limit.
      known: whether `param_shardings` says how leaves are split.
      blocks: or this many blocks for each device, if they are more.
      **options: of `scale_by_soap`.
    """
    mesh = mesh_of(mesh_name, kind)
    for tree in leaves(mesh.axis_names):
        text, state = program_of(mesh, tree, known, **options)
        of_block = max(
            [math.prod(stack.mu.shape[1:]) for stack in state.stacks.values()], default=0
        )
        most = max(times * part_of(mesh, tree), blocks * of_block)
        for size, line in received_of(text):
            assert size <= most, (tree, most, line)
        holds_no_factor_of_another(text, state, any(any(spec) for _, spec in tree))


def needs_no_exchange(
    mesh_name: str, kind: AxisType, leaf: tuple[int, ...], **options: Any
) -> None:
    """A leaf that lies as the state does is exchanged with nobody."""
    mesh = mesh_of(mesh_name, kind)
    text, _ = program_of(mesh, [(leaf, (mesh.axis_names,))], known=True, **options)
    for size, line in received_of(text):
        assert size <= 1, line  # Whether all of a leaf is finite.


def split_by_layers(axes: Sequence[str]) -> list[list[Leaf]]:
    """Stacks of layers or experts that are split along them, one and three."""
    last = axes[-1] if len(axes) > 1 else None
    specs: list[Spec] = [(axes,), (axes[0], last), (axes[-1],), ()]
    specs += [(axes[:-1] or None, None, axes[-1])]
    return [[((8, 16, 24), spec)] * count for spec in specs for count in (1, 3)]


def split_in_two_ways(axes: Sequence[str]) -> list[list[Leaf]]:
    """Queries that are split in one way, and outputs in another."""
    first, last = axes[0], axes[-1] if len(axes) > 1 else None
    pairs: list[tuple[Spec, Spec]] = [
        ((first, last), (last, first)),
        ((first,), (None, first)),
        ((axes,), ()),
    ]
    return [[((32, 32), one)] * 6 + [((32, 32), other)] * 2 for one, other in pairs]


def alone(axes: Sequence[str]) -> list[list[Leaf]]:
    """One block of a kind, and seven devices that have none."""
    first, last = axes[0], axes[-1]
    specs: list[Spec] = [(), (axes,), (last,), (None, last), (None, first)]
    return [[((64, 32), spec)] for spec in specs]


def without_factors(axes: Sequence[str]) -> list[list[Leaf]]:
    """A large leaf that has a vector of its own."""
    first, last = axes[0], axes[-1]
    specs: list[Spec] = [(axes,), (first,), (last,), (None, last), ()]
    if len(axes) == 2:
        specs += [(first, last), (last, first), ((last, first),)]
    return [[((1024, 128), spec)] for spec in specs]


def without_factors_if_known(axes: Sequence[str]) -> list[list[Leaf]]:
    """One that the compiler gathers on the way out, unless it is known how it is split."""
    specs: list[Spec] = [(None, axes)]
    if len(axes) > 2:
        specs += [(axes[0], axes[-1]), (axes[-1], axes[0])]
    return [[((1024, 128), spec)] for spec in specs]


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
    | {
        f"{name}_{mesh}_{kind.name.lower()}{'_known' * known}": functools.partial(
            receives_little, mesh, kind, leaves, known=known, **options
        )
        for mesh, kind in KINDS
        for known in (False, True)
        if not (known and kind == EXPLICIT)
        for name, leaves, options in (
            ("layers", split_by_layers, {"dimension_numbers": LAYERS, "times": 2}),
            ("alone", alone, {"blocks": 1, "times": 2}),
            ("alone_of_64", alone, {"blocks": 1, "times": 2, "stack_multiple": 64}),
            ("without_factors", without_factors, {"times": 2, "max_precond_dim": 32}),
            ("vector", without_factors_if_known, {"times": 2, "max_precond_dim": 32}),
            ("two_ways", split_in_two_ways, {"times": 2}),
        )
        if name not in ("vector", "two_ways") or known or kind == EXPLICIT
    }
    | {
        f"{name}_as_the_state_{mesh}_{kind.name.lower()}": functools.partial(
            needs_no_exchange, mesh, kind, leaf, **options
        )
        for mesh, kind in [*KINDS, *((mesh, AUTO) for mesh in WITH_SHORT_AXES)]
        for name, leaf, options in (
            ("layers", (16, 16, 24), {"dimension_numbers": LAYERS}),
            ("without_factors", (1024, 128), {"max_precond_dim": 32}),
        )
    }
)


if __name__ == "__main__":
    eight.run_checks(CHECKS)
