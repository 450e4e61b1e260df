"""The known shardings of the leaves, from their types or from `param_shardings`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from soap_optax.blocks import Plan, Shape, broadcast_prefix, split_complex, tree_of

# For each axis of a leaf the mesh axes that shard it, without mesh axes of length 1.
AxesSpec = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class LeafShardings:
    """The known shardings of the leaves of a tree.

    Attributes:
      hints: the sharding that `param_shardings` specifies for each leaf, or None.
      specs: the mesh axes that shard each axis of each leaf; None where these are not known.
    """

    hints: tuple[NamedSharding | None, ...]
    specs: tuple[AxesSpec | None, ...]

    def view_spec(self, plan: Plan, leaf: int) -> tuple[AxesSpec, ...] | None:
        """For each axis of a leaf's view, the specs of the leaf's axes that are merged in it."""
        spec, view, shape = self.specs[leaf], plan.views[leaf], plan.shapes[leaf]
        if spec is None:
            return None
        axes = [(shape[axis], spec[axis]) for axis in view.permutation if shape[axis] > 1]
        merged: list[AxesSpec] = []
        for length in view.shape:
            taken, product = [], 1
            while product < length:
                d, of_axis = axes.pop(0)
                product *= d
                taken.append(of_axis)
            merged.append(tuple(taken))
        return tuple(merged)

    def constrain(self, leaves: Sequence[ArrayLike]) -> list[Any]:
        """The leaves, constrained to their hints."""
        return [
            leaf if sharding is None else lax.with_sharding_constraint(jnp.asarray(leaf), sharding)
            for leaf, sharding in zip(leaves, self.hints, strict=True)
        ]


def leaf_shardings(
    tree: Any, param_shardings: Any, stack_mesh: Any, auto_mesh: Any
) -> LeafShardings:
    """The shardings of a tree's leaves, as far as they are specified.

    Args:
      tree: parameters or gradients. Explicit shardings in their types override `param_shardings`.
      param_shardings: the argument of `scale_by_soap`.
      stack_mesh: the mesh of `stack_sharding`.
      auto_mesh: the same mesh with automatic axes.

    Raises:
      TypeError, ValueError: if `param_shardings` is not a prefix of the tree, an entry is not a
        sharding of its leaf on this mesh, or a leaf has explicit axes of another mesh.
    """
    param_shardings = tree_of(param_shardings, tree)
    tree = split_complex(tree)
    hints = broadcast_prefix("param_shardings", param_shardings, tree, lambda leaf: leaf is None)
    checked, specs = [], []
    for hint, (path, leaf) in zip(hints, jax.tree_util.tree_leaves_with_path(tree), strict=True):
        where = jax.tree_util.keystr(path)
        hint = None if hint is None else _check_hint(auto_mesh, hint, jnp.shape(leaf), where)
        explicit = jax.typeof(leaf).sharding
        _check_explicit(explicit.mesh, stack_mesh, where)
        if explicit.mesh.explicit_axes:
            hint, spec = None, _spec_of(explicit, jnp.ndim(leaf))
        else:
            spec = None if hint is None else _spec_of(hint, jnp.ndim(leaf))
        checked.append(hint)
        specs.append(spec)
    return LeafShardings(tuple(checked), tuple(specs))


def _check_explicit(mesh: Any, stack_mesh: Any, path: str) -> None:
    """Raises if the explicit axes of a leaf and of the stacks differ.

    A leaf on no mesh is moved to the mesh of the stacks.
    """
    if mesh.empty or not (mesh.explicit_axes or stack_mesh.explicit_axes):
        return
    if mesh.shape != stack_mesh.shape or set(mesh.explicit_axes) != set(stack_mesh.explicit_axes):
        raise ValueError(
            "stack_sharding must be on the mesh of the parameters where its axes are explicit, got "
            f"{stack_mesh}, and {mesh} at {path}; build both from one mesh"
        )


def _check_hint(mesh: Any, sharding: Any, shape: Shape, path: str) -> NamedSharding:
    """Returns the hint of a leaf on `mesh`, or raises if it does not fit the leaf or the mesh."""
    if not isinstance(sharding, NamedSharding):
        raise TypeError(
            "param_shardings must have a NamedSharding or None for every parameter, got "
            f"{sharding!r} at {path}; wrap a PartitionSpec in NamedSharding(mesh, spec)"
        )
    if sharding.mesh.shape != mesh.shape or (
        isinstance(sharding.mesh, Mesh) and (sharding.mesh.devices != mesh.devices).any()
    ):
        raise ValueError(
            "param_shardings must be on the mesh of stack_sharding, with its devices in the same "
            f"sequence, {mesh}, got {sharding.mesh} at {path}; build both from one mesh"
        )
    if len(sharding.spec) > len(shape) or PartitionSpec.UNCONSTRAINED in sharding.spec:
        raise ValueError(
            "param_shardings must specify how a parameter's axes are sharded, got "
            f"{sharding.spec} at {path}, which has {len(shape)} axes; None gives no hint"
        )
    for length, axes in zip(shape, _spec_of(sharding, len(shape)), strict=True):
        if length % math.prod(mesh.shape[axis] for axis in axes):
            raise ValueError(
                "param_shardings must shard the axes of a parameter evenly, got "
                f"{sharding.spec} at {path}, which has the shape {shape}; None gives no hint"
            )
    return NamedSharding(mesh, sharding.spec)


def _spec_of(sharding: NamedSharding, ndim: int) -> AxesSpec:
    entries = [*sharding.spec, *[None] * (ndim - len(sharding.spec))]
    named = [entry if isinstance(entry, tuple) else (entry,) for entry in entries]
    lengths = {None: 1} | dict(sharding.mesh.shape)
    return tuple(tuple(axis for axis in axes if lengths[axis] > 1) for axes in named)
