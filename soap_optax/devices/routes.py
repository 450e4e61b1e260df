"""Routes: how the blocks of a group are resharded between leaves and stacks.

Leaves are resharded whole, once for each block shape, if all leaves of that shape are sharded the
same way, along axes of their blocks or not at all.

Other leaves are resharded twice, as slices. If a leaf is sharded along a tiled axis, a device holds
whole tiles or a part of one, but not the tiles that its shard of the stack needs. So all blocks are
first cut into equal slices, one for each device, which are then resharded like leaves.
"""

import itertools
import math
from dataclasses import dataclass

from jax.sharding import NamedSharding

from soap_optax.blocks import Group, Plan
from soap_optax.devices.mesh import mesh_axes, shard_count
from soap_optax.devices.padding import shortest_length
from soap_optax.devices.param_shardings import AxesSpec, LeafShardings
from soap_optax.devices.slices import Slices, best_slices


@dataclass(frozen=True)
class WholeLeaves:
    """Leaves are resharded whole.

    Attributes:
      presharded: the number of mesh axes of the sharding, from the first on, that already shard
        axis 0.
    """

    presharded: int


Route = WholeLeaves | Slices


@dataclass(frozen=True)
class Routes:
    """Chooses the route of each group.

    Attributes:
      plan: the plan of the tree.
      sharding: the sharding of stacks, on automatic axes.
      leaves: the shardings of the leaves.
    """

    plan: Plan
    sharding: NamedSharding
    leaves: LeafShardings

    def of_stack(self, group: Group) -> Route:
        """The route of a stack's blocks.

        Leaves are resharded whole unless one of these is true:

        - an axis that is cut into several blocks is sharded, or may be;
        - leaves are sharded in different ways;
        - the stack would have at least as much padding as blocks.

        Leaves are resharded whole in any case if a block has no equal slices.
        """
        shards = shard_count(self.sharding)
        if shards == 1 or math.prod(group.block) % shards:
            return WholeLeaves(presharded=0)
        several = [
            (region, axis)
            for region in group.regions
            for axis, count in enumerate(region.tiles)
            if count > 1
        ]
        # Leaves that are sharded along a batch axis have whole tiles on each device.
        counts = {region.tiles[axis] for region, axis in several if region.tile[axis] > 1}
        slices = best_slices(group.block, self.sharding, self._unused_axes(group), counts)
        if shortest_length(group, self.sharding) >= 2 * group.blocks:
            return slices
        known = {r: self.leaves.view_spec(self.plan, r.leaf) for r in group.regions}
        specs = {region: spec for region, spec in known.items() if spec is not None}
        if len(specs) < len(known):
            return slices if several else WholeLeaves(presharded=0)
        if len({spec[-len(group.block) :] for spec in specs.values()}) > 1:
            return slices
        sharded_axes = {axis for region, axis in several if any(specs[region][axis])}
        if not sharded_axes:
            return WholeLeaves(presharded=0)
        if sharded_axes == {0} and len(specs) == 1 and group.blocks % shards == 0:
            [(region, spec)] = specs.items()
            route = _whole_if_presharded(region.tiles[0], spec[0], self.sharding)
            return slices if route is None else route
        return slices

    def of_vector(self, group: Group) -> Route | None:
        """The route of a leaf with its own vectors; None for a bucket.

        Only shards of the first axis are consecutive in the vector, so that axis is resharded.
        """
        shards = shard_count(self.sharding)
        if shards == 1 or group.padding or group.entries != math.prod(group.block):
            return None
        unused = self._unused_axes(group)
        slices = best_slices(group.block, self.sharding, unused, leading_axes=1)
        if group.block[0] % shards:
            return slices
        spec = self.leaves.view_spec(self.plan, group.regions[0].leaf)
        # XLA needs no help, except for a leaf that is sharded along another axis and over only some
        # of the mesh axes.
        unaided = WholeLeaves(len(mesh_axes(self.sharding)))
        if spec is None:
            return unaided
        first, *others = spec[-len(group.block) :]
        if not any(itertools.chain(*others)):
            return unaided
        route = _whole_if_presharded(group.block[0], first, self.sharding)
        return route or (slices if unused else unaided)

    def _unused_axes(self, group: Group) -> set[str]:
        """The mesh axes that are known to shard none of the leaves."""
        specs = [self.leaves.specs[region.leaf] for region in group.regions]
        if None in specs:
            return set()
        used = {axis for spec in specs for axes in spec or () for axis in axes}
        return set(mesh_axes(self.sharding)) - used


def _whole_if_presharded(
    length: int, spec: AxesSpec, sharding: NamedSharding
) -> WholeLeaves | None:
    """The route of an axis that is sharded over the first mesh axes of its target sharding.

    None if it is not sharded that way.
    """
    first, inner = (spec[0], spec[1:]) if spec else ((), ())
    lengths = [sharding.mesh.shape[axis] for axis in first]
    is_prefix = mesh_axes(sharding)[: len(first)] == first
    if is_prefix and not any(inner) and length % math.prod(lengths) == 0:
        return WholeLeaves(len(first))
    return None
