"""Arguments that say something of every parameter, in a tree that may be a prefix of theirs."""

from collections.abc import Callable
from typing import Any

import jax


def said_of_leaves(name: str, said: Any, tree: Any, is_leaf: Callable[[Any], bool]) -> list[Any]:
    """What an argument says of each leaf of a tree, in the tree's order.

    Args:
      name: the argument's name.
      said: a prefix of the tree.
      tree: parameters or gradients.
      is_leaf: what of the prefix is a leaf, beside what always is one.

    Raises:
      ValueError: where it is no prefix of the tree.
    """
    leaves, treedef = jax.tree.flatten(tree)
    found: dict[int, Any] = {}

    def note(said: Any, numbers: Any) -> None:
        found.update(dict.fromkeys(jax.tree.leaves(numbers), said))

    try:
        jax.tree.map(
            note,
            said,
            treedef.unflatten(range(len(leaves))),
            is_leaf=is_leaf,
        )
    except ValueError as error:
        raise ValueError(
            f"{name} must be a tree whose structure is that of the parameters or a prefix of it, "
            f"or a function that returns one: {error}"
        ) from error
    return [found[number] for number in range(len(leaves))]
