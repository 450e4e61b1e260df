"""Where stacks and leaves lie on a mesh: what is known of leaves, by type or as was said."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from soap_optax import placement
from soap_optax.planning import Plan
from soap_optax.prefixes import said_of_leaves
from soap_optax.views import Shape

# For each axis of a leaf the axes of the mesh that split it, but those of length 1.
Split = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Places:
    """Where stacks and leaves lie on a mesh.

    Attributes:
      sharding: how stacks and vectors are divided among devices.
      shardings: where each leaf is said to lie; None where nothing is said.
      splits: how each leaf is split; None where that is not known.
    """

    sharding: NamedSharding
    shardings: tuple[NamedSharding | None, ...]
    splits: tuple[Split | None, ...]

    @property
    def shards(self) -> int:
        """In how many parts stacks are divided."""
        return math.prod(placement.parts_of(self.sharding))

    def split_of_view(self, plan: Plan, leaf: int) -> tuple[Split, ...] | None:
        """How a leaf is split along each axis of its view: along all axes that are merged in it."""
        split, view, shape = self.splits[leaf], plan.views[leaf], plan.shapes[leaf]
        if split is None:
            return None
        axes = [(shape[axis], split[axis]) for axis in view.order if shape[axis] > 1]
        merged: list[Split] = []
        for length in view.shape:
            taken, product = [], 1
            while product < length:
                d, of_axis = axes.pop(0)
                product *= d
                taken.append(of_axis)
            merged.append(tuple(taken))
        return tuple(merged)

    def hold(self, leaves: Sequence[ArrayLike]) -> list[Any]:
        """The leaves where they are said to lie, for the compiler to know."""
        return [
            leaf if sharding is None else lax.with_sharding_constraint(jnp.asarray(leaf), sharding)
            for leaf, sharding in zip(leaves, self.shardings, strict=True)
        ]


def places_of(
    tree: Any, param_shardings: Any, stack_sharding: NamedSharding | None
) -> Places | None:
    """Where stacks and leaves lie; None where nothing is divided.

    Args:
      tree: parameters or gradients. The types of its leaves count for more than what is said.
      param_shardings: the argument of `scale_by_soap`.
      stack_sharding: the argument of `scale_by_soap`.

    Raises:
      TypeError, ValueError: where `param_shardings` is no prefix of the tree, or a leaf of it no
        sharding of a leaf on that mesh; where explicit axes of a leaf are of another mesh.
    """
    if stack_sharding is None:
        return None
    if callable(param_shardings):
        param_shardings = param_shardings(tree)
    said = said_of_leaves("param_shardings", param_shardings, tree, lambda leaf: leaf is None)
    sharding = placement.on_automatic_axes(stack_sharding)
    shardings, splits = [], []
    for known, (path, leaf) in zip(said, jax.tree_util.tree_leaves_with_path(tree), strict=True):
        where = jax.tree_util.keystr(path)
        known = None if known is None else _on(sharding.mesh, known, jnp.shape(leaf), where)
        explicit = jax.typeof(leaf).sharding
        _check_explicit(explicit.mesh, stack_sharding.mesh, where)
        if explicit.mesh.explicit_axes:
            known, split = None, _split_of(explicit, jnp.ndim(leaf))
        else:
            split = None if known is None else _split_of(known, jnp.ndim(leaf))
        shardings.append(known)
        splits.append(split)
    return Places(sharding, tuple(shardings), tuple(splits))


def _check_explicit(mesh: Any, of_stacks: Any, path: str) -> None:
    """Raises where explicit axes, of leaves or stacks, are not those of the other.

    A leaf that lies on no mesh joins that of the stacks.
    """
    if mesh.empty or not (mesh.explicit_axes or of_stacks.explicit_axes):
        return
    if mesh.shape != of_stacks.shape or set(mesh.explicit_axes) != set(of_stacks.explicit_axes):
        raise ValueError(
            "stack_sharding must be on the mesh of the parameters where its axes are explicit, got "
            f"{of_stacks}, and {mesh} at {path}"
        )


def _on(mesh: Any, sharding: Any, shape: Shape, path: str) -> NamedSharding:
    """What is said of a leaf, on another mesh of the same devices."""
    if not isinstance(sharding, NamedSharding):
        raise TypeError(
            "param_shardings must have a NamedSharding or None for every parameter, got "
            f"{sharding!r} at {path}"
        )
    if sharding.mesh.shape != mesh.shape or (
        isinstance(sharding.mesh, Mesh) and (sharding.mesh.devices != mesh.devices).any()
    ):
        raise ValueError(
            "param_shardings must be on the mesh of stack_sharding, with its devices in its order, "
            f"{mesh}, got {sharding.mesh} at {path}"
        )
    if len(sharding.spec) > len(shape) or PartitionSpec.UNCONSTRAINED in sharding.spec:
        raise ValueError(
            "param_shardings must say how a parameter's axes are split, got "
            f"{sharding.spec} at {path}, which has {len(shape)} axes"
        )
    for length, axes in zip(shape, _split_of(sharding, len(shape)), strict=True):
        if length % math.prod(mesh.shape[axis] for axis in axes):
            raise ValueError(
                "param_shardings must divide the axes of a parameter evenly, got "
                f"{sharding.spec} at {path}, which has the shape {shape}"
            )
    return NamedSharding(mesh, sharding.spec)


def _split_of(sharding: NamedSharding, ndim: int) -> Split:
    entries = [*sharding.spec, *[None] * (ndim - len(sharding.spec))]
    named = [entry if isinstance(entry, tuple) else (entry,) for entry in entries]
    lengths = {None: 1} | dict(sharding.mesh.shape)
    return tuple(tuple(axis for axis in axes if lengths[axis] > 1) for axes in named)
