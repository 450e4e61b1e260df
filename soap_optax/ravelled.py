"""The leaves with no preconditioned axis, stepped together as one vector."""

from collections.abc import Sequence
from functools import partial
from itertools import accumulate

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding

from soap_optax import block, placement
from soap_optax.block import Hyperparameters
from soap_optax.planning import Group
from soap_optax.state import RavelledState


def update(
    grads: Sequence[Array],
    state: RavelledState,
    group: Group,
    hyper: Hyperparameters,
    sharding: NamedSharding | None,
) -> tuple[list[Array], RavelledState]:
    """Takes the gradients of leaves without a preconditioned axis and gives their updates: Adam.

    The moments of all of them are one vector, while each leaf is accepted, refused and scaled by
    itself.

    Args:
      grads: the leaves stacked by shape, `(k, *leaf)`, in the dtype of the statistics.
      state: the state of all of them.
      group: the leaves and their padding.
      hyper: the numbers of the step.
      sharding: how the vector is divided among devices; None if it is not.

    Returns:
      The updates, in the shapes of `grads`, and the new state.
    """
    acceptable = jax.vmap(partial(block.is_acceptable, stored=[state.mu.dtype]))
    accepted = jnp.concatenate([acceptable(grad) for grad in grads])
    applied = accepted & (state.accepted_gradients > 0)
    leaves = _consecutive_slices([len(grad) for grad in grads])
    entries = _consecutive_slices([grad.size for grad in grads])

    def spread(per_leaf: Array) -> Array:
        """Repeats each leaf's value for all of its entries, `(N,)`; zero for the padding."""
        parts = [
            jnp.broadcast_to(per_leaf[leaf, None], (len(grad), grad[0].size)).ravel()
            for grad, leaf in zip(grads, leaves, strict=True)
        ]
        return pad(jnp.concatenate(parts))

    def pad(vector: Array) -> Array:
        if group.padding:
            vector = jnp.concatenate([vector, jnp.zeros(group.padding, vector.dtype)])
        return placement.divide(vector, sharding)

    correction = jax.vmap(partial(block.bias_correction, hyper=hyper))(state.accepted_gradients)
    vector = pad(jnp.concatenate([grad.ravel() for grad in grads]))
    mu, nu = block.average_moments(state.mu, state.nu, vector, spread(applied), hyper)
    assert isinstance(nu, Array)
    # The division comes last: XLA would repeat cheaper work in the slice for every single leaf.
    scaled = mu * spread(jnp.where(applied, correction, 0))
    direction = block.adam_direction(scaled, nu, hyper)
    if sharding is not None:
        direction = placement.join_axis(direction, 0, sharding)
    updates = [
        direction[entry].reshape(grad.shape) for grad, entry in zip(grads, entries, strict=True)
    ]
    if hyper.normalize_grads:
        unit = jax.vmap(lambda update, scale: update * scale * block.normalization(update, hyper))
        updates = [
            unit(update, correction[leaf]) for update, leaf in zip(updates, leaves, strict=True)
        ]
    return updates, RavelledState(
        accepted_gradients=placement.replicate(state.accepted_gradients + accepted, sharding),
        refused_gradients=placement.replicate(state.refused_gradients + ~accepted, sharding),
        mu=mu.astype(state.mu.dtype),
        nu=nu,
    )


def _consecutive_slices(lengths: Sequence[int]) -> list[slice]:
    ends = list(accumulate(lengths))
    return [slice(end - length, end) for length, end in zip(lengths, ends, strict=True)]
