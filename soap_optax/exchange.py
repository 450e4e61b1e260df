"""The two ways between leaves and a stack that is divided among devices.

Leaves lie as the user wants them; of a stack every device has whole blocks. Gradients are exchanged
once on their way in, updates once on their way out, for each kind of block.

Tiles take a second exchange each way. A leaf that is split over a mesh along an axis that is cut
into tiles has whole tiles on every device, or a part of one, but not those that the stack wants
there. So all tiles are first cut into equal parts, one for each device, those of equal leaves
together, and then exchanged like leaves that are split in this way.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
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

    def divide(tiles: Array) -> Array:
        return placement.divide_axis(parts.cut(tiles), parts.axis, parts.mesh, may_be_split=True)

    [stack] = layout.gather(leaves, plan, group, partial(_on_equal_shapes, divide))
    stack = placement.divide_first_instead_of(parts.axis, stack, sharding)
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

    def join(tiles: Array) -> Array:
        return parts.join(placement.join_axis(tiles, parts.axis, parts.mesh, may_be_split=True))

    stack = placement.divide_instead_of_first(parts.axis, parts.cut(stack), sharding)
    tiles = {}
    for region, blocks in layout.split([stack], group, starts).items():
        batch = region.tile[: len(region.tile) - len(region.block)]
        tiles[region] = blocks.reshape(*region.tiles, *batch, *blocks.shape[1:])
    return _on_equal_shapes(join, tiles)


@dataclass(frozen=True)
class Parts:
    """How a tile is cut into as many parts as there are shards.

    Attributes:
      block: the shape of a tile.
      lengths: of each axis of the mesh that divides stacks.
      axes: the axis of the tile that is cut into so many parts, for each of them.
      mesh: divides an axis of parts among all devices, over more and shorter axes of the mesh.
    """

    block: Shape
    lengths: tuple[int, ...]
    axes: tuple[int, ...]
    mesh: NamedSharding

    @property
    def axis(self) -> int:
        """The axis of parts, from the end: it comes before those of a block."""
        return -1 - len(self.block)

    def cut(self, array: Array) -> Array:
        """Views `(..., *block)` as `(..., parts, *part)`."""
        batch = array.shape[: array.ndim - len(self.block)]
        split = array.reshape(*batch, *itertools.chain(*self._shapes))
        order = [*range(len(batch)), *(len(batch) + place for place in self._order)]
        return split.transpose(order).reshape(*batch, -1, *self._part)

    def join(self, array: Array) -> Array:
        """Undoes `cut`."""
        batch = array.shape[: array.ndim - len(self.block) - 1]
        split = array.reshape(*batch, *self.lengths, *self._part)
        order = [*range(len(batch)), *(len(batch) + place for place in np.argsort(self._order))]
        return split.transpose(order).reshape(*batch, *self.block)

    @property
    def _part(self) -> list[int]:
        return [shape[-1] for shape in self._shapes]

    @property
    def _shapes(self) -> list[list[int]]:
        """For each axis of a tile, the numbers of its parts and the length of one."""
        shapes = []
        for axis, length in enumerate(self.block):
            counts = [n for n, cut in zip(self.lengths, self.axes, strict=True) if cut == axis]
            shapes.append([*counts, length // math.prod(counts)])
        return shapes

    @property
    def _order(self) -> list[int]:
        """Where the parts, by axis of the mesh, and then the rests are in `_shapes`."""
        owners = [
            [*(number for number, cut in enumerate(self.axes) if cut == axis), None]
            for axis in range(len(self.block))
        ]
        places = list(enumerate(itertools.chain(*owners)))
        parts = sorted((owner, place) for place, owner in places if owner is not None)
        return [place for _, place in parts] + [place for place, owner in places if owner is None]


def _parts_of_tiles(group: Group, sharding: NamedSharding) -> Parts | None:
    """How tiles are cut on their way; None for whole leaves.

    It is also None where the axes of a tile cannot be cut into equal parts.
    """
    lengths = placement.parts_of(sharding)
    if not group.is_cut or math.prod(lengths) == 1:
        return None
    left, axes = list(group.block), []
    for length in lengths:
        even = [axis for axis, rest in enumerate(left) if rest % length == 0]
        if not even:
            return None
        left[even[0]] //= length
        axes.append(even[0])
    counts = {count for region in group.regions for count in region.tiles if count > 1}
    mesh = placement.refine(sharding, counts)
    return Parts(group.block, tuple(lengths), tuple(axes), mesh)


def _on_equal_shapes(
    function: Callable[[Array], Array], arrays: Mapping[Region, Array]
) -> dict[Region, Array]:
    """Calls a function once for all arrays of a shape and dtype, which it gets stacked."""
    alike: dict[jax.ShapeDtypeStruct, list[Region]] = {}
    for region, array in arrays.items():
        alike.setdefault(jax.ShapeDtypeStruct(array.shape, array.dtype), []).append(region)
    results = {}
    for regions in alike.values():
        stacked = function(jnp.stack([arrays[region] for region in regions]))
        results |= {region: stacked[number] for number, region in enumerate(regions)}
    return results
