"""Stacks of several lengths that hold the same blocks, and padding between these.

The state's stacks are as long as `stack_multiple` asks. What is exchanged has no more padding than
gives all devices equally many blocks, one each at most.
"""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding
from jax.typing import ArrayLike

from soap_optax import placement
from soap_optax.planning import Group


def least_places(group: Group, sharding: NamedSharding) -> int:
    """The least length of a stack that is divided evenly."""
    shards = math.prod(placement.parts_of(sharding))
    return -(-group.blocks // shards) * shards


def move(stack: Array, group: Group, target: int) -> Array:
    """The blocks of a stack in one of another length; padding becomes zeros."""
    return stack if len(stack) == target else _take(stack, _moves(group, len(stack), target))


def move_locally(stack: Array, group: Group, target: int, sharding: NamedSharding) -> Array:
    """The same with a stack that is divided, on every device for itself."""
    if len(stack) == target:
        return stack
    moves = _moves(group, len(stack), target, math.prod(placement.parts_of(sharding)))
    return placement.on_local_blocks(
        lambda blocks, _: _take(*blocks), (stack, jnp.asarray(moves)), (), sharding
    )


def _moves(group: Group, source: int, target: int, shards: int = 1) -> np.ndarray:
    """Where each place of a stack gets its block from, `(target,)`; padding from past the end.

    Args:
      group: the blocks.
      source: the length of the stack that they are in.
      target: the length of the stack that they are to be in.
      shards: how many shards divide both; the places of each are counted from 0.
    """
    moves = np.full(target, source // shards)
    moves[group.places_of_blocks(target)] = group.places_of_blocks(source) % (source // shards)
    return moves


def _take(stack: Array, moves: ArrayLike) -> Array:
    return stack.at[jnp.asarray(moves)].get(mode="fill", fill_value=0)
