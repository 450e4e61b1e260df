"""How the optimizer's state is divided among the devices of a mesh, leaf by leaf."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from soap_optax.state import RavelledState, ScaleBySoapState


def state_shardings(state: Any, stack_sharding: NamedSharding) -> Any:
    """Gives the sharding of every leaf of an optimizer's state, for `jit` or to restore into.

    Stacks and ravelled moments are divided along their leading axis, as `stack_sharding` says.
    Counters that belong to no block are whole on every device, and so is what other transformations
    of a chain keep, unless `state` says how a leaf lies on the mesh: a momentum that is sharded
    like its parameter stays so.

    Example:
      >>> import jax, jax.numpy as jnp, soap_optax
      >>> from jax.sharding import NamedSharding, PartitionSpec
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

    Returns:
      The same tree with a `NamedSharding` in place of every leaf.
    """
    mesh = stack_sharding.mesh

    def divided(leaf: Any) -> NamedSharding:
        return _as_a_program_spells_it(stack_sharding, leaf)

    def whole(leaf: Any) -> NamedSharding:
        return _as_a_program_spells_it(NamedSharding(mesh, PartitionSpec()), leaf)

    def of_another(leaf: Any) -> NamedSharding:
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh == mesh:
            return sharding
        return whole(leaf)

    def of_ravelled(ravelled: RavelledState) -> RavelledState:
        moments = {"mu": divided(ravelled.mu), "nu": divided(ravelled.nu)}
        return jax.tree.map(whole, ravelled)._replace(**moments)

    def of_soap(soap_state: ScaleBySoapState) -> ScaleBySoapState:
        blocks = {
            "stacks": jax.tree.map(divided, soap_state.stacks),
            "ravelled": {name: of_ravelled(part) for name, part in soap_state.ravelled.items()},
        }
        return jax.tree.map(whole, soap_state._replace(stacks={}, ravelled={}))._replace(**blocks)

    return jax.tree.map(
        lambda node: of_soap(node) if _is_soap(node) else of_another(node), state, is_leaf=_is_soap
    )


def _as_a_program_spells_it(sharding: NamedSharding, leaf: Any) -> NamedSharding:
    """The same sharding: on explicit axes with an entry for each dimension, else without Nones.

    Another spelling would be another type to `jit`, and a second program.
    """
    given = sharding.spec
    missing = leaf.ndim - len(given) if sharding.mesh.explicit_axes else 0
    return NamedSharding(sharding.mesh, PartitionSpec(*given, *[None] * missing))


def place_state(
    make: Callable[[], ScaleBySoapState], stack_sharding: NamedSharding | None
) -> ScaleBySoapState:
    """Makes a state where it is to lie, so that no device ever holds the whole of it."""
    if stack_sharding is None:
        return make()
    shardings = state_shardings(jax.eval_shape(make), stack_sharding)
    return jax.jit(make, out_shardings=shardings)()


def shards_of(stack_sharding: NamedSharding) -> int:
    """In how many parts the leading axis is divided."""
    axes = stack_sharding.spec[0]
    names = axes if isinstance(axes, tuple) else (axes,)
    return math.prod(stack_sharding.mesh.shape[name] for name in names)


def _is_soap(node: Any) -> bool:
    return isinstance(node, ScaleBySoapState)
