"""The plan of a tree: it assigns the blocks of all leaves to stacks, from shapes alone.

A leaf is viewed as it is, merged, or as a batch of matrices (`views`), then cut into rectangular
regions of equal tiles, and each tile is a block. Blocks of equal shape form one stack, so the
size of the program grows with the number of block shapes and not with the number of leaves.
"""

import itertools
import math
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jax.typing import DTypeLike

from soap_optax.blocks.views import Axes, BlockOptions, Shape, View, view_of

# The number of entries from which a leaf without a preconditioner gets its own vectors. Copying it
# into a bucket and back would take longer than its update.
LARGE = 2**16


class Region(NamedTuple):
    """A rectangle of one leaf, cut into equal tiles.

    Attributes:
      leaf: the leaf's position in the flattened tree.
      start: the rectangle's first entry in the leaf's view.
      tiles: the number of tiles along each axis.
      tile: the shape of a tile; a batch axis is cut into tiles of length 1.
      block: the shape of a block: the tile's shape without the batch axis.
    """

    leaf: int
    start: Shape
    tiles: Shape
    tile: Shape
    block: Shape


@dataclass(frozen=True)
class Group:
    """Blocks that share their arrays of state: a stack, or the leaves of a bucket.

    Attributes:
      regions: the regions of the blocks, in the sequence in which they are stored.
      dtype: the dtype of the statistics.
      axes: the preconditioned axes, the same for every block; none in a bucket.
      multiple: the leading axis of the arrays of state is padded to a multiple of this number.
    """

    regions: tuple[Region, ...]
    dtype: np.dtype
    axes: tuple[int, ...]
    multiple: int

    @property
    def runs(self) -> list[tuple[Region, ...]]:
        """The regions by block shape. All regions of a stack are one run."""
        return [tuple(run) for _, run in itertools.groupby(self.regions, lambda r: r.block)]

    @property
    def block(self) -> Shape:
        """The shape of the blocks of a stack."""
        return self.regions[0].block

    @property
    def blocks(self) -> int:
        """The number of blocks."""
        return sum(math.prod(region.tiles) for region in self.regions)

    @property
    def entries(self) -> int:
        """The number of entries of all blocks."""
        return sum(math.prod(region.tiles + region.tile) for region in self.regions)

    @property
    def padding(self) -> int:
        """The number of empty blocks in a stack, or of unused entries at the end of a bucket."""
        return -(self.blocks if self.axes else self.entries) % self.multiple

    @property
    def length(self) -> int:
        """The length of a stack: its blocks and its padding."""
        return self.blocks + self.padding

    def positions(self, length: int) -> np.ndarray:
        """The position of each block in a stack of some length, such as 0, 2 and 5 of 8.

        The positions are spread evenly: each shard holds its share of the blocks, or one less, for
        any number of shards that divides the length. The shard of a block depends on the number of
        shards, not on the length.
        """
        return np.arange(self.blocks) * length // self.blocks


@dataclass(frozen=True)
class Plan:
    """The groups of a tree, and the shapes and views from which its leaves are rebuilt."""

    shapes: tuple[Shape, ...]
    views: tuple[View, ...]
    stacks: dict[str, Group]
    adam: dict[str, Group]

    @property
    def dtypes(self) -> set[str]:
        """The dtypes of statistics."""
        groups = [*self.stacks.values(), *self.adam.values()]
        return {group.dtype.name for group in groups}


