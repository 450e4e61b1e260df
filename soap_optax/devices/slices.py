"""Blocks cut into slices for communication: as many equal slices as there are shards.

A slice is a run of consecutive entries and not a rectangle, because TPUs store the last two axes of
an array in tiles of 8x128.
"""

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding

from soap_optax.blocks import Shape
from soap_optax.devices.constraints import shard_axis, unshard_axis
from soap_optax.devices.mesh import axis_0_sharding, mesh_axes, mesh_axis_lengths, refine_mesh
from soap_optax.devices.param_shardings import AxesSpec


def best_slices(
    block: Shape,
    sharding: NamedSharding,
    unused: Collection[str],
    counts: Collection[int] = (),
    leading_axes: int | None = None,
) -> "Slices":
    """The way to cut a block into slices that needs the least communication.

    Args:
      block: the shape of a block; the number of shards divides its size.
      sharding: the sharding of stacks.
      unused: mesh axes that are known to shard no leaf. They come last in the sequence of mesh
        axes. Resharding starts there, where devices drop slices and receive none.
      counts: the numbers of blocks along the tiled axes of leaves.
      leading_axes: only this number of axes, from the first on, may be the tile axis; None means
        all axes.
    """
    lengths = dict(zip(mesh_axes(sharding), mesh_axis_lengths(sharding), strict=True))
    mesh, parts = refine_mesh(sharding, counts)
    finer = {axis: parts[axis] for axis in sorted(lengths, key=lambda axis: axis in unused)}
    shorter = {name: mesh.shape[name] for name in itertools.chain(*finer.values())}
    tile_axis, names = _best_tile_axis(block[:leading_axes], shorter, [*finer.values()])
    sequence = (*names, *(name for name in shorter if name not in names))
    return Slices(
        block,
        axis_0_sharding(_whole_axes(sequence, finer) or lengths, sharding.mesh),
        axis_0_sharding(sequence, mesh),
        tile_axis - len(block),
        axis_0_sharding(names, mesh),
        finer,
    )


@dataclass(frozen=True)
class Slices:
    """How a block is cut into as many slices as there are shards.

    Attributes:
      block: the shape of a block.
      sharding: shards an axis of slices over all devices.
      finer: the same over a mesh with more and shorter axes, perhaps in another sequence.
      tile_axis: the axis of a tile that is sharded before the tile is cut, counted from the end.
      tile_sharding: shards that axis over the first mesh axes of `finer`.
      names: for each mesh axis, the axes of the finer mesh that compose it.
    """

    block: Shape
    sharding: NamedSharding
    finer: NamedSharding
    tile_axis: int
    tile_sharding: NamedSharding
    names: Mapping[str, Sequence[str]]
    axis = -2  # Of the slices.

    def cut(self, tiles: Array) -> Array:
        """Reshapes `(..., *block)` to `(..., slices, entries)`."""
        ndim = len(self.block)
        slices = math.prod(mesh_axis_lengths(self.sharding))
        tiles = jnp.moveaxis(tiles, self.tile_axis, -ndim)
        return tiles.reshape(*tiles.shape[: tiles.ndim - ndim], slices, -1)

    def join(self, slices: Array) -> Array:
        """Undoes `cut`."""
        rest = list(self.block)
        lengths = [rest.pop(self.tile_axis), *rest]
        tiles = slices.reshape(*slices.shape[: self.axis], *lengths)
        return jnp.moveaxis(tiles, -len(lengths), self.tile_axis)

    def presharded_axes(self, spec: AxesSpec) -> int:
        """The number of mesh axes of `tile_sharding` that are known to shard the tile axis already.

        Args:
          spec: the known sharding of the tile axis.
        """
        if not spec or any(spec[1:]):
            return 0
        names = (*itertools.chain(*(self.names.get(axis, [axis]) for axis in spec[0])),)
        return len(names) if mesh_axes(self.tile_sharding)[: len(names)] == names else 0

    def shard(self, tiles: Array, presharded: int = 0) -> Array:
        """Cuts tiles that are sharded as leaves are, and shards the slices.

        Args:
          tiles: the tiles of leaves, `(..., *block)`.
          presharded: the number of mesh axes of `tile_sharding` that already shard the tile axis.
        """
        tiles = shard_axis(
            tiles, self.tile_axis, self.tile_sharding, presharded=presharded, unknown=True
        )
        after = len(mesh_axes(self.tile_sharding))
        return shard_axis(self.cut(tiles), self.axis, self.finer, presharded=after, unknown=True)

    def unshard(self, slices: Array, presharded: int = 0) -> Array:
        """Undoes `shard`, with the same arguments."""
        after = len(mesh_axes(self.tile_sharding))
        slices = unshard_axis(slices, self.axis, self.finer, presharded=after, unknown=True)
        return unshard_axis(
            self.join(slices),
            self.tile_axis,
            self.tile_sharding,
            presharded=presharded,
            unknown=True,
        )


def _best_tile_axis(
    block: Shape, lengths: Mapping[str, int], whole: Sequence[Sequence[str]]
) -> tuple[int, Sequence[str]]:
    """The axis of a tile that shards evenly over the most devices, and the finer axes for it.

    The finer axes compose whole mesh axes, the last ones if there is a choice: parameters are most
    often sharded over these. If the last parts of one mesh axis give more devices, they are chosen
    instead. A leaf that is sharded over all of that mesh axis has its tiles sharded over the first
    parts.

    Args:
      block: the shape of a tile.
      lengths: the lengths of the finer mesh's axes.
      whole: the finer mesh axes that compose each mesh axis.
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
    tile_axis = max(range(len(block)), key=lambda axis: shards(best[axis]))
    return tile_axis, best[tile_axis]


def _whole_axes(sequence: Sequence[str], parts: Mapping[str, Sequence[str]]) -> list[str]:
    """The mesh axes with this sequence of parts; none if other parts come between those of one."""
    ordered = sorted(parts, key=lambda axis: sequence.index(parts[axis][0]) if parts[axis] else -1)
    return ordered if [*itertools.chain(*(parts[axis] for axis in ordered))] == [*sequence] else []
