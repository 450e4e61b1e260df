"""The shardings of an optimizer's state, for `jit` and for checkpoints."""

from typing import Any

from jax.sharding import NamedSharding

from soap_optax import devices, value_checks


def state_shardings(state: Any, stack_sharding: NamedSharding, params: Any = None) -> Any:
    """Returns the sharding of every leaf of an optimizer's state, for `jit` or for a restore.

    Stacks, and the moments of parameters without a preconditioner, are sharded along axis 0 by
    `stack_sharding`. Counters that belong to no block are replicated. A leaf of another
    transformation of the chain keeps its own sharding, if it is on the mesh. Otherwise it gets the
    sharding of its parameter, as the moments of AdamW do. Otherwise it is replicated.

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
      state: the state of any Optax transformation, as arrays or as shapes, such as `jax.eval_shape`
        returns for its `init`.
      stack_sharding: the argument of `soap`.
      params: None, or the parameters, as arrays or as shapes with shardings. A leaf belongs to the
        parameter of the same shape whose path is the end of the leaf's path.

    Returns:
      The same tree with a `NamedSharding` in place of every leaf.

    Raises:
      TypeError, ValueError: if `soap` would not take this `stack_sharding`.
    """
    value_checks.check_stack_sharding("stack_sharding", stack_sharding, is_optional=False)
    return devices.shardings_of_state(state, stack_sharding, params)
