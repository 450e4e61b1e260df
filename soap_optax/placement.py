"""Where arrays lie on a mesh: leaves, stacks, and what a device does with its own blocks alone.

A stack that is sharded has whole blocks on every device. Between the leaves and the stack lies a
form that is whole along the stack's axis, and otherwise split as the compiler finds the leaves
split: putting it in between leaves one exchange of gradients and one of updates.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array, lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike


def with_automatic_axes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Lets a function see the axes of an explicit mesh as automatic ones.

    Every result gets the sharding of one of the arguments: `function(numbers, leaves, state)`
    returns leaves and a state of the same structure. On automatic axes, and on one device, it is
    called as it is.
    """

    def call(numbers: Any, *arguments: Any) -> Any:
        shardings = jax.tree.map(lambda array: jax.typeof(array).sharding, arguments)
        axes = {axis for s in jax.tree.leaves(shardings) for axis in s.mesh.explicit_axes}
        if not axes:
            return function(numbers, *arguments)
        on_automatic = jax.sharding.auto_axes(function, axes=tuple(axes), out_sharding=shardings)
        return on_automatic(numbers, *arguments)

    return call


def on_automatic_axes(sharding: NamedSharding) -> NamedSharding:
    """The same sharding on a mesh whose axes are all automatic."""
    mesh = sharding.mesh
    assert isinstance(mesh, Mesh)
    axis_types = (AxisType.Auto,) * len(mesh.axis_names)
    return NamedSharding(Mesh(mesh.devices, mesh.axis_names, axis_types=axis_types), sharding.spec)


def divide(array: Array, sharding: NamedSharding | None) -> Array:
    """The array, divided along its leading axis."""
    return array if sharding is None else lax.with_sharding_constraint(array, sharding)


def replicate(array: Array, sharding: NamedSharding | None) -> Array:
    """The array, whole on every device."""
    if sharding is None:
        return array
    return lax.with_sharding_constraint(array, NamedSharding(sharding.mesh, PartitionSpec()))


def join(array: Array, sharding: NamedSharding | None) -> Array:
    """The array, whole along its leading axis on every device; the others are the compiler's."""
    if sharding is None:
        return array
    others = [PartitionSpec.UNCONSTRAINED] * (array.ndim - 1)
    return lax.with_sharding_constraint(
        array, NamedSharding(sharding.mesh, PartitionSpec(None, *others))
    )


def on_local_blocks(
    function: Callable[[Any, Any], Any], blocks: Any, shared: Any, sharding: NamedSharding | None
) -> Any:
    """Calls `function(blocks, shared)`, on every device with its own blocks and the same `shared`.

    Args:
      function: treats every block by itself.
      blocks: arrays with a leading axis of blocks.
      shared: arrays without one.
      sharding: how the blocks are divided among devices; None if they are not.
    """
    if sharding is None:
        return function(blocks, shared)
    return jax.shard_map(
        function,
        mesh=sharding.mesh,
        in_specs=(sharding.spec, PartitionSpec()),
        out_specs=sharding.spec,
    )(blocks, shared)


def make_whole(leaf: Array) -> Array:
    """The same leaf, whole on every device where an explicit mesh splits it."""
    if not _is_split(leaf):
        return leaf
    mesh = jax.typeof(leaf).sharding.mesh
    return jax.sharding.reshard(leaf, NamedSharding(mesh, PartitionSpec()))


def split_like(leaf: Array, like: ArrayLike) -> Array:
    """The leaf split over an explicit mesh as another is."""
    return jax.sharding.reshard(leaf, jax.typeof(like).sharding) if _is_split(like) else leaf


def _is_split(leaf: ArrayLike) -> bool:
    sharding = jax.typeof(leaf).sharding
    return bool(sharding.mesh.explicit_axes) and any(sharding.spec)
