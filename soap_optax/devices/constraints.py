"""Sharding constraints that make XLA reshard an array over one mesh axis after another.

XLA all-gathers the array if a single constraint shards an array axis over several mesh axes, and
one of these already shards another array axis. It does the same without an array axis for each mesh
axis. So array axes are reshaped to one for each mesh axis, and each constraint changes one of them.
"""

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any

from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from soap_optax.devices.mesh import mesh_axes, mesh_axis_lengths

UNCONSTRAINED = PartitionSpec.UNCONSTRAINED

# The sharding of one array axis, reshaped to one axis for each mesh axis and one for the rest. Each
# entry is a mesh axis, None (replicated) or UNCONSTRAINED (XLA chooses).
AxisSpec = tuple[Any, ...]


def shard(array: Array, sharding: NamedSharding) -> Array:
    """The array, sharded along axis 0."""
    return lax.with_sharding_constraint(array, sharding)


def replicate(array: Array, mesh: Any) -> Array:
    """The array, replicated."""
    return lax.with_sharding_constraint(array, NamedSharding(mesh, PartitionSpec()))


def shard_axis(
    array: Array,
    axis: int,
    sharding: NamedSharding,
    *,
    presharded: int = 0,
    unknown: bool = False,
) -> Array:
    """Shards an axis of an array over all devices.

    Args:
      array: any array.
      axis: the axis to shard.
      sharding: the mesh axes to shard over, as a sharding of axis 0.
      presharded: the number of these mesh axes that shard the axis already.
      unknown: whether other mesh axes may shard the axis already, which only XLA knows. If False,
        the axis is first replicated over all other mesh axes.
    """
    steps = _unsharding_steps(sharding, presharded, unknown)
    return _constrain_stepwise(array, {axis: sharding}, reversed(steps))


def unshard_axis(
    array: Array,
    axis: int,
    sharding: NamedSharding,
    *,
    presharded: int = 0,
    unknown: bool = False,
) -> Array:
    """Undoes `shard_axis`, with the same arguments."""
    steps = _unsharding_steps(sharding, presharded, unknown)
    return _constrain_stepwise(array, {axis: sharding}, steps)


def move_sharding_to_axis_0(
    array: Array, axis: int, sharding: NamedSharding, axis_sharding: NamedSharding
) -> Array:
    """Shards axis 0 of an array in place of another axis, which becomes replicated.

    Args:
      array: any array.
      axis: the axis that is sharded.
      sharding: the sharding that axis 0 gets.
      axis_sharding: the sharding of the other axis: the same mesh axes, in any sequence.
    """
    steps = reversed(_moving_steps(sharding, axis_sharding))
    return _constrain_stepwise(array, {0: sharding, axis: axis_sharding}, steps)


def move_sharding_from_axis_0(
    array: Array, axis: int, sharding: NamedSharding, axis_sharding: NamedSharding
) -> Array:
    """Undoes `move_sharding_to_axis_0`, with the same arguments."""
    steps = _moving_steps(sharding, axis_sharding)
    return _constrain_stepwise(array, {0: sharding, axis: axis_sharding}, steps)


def permute_shards(array: Array, axis: int, sharding: NamedSharding) -> Array:
    """Changes the sequence of devices that shard an axis, by one collective permutation."""
    spec: list[Any] = [None] * array.ndim  # No mesh axis is left for other axes.
    spec[axis] = sharding.spec[0]
    return lax.with_sharding_constraint(array, NamedSharding(sharding.mesh, PartitionSpec(*spec)))


def _unsharding_steps(
    sharding: NamedSharding, presharded: int, unknown: bool
) -> list[tuple[AxisSpec]]:
    """The shardings of an axis while it is unsharded over one mesh axis after another."""
    constant, axes = mesh_axes(sharding)[:presharded], mesh_axes(sharding)[presharded:]
    free = UNCONSTRAINED if unknown else None
    return [
        ((*constant, *[free] * (number - 1), *[None] * min(number, 1), *axes[number:], free),)
        for number in range(len(axes) + 1)
    ]


def _moving_steps(
    sharding: NamedSharding, axis_sharding: NamedSharding
) -> list[tuple[AxisSpec, AxisSpec]]:
    """The shardings of axis 0 and another axis while one mesh axis after another moves."""
    names = mesh_axes(sharding)
    return [
        (
            (*(None if name in names[:number] else name for name in names), None),
            (
                *(name if name in names[:number] else None for name in mesh_axes(axis_sharding)),
                None,
            ),
        )
        for number in range(len(names) + 1)
    ]


def _constrain_stepwise(
    array: Array, shardings: Mapping[int, NamedSharding], steps: Iterable[tuple[AxisSpec, ...]]
) -> Array:
    """Constrains some axes of an array by one sharding after another; XLA chooses for the others.

    Each constrained axis is reshaped to one axis for each mesh axis. Shardings over mesh axes that
    no step uses stay as they are.
    """
    lengths = {axis % array.ndim: mesh_axis_lengths(given) for axis, given in shardings.items()}
    mesh = next(iter(shardings.values())).mesh
    shapes = [
        [*lengths[axis], length // math.prod(lengths[axis])] if axis in lengths else [length]
        for axis, length in enumerate(array.shape)
    ]
    reshaped = array.reshape(list(itertools.chain(*shapes)))
    for step in steps:
        names = dict(zip(lengths, step, strict=True))
        specs = [names.get(axis, (UNCONSTRAINED,)) for axis in range(array.ndim)]
        sharding = NamedSharding(mesh, PartitionSpec(*itertools.chain(*specs)))
        reshaped = lax.with_sharding_constraint(reshaped, sharding)
    return reshaped.reshape(array.shape)
