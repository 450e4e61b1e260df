"""Padding of sharded stacks.

`stack_multiple` decides the length of the state's stacks. Communication uses shorter stacks, whose
padding only makes the number of blocks equal on all devices.
"""

import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding

from soap_optax.blocks import Group, padding_sources, take_or_zero
from soap_optax.devices.mesh import map_shards, shard_count


def shortest_length(group: Group, sharding: NamedSharding) -> int:
    """The length of the shortest stack that is sharded evenly."""
    shards = shard_count(sharding)
    return -(-group.blocks // shards) * shards


def repad_shards(stack: Array, group: Group, length: int, sharding: NamedSharding) -> Array:
    """Changes the padding of a sharded stack: every device repads its own shard."""
    if len(stack) == length:
        return stack
    sources = padding_sources(group, len(stack), length, shard_count(sharding))
    return map_shards(
        lambda blocks, _: take_or_zero(*blocks), (stack, jnp.asarray(sources)), (), sharding
    )
