"""The two ways between leaves and a stack that is divided among devices.

Leaves lie as the user wants them; of a stack every device has whole blocks. Gradients are exchanged
once on their way in, updates once on their way out, for each kind of block.

Tiles take a second exchange each way. A leaf that is split over a mesh along an axis that is cut
into tiles has whole tiles on every device, or a part of one, but not those that the stack wants
there. So tiles are first divided among all devices along one of their own axes, those of equal
leaves together, and then exchanged like leaves that are split along this axis.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding
from jax.typing import ArrayLike

from soap_optax import layout, placement
from soap_optax.planning import Group, Plan, Region


def bring_in(
    leaves: Sequence[ArrayLike], plan: Plan, group: Group, sharding: NamedSharding | None
) -> Array:
    """Reads the blocks of a stack out of the leaves, `(B, *block)`: the exchange of gradients."""
    if sharding is None:
        [stack] = layout.gather(leaves, plan, group)
        return stack
    axis = _axis_in_between(group, sharding)
    if axis is None:
        [stack] = layout.gather(leaves, plan, group)
        return placement.divide(placement.divide_axis(stack, 0, sharding), sharding)
    finer = placement.refine(sharding, _tiles_along_axes(group))
    divide = partial(placement.divide_axis, axis=axis, sharding=finer, may_be_split=True)
    [stack] = layout.gather(leaves, plan, group, partial(_on_equal_shapes, divide))
    return placement.divide(placement.divide_first_instead_of(axis, stack, sharding), sharding)


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
    axis = _axis_in_between(group, sharding)
    if axis is None:
        return layout.split([placement.join_axis(stack, 0, sharding)], group, starts)
    stack = placement.divide_instead_of_first(axis, stack, sharding)
    tiles = {
        region: blocks.reshape(region.tiles + region.tile)
        for region, blocks in layout.split([stack], group, starts).items()
    }
    finer = placement.refine(sharding, _tiles_along_axes(group))
    join = partial(placement.join_axis, axis=axis, sharding=finer, may_be_split=True)
    return _on_equal_shapes(join, tiles)


def _axis_in_between(group: Group, sharding: NamedSharding) -> int | None:
    """The axis, from the end, along which tiles are divided on their way; None for whole leaves.

    It is also None where no axis of a tile divides evenly.
    """
    shards = math.prod(placement.parts_of(sharding))
    even = [axis for axis, length in enumerate(group.block) if length % shards == 0]
    return even[0] - len(group.block) if group.is_cut and even and shards > 1 else None


def _tiles_along_axes(group: Group) -> set[int]:
    return {count for region in group.regions for count in region.tiles if count > 1}


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
