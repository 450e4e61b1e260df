"""The view of a leaf before it is cut into blocks: as it is, merged, or as a batch of matrices."""

import enum
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from soap_optax.blocks.prefixes import broadcast_prefix, tree_of

Shape = tuple[int, ...]

# The longest axis that gets a factor by default, as in the authors' code. In signatures it is None,
# because `optax.inject_hyperparams` traces every number that is a default.
DEFAULT_MAX_PRECOND_DIM = 10_000


@dataclass(frozen=True)
class BlockOptions:
    """How leaves are cut into blocks. The fields are arguments of `scale_by_soap`."""

    max_precond_dim: int | None
    precondition_1d: bool
    merge_dims: bool
    block_size: int | None
    one_sided: bool

    @property
    def longest_axis(self) -> int:
        """The length of the longest axis that gets a factor."""
        given = self.max_precond_dim
        return DEFAULT_MAX_PRECOND_DIM if given is None else given


class MatrixAxes(NamedTuple):
    """The axes of a leaf that form the rows, and the axes that form the columns, of a matrix."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]


class AxesMark(enum.Enum):
    """How a leaf's axes are used if `dimension_numbers` name none of them.

    `DEFAULT`, without `dimension_numbers`: every axis may get a factor. `NOT_PRECONDITIONED`, with
    an entry of None: no axis gets one.
    """

    DEFAULT = enum.auto()
    NOT_PRECONDITIONED = enum.auto()


Axes = MatrixAxes | AxesMark


class View(NamedTuple):
    """A transposition and a reshape of a leaf.

    Attributes:
      permutation: the leaf's axes, transposed.
      shape: the shape after the transposed axes are merged.
      batch: the number of leading batch axes in `shape`, 0 or 1.
      preconditioned: whether any axis may get a factor.
    """

    permutation: tuple[int, ...]
    shape: Shape
    batch: int
    preconditioned: bool


def view_of(shape: Shape, axes: Axes, options: BlockOptions) -> View:
    """The view of a leaf, from its shape and the use of its axes."""
    all_axes = tuple(range(len(shape)))
    if axes is AxesMark.NOT_PRECONDITIONED:
        return View(all_axes, shape, 0, preconditioned=False)
    if axes is AxesMark.DEFAULT:
        return View(
            all_axes, merged_shape(shape, options), 0, len(shape) > 1 or options.precondition_1d
        )
    batch = tuple(axis for axis in all_axes if axis not in axes.rows + axes.columns)
    parts = (*((batch,) if batch else ()), axes.rows, axes.columns)
    return View(
        permutation=tuple(itertools.chain(*parts)),
        shape=tuple(math.prod(shape[axis] for axis in part) for part in parts),
        batch=len(parts) - 2,
        preconditioned=True,
    )


def merged_shape(shape: Shape, options: BlockOptions) -> Shape:
    """The authors' merging: neighbours, from the first on, while their product stays in bounds.

    Their code merges every leaf of two or more dimensions. A leaf that merges into a vector is
    preconditioned even without `precondition_1d`.
    """
    if not options.merge_dims or len(shape) < 2 or 0 in shape:
        return shape
    merged: list[int] = []
    current = 1
    for length in shape:
        if current * length <= options.longest_axis:
            current *= length
        elif current > 1:
            merged.append(current)
            current = length
        else:
            merged.append(length)
    if current > 1 or not merged:
        merged.append(current)
    return tuple(merged)


def axes_of_leaves(dimension_numbers: Any | Callable[[Any], Any], tree: Any) -> list[Axes]:
    """The use of the axes of each leaf of a tree, from `dimension_numbers`.

    Args:
      dimension_numbers: None, or a prefix of the tree, or a function of the tree that returns one.
        Its leaves are None (no preconditioner), or have a `reduction_axis` and an `output_axis`, or
        are functions of a leaf of the tree that return one of these.
      tree: parameters or gradients.

    Raises:
      TypeError: if an axis is no integer.
      ValueError: if it is not a prefix of the tree, or an axis is out of range or named twice.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    dimension_numbers = tree_of(dimension_numbers, tree)
    if dimension_numbers is None:
        return [AxesMark.DEFAULT] * len(leaves)
    broadcast = broadcast_prefix("dimension_numbers", dimension_numbers, tree, _is_numbers)
    return [
        _axes_of(_entry_for(leaf, numbers), jax.numpy.ndim(leaf), jax.tree_util.keystr(path))
        for numbers, (path, leaf) in zip(broadcast, leaves, strict=True)
    ]


def _is_numbers(value: Any) -> bool:
    return value is None or hasattr(value, "reduction_axis")


def _entry_for(leaf: Any, entry: Any) -> Any:
    """The entry itself, or its result if it is a function of the leaf."""
    return entry(leaf) if callable(entry) and not _is_numbers(entry) else entry


def _axes_of(numbers: Any, ndim: int, path: str) -> Axes:
    if numbers is None:
        return AxesMark.NOT_PRECONDITIONED
    if not _is_numbers(numbers) or not hasattr(numbers, "output_axis"):
        raise ValueError(
            "dimension_numbers must be None or have reduction_axis and output_axis, or be a "
            f"function of the leaf that returns one of these, got {numbers!r} at {path}; "
            "optax.contrib.MuonDimensionNumbers has both"
        )
    try:
        rows, columns = _as_axes(numbers.reduction_axis), _as_axes(numbers.output_axis)
    except TypeError as error:
        raise TypeError(
            "dimension_numbers must name axes by integers or sequences of them, such as (0, 1), "
            f"got {numbers!r} at {path}"
        ) from error
    if not all(-ndim <= axis < ndim for axis in rows + columns):
        raise ValueError(
            f"dimension_numbers must name axes of the parameter, got {numbers!r} at {path}, which "
            f"has {ndim} axes; use None there for no preconditioner"
        )
    axes = MatrixAxes(tuple(axis % ndim for axis in rows), tuple(axis % ndim for axis in columns))
    if len(set(axes.rows + axes.columns)) < len(axes.rows + axes.columns) or not (rows and columns):
        raise ValueError(
            "dimension_numbers must name at least one axis on each side and none twice, got "
            f"{numbers!r} at {path}; use None there for no preconditioner"
        )
    return axes


def _as_axes(value: int | Sequence[int]) -> tuple[int, ...]:
    """The axes as Python's integers; raises a TypeError for anything else, booleans included."""
    axes = tuple(value) if isinstance(value, Sequence) else (value,)
    if any(isinstance(axis, bool) for axis in axes):
        raise TypeError
    return tuple(operator.index(axis) for axis in axes)
