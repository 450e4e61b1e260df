"""From leaves to blocks along a plan, and back. All arrays are on one device, or replicated."""

import itertools
import math
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from soap_optax.blocks.plan import Group, Plan, Region
from soap_optax.blocks.views import Shape, View


def gather(leaves: Sequence[ArrayLike], plan: Plan, group: Group) -> list[Array]:
    """Gathers a group's blocks from the leaves: `(k, *tile)` for each run of equal tiles."""
    return concatenate(tiles_of(leaves, plan, group), group)


def tiles_of(leaves: Sequence[ArrayLike], plan: Plan, group: Group) -> dict[Region, Array]:
    """Cuts the regions of a group out of all leaves, and into tiles: `(*tiles, *tile)` for each."""
    return {
        region: _to_tiles(_to_view(leaves[region.leaf], plan.views[region.leaf]), region)
        for region in group.regions
    }


def concatenate(tiles: Mapping[Region, Array], group: Group) -> list[Array]:
    """Concatenates tiles: `(k, *tile)` for each run of equal tiles.

    Args:
      tiles: the tiles of each region, `(*tiles, *tile)`. The axes of a block may be reshaped.
      group: the group of these regions.
    """
    runs = []
    for run in group.runs:
        blocks = [_to_blocks(tiles[region], region) for region in run]
        runs.append(jnp.concatenate(blocks, dtype=group.dtype))
    return runs


def split(
    blocks: Sequence[Array], group: Group, starts: Mapping[int, ArrayLike]
) -> dict[Region, Array]:
    """Splits the blocks of a group into its regions: undoes `concatenate`.

    Args:
      blocks: `(k, *tile)` for each run of equal tiles.
      group: the group that was gathered.
      starts: each position of `slice_starts`, as a number or as a traced scalar.
    """
    by_region = {}
    for stack, run in zip(blocks, group.runs, strict=True):
        for start, length, region in _slices_of(run):
            by_region[region] = (
                stack
                if length == len(stack)
                else lax.dynamic_slice_in_dim(stack, starts[start], length)
            )
    return by_region


def slice_starts(plan: Plan) -> list[int]:
    """The positions at which `split` slices the runs of all groups."""
    groups = [*plan.stacks.values(), *plan.adam.values()]
    runs = itertools.chain.from_iterable(group.runs for group in groups)
    return sorted({start for run in runs for start, _, _ in _slices_of(run)})


def _slices_of(run: Sequence[Region]) -> list[tuple[int, int, Region]]:
    """The slice of each region in its run: `(start, length, region)`."""
    lengths = [math.prod(region.tiles) for region in run]
    starts = itertools.accumulate(lengths, initial=0)
    return list(zip(starts, lengths, run, strict=False))


def scatter(plan: Plan, blocks: Mapping[Region, Array], leaves: Sequence[ArrayLike]) -> list[Array]:
    """Rebuilds the leaves from the blocks of all their regions: undoes `gather`.

    Args:
      plan: the plan of the tree.
      blocks: the blocks of every region.
      leaves: the leaves that were gathered, for their dtypes.
    """
    regions: dict[int, list[Region]] = {}
    for region in sorted(blocks):  # By leaf, then by start: the last axis varies fastest.
        regions.setdefault(region.leaf, []).append(region)
    rebuilt = []
    for leaf, (shape, like) in enumerate(zip(plan.shapes, leaves, strict=True)):
        if leaf in regions:
            pieces = [_from_blocks(blocks[region], region) for region in regions[leaf]]
            joined = _join([region.start for region in regions[leaf]], pieces)
            array = _from_view(joined, plan.views[leaf], shape)
        else:
            array = jnp.zeros(shape)
        rebuilt.append(array.astype(jnp.result_type(like)))
    return rebuilt


def consecutive_slices(lengths: Sequence[int]) -> list[slice]:
    """The slices of arrays of these lengths in their concatenation."""
    ends = itertools.accumulate(lengths)
    return [slice(end - length, end) for length, end in zip(lengths, ends, strict=True)]


def _to_view(leaf: ArrayLike, view: View) -> Array:
    return jnp.transpose(jnp.asarray(leaf), view.permutation).reshape(view.shape)


def _from_view(array: Array, view: View, shape: Shape) -> Array:
    transposed = array.reshape([shape[axis] for axis in view.permutation])
    return transposed.transpose(np.argsort(np.asarray(view.permutation, int)))


def _to_tiles(view: Array, region: Region) -> Array:
    lengths = [count * d for count, d in zip(region.tiles, region.tile, strict=True)]
    window = tuple(
        slice(first, first + length) for first, length in zip(region.start, lengths, strict=True)
    )
    if math.prod(region.tiles) == 1:
        return view[window].reshape(region.tiles + region.tile)
    ndim = len(region.tile)
    tiled = view[window].reshape(
        list(itertools.chain(*zip(region.tiles, region.tile, strict=True)))
    )
    return tiled.transpose([*range(0, 2 * ndim, 2), *range(1, 2 * ndim, 2)])


def _to_blocks(tiles: Array, region: Region) -> Array:
    ndim_before = 2 * len(region.tile) - len(region.block)  # Of tiles, and batch axes.
    return tiles.reshape(-1, *tiles.shape[ndim_before:])


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
            rows.setdefault(start[:axis], []).append(piece)
        starts = list(rows)
        pieces = [jnp.concatenate(row, axis) for row in rows.values()]
    return pieces[0]
