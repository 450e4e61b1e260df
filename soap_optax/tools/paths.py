"""The parameters of a tree as the other tools see them: paths in words, shapes, names of axes."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec


class Parameter(NamedTuple):
    """One parameter of a tree.

    Attributes:
      parts: the parts of its path, such as ``("layers", "0", "query", "kernel")``. Keys of the tree
        are further split at ``/`` and ``.``.
      shape: its shape.
      axis_names: the names of its axes in Flax's metadata, None for an axis without a name; empty
        without metadata.
    """

    parts: tuple[str, ...]
    shape: tuple[int, ...]
    axis_names: tuple[str | None, ...] = ()

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.parts[-1]

    @property
    def module(self) -> list[str]:
        """The words of the last part with words before the name, such as the layer's name."""
        before = [found for part in self.parts[:-1] if (found := words_of(part))]
        return before[-1] if before else []


def parameters_of(params: Any, nnx_metadata: bool) -> list[Parameter]:
    """The parameters of a tree, in the sequence of `jax.tree.leaves`.

    Args:
      params: a tree of arrays or shapes; they may be in Flax's boxes and variables.
      nnx_metadata: whether to read the metadata of the variables of `flax.nnx`, which are around
        parameters but not around gradients. Linen's boxes are around both, and are always read.
    """

    def is_read(node: Any) -> bool:
        return is_box(node) or (nnx_metadata and is_variable(node))

    parameters = []
    for path, node in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_read):
        names = _axis_names(node) if is_read(node) else ()
        for leaf in jax.tree.leaves(node):
            shape = np.shape(leaf)
            names = names if len(names) == len(shape) else ()
            parameters.append(Parameter(parts_of(path), shape, names))
    return parameters


def is_box(node: Any) -> bool:
    """Whether a node is one of Linen's boxes, such as `flax.linen.Partitioned`."""
    return hasattr(node, "unbox") and hasattr(node, "names")


def is_variable(node: Any) -> bool:
    """Whether a node is a variable of `flax.nnx`, such as `flax.nnx.Param`."""
    return hasattr(type(node), "get_metadata")


def parts_of(path: Sequence[Any]) -> tuple[str, ...]:
    """The parts of a path of JAX, without the attribute ``value`` of boxes and variables."""
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return tuple(re.split("[/.]", jax.tree_util.keystr(tuple(path), simple=True, separator="/")))


def words_of(part: str) -> list[str]:
    """The words of one part of a path, in lower case: `LMHead_0` is *lm* and *head*."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", part)]


def last_word(words: Sequence[str]) -> str:
    """The last word, or an empty one."""
    return words[-1] if words else ""


def _axis_names(node: Any) -> tuple[str | None, ...]:
    """The names that a box or a variable gives to its axes, or none."""
    if is_box(node):
        names = node.names
    else:
        metadata = node.get_metadata()  # The key depends on the version of Flax.
        keys = ("out_sharding", "sharding_names", "sharding")
        names = next((metadata[key] for key in keys if metadata.get(key) is not None), ())
    if not isinstance(names, (tuple, list, PartitionSpec)):
        return ()
    return tuple(name if isinstance(name, str) else None for name in names)
