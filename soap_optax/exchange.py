"""The two ways between leaves and a stack that is divided among devices.

Leaves lie as the user wants them; of a stack every device has whole blocks. Gradients are exchanged
once on their way in, updates once on their way out, for each kind of block.

Tiles take a second exchange each way. A leaf that is split over a mesh along an axis that is cut
into tiles has whole tiles on every device, or a part of one, but not those that the stack wants
there. So all tiles are first cut into equal parts, one for each device, those of equal leaves
together, and then exchanged like leaves that are split in this way. A part is numbers in a row, and
not a rectangle: TPUs store the last two axes of an array in units of 8x128.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding
from jax.typing import ArrayLike

from soap_optax import layout, placement
from soap_optax.planning import Group, Plan, Region
from soap_optax.views import Shape


def bring_in(
    leaves: Sequence[ArrayLike], plan: Plan, group: Group, sharding: NamedSharding | None
) -> Array:
    """Reads the blocks of a stack out of the leaves, `(B, *block)`: the exchange of gradients."""
    if sharding is None:
        [stack] = layout.gather(leaves, plan, group)
        return stack
    parts = _parts_of_tiles(group, sharding)
    if parts is None:
        [stack] = layout.gather(leaves, plan, group)
        return placement.divide(placement.divide_axis(stack, 0, sharding), sharding)

    [stack] = layout.gather(leaves, plan, group, partial(_on_equal_shapes, parts.divide))
    # Held as it comes, or the compiler of JAX 0.8 exchanges one leaf after another.
    for order in (parts.finer, parts.sharding):
        stack = placement.redivide(stack, parts.axis, order)
    stack = placement.divide_first_instead_of(parts.axis, stack, sharding, parts.sharding)
    return placement.divide(parts.join(stack), sharding)


def take_out(
    stack: Array, group: Group, starts: Mapping[int, ArrayLike], sharding: NamedSharding | None
) -> dict[Region, Array]:
    """Divides a stack among the regions that it came from: the exchange of updates.

    Args:
      stack: `(B, *block)`.
      group: the group of `bring_in`.
      starts: each position of `layout.starts_of`, as a number or as a traced scalar.
      sharding: how the stack is divided among devices; None if it is not.
    """
    if sharding is None:
        return layout.split([stack], group, starts)
    parts = _parts_of_tiles(group, sharding)
    if parts is None:
        return layout.split([placement.join_axis(stack, 0, sharding)], group, starts)

    cut = parts.cut(stack)
    stack = placement.divide_instead_of_first(parts.axis, cut, sharding, parts.sharding)
    stack = placement.redivide(stack, parts.axis, parts.finer)
    tiles = {}
    for region, blocks in layout.split([stack], group, starts).items():
        batch = region.tile[: len(region.tile) - len(region.block)]
        tiles[region] = blocks.reshape(*region.tiles, *batch, *blocks.shape[1:])
    return _on_equal_shapes(parts.gather, tiles)


@dataclass(frozen=True)
class Parts:
    """How a tile is cut into as many parts as there are shards, each of numbers in a row.

    Attributes:
      block: the shape of a tile.
      sharding: divides an axis of parts among all devices.
      finer: the same over a mesh with more and shorter axes, perhaps in another order.
      first: the axis of a tile that is divided before the tile is cut; from the end.
      before: over which axes of the finer mesh it is, the first ones of `finer`.
    """

    block: Shape
    sharding: NamedSharding
    finer: NamedSharding
    first: int
    before: NamedSharding
    axis = -2  # of parts

    def cut(self, tiles: Array) -> Array:
        """Views `(..., *block)` as `(..., parts, numbers)`."""
        ndim = len(self.block)
        parts = math.prod(placement.parts_of(self.sharding))
        tiles = jnp.moveaxis(tiles, self.first, -ndim)
        return tiles.reshape(*tiles.shape[: tiles.ndim - ndim], parts, -1)

    def join(self, parts: Array) -> Array:
        """Undoes `cut`."""
        rest = list(self.block)
        lengths = [rest.pop(self.first), *rest]
        tiles = parts.reshape(*parts.shape[: self.axis], *lengths)
        return jnp.moveaxis(tiles, -len(lengths), self.first)

    def divide(self, tiles: Array) -> Array:
        """Cuts tiles that lie as leaves do, and divides the parts."""
        tiles = placement.divide_axis(tiles, self.first, self.before, may_be_split=True)
        after = len(placement.axes_of(self.before))
        return placement.divide_axis(
            self.cut(tiles), self.axis, self.finer, after=after, may_be_split=True
        )

    def gather(self, parts: Array) -> Array:
        """Undoes `divide`."""
        after = len(placement.axes_of(self.before))
        parts = placement.join_axis(parts, self.axis, self.finer, after=after, may_be_split=True)
        return placement.join_axis(self.join(parts), self.first, self.before, may_be_split=True)


def _parts_of_tiles(group: Group, sharding: NamedSharding) -> Parts | None:
    """How tiles are cut on their way; None for whole leaves, and where parts would not be equal."""
    lengths = dict(zip(placement.axes_of(sharding), placement.parts_of(sharding), strict=True))
    shards = math.prod(lengths.values())
    if not group.is_cut or shards == 1 or math.prod(group.block) % shards:
        return None
    counts = {
        count
        for region in group.regions
        for count, length in zip(region.tiles, region.tile, strict=True)
        if count > 1 and length > 1  # What is split along an axis of layers has whole tiles.
    }
    mesh, names = placement.refine(sharding, counts)
    finer = {axis: names[axis] for axis in lengths}
    shorter = {name: mesh.shape[name] for name in itertools.chain(*finer.values())}
    first, before = _divided_before(group.block, shorter, [*finer.values()])
    order = (*before, *(name for name in shorter if name not in before))
    return Parts(
        group.block,
        placement.over(_whole_axes(order, finer) or lengths, sharding.mesh),
        placement.over(order, mesh),
        first,
        placement.over(before, mesh),
    )


def _divided_before(
    block: Shape, lengths: Mapping[str, int], whole: Sequence[Sequence[str]]
) -> tuple[int, Sequence[str]]:
    """Which axis of a tile divides evenly over most devices, and over which axes of the finer mesh.

    The first such axis of the tile, from the end, and axes that make up whole ones, the last of
    them: those over which parameters are most often split. Or, if these are more, the last parts of
    one: a leaf that is split over all of it is split from tile to tile over its first parts.

    Args:
      block: the shape of a tile.
      lengths: of the finer mesh's axes.
      whole: which of these make up an axis of the mesh.
    """

    def shards(axes: Sequence[str]) -> int:
        return math.prod(lengths[axis] for axis in axes)

    some = [c for n in range(len(whole) + 1) for c in itertools.combinations(whole, n)]
    candidates = [list(itertools.chain(*combination)) for combination in reversed(some)]
    candidates += [parts[n:] for parts in reversed(whole) for n in range(1, len(parts))]
    best = [
        max((axes for axes in candidates if length % shards(axes) == 0), key=shards)
        for length in block
    ]
    first = max(range(len(block)), key=lambda axis: shards(best[axis]))
    return first - len(block), best[first]


def _whole_axes(order: Sequence[str], parts: Mapping[str, Sequence[str]]) -> list[str]:
    """The axes of a mesh whose parts are in that order; none, if it takes some of them apart."""
    ordered = sorted(parts, key=lambda axis: order.index(parts[axis][0]) if parts[axis] else -1)
    return ordered if [*itertools.chain(*(parts[axis] for axis in ordered))] == [*order] else []


def _on_equal_shapes(
    function: Callable[[Array], Array], arrays: Mapping[Region, Array]
) -> dict[Region, Array]:
    """Calls a function once for all arrays of a shape and dtype, which it gets stacked.

    One shape comes after another, so that what is on its way is not held for all at once.
    """
    alike: dict[jax.ShapeDtypeStruct, list[Region]] = {}
    for region, array in arrays.items():
        alike.setdefault(jax.ShapeDtypeStruct(array.shape, array.dtype), []).append(region)
    stacks: list[Array] = []
    for regions in alike.values():
        given = [arrays[region] for region in regions]
        if stacks:  # Both results are used: of others, compilers rid a barrier.
            given, stacks[-1] = lax.optimization_barrier((given, stacks[-1]))
        stacks.append(function(jnp.stack(given)))
    return {
        region: stack[number]
        for regions, stack in zip(alike.values(), stacks, strict=True)
        for number, region in enumerate(regions)
    }
