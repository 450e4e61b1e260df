"""The layout on a mesh: stacks are sharded along axis 0, leaves as the user shards them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding
from jax.typing import ArrayLike

from soap_optax import blocks
from soap_optax.blocks import Group, Plan, Region, Shape
from soap_optax.devices import constraints
from soap_optax.devices.explicit_axes import run_with_auto_axes
from soap_optax.devices.layout import Layout, OneDevice, Starts, append_zeros, split_vector
from soap_optax.devices.mesh import map_shards, shard_count, with_auto_axes
from soap_optax.devices.padding import repad_shards, shortest_length
from soap_optax.devices.param_shardings import LeafShardings, leaf_shardings
from soap_optax.devices.routes import Routes, WholeLeaves
from soap_optax.devices.slices import Slices
from soap_optax.devices.state_shardings import create_state
from soap_optax.state import PreconditionerState


def layout_of(
    tree: Any, plan: Plan, stack_sharding: NamedSharding | None, param_shardings: Any
) -> Layout:
    """The layout of parameters or gradients and of their stacks.

    Args:
      tree: parameters or gradients.
      plan: the plan of the tree.
      stack_sharding: the argument of `scale_by_soap`; None means one device.
      param_shardings: the argument of `scale_by_soap`.

    Raises:
      TypeError, ValueError: if `param_shardings` does not fit the tree or the mesh.
    """
    if stack_sharding is None:
        return OneDevice(plan)
    sharding = with_auto_axes(stack_sharding)
    leaves = leaf_shardings(tree, param_shardings, stack_sharding.mesh, sharding.mesh)
    return Sharded(plan, stack_sharding, sharding, leaves)


class Sharded:
    """The layout with `stack_sharding`: every device holds whole blocks of every stack.

    Gradients are resharded from leaves to stacks, and updates from stacks to leaves. Each block
    shape has its own route (`routes`).
    """

    def __init__(
        self,
        plan: Plan,
        stack_sharding: NamedSharding,
        sharding: NamedSharding,
        leaves: LeafShardings,
    ):
        self.plan = plan
        self._stack_sharding = stack_sharding
        self._sharding = sharding  # The same on automatic axes.
        self._leaves = leaves
        self._routes = Routes(plan, sharding, leaves)

    def create(self, make: Callable[[], PreconditionerState]) -> PreconditionerState:
        """Makes a state in its shards, so that no device ever holds all of it."""
        return create_state(make, self._stack_sharding)

    def run(self, function: Callable[..., Any], settings: Any, leaves: Any, state: Any) -> Any:
        """Calls the function with the explicit axes of the mesh as automatic ones."""
        return run_with_auto_axes(function)(settings, leaves, state)

    def prepare(self, leaves: Sequence[ArrayLike]) -> list[Any]:
        """The leaves, constrained to the shardings that `param_shardings` specifies."""
        return self._leaves.constrain(leaves)

    def finish(self, leaves: Sequence[Array], like: Sequence[ArrayLike]) -> list[Array]:
        """The leaves, constrained to the shardings that `param_shardings` specifies."""
        del like
        return self._leaves.constrain(leaves)

    def to_stack(self, leaves: Sequence[ArrayLike], group: Group) -> Array:
        """See `Layout.to_stack`: reshards gradients."""
        sharding = self._sharding
        shortest = shortest_length(group, sharding)
        route = self._routes.of_stack(group)
        if isinstance(route, WholeLeaves):
            [stack] = blocks.gather(leaves, self.plan, group)
            stack = blocks.repad(stack, group, shortest)
            stack = constraints.shard_axis(stack, 0, sharding, presharded=route.presharded)
        else:
            tiles = blocks.tiles_of(leaves, self.plan, group)
            tiles = self._over_equal_leaves(route.shard, route, tiles)
            [stack] = blocks.concatenate(tiles, group)
            # Without a constraint here, JAX 0.8 reshards one leaf after another.
            for permuted in (route.finer, route.sharding):
                stack = constraints.permute_shards(stack, route.axis, permuted)
            stack = blocks.repad(stack, group, shortest)
            stack = constraints.move_sharding_to_axis_0(stack, route.axis, sharding, route.sharding)
            stack = route.join(stack)
        return repad_shards(constraints.shard(stack, sharding), group, group.length, sharding)

    def from_stack(self, stack: Array, group: Group, starts: Starts) -> dict[Region, Array]:
        """See `Layout.from_stack`: reshards updates."""
        sharding = self._sharding
        stack = repad_shards(stack, group, shortest_length(group, sharding), sharding)
        route = self._routes.of_stack(group)
        if isinstance(route, WholeLeaves):
            stack = constraints.unshard_axis(stack, 0, sharding, presharded=route.presharded)
            return blocks.split([blocks.repad(stack, group, group.blocks)], group, starts)
        slices = constraints.move_sharding_from_axis_0(
            route.cut(stack), route.axis, sharding, route.sharding
        )
        slices = blocks.repad(slices, group, group.blocks)
        slices = constraints.permute_shards(slices, route.axis, route.finer)
        tiles = {}
        for region, of_region in blocks.split([slices], group, starts).items():
            batch = region.tile[: len(region.tile) - len(region.block)]
            tiles[region] = of_region.reshape(*region.tiles, *batch, *of_region.shape[1:])
        return self._over_equal_leaves(route.unshard, route, tiles)

    def to_vector(self, leaves: Sequence[Array], group: Group) -> Array:
        """See `Layout.to_vector`: reshards gradients."""
        route = self._routes.of_vector(group)
        if route is None:
            return self.pad_vector(jnp.concatenate([leaf.ravel() for leaf in leaves]), group)
        [[leaf]] = leaves
        if isinstance(route, WholeLeaves):
            leaf = constraints.shard_axis(leaf, 0, self._sharding, presharded=route.presharded)
        else:
            leaf = route.shard(leaf)
            for permuted in (route.finer, self._sharding):
                leaf = constraints.permute_shards(leaf, route.axis, permuted)
        return constraints.shard(leaf.ravel(), self._sharding)

    def from_vector(self, vector: Array, shapes: Sequence[Shape], group: Group) -> list[Array]:
        """See `Layout.from_vector`: reshards updates."""
        route = self._routes.of_vector(group)
        if route is None:
            return split_vector(constraints.unshard_axis(vector, 0, self._sharding), shapes)
        if isinstance(route, WholeLeaves):
            leaf = vector.reshape(group.block)
            presharded = route.presharded
            return [constraints.unshard_axis(leaf, 0, self._sharding, presharded=presharded)[None]]
        slices = vector.reshape(shard_count(self._sharding), -1)
        for permuted in (self._sharding, route.finer):
            slices = constraints.permute_shards(slices, route.axis, permuted)
        return [route.unshard(slices)[None]]

    def pad_vector(self, vector: Array, group: Group) -> Array:
        """See `Layout.pad_vector`."""
        return constraints.shard(append_zeros(vector, group.padding), self._sharding)

    def replicate(self, array: Array) -> Array:
        """The array, replicated."""
        return constraints.replicate(array, self._sharding.mesh)

    def map_blocks(self, function: Callable[[Any, Any], Any], blocks: Any, shared: Any) -> Any:
        """See `Layout.map_blocks`: every device maps its own shard, without communication."""
        return map_shards(function, blocks, shared, self._sharding)

    def _over_equal_leaves(
        self,
        function: Callable[[Array, int], Array],
        slices: Slices,
        arrays: Mapping[Region, Array],
    ) -> dict[Region, Array]:
        """Calls a method of `slices` once for all arrays of equal leaves, stacked.

        Equal leaves have one shape, dtype and sharding, or an unknown sharding. A barrier puts the
        calls in sequence, so that not all arrays in transit are in memory at once.
        """
        equal: dict[Any, list[Region]] = {}
        for region, array in arrays.items():
            spec = self._leaves.view_spec(self.plan, region.leaf)
            equal.setdefault((array.shape, array.dtype, spec), []).append(region)
        stacks: list[Array] = []
        for (_, _, spec), regions in equal.items():
            given = [arrays[region] for region in regions]
            is_tiled = regions[0].tiles[slices.tile_axis] > 1
            known = None if spec is None or is_tiled else spec[slices.tile_axis]
            presharded = 0 if known is None else slices.presharded_axes(known)
            if stacks:  # Both results are used: XLA drops a barrier with unused results.
                given, stacks[-1] = lax.optimization_barrier((given, stacks[-1]))
            stacks.append(function(jnp.stack(given), presharded))
        return {
            region: stack[number]
            for regions, stack in zip(equal.values(), stacks, strict=True)
            for number, region in enumerate(regions)
        }
