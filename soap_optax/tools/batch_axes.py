"""Axes of layers, experts and other stacks, from Flax's metadata and from shapes."""

import itertools
from collections.abc import Iterator, Mapping, Sequence

from soap_optax.tools.paths import Parameter, words_of
from soap_optax.tools.vectors import Siblings, extra_axes, is_vector

_STACK_NAMES = {
    *("block", "blocks", "exp", "expert", "experts", "layer", "layers", "qkv", "repeat", "repeats"),
    *("scan", "stack", "stacked", "stage", "stages", "vmap"),
}

Axes = tuple[int, ...]


def named_batch_axes(parameter: Parameter) -> Axes:
    """The axes with names such as *layers* or *experts* in the metadata."""
    return tuple(
        axis
        for axis, name in enumerate(parameter.axis_names)
        if name is not None and not _STACK_NAMES.isdisjoint(words_of(name))
    )


def stacked_axes(parameters: Sequence[Parameter], siblings: Siblings) -> list[Axes]:
    """The axes along which whole subtrees are stacked, for each parameter.

    A subtree is stacked along an axis under two conditions. All its parameters have the same length
    there, and one of its biases or scales has an axis too many. The axis is the first one, or the
    second one if that is shorter in these biases and scales. The subtree is then searched again
    without that axis.
    """
    vectors = {
        number: extra_axes(parameter)
        for number, parameter in enumerate(parameters)
        if is_vector(parameter, siblings)
    }
    shapes = {number: parameter.shape for number, parameter in enumerate(parameters)}
    found: list[list[int]] = [[] for _ in parameters]
    for subtree in _subtrees([parameter.parts for parameter in parameters]):
        while (axis := _stacked_axis(subtree, shapes, vectors)) is not None:
            for number in subtree:
                found[number].append(axis)
                shapes[number] = shapes[number][:axis] + shapes[number][axis + 1 :]
                if number in vectors:
                    vectors[number] -= 1
    return [_in_the_parameter(axes) for axes in found]


def _stacked_axis(
    subtree: Sequence[int], shapes: Mapping[int, Axes], vectors: Mapping[int, int]
) -> int | None:
    evidence = [shapes[number] for number in subtree if vectors.get(number, 0) > 0]
    if not evidence:
        return None
    of_two_axes = [shape for shape in evidence if len(shape) == 2]
    # Models have fewer layers than entries in a vector: the shorter axis is that of the layers.
    may_be_second = bool(of_two_axes) and all(shape[1] < shape[0] for shape in of_two_axes)
    for axis in range(1 + may_be_second):
        lengths = {shapes[number][axis : axis + 1] for number in subtree}
        if len(lengths) == 1 and lengths != {()}:
            return axis
    return None


def _subtrees(paths: Sequence[tuple[str, ...]]) -> Iterator[list[int]]:
    """The parameters below each node of a tree, as their positions, from the root on."""
    for depth in range(max(map(len, paths), default=0)):
        deep = [number for number, path in enumerate(paths) if len(path) > depth]
        by_node = {}
        for number in deep:
            by_node.setdefault(paths[number][:depth], []).append(number)
        yield from by_node.values()


def _in_the_parameter(removed: Sequence[int]) -> Axes:
    """Axes that were removed one after the other, counted in the parameter's whole shape."""
    axes: list[int] = []
    for axis in removed:
        remaining = (number for number in itertools.count() if number not in axes)
        axes.append(next(itertools.islice(remaining, axis, None)))
    return tuple(sorted(axes))
