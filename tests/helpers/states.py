"""States with bases and factors from a test."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import soap_optax
from soap_optax.linalg import triangle


def put_bases(state: Any, bases: Sequence[np.ndarray]) -> Any:
    """Puts bases, one for each preconditioned axis, into the one stack of an optimizer's state."""

    def put(soap_state: soap_optax.ScaleBySoapState) -> soap_optax.ScaleBySoapState:
        ((name, stack),) = soap_state.stacks.items()
        stack = stack._replace(
            bases=tuple(
                jnp.asarray(basis, old.dtype)[None]
                for basis, old in zip(bases, stack.bases, strict=True)
            ),
            refreshes=jnp.ones_like(stack.refreshes),  # At 0 the next call computes a first basis.
        )
        return soap_state._replace(stacks={name: stack})

    return map_soap_state(put, state)


def map_soap_state(function: Callable[[Any], Any], state: Any) -> Any:
    """Applies a function to every state with stacks inside an optimizer's state."""

    def is_soap_state(node: Any) -> bool:
        return isinstance(node, soap_optax.ScaleBySoapState | soap_optax.ScaleByShampooState)

    return jax.tree.map(
        lambda node: function(node) if is_soap_state(node) else node, state, is_leaf=is_soap_state
    )


def full_rank_factor(length: int) -> np.ndarray:
    """A first factor without a null space and without equal eigenvalues."""
    return np.diag(np.linspace(1.0, 2.0, length))


def put_full_rank_factors(state: Any) -> Any:
    """Puts `full_rank_factor` into every stack of an optimizer's state."""

    def fill(factor: jax.Array, basis: jax.Array) -> jax.Array:
        full = jnp.asarray(full_rank_factor(basis.shape[-1]), factor.dtype)
        stored = full if factor.shape == basis.shape else triangle.fold(full)
        return jnp.broadcast_to(stored, factor.shape)

    def put(soap_state: Any) -> Any:
        stacks = {
            name: stack._replace(
                factors=tuple(map(fill, stack.factors, stack.bases or stack.roots))
            )
            for name, stack in soap_state.stacks.items()
        }
        return soap_state._replace(stacks=stacks)

    return map_soap_state(put, state)
