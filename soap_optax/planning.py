"""Where every parameter goes: a static plan, made of shapes alone.

A leaf is viewed as it is, merged, or as a batch of matrices (`soap_optax.views`), then cut into
rectangular regions of equal tiles, and each tile is a block. Equal blocks of all leaves form one
stack, so that the size of the program follows the number of kinds of block and not that of leaves.
"""

import itertools
import math
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jax.typing import DTypeLike

from soap_optax.views import Axes, AxesMark, Cut, Shape, View, view_of

# Entries from which on a ravelled leaf gets a vector of its own: to move it into a shared one and
# back would cost more than its update does.
LARGE = 2**16


class Region(NamedTuple):
    """A rectangle of one leaf, cut into equal tiles.

    Attributes:
      leaf: the leaf's position in the flattened tree.
      start: the rectangle's first entry in the leaf's view.
      tiles: how many tiles it has along each axis.
      tile: the shape of a tile; a batch axis is cut into tiles of length 1.
      block: the shape of a block, which is the tile's without the batch axis.
    """

    leaf: int
    start: Shape
    tiles: Shape
    tile: Shape
    block: Shape


@dataclass(frozen=True)
class Group:
    """Blocks that share their arrays of state: a stack, or leaves that are ravelled together.

    Attributes:
      regions: where the blocks come from, in the order in which they are stored.
      dtype: the dtype of the statistics.
      axes: the preconditioned axes, the same for every block; none where leaves are ravelled.
      multiple: what the leading axis of the arrays of state is padded to a multiple of.
    """

    regions: tuple[Region, ...]
    dtype: np.dtype
    axes: tuple[int, ...]
    multiple: int

    @property
    def runs(self) -> list[tuple[Region, ...]]:
        """The regions by shape of their blocks. All of a stack are one run."""
        return [tuple(run) for _, run in itertools.groupby(self.regions, lambda r: r.block)]

    @property
    def block(self) -> Shape:
        """The shape of the blocks of a stack."""
        return self.regions[0].block

    @property
    def blocks(self) -> int:
        """How many blocks the group holds."""
        return sum(math.prod(region.tiles) for region in self.regions)

    @property
    def entries(self) -> int:
        """How many entries of parameters the group holds."""
        return sum(math.prod(region.tiles + region.tile) for region in self.regions)

    @property
    def padding(self) -> int:
        """How many blocks of a stack, or last entries of ravelled leaves, hold nothing."""
        return -(self.blocks if self.axes else self.entries) % self.multiple

    @property
    def places(self) -> int:
        """The length of a stack: its blocks and its padding."""
        return self.blocks + self.padding

    def places_of_blocks(self, places: int) -> np.ndarray:
        """Where the blocks lie in a stack of some length, `(blocks,)`: evenly, as 0, 2, 5 of 8.

        However many shards divide that length, each has its share of blocks, or one less. Which it
        has does not depend on the length.
        """
        return np.arange(self.blocks) * places // self.blocks


@dataclass(frozen=True)
class Plan:
    """The groups of a tree, and the shapes needed to put its leaves together again."""

    shapes: tuple[Shape, ...]
    views: tuple[View, ...]
    stacks: dict[str, Group]
    ravelled: dict[str, Group]

    @property
    def dtypes(self) -> set[str]:
        """The dtypes of statistics."""
        groups = [*self.stacks.values(), *self.ravelled.values()]
        return {group.dtype.name for group in groups}


