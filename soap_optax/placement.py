"""Where arrays lie on a mesh, and what a device does with its own blocks alone."""

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
from jax import Array, lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

UNCONSTRAINED = PartitionSpec.UNCONSTRAINED

# What divides the parts of an axis, of which there is one for each axis of the mesh, and then the
# rest: that axis of the mesh, or nothing, or what the compiler finds.
Division = tuple[Any, ...]


def with_automatic_axes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Lets a function see the axes of an explicit mesh as automatic ones.

    Every result gets the sharding of one of the arguments: `function(numbers, leaves, state)`
    returns leaves and a state of the same structure. On automatic axes, and on one device, it is
    called as it is.
    """

    def call(numbers: Any, *arguments: Any) -> Any:
        shardings = jax.tree.map(lambda array: jax.typeof(array).sharding, arguments)
        meshes = [s.mesh for s in jax.tree.leaves(shardings) if s.mesh.explicit_axes]
        if not meshes:
            return function(numbers, *arguments)
        axes = meshes[0].explicit_axes
        whole = NamedSharding(meshes[0], PartitionSpec())  # As what lies on no mesh is to be.
        shardings = jax.tree.map(lambda s: whole if s.mesh.empty else s, shardings)
        on_automatic = jax.sharding.auto_axes(function, axes=tuple(axes), out_sharding=shardings)
        return on_automatic(numbers, *arguments)

    return call


def on_automatic_axes(sharding: NamedSharding) -> NamedSharding:
    """The same division of a leading axis on a mesh whose axes are all automatic.

    Axes of length 1 are left out, as what is known of leaves leaves them out.
    """
    mesh = sharding.mesh
    assert isinstance(mesh, Mesh)
    axis_types = (AxisType.Auto,) * len(mesh.axis_names)
    automatic = Mesh(mesh.devices, mesh.axis_names, axis_types=axis_types)
    return over(long_axes_of(sharding), automatic)


def divide(array: Array, sharding: NamedSharding | None) -> Array:
    """The array, divided along its leading axis."""
    return array if sharding is None else lax.with_sharding_constraint(array, sharding)


def replicate(array: Array, sharding: NamedSharding | None) -> Array:
    """The array, whole on every device."""
    if sharding is None:
        return array
    return lax.with_sharding_constraint(array, NamedSharding(sharding.mesh, PartitionSpec()))


def divide_axis(
    array: Array, axis: int, sharding: NamedSharding, *, after: int = 0, may_be_split: bool = False
) -> Array:
    """Divides an axis of an array among all devices.

    Args:
      array: any array.
      axis: the axis that is to be divided.
      sharding: over which axes of the mesh, one after another.
      after: how many of these divide it already.
      may_be_split: whether the compiler may find the axis split to begin with, or else is to make
        it whole.
    """
    steps = _from_divided_to_whole(sharding, after, may_be_split)
    return _step_by_step(array, {axis: sharding}, reversed(steps))


def join_axis(
    array: Array, axis: int, sharding: NamedSharding, *, after: int = 0, may_be_split: bool = False
) -> Array:
    """Undoes `divide_axis`, with the same arguments."""
    steps = _from_divided_to_whole(sharding, after, may_be_split)
    return _step_by_step(array, {axis: sharding}, steps)


def divide_first_instead_of(
    axis: int, array: Array, sharding: NamedSharding, other: NamedSharding
) -> Array:
    """Divides the first axis of an array in place of another, which becomes whole.

    Args:
      axis: the axis that is divided.
      array: any array.
      sharding: how the first axis is to be divided.
      other: how the other is divided: over the same axes of the mesh, in any order.
    """
    return _step_by_step(array, {0: sharding, axis: other}, reversed(_exchanges(sharding, other)))


def divide_instead_of_first(
    axis: int, array: Array, sharding: NamedSharding, other: NamedSharding
) -> Array:
    """Undoes `divide_first_instead_of`, with the same arguments."""
    return _step_by_step(array, {0: sharding, axis: other}, _exchanges(sharding, other))


def redivide(array: Array, axis: int, sharding: NamedSharding) -> Array:
    """Divides an axis that is divided over all devices in another order: one permutation."""
    spec: list[Any] = [None] * array.ndim  # No axis of the mesh is left over.
    spec[axis] = sharding.spec[0]
    return lax.with_sharding_constraint(array, NamedSharding(sharding.mesh, PartitionSpec(*spec)))


def _from_divided_to_whole(
    sharding: NamedSharding, after: int, may_be_split: bool
) -> list[tuple[Division]]:
    """The divisions of an axis that is given up by one axis of the mesh after another."""
    kept, axes = axes_of(sharding)[:after], axes_of(sharding)[after:]
    given_up = UNCONSTRAINED if may_be_split else None
    return [
        ((*kept, *[given_up] * (number - 1), *[None] * min(number, 1), *axes[number:], given_up),)
        for number in range(len(axes) + 1)
    ]


def _exchanges(first: NamedSharding, second: NamedSharding) -> list[tuple[Division, Division]]:
    """The divisions of two axes, of which one gives up axes of the mesh for the other."""
    names = axes_of(first)
    return [
        (
            (*(None if name in names[:number] else name for name in names), None),
            (*(name if name in names[:number] else None for name in axes_of(second)), None),
        )
        for number in range(len(names) + 1)
    ]


def _step_by_step(
    array: Array, shardings: Mapping[int, NamedSharding], steps: Iterable[tuple[Division, ...]]
) -> Array:
    """Takes axes of an array through one division after another; the others are the compiler's.

    What the compiler finds split over axes of the mesh that are not in use stays so. In a single
    step, or without an axis of the array for each axis of the mesh, it would gather the array on
    every device wherever one of the others is split over an axis of the mesh that comes into use.
    """
    divided = {axis % array.ndim: parts_of(sharding) for axis, sharding in shardings.items()}
    mesh = next(iter(shardings.values())).mesh
    shapes = [
        [*divided[axis], length // math.prod(divided[axis])] if axis in divided else [length]
        for axis, length in enumerate(array.shape)
    ]
    split = array.reshape(list(itertools.chain(*shapes)))
    for step in steps:
        names = dict(zip(divided, step, strict=True))
        specs = [names.get(axis, (UNCONSTRAINED,)) for axis in range(array.ndim)]
        held = NamedSharding(mesh, PartitionSpec(*itertools.chain(*specs)))
        split = lax.with_sharding_constraint(split, held)
    return split.reshape(array.shape)


def over(axes: Iterable[str], mesh: Any) -> NamedSharding:
    """Divides a leading axis over these axes of a mesh."""
    return NamedSharding(mesh, PartitionSpec(tuple(axes)))


def refine(
    sharding: NamedSharding, counts: Collection[int]
) -> tuple[Mesh, Mapping[str, Sequence[str]]]:
    """The same mesh with more and shorter axes, and their names for each axis that it had.

    An axis of a leaf that is cut into tiles, and split over the mesh, is split first from tile to
    tile and then within a tile: where there are fewer tiles than devices, over a part of an axis of
    the mesh each. Only a whole axis of a mesh can be named, and so each part gets one. All parts
    are equally long, where possible: then what splits a tile first and what is to divide it first
    are alike.

    Args:
      sharding: divides a leading axis among devices.
      counts: how many tiles there are along the axes of leaves.
    """
    mesh, before, factors = sharding.mesh, 1, []
    assert isinstance(mesh, Mesh)
    for length in parts_of(sharding):
        left = {count // math.gcd(count, first) for count in counts for first in (1, before)}
        factors.append(_factors(length, {math.gcd(count, length) for count in left}))
        before *= length
    divisors = _powers_of_one_base(set(itertools.chain(*factors)), before)
    factors = [_factors(length, divisors) for length in parts_of(sharding)]
    lengths, names, names_of = [], [], {}
    divided = dict(zip(axes_of(sharding), factors, strict=True))
    for axis, length in mesh.shape.items():
        parts = divided.get(axis, [length])
        names_of[axis] = [f"{axis}_{number}" for number in range(len(parts))]
        lengths += parts
        names += names_of[axis]
    finer = Mesh(mesh.devices.reshape(lengths), names, axis_types=(AxisType.Auto,) * len(names))
    return finer, names_of


def _factors(length: int, divisors: Iterable[int]) -> list[int]:
    """Factors of a number, whose products from the first on are divisors of it, if they can be."""
    products = [1]
    for divisor in (*sorted(divisors), length):
        if divisor % products[-1] == 0 == length % divisor and divisor > products[-1]:
            products.append(divisor)
    return [end // start for start, end in itertools.pairwise(products)]


def _powers_of_one_base(numbers: Collection[int], limit: int) -> Collection[int]:
    """The powers of the largest number of which all are powers; all numbers, if there is none."""
    for base in range(min(numbers, default=1), 1, -1):
        powers = [base**n for n in range(1, limit.bit_length() + 1)]
        if all(number in powers for number in numbers):
            return powers
    return range(2, limit)


def axes_of(sharding: NamedSharding) -> tuple[str, ...]:
    """The axes of the mesh that divide stacks."""
    axes = sharding.spec[0] or ()
    return axes if isinstance(axes, tuple) else (axes,)


def long_axes_of(sharding: NamedSharding) -> tuple[str, ...]:
    """Those of them that are longer than 1; all, if none is."""
    axes = axes_of(sharding)
    return tuple(axis for axis in axes if sharding.mesh.shape[axis] > 1) or axes


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
        # JAX's own eigh for TPUs, which 0.8 takes beyond a length of 256, loops over values whose
        # types this check finds to differ.
        check_vma=False,
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
