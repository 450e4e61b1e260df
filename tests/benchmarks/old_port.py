"""SOAP with the two defects of an old public port, each of which can be switched on alone.

The port is SOAP_JAX 0.1, with which https://arxiv.org/abs/2502.00604 trained its networks.

1. *Frozen second moment.* A step that ends without a refresh returns the second moment from before
   the step. Its update still uses the new one.
2. *Counted first call.* The first call only fills the factors, but Adam's bias correction counts
   it. With decays of 0.95, the first update has 0.716 of its size.

Everything else is `soap_optax.scale_by_soap`. As in the port, a refresh comes at the end of every
call whose number is a multiple of the frequency.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

import soap_optax

NEVER = 2**30  # a refresh frequency


class OldPortState(NamedTuple):
    """The number of calls, and the state of `soap_optax.scale_by_soap`."""

    calls: Array
    soap: soap_optax.ScaleBySoapState


def scale_by_old_port(
    b1: ArrayLike = 0.95,
    b2: ArrayLike = 0.95,
    *,
    precondition_frequency: ArrayLike = 2,
    frozen_nu: bool = True,
    counted_first_call: bool = True,
    **options: Any,
) -> optax.GradientTransformation:
    """Rescales updates by SOAP with the chosen defects. Call its `update` inside `jax.jit`.

    Args:
      b1: decay of the first moment.
      b2: decay of the second moment and of the factors.
      precondition_frequency: steps from one refresh to the next. It may be traced.
      frozen_nu: whether the second moment moves only in calls that end with a refresh.
      counted_first_call: whether the bias correction counts the first call.
      options: other arguments of `soap_optax.scale_by_soap`.
    """

    def step(updates: Any, state: Any) -> tuple[Any, Any]:
        soap = soap_optax.scale_by_soap(
            b1, b2, precondition_frequency=NEVER, correct_bias=False, **options
        )
        return soap.update(updates, state)

    def refresh(updates: Any, state: Any, due: Array) -> Any:
        """A call that only refreshes: with decays of 1, moments and factors stay."""
        one = jnp.ones_like(jnp.asarray(b1))
        frequency = jnp.where(due, 1, NEVER)
        soap = soap_optax.scale_by_soap(
            one, one, precondition_frequency=frequency, correct_bias=False, **options
        )
        return soap.update(optax.tree_utils.tree_zeros_like(updates), state)[1]

    def init_fn(params: optax.Params) -> OldPortState:
        soap = soap_optax.scale_by_soap(correct_bias=False, **options)
        state: Any = soap.init(params)
        return OldPortState(jnp.zeros((), jnp.int32), state)

    def update_fn(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, OldPortState]:
        del params
        assert isinstance(state, OldPortState)
        calls = state.calls + 1
        due = calls % precondition_frequency == 0
        updates, soap = step(updates, state.soap)
        scale = bias_correction(calls if counted_first_call else calls - 1, b1, b2)
        updates = optax.tree_utils.tree_scale(scale, updates)
        if frozen_nu:
            soap = soap._replace(
                stacks=choose_nu(due, soap.stacks, state.soap.stacks),
                adam=choose_nu(due, soap.adam, state.soap.adam),
            )
        return updates, OldPortState(calls, refresh(updates, soap, due))

    return optax.GradientTransformation(init_fn, update_fn)


def bias_correction(count: Array, b1: ArrayLike, b2: ArrayLike) -> Array:
    """Adam's factor for both moments; the first update is zero in any case."""
    b1, b2 = jnp.asarray(b1), jnp.asarray(b2)
    number = jnp.maximum(count, 1).astype(b1.dtype)
    return jnp.sqrt(1 - b2**number) / (1 - b1**number)


def choose_nu(due: Array, new: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
    """New states, with the old second moments unless a refresh is due."""
    return {
        name: state._replace(nu=jnp.where(due, state.nu, old[name].nu))
        for name, state in new.items()
    }
