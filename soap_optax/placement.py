"""Where arrays lie on a mesh: leaves, stacks, and what a device does with its own blocks alone.

A stack that is sharded has whole blocks on every device. Between it and the leaves, which lie as
the user wants them, gradients are exchanged once on their way in and updates on their way out.
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


def bring_in(stack: Array, sharding: NamedSharding | None) -> Array:
    """Divides a stack that was put together from leaves: the exchange of gradients."""
    if sharding is None:
        return stack
    parts = stack.reshape(*parts_of(sharding), -1, *stack.shape[1:])
    for joined in reversed(range(len(axes_of(sharding)) + 1)):
        parts = _divide_over_all_but(joined, parts, sharding)
    return divide(parts.reshape(stack.shape), sharding)


def take_out(stack: Array, sharding: NamedSharding | None) -> Array:
    """Makes a divided stack whole along its leading axis: the exchange of updates."""
    if sharding is None:
        return stack
    parts = stack.reshape(*parts_of(sharding), -1, *stack.shape[1:])
    for joined in range(1, len(axes_of(sharding)) + 1):
        parts = _divide_over_all_but(joined, parts, sharding)
    return parts.reshape(stack.shape)


def _divide_over_all_but(joined: int, parts: Array, sharding: NamedSharding) -> Array:
    """Divides parts, `(x, y, ..., blocks, *block)`, over all axes of the mesh but the first ones.

    The compiler splits the axes of a block as it finds the leaves split, with those axes of the
    mesh that are free. Going from whole to divided in a single step, or one axis of the mesh after
    another without an axis of the array for each, makes it gather the stack on every device
    wherever leaves are split over an axis that divides the stack too.
    """
    axes = axes_of(sharding)
    leading = [*[None] * joined, *axes[joined:], None]
    others = [PartitionSpec.UNCONSTRAINED] * (parts.ndim - len(leading))
    spec = PartitionSpec(*leading, *others)
    return lax.with_sharding_constraint(parts, NamedSharding(sharding.mesh, spec))


def axes_of(sharding: NamedSharding) -> tuple[str, ...]:
    """The axes of the mesh that divide stacks."""
    axes = sharding.spec[0]
    return axes if isinstance(axes, tuple) else (axes,)


def parts_of(sharding: NamedSharding) -> list[int]:
    """In how many parts each axis of the mesh divides the stack."""
    return [sharding.mesh.shape[axis] for axis in axes_of(sharding)]


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
