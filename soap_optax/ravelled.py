"""The leaves with no preconditioned axis, stepped together as one vector."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from soap_optax import block, exchange, layout, placement
from soap_optax.block import Hyperparameters
from soap_optax.places import Places
from soap_optax.planning import Group, Plan
from soap_optax.state import RavelledState


def update(
    grads: Sequence[Array],
    state: RavelledState,
    plan: Plan,
    group: Group,
    hyper: Hyperparameters,
    places: Places | None,
) -> tuple[list[Array], RavelledState]:
    """Takes the gradients of leaves without a preconditioned axis and gives their updates: Adam.

    The moments of all of them are one vector, while each leaf is accepted, refused and scaled by
    itself.

    Args:
      grads: the leaves stacked by shape, `(k, *leaf)`, in the dtype of the statistics.
      state: the state of all of them.
      plan: the plan of the tree.
      group: the leaves and their padding.
      hyper: the numbers of the step.
      places: where the vector and the leaves lie; None if they are not divided.

    Returns:
      The updates, in the shapes of `grads`, and the new state.
    """
    sharding = None if places is None else places.sharding
    acceptable = jax.vmap(partial(block.is_acceptable, stored=[state.mu.dtype]))
    accepted = jnp.concatenate([acceptable(grad) for grad in grads])
    applied = accepted & (state.accepted_gradients > 0)
    leaves = layout.consecutive_slices([len(grad) for grad in grads])

    def spread(per_leaf: Array) -> Array:
        """Repeats each leaf's value for all of its entries, `(N,)`; zero for the padding."""
        parts = [
            jnp.broadcast_to(per_leaf[leaf, None], (len(grad), grad[0].size)).ravel()
            for grad, leaf in zip(grads, leaves, strict=True)
        ]
        return exchange.divide_vector(jnp.concatenate(parts), group, sharding)

    correction = jax.vmap(partial(block.bias_correction, hyper=hyper))(state.accepted_gradients)
    vector = exchange.ravel(grads, plan, group, places)
    mu, nu = block.average_moments(state.mu, state.nu, vector, spread(applied), hyper)
    assert isinstance(nu, Array)
    # The division comes last: XLA would repeat cheaper work in the slice for every single leaf.
    scaled = mu * spread(jnp.where(applied, correction, 0))
    direction = block.adam_direction(scaled, nu, hyper)
    updates = exchange.unravel(direction, [grad.shape for grad in grads], plan, group, places)
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
