"""Arguments with an entry for each parameter, as a tree or a prefix of the parameters' tree."""

from collections.abc import Callable, Container
from typing import Any

import jax

Path = tuple[str, ...]


def is_function(argument: Any) -> bool:
    """Whether an argument is a function and not a tree.

    A tree with the structure of an Equinox module is callable as well, and counts as a tree.
    """
    return callable(argument) and jax.tree_util.all_leaves([argument])


def tree_of(argument: Any, tree: Any) -> Any:
    """An argument that is a tree, or a function of a tree that returns one."""
    return argument(tree) if is_function(argument) else argument


def broadcast_prefix(
    name: str, prefix: Any, tree: Any, is_leaf: Callable[[Any], bool]
) -> list[Any]:
    """The entry of a prefix tree for each leaf of a tree, in the tree's order.

    Args:
      name: the argument's name, for errors.
      prefix: a prefix of the tree. It may have entries below an empty node of the tree, such as the
        nodes that `optax.masked` leaves in place of parameters.
      tree: parameters or gradients.
      is_leaf: which nodes of the prefix are entries, besides its leaves.

    Raises:
      ValueError: if it is not a prefix of the tree.
    """
    entries = _by_path(prefix, is_leaf)
    nodes = _by_path(tree, lambda node: not jax.tree.leaves(node))
    leaves = [path for path, node in nodes.items() if jax.tree.leaves(node)]
    above = {path: _starts_of(path, entries) for path in nodes}
    for path in leaves:
        if not above[path]:
            raise _mismatch(name, f"no entry for the parameter {_text(path)}")
    used = {start for starts in above.values() for start in starts}
    empty = nodes.keys() - set(leaves)
    for path in entries:
        if path not in used and not _starts_of(path, empty):
            raise _mismatch(name, f"an entry for {_text(path)}, which is no parameter")
    return [entries[above[path][0]] for path in leaves]


def _mismatch(name: str, found: str) -> ValueError:
    return ValueError(
        f"{name} must be a tree with the structure of the parameters or a prefix of it, or a "
        f"function that returns such a tree, got {found}; give every parameter an entry, or None"
    )


def _by_path(tree: Any, is_leaf: Callable[[Any], bool]) -> dict[Path, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return {tuple(map(str, path)): leaf for path, leaf in leaves}


def _starts_of(path: Path, known: Container[Path]) -> list[Path]:
    """The known prefixes of a path, the shortest first."""
    return [path[:end] for end in range(len(path) + 1) if path[:end] in known]


def _text(path: Path) -> str:
    return "".join(path) or "the tree itself"
