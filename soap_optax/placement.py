"""Where arrays lie on an explicit mesh: leaves are made whole to be cut, and split again after."""

import jax
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike


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
