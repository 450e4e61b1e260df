"""Meshes with explicit axes: the shardings that types carry, and functions that see none."""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike


def run_with_auto_axes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Runs a function with the explicit axes of a mesh as automatic ones.

    Every result gets the sharding of one of the arguments: `function(settings, leaves, state)`
    returns leaves and a state of the same structure. On automatic axes, and on one device, the
    function is called directly.
    """

    def call(settings: Any, *arguments: Any) -> Any:
        shardings = jax.tree.map(lambda array: jax.typeof(array).sharding, arguments)
        meshes = [s.mesh for s in jax.tree.leaves(shardings) if s.mesh.explicit_axes]
        if not meshes:
            return function(settings, *arguments)
        axes = meshes[0].explicit_axes
        replicated = NamedSharding(meshes[0], PartitionSpec())  # For arrays on no mesh.
        shardings = jax.tree.map(lambda s: replicated if s.mesh.empty else s, shardings)
        with_auto = jax.sharding.auto_axes(function, axes=tuple(axes), out_sharding=shardings)
        return with_auto(settings, *arguments)

    return call


def replicate_explicit(leaf: Array) -> Array:
    """The leaf, replicated if explicit axes shard it."""
    if not _is_sharded_explicitly(leaf):
        return leaf
    mesh = jax.typeof(leaf).sharding.mesh
    return jax.sharding.reshard(leaf, NamedSharding(mesh, PartitionSpec()))


def reshard_like(leaf: Array, like: ArrayLike) -> Array:
    """The leaf with the sharding of another, if explicit axes shard that one."""
    if not _is_sharded_explicitly(like):
        return leaf
    return jax.sharding.reshard(leaf, jax.typeof(like).sharding)


def reshard_to(array: Array, like: ArrayLike) -> Array:
    """The array with the sharding of another, if that one is on a mesh with explicit axes."""
    sharding = jax.typeof(like).sharding
    if not sharding.mesh.explicit_axes or jax.typeof(array).sharding == sharding:
        return array
    return jax.sharding.reshard(array, sharding)


def _is_sharded_explicitly(leaf: ArrayLike) -> bool:
    sharding = jax.typeof(leaf).sharding
    return bool(sharding.mesh.explicit_axes) and any(sharding.spec)
