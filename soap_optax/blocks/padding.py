"""Padding of stacks: moves blocks to a stack of another length."""

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from soap_optax.blocks.plan import Group


def repad(stack: Array, group: Group, length: int) -> Array:
    """The same blocks in a stack of another length, with zeros as padding."""
    if len(stack) == length:
        return stack
    return take_or_zero(stack, padding_sources(group, len(stack), length))


def padding_sources(group: Group, old: int, new: int, shards: int = 1) -> np.ndarray:
    """For each position of a new stack, the position of its block in the old one, `(new,)`.

    Padding gets a position past the end of the old stack.

    Args:
      group: the blocks.
      old: the length of the old stack.
      new: the length of the new stack.
      shards: the number of shards of both; positions count from 0 in each shard.
    """
    sources = np.full(new, old // shards)
    sources[group.positions(new)] = group.positions(old) % (old // shards)
    return sources


def take_or_zero(stack: Array, sources: ArrayLike) -> Array:
    """The blocks at these positions; zeros for positions past the end."""
    return stack.at[jnp.asarray(sources)].get(mode="fill", fill_value=0)
