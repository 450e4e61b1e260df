"""The sharding of every leaf of an optimizer's state."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import tree_leaves_with_path, tree_map_with_path

from soap_optax.devices.mesh import long_mesh_axes
from soap_optax.state import AdamState, PreconditionerState


def shardings_of_state(state: Any, stack_sharding: NamedSharding, params: Any = None) -> Any:
    """The sharding of every leaf of a state; see `soap_optax.state_shardings`."""
    known_params = dict(tree_leaves_with_path(params))

    def of_node(path: tuple[Any, ...], node: Any) -> Any:
        if _has_stacks(node):
            return _shardings_of_blocks(node, stack_sharding)
        return _other_sharding(path, node, stack_sharding.mesh, known_params)

    return tree_map_with_path(of_node, state, is_leaf=_has_stacks)


def create_state(
    make: Callable[[], PreconditionerState], stack_sharding: NamedSharding
) -> PreconditionerState:
    """Makes a state in its shards, so that no device ever holds all of it."""
    shardings = shardings_of_state(jax.eval_shape(make), stack_sharding)
    state = jax.jit(make, out_shardings=shardings)()
    if stack_sharding.mesh.explicit_axes:  # Inside `jit`, `out_shardings` has no effect on these.
        state = jax.tree.map(jax.sharding.reshard, state, shardings)
    return state


def _shardings_of_blocks(
    state: PreconditionerState, stack_sharding: NamedSharding
) -> PreconditionerState:
    """Stacks and vectors are sharded along axis 0; everything else is replicated."""
    mesh = stack_sharding.mesh
    along_axis_0 = NamedSharding(mesh, PartitionSpec(stack_sharding.spec[0]))

    def sharded(leaf: Any) -> NamedSharding:
        return _canonical(along_axis_0, leaf)

    def replicated(leaf: Any) -> NamedSharding:
        return _canonical(NamedSharding(mesh, PartitionSpec()), leaf)

    def of_adam(adam: AdamState) -> AdamState:
        moments = {"mu": sharded(adam.mu), "nu": sharded(adam.nu)}
        return jax.tree.map(replicated, adam)._replace(**moments)

    groups = {
        "stacks": jax.tree.map(sharded, state.stacks),
        "adam": {name: of_adam(part) for name, part in state.adam.items()},
    }
    return jax.tree.map(replicated, state._replace(stacks={}, adam={}))._replace(**groups)


def _other_sharding(
    path: tuple[Any, ...], leaf: Any, mesh: Any, params: dict[Any, Any]
) -> NamedSharding:
    """The sharding of a leaf of another transformation of the chain.

    It is the leaf's own sharding, if that is on the mesh. Otherwise it is the sharding of its
    parameter: the one of the same shape whose path is the end of the leaf's path. If neither is on
    the mesh, the leaf is replicated.
    """
    endings = [path[start:] for start in range(len(path) + 1)]
    mirrored = [params[end] for end in endings if end in params]
    equal = [param for param in mirrored if param.shape == leaf.shape]
    specs = [known.sharding.spec for known in [leaf, *equal] if _is_on(mesh, known)]
    if specs:
        return NamedSharding(mesh, specs[0])
    return _canonical(NamedSharding(mesh, PartitionSpec()), leaf)


def _canonical(sharding: NamedSharding, leaf: Any) -> NamedSharding:
    """The same sharding, with the spec that XLA's programs return.

    On explicit axes that spec has an entry for each dimension. On automatic axes it has neither
    trailing Nones nor mesh axes of length 1. `jit` would compile a second program for another spec.
    """
    mesh, given = sharding.mesh, sharding.spec
    if mesh.explicit_axes:
        return NamedSharding(mesh, PartitionSpec(*given, *[None] * (leaf.ndim - len(given))))
    if not given:
        return sharding
    [first, *others] = long_mesh_axes(sharding)
    return NamedSharding(mesh, PartitionSpec((first, *others) if others else first))


def _is_on(mesh: Any, leaf: Any) -> bool:
    """Whether a leaf has a sharding on this mesh, or on an abstract mesh of the same shape."""
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.shape != mesh.shape:
        return False
    # An abstract leaf has no sharding over automatic axes.
    return isinstance(sharding.mesh, Mesh) or bool(sharding.mesh.explicit_axes)


def _has_stacks(node: Any) -> bool:
    return isinstance(node, PreconditionerState)
