"""The two ways between leaves and what is divided among devices: stacks, and ravelled moments.

Leaves lie as the user wants them; of a stack every device has whole blocks. Gradients are exchanged
once on their way in, updates once on their way out, for each kind of block, where its leaves are
split alike, along axes of their blocks or not at all.

Other leaves take a second exchange each way. A leaf that is split along an axis that is cut into
tiles has whole tiles on every device, or a part of one, but not those that the stack wants there.
So all blocks are first cut into equal parts, one for each device, those of equal leaves together,
and then exchanged like leaves that are split in this way.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding
from jax.typing import ArrayLike

from soap_optax import layout, padding, placement
from soap_optax.parts import Parts, parts_of
from soap_optax.places import Places, Split
from soap_optax.planning import Group, Plan, Region
from soap_optax.views import Shape


@dataclass(frozen=True)
class Whole:
    """Leaves are exchanged as they are.

    Attributes:
      kept: how many axes of the mesh divide the first axis already, in the order of the sharding.
    """

    kept: int


def bring_in(leaves: Sequence[ArrayLike], plan: Plan, group: Group, places: Places | None) -> Array:
    """Reads the blocks of a stack out of the leaves, `(B, *block)`: the exchange of gradients."""
    if places is None:
        [stack] = layout.gather(leaves, plan, group)
        return padding.move(stack, group, group.places)
    sharding = places.sharding
    least = padding.least_places(group, sharding)
    way = _way_of_stack(plan, group, places)
    if isinstance(way, Whole):
        [stack] = layout.gather(leaves, plan, group)
        stack = padding.move(stack, group, least)
        stack = placement.divide_axis(stack, 0, sharding, after=way.kept)
    else:
        divide = partial(_on_equal_leaves, way.divide, way, plan, places)
        [stack] = layout.gather(leaves, plan, group, divide)
        # Held as it comes, or the compiler of JAX 0.8 exchanges one leaf after another.
        for order in (way.finer, way.sharding):
            stack = placement.redivide(stack, way.axis, order)
        stack = padding.move(stack, group, least)
        stack = placement.divide_first_instead_of(way.axis, stack, sharding, way.sharding)
        stack = way.join(stack)
    return padding.move_locally(placement.divide(stack, sharding), group, group.places, sharding)


def take_out(
    stack: Array, plan: Plan, group: Group, starts: Mapping[int, ArrayLike], places: Places | None
) -> dict[Region, Array]:
    """Divides a stack among the regions that it came from: the exchange of updates.

    Args:
      stack: `(B, *block)`.
      plan: the plan of the tree.
      group: the group of `bring_in`.
      starts: each position of `layout.starts_of`, as a number or as a traced scalar.
      places: where stacks and leaves lie; None if they are not divided.
    """
    if places is None:
        return layout.split([padding.move(stack, group, group.blocks)], group, starts)
    sharding = places.sharding
    least = padding.least_places(group, sharding)
    stack = padding.move_locally(stack, group, least, sharding)
    way = _way_of_stack(plan, group, places)
    if isinstance(way, Whole):
        stack = placement.join_axis(stack, 0, sharding, after=way.kept)
        return layout.split([padding.move(stack, group, group.blocks)], group, starts)
    parts = placement.divide_instead_of_first(way.axis, way.cut(stack), sharding, way.sharding)
    parts = placement.redivide(padding.move(parts, group, group.blocks), way.axis, way.finer)
    tiles = {}
    for region, blocks in layout.split([parts], group, starts).items():
        batch = region.tile[: len(region.tile) - len(region.block)]
        tiles[region] = blocks.reshape(*region.tiles, *batch, *blocks.shape[1:])
    return _on_equal_leaves(way.gather, way, plan, places, tiles)


def ravel(leaves: Sequence[Array], plan: Plan, group: Group, places: Places | None) -> Array:
    """Puts the entries of leaves into one vector, `(N,)`, with zeros as padding, and divides it.

    Args:
      leaves: the leaves of a group, stacked by shape, `(k, *leaf)`.
      plan: the plan of the tree.
      group: the leaves and their padding.
      places: where the vector and the leaves lie; None if they are not divided.
    """
    way = None if places is None else _way_of_vector(plan, group, places)
    if places is None or way is None:
        vector = jnp.concatenate([leaf.ravel() for leaf in leaves])
        return divide_vector(vector, group, None if places is None else places.sharding)
    [[leaf]] = leaves
    if isinstance(way, Whole):
        leaf = placement.divide_axis(leaf, 0, places.sharding, after=way.kept)
    else:
        leaf = way.divide(leaf)
        for order in (way.finer, places.sharding):
            leaf = placement.redivide(leaf, way.axis, order)
    return placement.divide(leaf.ravel(), places.sharding)


def unravel(
    vector: Array,
    shapes: Sequence[Shape],
    plan: Plan,
    group: Group,
    places: Places | None,
) -> list[Array]:
    """Undoes `ravel`: gives leaves of these shapes."""
    way = None if places is None else _way_of_vector(plan, group, places)
    if places is None or way is None:
        if places is not None:
            vector = placement.join_axis(vector, 0, places.sharding)
        parts = layout.consecutive_slices([math.prod(shape) for shape in shapes])
        return [vector[part].reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
    if isinstance(way, Whole):
        leaf = vector.reshape(group.block)
        return [placement.join_axis(leaf, 0, places.sharding, after=way.kept)[None]]
    parts = vector.reshape(places.shards, -1)
    for order in (places.sharding, way.finer):
        parts = placement.redivide(parts, way.axis, order)
    return [way.gather(parts)[None]]


def divide_vector(vector: Array, group: Group, sharding: NamedSharding | None) -> Array:
    """Pads a vector with zeros and divides it."""
    if group.padding:
        vector = jnp.concatenate([vector, jnp.zeros(group.padding, vector.dtype)])
    return placement.divide(vector, sharding)


def _way_of_stack(plan: Plan, group: Group, places: Places) -> Whole | Parts:
    """How the blocks of a stack are exchanged.

    In parts, where an axis of a leaf that holds several blocks is split, or may be; where leaves
    are split in several ways; and where there would be as much padding as blocks. As a stack of
    whole leaves otherwise, and where parts would not be equal.
    """
    shards = places.shards
    if shards == 1 or math.prod(group.block) % shards:
        return Whole(kept=0)
    several = [
        (region, axis)
        for region in group.regions
        for axis, count in enumerate(region.tiles)
        if count > 1
    ]
    # What is split along an axis of layers has whole tiles.
    counts = {region.tiles[axis] for region, axis in several if region.tile[axis] > 1}
    in_parts = parts_of(group.block, places.sharding, counts, unused=_unused(group, places))
    if padding.least_places(group, places.sharding) >= 2 * group.blocks:
        return in_parts
    known = {r: places.split_of_view(plan, r.leaf) for r in group.regions}
    splits = {region: split for region, split in known.items() if split is not None}
    if len(splits) < len(known):
        return in_parts if several else Whole(kept=0)
    if len({split[-len(group.block) :] for split in splits.values()}) > 1:
        return in_parts
    split_first = {axis for region, axis in several if any(splits[region][axis])}
    if not split_first:
        return Whole(kept=0)
    if split_first == {0} and len(splits) == 1 and group.blocks % shards == 0:
        [(region, split)] = splits.items()
        way = _kept(region.tiles[0], split[0], places.sharding)
        return in_parts if way is None else way
    return in_parts


def _way_of_vector(plan: Plan, group: Group, places: Places) -> Whole | Parts | None:
    """How the entries of a leaf with a vector of its own are exchanged, or None for all at once.

    Along its first axis, where entries are one after another.
    """
    if places.shards == 1 or group.padding or group.entries != math.prod(group.block):
        return None
    unused = _unused(group, places)
    in_parts = parts_of(group.block, places.sharding, axes=1, unused=unused)
    if group.block[0] % places.shards:
        return in_parts
    split = places.split_of_view(plan, group.regions[0].leaf)
    # The compiler finds a short way by itself, but for leaves that are split along other axes, and
    # over some of the axes of the mesh alone.
    by_itself = Whole(len(placement.axes_of(places.sharding)))
    if split is None:
        return by_itself
    first, *others = split[-len(group.block) :]
    if not any(itertools.chain(*others)):
        return by_itself
    way = _kept(group.block[0], first, places.sharding)
    return way or (in_parts if unused else by_itself)


def _unused(group: Group, places: Places) -> set[str]:
    """The axes of the mesh that are known to split none of the leaves."""
    splits = [places.splits[region.leaf] for region in group.regions]
    if None in splits:
        return set()
    used = {axis for split in splits for axes in split or () for axis in axes}
    return set(placement.axes_of(places.sharding)) - used


def _kept(length: int, split: Split, sharding: NamedSharding) -> Whole | None:
    """How an axis is exchanged that is split over the first axes of the mesh that are to divide it.

    None if it is not.
    """
    first, inner = (split[0], split[1:]) if split else ((), ())
    lengths = [sharding.mesh.shape[axis] for axis in first]
    is_kept = placement.axes_of(sharding)[: len(first)] == first
    if is_kept and not any(inner) and length % math.prod(lengths) == 0:
        return Whole(len(first))
    return None


def _on_equal_leaves(
    function: Callable[[Array, int], Array],
    parts: Parts,
    plan: Plan,
    places: Places,
    arrays: Mapping[Region, Array],
) -> dict[Region, Array]:
    """Calls a method of `parts` once for all arrays of leaves that are alike, stacked.

    They have one shape and dtype, and are split in one way, or in one that is not known. One kind
    comes after another, so that what is on its way is not held for all at once.
    """
    alike: dict[Any, list[Region]] = {}
    for region, array in arrays.items():
        split = places.split_of_view(plan, region.leaf)
        alike.setdefault((array.shape, array.dtype, split), []).append(region)
    stacks: list[Array] = []
    for (_, _, split), regions in alike.items():
        given = [arrays[region] for region in regions]
        is_cut = regions[0].tiles[parts.first] > 1
        kept = 0 if split is None or is_cut else parts.kept(split[parts.first])
        if stacks:  # Both results are used: of others, compilers rid a barrier.
            given, stacks[-1] = lax.optimization_barrier((given, stacks[-1]))
        stacks.append(function(jnp.stack(given), kept))
    return {
        region: stack[number]
        for regions, stack in zip(alike.values(), stacks, strict=True)
        for number, region in enumerate(regions)
    }
