"""The interface of this wing, and its implementation for one device."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from soap_optax import blocks
from soap_optax.blocks import Group, Plan, Region, Shape
from soap_optax.devices.explicit_axes import replicate_explicit, reshard_like
from soap_optax.state import PreconditionerState

Starts = Mapping[int, ArrayLike]


class Layout(Protocol):
    """The shardings of leaves and stacks, and the functions from one to the other."""

    plan: Plan

    def create(self, make: Callable[[], PreconditionerState]) -> PreconditionerState:
        """Makes a state with the shardings of this layout."""
        ...

    def run(self, function: Callable[..., Any], settings: Any, leaves: Any, state: Any) -> Any:
        """Calls `function(settings, leaves, state)`, which returns new leaves and a new state."""
        ...

    def prepare(self, leaves: Sequence[ArrayLike]) -> list[Any]:
        """The leaves, ready for `to_stack` and `blocks.gather`."""
        ...

    def finish(self, leaves: Sequence[Array], like: Sequence[ArrayLike]) -> list[Array]:
        """New leaves with the shardings of `like`, or of the hints in `param_shardings`."""
        ...

    def to_stack(self, leaves: Sequence[ArrayLike], group: Group) -> Array:
        """Gathers the blocks of a stack from the leaves, `(blocks, *block)`."""
        ...

    def from_stack(self, stack: Array, group: Group, starts: Starts) -> dict[Region, Array]:
        """Splits a stack, `(blocks, *block)`, into its regions: undoes `to_stack`.

        Args:
          stack: the stack.
          group: the group that was gathered.
          starts: each position of `blocks.slice_starts`, as a number or as a traced scalar.
        """
        ...

    def to_vector(self, leaves: Sequence[Array], group: Group) -> Array:
        """Concatenates the entries of a bucket's leaves, `(entries,)`, with zeros as padding.

        Args:
          leaves: the leaves of the group, stacked by shape, `(k, *leaf)`.
          group: the leaves and their padding.
        """
        ...

    def from_vector(self, vector: Array, shapes: Sequence[Shape], group: Group) -> list[Array]:
        """Splits a vector into leaves of these shapes: undoes `to_vector`."""
        ...

    def pad_vector(self, vector: Array, group: Group) -> Array:
        """Appends the padding of a bucket to a vector, zeros, and shards it."""
        ...

    def replicate(self, array: Array) -> Array:
        """The array, replicated."""
        ...

    def map_blocks(self, function: Callable[[Any, Any], Any], blocks: Any, shared: Any) -> Any:
        """Calls `function(blocks, shared)` on each device with its own blocks.

        Args:
          function: a function of blocks that treats each block independently.
          blocks: arrays with a leading axis of blocks.
          shared: arrays without one.
        """
        ...


class OneDevice:
    """The layout without `stack_sharding`: leaves and stacks are on one device, or replicated."""

    def __init__(self, plan: Plan):
        self.plan = plan

    def create(self, make: Callable[[], PreconditionerState]) -> PreconditionerState:
        """Makes a state."""
        return make()

    def run(self, function: Callable[..., Any], settings: Any, leaves: Any, state: Any) -> Any:
        """Calls the function."""
        return function(settings, leaves, state)

    def prepare(self, leaves: Sequence[ArrayLike]) -> list[Any]:
        """The leaves, replicated if an explicit mesh shards them."""
        return [replicate_explicit(jnp.asarray(leaf)) for leaf in leaves]

    def finish(self, leaves: Sequence[Array], like: Sequence[ArrayLike]) -> list[Array]:
        """The leaves, sharded over an explicit mesh as the given ones are."""
        return [reshard_like(leaf, other) for leaf, other in zip(leaves, like, strict=True)]

    def to_stack(self, leaves: Sequence[ArrayLike], group: Group) -> Array:
        """See `Layout.to_stack`."""
        [stack] = blocks.gather(leaves, self.plan, group)
        return blocks.repad(stack, group, group.length)

    def from_stack(self, stack: Array, group: Group, starts: Starts) -> dict[Region, Array]:
        """See `Layout.from_stack`."""
        return blocks.split([blocks.repad(stack, group, group.blocks)], group, starts)

    def to_vector(self, leaves: Sequence[Array], group: Group) -> Array:
        """See `Layout.to_vector`."""
        return self.pad_vector(jnp.concatenate([leaf.ravel() for leaf in leaves]), group)

    def from_vector(self, vector: Array, shapes: Sequence[Shape], group: Group) -> list[Array]:
        """See `Layout.from_vector`."""
        del group
        return split_vector(vector, shapes)

    def pad_vector(self, vector: Array, group: Group) -> Array:
        """See `Layout.pad_vector`."""
        return append_zeros(vector, group.padding)

    def replicate(self, array: Array) -> Array:
        """The array."""
        return array

    def map_blocks(self, function: Callable[[Any, Any], Any], blocks: Any, shared: Any) -> Any:
        """Calls the function."""
        return function(blocks, shared)


def split_vector(vector: Array, shapes: Sequence[Shape]) -> list[Array]:
    """Splits a vector into arrays of these shapes, and drops the rest."""
    slices = blocks.consecutive_slices([math.prod(shape) for shape in shapes])
    return [vector[part].reshape(shape) for part, shape in zip(slices, shapes, strict=True)]


def append_zeros(vector: Array, count: int) -> Array:
    """The vector with this number of zeros appended."""
    if not count:
        return vector
    return jnp.concatenate([vector, jnp.zeros(count, vector.dtype)])
