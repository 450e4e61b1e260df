"""Where every parameter goes: a static plan, made of shapes alone, and the two ways along it.

A leaf is viewed with its dimensions merged if asked for, cut into rectangular regions of equal
tiles, and each tile is a block. Equal blocks of all leaves form one stack, so that the size of the
program follows the number of kinds of block and not the number of leaves.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Cut:
    """How leaves are cut into blocks; the fields are the arguments of `scale_by_soap`."""

    max_precond_dim: int
    precondition_1d: bool
    merge_dims: bool
    block_size: int | None


class Region(NamedTuple):
    """A rectangle of one leaf, cut into equal tiles.

    Attributes:
      leaf: the leaf's position in the flattened tree.
      start: the rectangle's first entry in the leaf's view.
      tiles: how many tiles it has along each axis.
      tile: the shape of a tile.
    """

    leaf: int
    start: Shape
    tiles: Shape
    tile: Shape


@dataclass(frozen=True)
class Group:
    """Blocks that share their arrays of state: a stack, or leaves that are ravelled together.

    Attributes:
      regions: where the blocks come from, in the order in which they are stored.
      dtype: the dtype of the statistics.
      axes: the preconditioned axes, the same for every block; none where leaves are ravelled.
    """

    regions: tuple[Region, ...]
    dtype: np.dtype
    axes: tuple[int, ...]

    @property
    def runs(self) -> list[tuple[Region, ...]]:
        """The regions by shape of their tiles. All of a stack are one run."""
        return [tuple(run) for _, run in itertools.groupby(self.regions, lambda r: r.tile)]

    @property
    def tile(self) -> Shape:
        """The shape of the blocks of a stack."""
        return self.regions[0].tile

    @property
    def blocks(self) -> int:
        """How many blocks the group holds."""
        return sum(math.prod(region.tiles) for region in self.regions)

    @property
    def entries(self) -> int:
        """How many entries of parameters the group holds."""
        return sum(math.prod(region.tiles + region.tile) for region in self.regions)


@dataclass(frozen=True)
class Plan:
    """The groups of a tree, and the shapes needed to put its leaves together again."""

    shapes: tuple[Shape, ...]
    views: tuple[Shape, ...]
    stacks: dict[str, Group]
    ravelled: dict[str, Group]


def make_plan(shapes: Sequence[Shape], dtypes: Sequence[DTypeLike], cut: Cut) -> Plan:
    """Assigns every leaf, known by shape and dtype, to stacks or to the ravelled leaves.

    Zero-size leaves belong to no group. Statistics are float32, or the leaf's dtype where wider.
    """
    views = tuple(merged_shape(shape, cut) for shape in shapes)
    stacks: dict[tuple[np.dtype, Shape], list[Region]] = {}
    ravelled: dict[np.dtype, list[Region]] = {}
    for leaf, (shape, view, leaf_dtype) in enumerate(zip(shapes, views, dtypes, strict=True)):
        dtype = statistics_dtype(leaf_dtype)
        is_vector = len(shape) < 2
        for region in regions_of(leaf, view, is_vector, cut):
            if preconditioned_axes(region.tile, is_vector, cut):
                stacks.setdefault((dtype, region.tile), []).append(region)
            else:
                ravelled.setdefault(dtype, []).append(region)
    return Plan(
        shapes=tuple(shapes),
        views=views,
        stacks={
            stack_name(tile, dtype): Group(
                tuple(regions), dtype, preconditioned_axes(tile, is_vector=False, cut=cut)
            )
            for (dtype, tile), regions in stacks.items()
        },
        ravelled={
            dtype.name: Group(tuple(sorted(regions, key=lambda r: r.tile)), dtype, axes=())
            for dtype, regions in ravelled.items()
        },
    )


def statistics_dtype(dtype: DTypeLike) -> np.dtype:
    """The dtype of a leaf's factors, bases and moments: never narrower than float32."""
    return np.dtype(np.float64 if np.dtype(dtype) == np.float64 else np.float32)


def stack_name(tile: Shape, dtype: np.dtype) -> str:
    """The key of a stack in the state, such as `512x2048` or `512x2048_float64`."""
    name = "x".join(map(str, tile))
    return name if dtype == np.float32 else f"{name}_{dtype.name}"


def merged_shape(shape: Shape, cut: Cut) -> Shape:
    """The authors' merging: neighbours, from the first on, while their product stays in bounds.

    They do the same to every leaf of two or more dimensions, so that one may merge into a vector,
    which is then preconditioned whatever `precondition_1d` says.
    """
    if not cut.merge_dims or len(shape) < 2:
        return shape
    merged: list[int] = []
    current = 1
    for length in shape:
        if current * length <= cut.max_precond_dim:
            current *= length
        elif current > 1:
            merged.append(current)
            current = length
        else:
            merged.append(length)
    if current > 1 or not merged:
        merged.append(current)
    return tuple(merged)


def preconditioned_axes(tile: Shape, is_vector: bool, cut: Cut) -> tuple[int, ...]:
    """The axes of a block that get a factor. One of length 1 gets none: it would be a sign."""
    if is_vector and not cut.precondition_1d:
        return ()
    return tuple(axis for axis, d in enumerate(tile) if 1 < d <= cut.max_precond_dim)


