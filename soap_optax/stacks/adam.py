"""Adam for leaves without a preconditioner, updated together as one vector."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from soap_optax import algorithm
from soap_optax.algorithm import Hyperparameters
from soap_optax.blocks import Group, consecutive_slices
from soap_optax.devices import Layout
from soap_optax.stacks.varying import vary_like
from soap_optax.state import AdamState


def update_adam(
    grads: Sequence[Array],
    state: AdamState,
    group: Group,
    hyper: Hyperparameters,
    layout: Layout,
) -> tuple[list[Array], AdamState]:
    """Updates the leaves of a bucket, or one large leaf, by Adam, and returns their updates.

    The moments of all leaves are one vector. Each leaf's gradient is accepted or rejected, and its
    update scaled, independently of the others.

    Args:
      grads: the gradients stacked by shape, `(k, *leaf)`, in the dtype of the statistics.
      state: the state of the leaves.
      group: the leaves and their padding.
      hyper: the numbers of the step.
      layout: the devices.

    Returns:
      The updates, in the shapes of `grads`, and the new state.
    """
    state = vary_like(state, (grads, hyper))
    acceptable = jax.vmap(partial(algorithm.is_acceptable, stored=[state.mu.dtype]))
    accepted = jnp.concatenate([acceptable(grad) for grad in grads])
    numbers = algorithm.update_number(state.accepted_gradients, hyper)
    applied = accepted & (numbers > 0)
    leaves = consecutive_slices([len(grad) for grad in grads])

    def spread(per_leaf: Array) -> Array:
        """Repeats each leaf's value for all of its entries, `(entries,)`; zero for the padding."""
        repeated = [
            jnp.broadcast_to(per_leaf[leaf, None], (len(grad), grad[0].size)).ravel()
            for grad, leaf in zip(grads, leaves, strict=True)
        ]
        return layout.pad_vector(jnp.concatenate(repeated), group)

    correction = jax.vmap(partial(algorithm.bias_correction, hyper=hyper))(numbers)
    vector = layout.to_vector(grads, group)
    mu, nu = algorithm.average_moments(state.mu, state.nu, vector, spread(applied), hyper)
    assert isinstance(nu, Array)
    # The division comes last: XLA would repeat cheaper work in the slice of every leaf.
    scaled = mu * spread(jnp.where(applied, correction, 0))
    direction = algorithm.adam_direction(scaled, nu, hyper)
    updates = layout.from_vector(direction, [grad.shape for grad in grads], group)
    if hyper.normalize_grads:
        unit = jax.vmap(
            lambda update, scale: update * scale * algorithm.normalization(update, hyper)
        )
        updates = [
            unit(update, correction[leaf]) for update, leaf in zip(updates, leaves, strict=True)
        ]
    return updates, AdamState(
        accepted_gradients=layout.replicate(state.accepted_gradients + accepted.astype(jnp.int32)),
        rejected_gradients=layout.replicate(
            state.rejected_gradients + (~accepted).astype(jnp.int32)
        ),
        mu=mu.astype(state.mu.dtype),
        nu=nu,
    )
