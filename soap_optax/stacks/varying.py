"""Arrays that vary over the devices of a `jax.shard_map` of the user.

There, the type of an array says over which mesh axes it varies. A conditional or a loop needs equal
types of its operands and results. A new state varies over no axis, and a gradient may.
"""

import functools
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array

Tree = TypeVar("Tree")


def vary_like(tree: Tree, others: object) -> Tree:
    """The arrays of a tree, varying over the mesh axes over which any array of either tree varies.

    Outside of a `jax.shard_map` the tree is returned as it is.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return tree
    flags = [_flag(array) for array in (*jax.tree.leaves(tree), *jax.tree.leaves(others))]
    flag = functools.reduce(jnp.logical_or, flags)
    # XLA removes this selection. JAX has no function for it that all supported versions share.
    return jax.tree.map(lambda array: jnp.where(flag, array, array), tree)


def _flag(array: Array) -> Array:
    """A boolean scalar that varies as an array does."""
    entry = jnp.ravel(array)[0]
    return entry == entry