def make_plan(
    shapes: Sequence[Shape],
    dtypes: Sequence[DTypeLike],
    options: BlockOptions,
    axes: Sequence[Axes],
    multiple: int,
) -> Plan:
    """Assigns the blocks of every leaf to a stack, or the leaf to Adam, from shape and dtype.

    A leaf of size zero belongs to no group. Statistics are float32, or float64 for float64 leaves.

    Args:
      shapes: the shape of each leaf.
      dtypes: the dtype of each leaf.
      options: how leaves are cut into blocks.
      axes: the use of each leaf's axes.
      multiple: the leading axis of the arrays of state is padded to a multiple of this number.
    """
    views = tuple(view_of(shape, use, options) for shape, use in zip(shapes, axes, strict=True))
    stacks: dict[tuple[np.dtype, Shape], list[Region]] = {}
    adam: dict[str, list[Region]] = {}
    for leaf, (view, leaf_dtype) in enumerate(zip(views, dtypes, strict=True)):
        dtype = statistics_dtype(leaf_dtype)
        for region in regions_of(leaf, view, options):
            if view.preconditioned and preconditioned_axes(region.block, options):
                stacks.setdefault((dtype, region.block), []).append(region)
            else:
                adam.setdefault(adam_name(region, dtype, adam), []).append(region)
    return Plan(
        shapes=tuple(shapes),
        views=views,
        stacks={
            stack_name(block, dtype): Group(
                tuple(regions), dtype, preconditioned_axes(block, options), multiple
            )
            for (dtype, block), regions in stacks.items()
        },
        adam={
            name: Group(
                tuple(sorted(regions, key=lambda r: r.block)),
                statistics_dtype(dtypes[regions[0].leaf]),
                axes=(),
                multiple=multiple,
            )
            for name, regions in adam.items()
        },
    )


def statistics_dtype(dtype: DTypeLike) -> np.dtype:
    """The dtype of a leaf's factors, bases and moments: never narrower than float32."""
    return np.dtype(np.float64 if np.dtype(dtype) == np.float64 else np.float32)


def stack_name(block: Shape, dtype: np.dtype) -> str:
    """The key of a stack in the state, such as `512x2048` or `512x2048_float64`."""
    name = "x".join(map(str, block))
    return name if dtype == np.float32 else f"{name}_{dtype.name}"


def adam_name(region: Region, dtype: np.dtype, taken: Container[str]) -> str:
    """The key of an Adam leaf in the state: the dtype's name for the leaves that share a bucket.

    A large leaf has its own vectors, because concatenating it would cost more than its update. Its
    key is its shape, such as `50304x16384`. Further leaves of that shape get a number after it.
    """
    if math.prod(region.tiles + region.tile) < LARGE:
        return dtype.name
    name = stack_name(region.block, dtype)
    numbered = (f"{name}_{number}" for number in itertools.count(2))
    return next(key for key in itertools.chain([name], numbered) if key not in taken)


def preconditioned_axes(block: Shape, options: BlockOptions) -> tuple[int, ...]:
    """The axes of a block that get a factor. An axis of length 1 gets none: its basis is a sign."""
    axes = tuple(axis for axis, d in enumerate(block) if 1 < d <= options.longest_axis)
    return tuple(sorted(axes, key=lambda axis: block[axis])[:1]) if options.one_sided else axes


def regions_of(leaf: int, view: View, options: BlockOptions) -> list[Region]:
    """Cuts a leaf's view into regions of equal tiles, the last axis varying fastest."""
    if 0 in view.shape:
        return []
    block_size = options.block_size if view.preconditioned else None
    parts = [[(0, length, 1)] for length in view.shape[: view.batch]]
    parts += [cut_axis(length, block_size) for length in view.shape[view.batch :]]
    regions = []
    for part in itertools.product(*parts):
        start, tiles, tile = zip(*part, strict=True) if part else ((), (), ())
        regions.append(Region(leaf, start, tiles, tile, tile[view.batch :]))
    return regions


def cut_axis(length: int, block_size: int | None) -> list[tuple[int, int, int]]:
    """Cuts an axis into tiles of at most `block_size`, as `(start, tiles, length of a tile)`.

    All tiles are equal if the axis has a divisor that is at least half of `block_size`, and at
    least 2. Otherwise their lengths differ by one, the longer tiles first.
    """
    if block_size is None or length <= block_size:
        return [(0, 1, length)]
    for tile in range(block_size, max(1, (block_size - 1) // 2), -1):
        if length % tile == 0:
            return [(0, length // tile, tile)]
    tiles = -(-length // block_size)
    short, longer = divmod(length, tiles)
    return [(0, longer, short + 1), (longer * (short + 1), tiles - longer, short)]
