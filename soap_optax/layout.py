"""Where every parameter goes: a static plan, made of shapes alone, and the two ways along it.

A leaf is viewed as it is, merged, or as a batch of matrices (`soap_optax.views`), then cut into
rectangular regions of equal tiles, and each tile is a block. Equal blocks of all leaves form one
stack, so that the size of the program follows the number of kinds of block and not that of leaves.
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

from soap_optax.placement import make_whole, split_like
from soap_optax.views import Axes, AxesMark, Cut, Shape, View, view_of


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
    """

    regions: tuple[Region, ...]
    dtype: np.dtype
    axes: tuple[int, ...]

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


@dataclass(frozen=True)
class Plan:
    """The groups of a tree, and the shapes needed to put its leaves together again."""

    shapes: tuple[Shape, ...]
    views: tuple[View, ...]
    stacks: dict[str, Group]
    ravelled: dict[str, Group]


def make_plan(
    shapes: Sequence[Shape],
    dtypes: Sequence[DTypeLike],
    cut: Cut,
    axes: Sequence[Axes] | None = None,
) -> Plan:
    """Assigns every leaf, known by shape and dtype, to stacks or to the ravelled leaves.

    Zero-size leaves belong to no group. Statistics are float32, or float64 for leaves in float64.

    Args:
      shapes: the shape of each leaf.
      dtypes: the dtype of each leaf.
      cut: how leaves are cut into blocks.
      axes: what is said of each leaf's axes; None says nothing.
    """
    axes = axes or [AxesMark.ALIKE] * len(shapes)
    views = tuple(view_of(shape, said, cut) for shape, said in zip(shapes, axes, strict=True))
    stacks: dict[tuple[np.dtype, Shape], list[Region]] = {}
    ravelled: dict[np.dtype, list[Region]] = {}
    for leaf, (view, leaf_dtype) in enumerate(zip(views, dtypes, strict=True)):
        dtype = statistics_dtype(leaf_dtype)
        for region in regions_of(leaf, view, cut):
            if view.preconditioned and preconditioned_axes(region.block, cut):
                stacks.setdefault((dtype, region.block), []).append(region)
            else:
                ravelled.setdefault(dtype, []).append(region)
    return Plan(
        shapes=tuple(shapes),
        views=views,
        stacks={
            stack_name(block, dtype): Group(tuple(regions), dtype, preconditioned_axes(block, cut))
            for (dtype, block), regions in stacks.items()
        },
        ravelled={
            dtype.name: Group(tuple(sorted(regions, key=lambda r: r.block)), dtype, axes=())
            for dtype, regions in ravelled.items()
        },
    )


def statistics_dtype(dtype: DTypeLike) -> np.dtype:
    """The dtype of a leaf's factors, bases and moments: never narrower than float32."""
    return np.dtype(np.float64 if np.dtype(dtype) == np.float64 else np.float32)


def stack_name(block: Shape, dtype: np.dtype) -> str:
    """The key of a stack in the state, such as `512x2048` or `512x2048_float64`."""
    name = "x".join(map(str, block))
    return name if dtype == np.float32 else f"{name}_{dtype.name}"


def preconditioned_axes(block: Shape, cut: Cut) -> tuple[int, ...]:
    """The axes of a block that get a factor. One of length 1 gets none: it would be a sign."""
    return tuple(axis for axis, d in enumerate(block) if 1 < d <= cut.max_precond_dim)


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


def gather(leaves: Sequence[ArrayLike], plan: Plan, group: Group) -> list[Array]:
    """Reads a group's blocks out of the leaves: `(k, *tile)` for each run of equal tiles."""
    return [
        jnp.concatenate(
            [
                _to_blocks(_to_view(leaves[region.leaf], plan.views[region.leaf]), region)
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


def scatter(plan: Plan, blocks: Mapping[Region, Array], leaves: Sequence[ArrayLike]) -> list[Array]:
    """Puts leaves together again from the blocks of all their regions: undoes `gather`.

    Each gets the dtype of the leaf that it stands for, and its sharding where that is explicit.
    """
    parts: dict[int, list[Region]] = {}
    for region in sorted(blocks):  # By leaf, then by start: the last axis varies fastest.
        parts.setdefault(region.leaf, []).append(region)
    wholes = []
    for leaf, (shape, like) in enumerate(zip(plan.shapes, leaves, strict=True)):
        if leaf in parts:
            pieces = [_from_blocks(blocks[region], region) for region in parts[leaf]]
            whole = _join([region.start for region in parts[leaf]], pieces)
            whole = _from_view(whole, plan.views[leaf], shape)
        else:
            whole = jnp.zeros(shape)
        wholes.append(split_like(whole.astype(jnp.result_type(like)), like))
    return wholes


def _to_view(leaf: ArrayLike, view: View) -> Array:
    return jnp.transpose(make_whole(jnp.asarray(leaf)), view.order).reshape(view.shape)


def _from_view(array: Array, view: View, shape: Shape) -> Array:
    ordered = array.reshape([shape[axis] for axis in view.order])
    return ordered.transpose(np.argsort(np.asarray(view.order, int)))


def _to_blocks(view: Array, region: Region) -> Array:
    lengths = [count * d for count, d in zip(region.tiles, region.tile, strict=True)]
    window = tuple(
        slice(first, first + length) for first, length in zip(region.start, lengths, strict=True)
    )
    if math.prod(region.tiles) == 1:
        return view[window].reshape(1, *region.block)
    ndim = len(region.tile)
    tiled = view[window].reshape(
        list(itertools.chain(*zip(region.tiles, region.tile, strict=True)))
    )
    tiled = tiled.transpose([*range(0, 2 * ndim, 2), *range(1, 2 * ndim, 2)])
    return tiled.reshape(-1, *region.block)


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
