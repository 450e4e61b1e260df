"""Blocks taken apart for an exchange, into as many equal parts as there are shards.

A part is numbers in a row, and not a rectangle: TPUs store the last two axes of an array in units
of 8x128.
"""

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding

from soap_optax import placement
from soap_optax.places import Split
from soap_optax.views import Shape


def parts_of(
    block: Shape,
    sharding: NamedSharding,
    counts: Collection[int] = (),
    axes: int | None = None,
    unused: Collection[str] = (),
) -> "Parts":
    """How a block is best taken apart.

    Args:
      block: the shape of a block, whose size the shards divide.
      sharding: how stacks are divided among devices.
      counts: how many blocks there are along the axes of leaves that are cut.
      axes: how many axes of the block, from the first one on, may come first in its numbers; all
        of them if None.
      unused: axes of the mesh that are known to split no leaf. They come last in the order of the
        devices and so first in time, where they take parts away and bring nothing.
    """
    lengths = dict(zip(placement.axes_of(sharding), placement.parts_of(sharding), strict=True))
    mesh, names = placement.refine(sharding, counts)
    finer = {axis: names[axis] for axis in sorted(lengths, key=lambda axis: axis in unused)}
    shorter = {name: mesh.shape[name] for name in itertools.chain(*finer.values())}
    first, before = _divided_before(block[:axes], shorter, [*finer.values()])
    order = (*before, *(name for name in shorter if name not in before))
    return Parts(
        block,
        placement.over(_whole_axes(order, finer) or lengths, sharding.mesh),
        placement.over(order, mesh),
        first - len(block),
        placement.over(before, mesh),
        finer,
    )


@dataclass(frozen=True)
class Parts:
    """How a block is cut into as many parts as there are shards, each of numbers in a row.

    Attributes:
      block: the shape of a block.
      sharding: divides an axis of parts among all devices.
      finer: the same over a mesh with more and shorter axes, perhaps in another order.
      first: the axis of a tile that is divided before the tile is cut; from the end.
      before: over which axes of the finer mesh it is, the first ones of `finer`.
      names: those axes of the finer mesh that make up an axis of the mesh.
    """

    block: Shape
    sharding: NamedSharding
    finer: NamedSharding
    first: int
    before: NamedSharding
    names: Mapping[str, Sequence[str]]
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

    def kept(self, split: Split) -> int:
        """How many axes of `before` split the first axis already, if it is known to be split so."""
        if not split or any(split[1:]):
            return 0
        names = (*itertools.chain(*(self.names.get(axis, [axis]) for axis in split[0])),)
        return len(names) if placement.axes_of(self.before)[: len(names)] == names else 0

    def divide(self, tiles: Array, kept: int = 0) -> Array:
        """Cuts tiles that lie as leaves do, and divides the parts.

        Args:
          tiles: the tiles of leaves, `(..., *block)`.
          kept: how many axes of `before` split their first axis already.
        """
        tiles = placement.divide_axis(tiles, self.first, self.before, after=kept, may_be_split=True)
        after = len(placement.axes_of(self.before))
        return placement.divide_axis(
            self.cut(tiles), self.axis, self.finer, after=after, may_be_split=True
        )

    def gather(self, parts: Array, kept: int = 0) -> Array:
        """Undoes `divide`, with the same arguments."""
        after = len(placement.axes_of(self.before))
        parts = placement.join_axis(parts, self.axis, self.finer, after=after, may_be_split=True)
        return placement.join_axis(
            self.join(parts), self.first, self.before, after=kept, may_be_split=True
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
    return first, best[first]


def _whole_axes(order: Sequence[str], parts: Mapping[str, Sequence[str]]) -> list[str]:
    """The axes of a mesh whose parts are in that order; none, if it takes some of them apart."""
    ordered = sorted(parts, key=lambda axis: order.index(parts[axis][0]) if parts[axis] else -1)
    return ordered if [*itertools.chain(*(parts[axis] for axis in ordered))] == [*order] else []
