"""Arguments that say something of every parameter, in a tree that may be a prefix of theirs."""

from collections.abc import Callable, Container
from typing import Any

import jax

Path = tuple[str, ...]


def said_of_leaves(name: str, said: Any, tree: Any, is_leaf: Callable[[Any], bool]) -> list[Any]:
    """What an argument says of each leaf of a tree, in the tree's order.

    Args:
      name: the argument's name.
      said: a prefix of the tree. Where the tree holds nothing, as where `optax.masked` has taken
        parameters out of it, it may go on.
      tree: parameters or gradients.
      is_leaf: what of the prefix is a leaf, beside what always is one.

    Raises:
      ValueError: where it is no prefix of the tree.
    """
    entries = _by_path(said, is_leaf)
    nodes = _by_path(tree, lambda node: not jax.tree.leaves(node))
    leaves = [path for path, node in nodes.items() if jax.tree.leaves(node)]
    above = {path: _starts_of(path, entries) for path in nodes}
    for path in leaves:
        if not above[path]:
            raise _mismatch(name, f"nothing for {_text(path)}, which is one")
    used = {start for starts in above.values() for start in starts}
    empty = nodes.keys() - set(leaves)
    for path in entries:
        if path not in used and not _starts_of(path, empty):
            raise _mismatch(name, f"{_text(path)}, which is none")
    return [entries[above[path][0]] for path in leaves]


def _mismatch(name: str, found: str) -> ValueError:
    return ValueError(
        f"{name} must be a tree whose structure is that of the parameters or a prefix of it, or a "
        f"function that returns one, got {found}"
    )


def _by_path(tree: Any, is_leaf: Callable[[Any], bool]) -> dict[Path, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return {tuple(map(str, path)): leaf for path, leaf in leaves}


def _starts_of(path: Path, known: Container[Path]) -> list[Path]:
    """Those beginnings of a path that are known, the shortest first."""
    return [path[:end] for end in range(len(path) + 1) if path[:end] in known]


def _text(path: Path) -> str:
    return "".join(path) or "the tree itself"