def regions_of(leaf: int, view: Shape, is_vector: bool, cut: Cut) -> list[Region]:
    """Cuts a leaf's view into regions of equal tiles, the last axis varying fastest."""
    if 0 in view:
        return []
    if cut.block_size is None or not view or (is_vector and not cut.precondition_1d):
        return [Region(leaf, (0,) * len(view), (1,) * len(view), view)]
    regions = []
    for parts in itertools.product(*(cut_axis(length, cut.block_size) for length in view)):
        start, tiles, tile = zip(*parts, strict=True)
        regions.append(Region(leaf, start, tiles, tile))
    return regions


def cut_axis(length: int, block_size: int) -> list[tuple[int, int, int]]:
    """Cuts an axis into tiles of at most `block_size`, as `(start, tiles, length of a tile)`.

    All tiles are equal where the axis has a divisor no smaller than half of the block size, and
    than 2; otherwise their lengths differ by one, the longer ones first.
    """
    if length <= block_size:
        return [(0, 1, length)]
    for tile in range(block_size, max(1, (block_size - 1) // 2), -1):
        if length % tile == 0:
            return [(0, length // tile, tile)]
    tiles = -(-length // block_size)
    short, longer = divmod(length, tiles)
    return [(0, longer, short + 1), (longer * (short + 1), tiles - longer, short)]


def gather(leaves: Sequence[ArrayLike], plan: Plan, group: Group) -> list[Array]:
    """Reads a group's blocks out of the leaves: `(k, *tile)` for each run of equal tiles."""
    return [
        jnp.concatenate(
            [
                _to_blocks(jnp.reshape(leaves[region.leaf], plan.views[region.leaf]), region)
                for region in run
            ],
            dtype=group.dtype,
        )
        for run in group.runs
    ]


def split(
    blocks: Sequence[Array], group: Group, starts: Mapping[int, ArrayLike]
) -> dict[Region, Array]:
    """Divides what `gather` put together among the regions that it came from.

    Args:
      blocks: `(k, *tile)` for each run of equal tiles.
      group: the group that was gathered.
      starts: each position of `starts_of`, as a number or as a traced scalar.
    """
    parts = {}
    for stack, run in zip(blocks, group.runs, strict=True):
        for start, length, region in _stretches(run):
            parts[region] = (
                stack
                if length == len(stack)
                else lax.dynamic_slice_in_dim(stack, starts[start], length)
            )
    return parts


def starts_of(plan: Plan) -> list[int]:
    """The positions at which `split` cuts the runs of all groups."""
    groups = [*plan.stacks.values(), *plan.ravelled.values()]
    runs = itertools.chain.from_iterable(group.runs for group in groups)
    return sorted({start for run in runs for start, _, _ in _stretches(run)})


def _stretches(run: Sequence[Region]) -> list[tuple[int, int, Region]]:
    """Where each region lies in its run: `(start, length, region)`."""
    lengths = [math.prod(region.tiles) for region in run]
    starts = itertools.accumulate(lengths, initial=0)
    return list(zip(starts, lengths, run, strict=False))


def scatter(plan: Plan, blocks: dict[Region, Array], dtypes: Sequence[DTypeLike]) -> list[Array]:
    """Puts the leaves together again from the blocks of all their regions: undoes `gather`."""
    parts: dict[int, list[Region]] = {}
    for region in sorted(blocks):  # By leaf, then by start: the last axis varies fastest.
        parts.setdefault(region.leaf, []).append(region)
    leaves = []
    for leaf, (shape, dtype) in enumerate(zip(plan.shapes, dtypes, strict=True)):
        if leaf in parts:
            pieces = [_from_blocks(blocks[region], region) for region in parts[leaf]]
            whole = _join([region.start for region in parts[leaf]], pieces)
        else:
            whole = jnp.zeros(shape)
        leaves.append(whole.reshape(shape).astype(dtype))
    return leaves


def _to_blocks(view: Array, region: Region) -> Array:
    lengths = [count * d for count, d in zip(region.tiles, region.tile, strict=True)]
    window = tuple(
        slice(first, first + length) for first, length in zip(region.start, lengths, strict=True)
    )
    if math.prod(region.tiles) == 1:
        return view[window][None]
    ndim = len(region.tile)
    tiled = view[window].reshape(
        list(itertools.chain(*zip(region.tiles, region.tile, strict=True)))
    )
    tiled = tiled.transpose([*range(0, 2 * ndim, 2), *range(1, 2 * ndim, 2)])
    return tiled.reshape(-1, *region.tile)


def _from_blocks(blocks: Array, region: Region) -> Array:
    ndim = len(region.tile)
    tiled = blocks.reshape(region.tiles + region.tile)
    tiled = tiled.transpose(
        list(itertools.chain(*zip(range(ndim), range(ndim, 2 * ndim), strict=True)))
    )
    return tiled.reshape([count * d for count, d in zip(region.tiles, region.tile, strict=True)])


def _join(starts: list[Shape], pieces: list[Array]) -> Array:
    """Concatenates the regions of one leaf, axis by axis from the last to the first."""
    while len(pieces) > 1:
        axis = max(a for a in range(len(starts[0])) if len({start[a] for start in starts}) > 1)
        rows: dict[Shape, list[Array]] = {}
        for start, piece in zip(starts, pieces, strict=True):
            rows.setdefault((*start[:axis], 0, *start[axis + 1 :]), []).append(piece)
        starts = list(rows)
        pieces = [jnp.concatenate(row, axis) for row in rows.values()]
    return pieces[0]