def make_plan(
    shapes: Sequence[Shape],
    dtypes: Sequence[DTypeLike],
    cut: Cut,
    axes: Sequence[Axes] | None = None,
    multiple: int = 1,
) -> Plan:
    """Assigns every leaf, known by shape and dtype, to stacks or to the ravelled leaves.

    Zero-size leaves belong to no group. Statistics are float32, or float64 for leaves in float64.

    Args:
      shapes: the shape of each leaf.
      dtypes: the dtype of each leaf.
      cut: how leaves are cut into blocks.
      axes: what is said of each leaf's axes; None says nothing.
      multiple: what the leading axis of every array of state is padded to a multiple of.
    """
    axes = axes or [AxesMark.ALIKE] * len(shapes)
    views = tuple(view_of(shape, said, cut) for shape, said in zip(shapes, axes, strict=True))
    stacks: dict[tuple[np.dtype, Shape], list[Region]] = {}
    ravelled: dict[str, list[Region]] = {}
    for leaf, (view, leaf_dtype) in enumerate(zip(views, dtypes, strict=True)):
        dtype = statistics_dtype(leaf_dtype)
        for region in regions_of(leaf, view, cut):
            if view.preconditioned and preconditioned_axes(region.block, cut):
                stacks.setdefault((dtype, region.block), []).append(region)
            else:
                ravelled.setdefault(vector_name(region, dtype, ravelled), []).append(region)
    return Plan(
        shapes=tuple(shapes),
        views=views,
        stacks={
            stack_name(block, dtype): Group(
                tuple(regions), dtype, preconditioned_axes(block, cut), multiple
            )
            for (dtype, block), regions in stacks.items()
        },
        ravelled={
            name: Group(
                tuple(sorted(regions, key=lambda r: r.block)),
                statistics_dtype(dtypes[regions[0].leaf]),
                axes=(),
                multiple=multiple,
            )
            for name, regions in ravelled.items()
        },
    )


def statistics_dtype(dtype: DTypeLike) -> np.dtype:
    """The dtype of a leaf's factors, bases and moments: never narrower than float32."""
    return np.dtype(np.float64 if np.dtype(dtype) == np.float64 else np.float32)


def stack_name(block: Shape, dtype: np.dtype) -> str:
    """The key of a stack in the state, such as `512x2048` or `512x2048_float64`."""
    name = "x".join(map(str, block))
    return name if dtype == np.float32 else f"{name}_{dtype.name}"


def vector_name(region: Region, dtype: np.dtype, taken: Container[str]) -> str:
    """The key of ravelled leaves in the state: the dtype's name where they share a vector.

    A large leaf has a vector of its own, named like a stack, with a number if it is not the first
    of its name. To put large leaves side by side would cost more than their whole update.
    """
    if math.prod(region.tiles + region.tile) < LARGE:
        return dtype.name
    name = stack_name(region.block, dtype)
    numbered = (f"{name}_{number}" for number in itertools.count(2))
    return next(key for key in itertools.chain([name], numbered) if key not in taken)


def preconditioned_axes(block: Shape, cut: Cut) -> tuple[int, ...]:
    """The axes of a block that get a factor. One of length 1 gets none: it would be a sign."""
    axes = tuple(axis for axis, d in enumerate(block) if 1 < d <= cut.max_precond_dim)
    return tuple(sorted(axes, key=lambda axis: block[axis])[:1]) if cut.one_sided else axes


def regions_of(leaf: int, view: View, cut: Cut) -> list[Region]:
    """Cuts a leaf's view into regions of equal tiles, the last axis varying fastest."""
    if 0 in view.shape:
        return []
    block_size = cut.block_size if view.preconditioned else None
    parts = [[(0, length, 1)] for length in view.shape[: view.batch]]
    parts += [cut_axis(length, block_size) for length in view.shape[view.batch :]]
    regions = []
    for part in itertools.product(*parts):
        start, tiles, tile = zip(*part, strict=True) if part else ((), (), ())
        regions.append(Region(leaf, start, tiles, tile, tile[view.batch :]))
    return regions


def cut_axis(length: int, block_size: int | None) -> list[tuple[int, int, int]]:
    """Cuts an axis into tiles of at most `block_size`, as `(start, tiles, length of a tile)`.

    All tiles are equal where the axis has a divisor no smaller than half of the block size, and
    than 2; otherwise their lengths differ by one, the longer ones first.
    """
    if block_size is None or length <= block_size:
        return [(0, 1, length)]
    for tile in range(block_size, max(1, (block_size - 1) // 2), -1):
        if length % tile == 0:
            return [(0, length // tile, tile)]
    tiles = -(-length // block_size)
    short, longer = divmod(length, tiles)
    return [(0, longer, short + 1), (longer * (short + 1), tiles - longer, short)]
