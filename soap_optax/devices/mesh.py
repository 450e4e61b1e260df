"""The axes of a mesh that shard stacks, and functions that every device runs on its own shard."""

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def mesh_axes(sharding: NamedSharding) -> tuple[str, ...]:
    """The mesh axes that shard axis 0."""
    axes = sharding.spec[0] or ()
    return axes if isinstance(axes, tuple) else (axes,)


def long_mesh_axes(sharding: NamedSharding) -> tuple[str, ...]:
    """The mesh axes that shard axis 0 and are longer than 1; all of them, if none is longer."""
    axes = mesh_axes(sharding)
    return tuple(axis for axis in axes if sharding.mesh.shape[axis] > 1) or axes


def mesh_axis_lengths(sharding: NamedSharding) -> list[int]:
    """The lengths of the mesh axes that shard axis 0."""
    return [sharding.mesh.shape[axis] for axis in mesh_axes(sharding)]


def shard_count(sharding: NamedSharding | None) -> int:
    """The number of shards of axis 0; 1 without a sharding."""
    if sharding is None:
        return 1
    return math.prod(mesh_axis_lengths(sharding))


def axis_0_sharding(axes: Iterable[str], mesh: Any) -> NamedSharding:
    """The sharding of axis 0 over these mesh axes."""
    return NamedSharding(mesh, PartitionSpec(tuple(axes)))


def with_auto_axes(sharding: NamedSharding) -> NamedSharding:
    """The same sharding of axis 0, on a mesh with automatic axes only.

    Mesh axes of length 1 are dropped, as in `LeafShardings`.
    """
    mesh = sharding.mesh
    assert isinstance(mesh, Mesh)
    axis_types = (AxisType.Auto,) * len(mesh.axis_names)
    automatic = Mesh(mesh.devices, mesh.axis_names, axis_types=axis_types)
    return axis_0_sharding(long_mesh_axes(sharding), automatic)


def map_shards(
    function: Callable[[Any, Any], Any], blocks: Any, shared: Any, sharding: NamedSharding
) -> Any:
    """Calls `function(blocks, shared)` on every device, with its own shard of the blocks.

    Args:
      function: a function of blocks that treats each block independently.
      blocks: arrays whose axis 0 is sharded.
      shared: replicated arrays.
      sharding: the sharding of axis 0.
    """
    return jax.shard_map(
        function,
        mesh=sharding.mesh,
        in_specs=(sharding.spec, PartitionSpec()),
        out_specs=sharding.spec,
        # For lengths over 256 JAX 0.8 lowers eigh on TPUs to a loop that this check rejects.
        check_vma=False,
    )(blocks, shared)


def refine_mesh(
    sharding: NamedSharding, counts: Collection[int]
) -> tuple[Mesh, Mapping[str, Sequence[str]]]:
    """Cuts the axes of a mesh into shorter ones, so that a sharding can name a part of an axis.

    A sharded axis of a leaf may have fewer tiles than devices. Then only a part of a mesh axis
    separates the tiles, and the rest shards each tile. A sharding can name whole mesh axes only, so
    each part becomes an axis with a name. All parts have the same length where possible. Then the
    same parts serve leaves and slices.

    Args:
      sharding: the sharding of axis 0 of stacks.
      counts: the numbers of tiles along the axes of leaves.

    Returns:
      The finer mesh, and for each axis of the mesh the names of its parts.
    """
    mesh, before, factors = sharding.mesh, 1, []
    assert isinstance(mesh, Mesh)
    for length in mesh_axis_lengths(sharding):
        left = {count // math.gcd(count, first) for count in counts for first in (1, before)}
        factors.append(_factors(length, {math.gcd(count, length) for count in left}))
        before *= length
    divisors = _powers_of_one_base(set(itertools.chain(*factors)), before)
    factors = [_factors(length, divisors) for length in mesh_axis_lengths(sharding)]
    lengths, names, names_of = [], [], {}
    factors_of = dict(zip(mesh_axes(sharding), factors, strict=True))
    for axis, length in mesh.shape.items():
        parts = factors_of.get(axis, [length])
        names_of[axis] = [f"{axis}_{number}" for number in range(len(parts))]
        lengths += parts
        names += names_of[axis]
    finer = Mesh(mesh.devices.reshape(lengths), names, axis_types=(AxisType.Auto,) * len(names))
    return finer, names_of


def _factors(length: int, divisors: Iterable[int]) -> list[int]:
    """Factors of a number. Their cumulative products are `divisors` of it, and the number itself.

    A divisor is left out if the product before it does not divide it.
    """
    products = [1]
    for divisor in (*sorted(divisors), length):
        if divisor % products[-1] == 0 == length % divisor and divisor > products[-1]:
            products.append(divisor)
    return [end // start for start, end in itertools.pairwise(products)]


def _powers_of_one_base(numbers: Collection[int], limit: int) -> Collection[int]:
    """The powers of the largest number of which all numbers are powers; without one, any number."""
    for base in range(min(numbers, default=1), 1, -1):
        powers = [base**n for n in range(1, limit.bit_length() + 1)]
        if all(number in powers for number in numbers):
            return powers
    return range(2, limit)
