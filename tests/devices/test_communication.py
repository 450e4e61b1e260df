"""The communication in compiled updates on eight simulated devices.

Programs are compiled and read, and never run.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from helpers.meshes import AUTO, EXPLICIT, MESHES, WITH_SHORT_AXES, all_axes, mesh_of
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers

import soap_optax

pytestmark = pytest.mark.usefixtures("x64")

COLLECTIVE = re.compile(
    r"= (?P<result>.*?) (all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter)"
    r"(-start)?\("
)
SHAPE = re.compile(r"f64\[([\d,]+)\]")
LEAVES = 5
LAYERS = MuonDimensionNumbers(-2, -1)

Spec = tuple[Any, ...]


class Leaf(NamedTuple):
    """A parameter and its sharding."""

    shape: tuple[int, ...]
    spec: Spec


class Axes(NamedTuple):
    """A mesh and the type of its axes."""

    mesh: str
    kind: AxisType

    def __str__(self) -> str:
        return f"{self.mesh}-{self.kind.name.lower()}"

    def make(self) -> Mesh:
        return mesh_of(self.mesh, self.kind)


MESHES_OF_EIGHT = [*(Axes(mesh, AUTO) for mesh in MESHES), Axes("4x2", EXPLICIT)]


def program_of(
    mesh: Mesh, leaves: Sequence[Leaf], specified: bool, **options: Any
) -> tuple[str, Any]:
    """The compiled update of sharded leaves, and the state."""
    shardings = [NamedSharding(mesh, PartitionSpec(*leaf.spec)) for leaf in leaves]
    optimizer = soap_optax.scale_by_soap(
        stack_sharding=all_axes(mesh),
        param_shardings=shardings if specified else None,
        precondition_frequency=2,
        **options,
    )
    grads = [
        jax.device_put(jnp.ones(leaf.shape), sharding)
        for leaf, sharding in zip(leaves, shardings, strict=True)
    ]
    state = optimizer.init(grads)
    results = jax.tree.map(lambda leaf: leaf.sharding, (grads, state))
    program = (
        jax.jit(optimizer.update, out_shardings=results)
        .lower(grads, state)
        # The program never runs, so that LLVM need not optimize it.
        .compile({"xla_backend_optimization_level": 0})  # pyright: ignore[reportArgumentType]  # an integer flag
    )
    return program.as_text() or "", state


class Received(NamedTuple):
    """One collective of a program."""

    size: int  # The number of float64 entries that a device holds after it.
    line: str


def received_in(program: str) -> list[Received]:
    """The collectives of a program.

    Raises for a collective in a branch or a loop, where bases are refreshed, and for one in the
    work that a device does on its own blocks.
    """
    received, is_entry = [], False
    for line in program.splitlines():
        if line.endswith("{"):
            is_entry = line.startswith("ENTRY")
        match = COLLECTIVE.search(line)
        if match:
            assert is_entry, line
            for part in ("/refresh/", "/step/"):
                assert part not in line, line
            shapes = [map(int, dims.split(",")) for dims in SHAPE.findall(match["result"])]
            received.append(Received(sum(map(math.prod, shapes)), line[:200]))
    return received


def entries_on_a_device(mesh: Mesh, leaves: Sequence[Leaf]) -> float:
    return sum(
        math.prod(leaf.shape) / math.prod(mesh.shape[axis] for axis in jax.tree.leaves(leaf.spec))
        for leaf in leaves
    )


def assert_factors_are_sharded(program: str, state: Any, leaves_are_sharded: bool) -> None:
    """No device holds all factors or bases."""
    for stack in state.stacks.values():
        for factor in stack.factors:
            blocks, d, _ = factor.shape
            assert f"[{blocks // 8},{d},{d}]" in program
            # Replicated updates of the factors' shape would look like factors.
            if leaves_are_sharded or factor.shape != stack.mu.shape:
                assert f"[{blocks},{d},{d}]" not in program


# One reshard each way -----------------------------------------------------------------------------


class Matrices(NamedTuple):
    """Equal leaves, and what their communication may take.

    Attributes:
      shape: of each leaf.
      more_axes: of the finer mesh over which tiles are resharded a second time.
      times: a device receives at most this number of times its entries of the leaves.
      block_size: the option of `scale_by_soap`.
    """

    shape: tuple[int, ...]
    more_axes: int = 0
    times: int = 1
    block_size: int | None = None


BLOCKS = Matrices((16, 24))
MATRICES: list[tuple[str, Matrices, list[Axes]]] = [
    ("blocks", BLOCKS, MESHES_OF_EIGHT),
    # Tiles are resharded twice each way, here over a mesh whose axes are cut into 2x2x2.
    ("tiles", Matrices((16, 64), 3, 1, 8), MESHES_OF_EIGHT),
    # Leaves whose shards end within a tile's columns are first sharded within its rows.
    (
        "shards_end_within_columns",
        Matrices((64, 16), 3, 1, 8),
        [Axes("8", AUTO), Axes("2x2x2", AUTO)],
    ),
    # The length of the first mesh axis divides the rows of these tiles, and the product of both
    # lengths does not. Devices along the second axis all-gather the rows of a tile.
    ("tiles_of_12", Matrices((24, 48), 3, 2, 12), [Axes("4x2", AUTO)]),
    # Only a factor of the one mesh axis divides the rows of these tiles. That permutes the axis,
    # once each way. Two devices all-gather rows that are sharded already.
    ("tiles_of_12_by_rows", Matrices((24, 96), 5, 2, 12), [Axes("8", AUTO)]),
    ("tiles_of_12_by_columns", Matrices((96, 24), 4, 1, 12), [Axes("8", AUTO)]),
    # Only the last two axes of these tiles, 3x3x16x16, can be sharded.
    ("tiles_of_kernels", Matrices((3, 3, 64, 64), 3, 1, 16), [Axes("8", AUTO)]),
]
# One case for matrices that are blocks, and one for tiles; below, one for layers and one for leaves
# with two shardings. The others are other ways to the same.
SHORT = {
    "blocks-4x2-auto-(x,y)",
    "tiles-4x2-auto-(None,x)",
}


def specs_of_matrices(axes: Axes) -> list[Spec]:
    """Matrices are replicated, or sharded by rows, by columns, by both."""
    names = MESHES[axes.mesh][1]
    first, last = names[0], names[-1]
    specs: list[Spec] = [(None, None), (first, None), (None, first), (last, None), (names, None)]
    if first != last:
        specs += [(first, last), (last, first), (names[1:], None), (None, names[1:])]
    return different(specs)


def different(specs: Sequence[Spec]) -> list[Spec]:
    """Leaves out specs that say the same as one before, as on a mesh of one axis."""
    by_meaning: dict[Spec, Spec] = {}
    for spec in specs:
        meaning = [axis[0] if isinstance(axis, tuple) and len(axis) == 1 else axis for axis in spec]
        while meaning and meaning[-1] is None:
            meaning.pop()
        by_meaning.setdefault(tuple(meaning), spec)
    return list(by_meaning.values())


def name_of(*parts: Any) -> str:
    return re.sub("[ ']", "", "-".join(map(str, parts)))


def some_of(cases: Sequence[Any], axes: Axes) -> Sequence[Any]:
    """All cases on the mesh 4x2, and every third one on the others, which repeat them."""
    return cases if str(axes) == "4x2-auto" else cases[::3]


def cases_of_matrices() -> Iterator[Any]:
    for name, matrices, meshes in MATRICES:
        for axes in meshes:
            for spec in some_of(specs_of_matrices(axes), axes):
                case = name_of(name, axes, spec)
                marks = [] if case in SHORT else [pytest.mark.long]
                yield pytest.param(matrices, axes, spec, id=case, marks=marks)


@pytest.mark.parametrize(("matrices", "axes", "spec"), list(cases_of_matrices()))
def test_equal_matrices_are_resharded_once_each_way(
    matrices: Matrices, axes: Axes, spec: Spec
) -> None:
    mesh = axes.make()
    ahead = len(matrices.shape) - len(spec)
    leaves = [Leaf(matrices.shape, (*[None] * ahead, *spec))] * LEAVES
    program, state = program_of(mesh, leaves, False, block_size=matrices.block_size)
    [stack] = state.stacks.values()
    received = received_in(program)
    # A reshard takes at most one collective for each axis of the mesh.
    assert 1 <= len(received) <= 2 * (len(mesh.axis_names) + matrices.more_axes), received
    # No all-gather is in vain: a device receives at most as many entries of gradients or updates
    # as it holds of the leaves and of the stack's padding, or twice that where tiles leave a rest.
    padding = stack.mu.size / (LEAVES * math.prod(matrices.shape))
    most = matrices.times * entries_on_a_device(mesh, leaves) * padding
    for size, line in received:
        assert size <= most, (most, line)
    for part in ("/refresh/", "/step/"):
        assert part in program
    assert_factors_are_sharded(program, state, any(spec))


# Trees of other leaves ----------------------------------------------------------------------------

Trees = dict[str, list[Leaf]]


def trees_of_layers(names: Sequence[str]) -> Trees:
    """Stacks of layers or experts that are sharded along them, one stack and three."""
    last = names[-1] if len(names) > 1 else None
    specs: list[Spec] = [(names,), (names[0], last), (names[-1],), ()]
    specs += [(names[:-1] or None, None, names[-1])]
    return {
        f"{count}x{spec}": [Leaf((8, 16, 24), spec)] * count
        for spec in different(specs)
        for count in (1, 3)
    }


def trees_of_two_shardings(names: Sequence[str]) -> Trees:
    """Queries with one sharding, outputs of the same shape with another."""
    first, last = names[0], names[-1] if len(names) > 1 else None
    pairs: list[tuple[Spec, Spec]] = [
        ((first, last), (last, first)),
        ((first,), (None, first)),
        ((names,), ()),
    ]
    return {
        f"{one}_{other}": [Leaf((32, 32), one)] * 6 + [Leaf((32, 32), other)] * 2
        for one, other in pairs
    }


def trees_of_one_block(names: Sequence[str]) -> Trees:
    """One block of its shape: seven devices have none."""
    first, last = names[0], names[-1]
    specs: list[Spec] = [(), (names,), (last,), (None, last), (None, first)]
    return {str(spec): [Leaf((64, 32), spec)] for spec in different(specs)}


def trees_of_a_large_leaf(names: Sequence[str]) -> Trees:
    """A large leaf without a preconditioner, which has vectors of its own in the state."""
    first, last = names[0], names[-1]
    specs: list[Spec] = [(names,), (first,), (last,), (None, last), ()]
    if len(names) == 2:
        specs += [(first, last), (last, first), ((last, first),)]
    return {str(spec): [Leaf((1024, 128), spec)] for spec in different(specs)}


def trees_of_a_large_leaf_with_a_hint(names: Sequence[str]) -> Trees:
    """Large leaves whose updates XLA all-gathers unless their sharding is specified."""
    specs: list[Spec] = [(None, names)]
    if len(names) > 2:
        specs += [(names[0], names[-1]), (names[-1], names[0])]
    return {str(spec): [Leaf((1024, 128), spec)] for spec in different(specs)}


class Limit(NamedTuple):
    """The most that a device may receive in one collective.

    Attributes:
      times: this number of times its entries of the leaves.
      blocks: or the number of blocks, where that is more.
    """

    times: float
    blocks: int = 0


# The name, the trees, the limit, the options, and whether only specified shardings keep within it.
OTHERS: list[tuple[str, Callable[[Sequence[str]], Trees], Limit, dict[str, Any], bool]] = [
    ("layers", trees_of_layers, Limit(2), {"dimension_numbers": LAYERS}, False),
    ("one_block", trees_of_one_block, Limit(2, 1), {}, False),
    ("one_block_in_64", trees_of_one_block, Limit(2, 1), {"stack_multiple": 64}, False),
    ("large_leaf", trees_of_a_large_leaf, Limit(2), {"max_precond_dim": 32}, False),
    (
        "large_leaf_with_a_hint",
        trees_of_a_large_leaf_with_a_hint,
        Limit(2),
        {"max_precond_dim": 32},
        True,
    ),
    ("two_shardings", trees_of_two_shardings, Limit(2), {}, True),
]
SHORT |= {
    "layers-4x2-auto-3x(x,y)-specified",
    "two_shardings-4x2-auto-(x,y)_(y,x)-specified",
}


# Whether shardings are specified: both on one mesh, and the types say it on explicit axes.
SPECIFIED = {"4x2-auto": [False, True], "4x2-explicit": [False]}


def cases_of_other_leaves() -> Iterator[Any]:
    for axes in MESHES_OF_EIGHT:
        for specified in SPECIFIED.get(str(axes), [True]):
            for name, trees, limit, options, needs_hint in OTHERS:
                if needs_hint and not specified and axes.kind == AUTO:
                    continue
                for tree, leaves in some_of([*trees(MESHES[axes.mesh][1]).items()], axes):
                    case = name_of(name, axes, tree) + "-specified" * specified
                    marks = [] if case in SHORT else [pytest.mark.long]
                    yield pytest.param(
                        leaves, axes, specified, limit, options, id=case, marks=marks
                    )


@pytest.mark.parametrize(
    ("leaves", "axes", "specified", "limit", "options"), list(cases_of_other_leaves())
)
def test_no_collective_brings_a_device_much_more_than_it_holds(
    leaves: list[Leaf], axes: Axes, specified: bool, limit: Limit, options: dict[str, Any]
) -> None:
    mesh = axes.make()
    program, state = program_of(mesh, leaves, specified, **options)
    largest_block = max(
        [math.prod(stack.mu.shape[1:]) for stack in state.stacks.values()], default=0
    )
    most = max(limit.times * entries_on_a_device(mesh, leaves), limit.blocks * largest_block)
    for size, line in received_in(program):
        assert size <= most, (most, line)
    assert_factors_are_sharded(program, state, any(any(leaf.spec) for leaf in leaves))


@pytest.mark.parametrize(
    ("shape", "options"),
    [((16, 16, 24), {"dimension_numbers": LAYERS}), ((1024, 128), {"max_precond_dim": 32})],
    ids=["layers", "large_leaf"],
)
@pytest.mark.parametrize(
    "axes",
    [
        pytest.param(axes, marks=[] if str(axes) == "4x2-auto" else [pytest.mark.long])
        for axes in [*MESHES_OF_EIGHT, *(Axes(mesh, AUTO) for mesh in WITH_SHORT_AXES)]
    ],
    ids=str,
)
def test_a_leaf_with_the_sharding_of_the_state_needs_no_communication(
    shape: tuple[int, ...], options: dict[str, Any], axes: Axes
) -> None:
    mesh = axes.make()
    program, _ = program_of(mesh, [Leaf(shape, (mesh.axis_names,))], True, **options)
    for size, line in received_in(program):
        assert size <= 1, line  # Whether the whole leaf is finite.
