"""Which parameters `soap_adamw` gives to SOAP, with which dimension numbers, and which to AdamW."""

from typing import Any, NamedTuple

import jax
import optax

from soap_optax import blocks
from soap_optax.tools.dimension_numbers import entries_of
from soap_optax.tools.labels import default_labels


class Assignment(NamedTuple):
    """The optimizer of each parameter of a tree, and the dimension numbers.

    Attributes:
      labels: the tree with ``"soap"`` or ``"adamw"`` in place of every parameter.
      dimension_numbers: the argument of `soap`, without functions of the whole tree.
    """

    labels: Any
    dimension_numbers: Any

    def of_soap(self, tree: Any) -> Any:
        """A tree with `optax.MaskedNode` in place of AdamW's parameters."""
        return jax.tree.map(
            lambda leaf, label: leaf if label == "soap" else optax.MaskedNode(), tree, self.labels
        )


def assignment_of(params: Any, labels: Any, dimension_numbers: Any) -> Assignment:
    """Assigns each parameter, or each gradient, to SOAP or to AdamW.

    Args:
      params: parameters or gradients.
      labels: the argument of `soap_adamw`; None means `default_labels`.
      dimension_numbers: the argument of `soap_adamw`; None means `default_dimension_numbers`,
        without the metadata of `flax.nnx`, which gradients do not have.

    Raises:
      TypeError: if a leaf is not a floating-point or complex array.
      ValueError: if the labels do not fit the tree.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(blocks.split_complex(params)):
        blocks.check_leaf(path, leaf)
    if dimension_numbers is None:
        treedef = jax.tree.structure(params)
        dimension_numbers = jax.tree.unflatten(treedef, entries_of(params))
    else:
        dimension_numbers = blocks.tree_of(dimension_numbers, params)
    labels = default_labels if labels is None else labels
    return Assignment(_checked(labels, params), dimension_numbers)


def _checked(labels: Any, params: Any) -> Any:
    """A label for each parameter, or an error that names a wrong one."""
    given = blocks.tree_of(labels, params)
    entries = blocks.broadcast_prefix("labels", given, params, lambda node: node is None)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for path, label in zip(paths, entries, strict=True):
        if label not in ("soap", "adamw"):
            raise ValueError(
                f"labels must be 'soap' or 'adamw', got {label!r} at {jax.tree_util.keystr(path)}; "
                "for other optimizers, use optax.partition"
            )
    return jax.tree.unflatten(jax.tree.structure(params), entries)
