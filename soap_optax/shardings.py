"""How the optimizer's state is divided among the devices of a mesh, leaf by leaf."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import tree_leaves_with_path, tree_map_with_path

from soap_optax import arguments, placement
from soap_optax.state import RavelledState, ScaleBySoapState


def state_shardings(state: Any, stack_sharding: NamedSharding, params: Any = None) -> Any:
    """Gives the sharding of every leaf of an optimizer's state, for `jit` or to restore into.

    Stacks and ravelled moments are divided along their leading axis, as `stack_sharding` says.
    Counters that belong to no block are whole on every device. What other transformations of a
    chain keep lies as `state` says, if its leaves lie on the mesh; or else as the parameter of
    which they keep it, such as the moments of AdamW; or else whole on every device.

    Example:
      >>> import jax, jax.numpy as jnp, soap_optax
      >>> from jax.sharding import Mesh, NamedSharding, PartitionSpec
      >>> mesh = jax.make_mesh((1,), ("data",))
      >>> sharding = NamedSharding(mesh, PartitionSpec("data"))
      >>> optimizer = soap_optax.soap(3e-3, stack_sharding=sharding)
      >>> state = jax.eval_shape(optimizer.init, {"kernel": jnp.ones((4, 3))})
      >>> shardings = soap_optax.state_shardings(state, sharding)
      >>> shardings[0].stacks["4x3"].mu.spec[0]
      'data'

    Args:
      state: the state of any Optax transformation, as arrays or as what `jax.eval_shape` makes of
        its `init`.
      stack_sharding: the argument of `soap`.
      params: None, or the parameters, as arrays or as shapes with shardings. A leaf belongs to the
        parameter that has its shape, and whose path its own ends with.

    Returns:
      The same tree with a `NamedSharding` in place of every leaf.

    Raises:
      TypeError, ValueError: where `stack_sharding` is none that `soap` takes.
    """
    arguments.check_stack_sharding(stack_sharding, is_optional=False)
    mesh = stack_sharding.mesh
    stack_sharding = NamedSharding(mesh, PartitionSpec(stack_sharding.spec[0]))

    def divided(leaf: Any) -> NamedSharding:
        return _as_a_program_spells_it(stack_sharding, leaf)

    def whole(leaf: Any) -> NamedSharding:
        return _as_a_program_spells_it(NamedSharding(mesh, PartitionSpec()), leaf)

    known_params = dict(tree_leaves_with_path(params))

    def of_another(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        endings = [path[start:] for start in range(len(path) + 1)]
        mirrored = [known_params[end] for end in endings if end in known_params]
        alike = [param for param in mirrored if param.shape == leaf.shape]
        specs = [known.sharding.spec for known in [leaf, *alike] if _lies_on(mesh, known)]
        return NamedSharding(mesh, specs[0]) if specs else whole(leaf)

    def of_ravelled(ravelled: RavelledState) -> RavelledState:
        moments = {"mu": divided(ravelled.mu), "nu": divided(ravelled.nu)}
        return jax.tree.map(whole, ravelled)._replace(**moments)

    def of_soap(soap_state: ScaleBySoapState) -> ScaleBySoapState:
        blocks = {
            "stacks": jax.tree.map(divided, soap_state.stacks),
            "ravelled": {name: of_ravelled(part) for name, part in soap_state.ravelled.items()},
        }
        return jax.tree.map(whole, soap_state._replace(stacks={}, ravelled={}))._replace(**blocks)

    return tree_map_with_path(
        lambda path, node: of_soap(node) if _is_soap(node) else of_another(path, node),
        state,
        is_leaf=_is_soap,
    )


def _as_a_program_spells_it(sharding: NamedSharding, leaf: Any) -> NamedSharding:
    """The same sharding: on explicit axes with an entry for each dimension.

    On others without Nones, and without axes of length 1. Another spelling would be another type to
    `jit`, and a second program.
    """
    mesh, given = sharding.mesh, sharding.spec
    if mesh.explicit_axes:
        return NamedSharding(mesh, PartitionSpec(*given, *[None] * (leaf.ndim - len(given))))
    if not given:
        return sharding
    [first, *others] = placement.long_axes_of(sharding)
    return NamedSharding(mesh, PartitionSpec((first, *others) if others else first))


def place_state(
    make: Callable[[], ScaleBySoapState], stack_sharding: NamedSharding | None
) -> ScaleBySoapState:
    """Makes a state where it is to lie, so that no device ever holds the whole of it."""
    if stack_sharding is None:
        return make()
    shardings = state_shardings(jax.eval_shape(make), stack_sharding)
    state = jax.jit(make, out_shardings=shardings)()
    if stack_sharding.mesh.explicit_axes:  # There `out_shardings` counts for nothing inside `jit`.
        state = jax.tree.map(jax.sharding.reshard, state, shardings)
    return state


def _lies_on(mesh: Any, leaf: Any) -> bool:
    """Whether a leaf says where it lies on this mesh, or on an abstract one that stands for it."""
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.shape != mesh.shape:
        return False
    # Of automatic axes an abstract leaf knows nothing.
    return isinstance(sharding.mesh, Mesh) or bool(sharding.mesh.explicit_axes)


def _is_soap(node: Any) -> bool:
    return isinstance(node, ScaleBySoapState)
