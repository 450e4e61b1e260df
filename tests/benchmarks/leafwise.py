"""SOAP leaf by leaf in the manner of the pull requests to public optimizer libraries.

It differs from `textbook.py` in what these ports have in common, and what costs them time:

- the first call and all others are two branches of one conditional around the whole step;
- the first moment is projected anew in every step;
- one conditional refreshes the bases of all leaves, one decomposition after another;
- the Rayleigh quotients, by which the columns are sorted, are separate products.

Vectors get Adam. The equations, and the results of a step, are those of the textbook.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.lax import Precision
from jax.typing import ArrayLike
from textbook import gram_matrix, rotate, rotate_back


class LeafwiseState(NamedTuple):
    """Trees in the structure of the parameters; vectors have no factors and no bases."""

    calls: Array
    mu: list[Array]  # in the coordinates of the parameters
    nu: list[Array]  # in the coordinates of the eigenbasis
    factors: list[tuple[Array, ...]]
    bases: list[tuple[Array, ...]]


def scale_by_leafwise_soap(
    b1: ArrayLike = 0.95,
    b2: ArrayLike = 0.95,
    eps: float = 1e-8,
    *,
    precondition_frequency: ArrayLike = 10,
) -> optax.GradientTransformation:
    """Rescales updates by SOAP. All arguments but `eps` may be traced."""

    def init_fn(params: optax.Params) -> LeafwiseState:
        leaves = jax.tree.leaves(params)
        factors = [
            tuple(jnp.zeros((d, d), leaf.dtype) for d in leaf.shape if leaf.ndim > 1)
            for leaf in leaves
        ]
        zeros = [jnp.zeros_like(leaf) for leaf in leaves]
        return LeafwiseState(jnp.zeros((), jnp.int32), zeros, zeros, factors, factors)

    def first_step(grads: list[Array], state: LeafwiseState) -> tuple[list[Array], LeafwiseState]:
        factors = average_factors(grads, state.factors, b2)
        bases = [tuple(map(eigenvectors, leaf)) for leaf in factors]
        zeros = [jnp.zeros_like(grad) for grad in grads]
        return zeros, state._replace(factors=factors, bases=bases)

    def step(grads: list[Array], state: LeafwiseState) -> tuple[list[Array], LeafwiseState]:
        rotated = [rotate(g, q) for g, q in zip(grads, state.bases, strict=True)]
        mu = [b1 * m + (1 - b1) * g for m, g in zip(state.mu, grads, strict=True)]
        nu = [b2 * v + (1 - b2) * g**2 for v, g in zip(state.nu, rotated, strict=True)]
        rotated_mu = [rotate(jnp.asarray(m), q) for m, q in zip(mu, state.bases, strict=True)]
        count = state.calls.astype(grads[0].dtype)
        correction = jnp.sqrt(1 - b2**count) / (1 - b1**count)
        updates = [
            rotate_back(jnp.asarray(correction * m / (jnp.sqrt(v) + eps)), q)
            for m, v, q in zip(rotated_mu, nu, state.bases, strict=True)
        ]
        factors = average_factors(grads, state.factors, b2)
        bases, nu = lax.cond(
            state.calls % precondition_frequency == 0,
            refresh_all,
            lambda _factors, bases, nu: (bases, nu),
            *(factors, state.bases, nu),
        )
        return updates, state._replace(mu=mu, nu=nu, factors=factors, bases=bases)

    def update_fn(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, LeafwiseState]:
        del params
        assert isinstance(state, LeafwiseState)
        grads, treedef = jax.tree.flatten(updates)
        results, new = lax.cond(state.calls == 0, first_step, step, grads, state)
        return jax.tree.unflatten(treedef, results), new._replace(calls=state.calls + 1)

    return optax.GradientTransformation(init_fn, update_fn)


def average_factors(grads: list[Array], factors: Any, b2: ArrayLike) -> Any:
    return [
        tuple(b2 * old + (1 - b2) * gram_matrix(g, axis) for axis, old in enumerate(leaf))
        for g, leaf in zip(grads, factors, strict=True)
    ]


def eigenvectors(factor: Array) -> Array:
    """All eigenvectors, by descending eigenvalue."""
    return jnp.linalg.eigh(factor)[1][:, ::-1]


def refresh_all(factors: Any, bases: Any, nu: list[Array]) -> tuple[Any, list[Array]]:
    results = [refresh(*leaf) for leaf in zip(factors, bases, nu, strict=True)]
    return [bases for bases, _ in results], [nu for _, nu in results]


def refresh(
    factors: tuple[Array, ...], bases: tuple[Array, ...], nu: Array
) -> tuple[tuple[Array, ...], Array]:
    """One step of orthogonal iteration for one leaf."""
    new = []
    for axis, (factor, basis) in enumerate(zip(factors, bases, strict=True)):
        product = jnp.matmul(basis.T, factor, precision=Precision.HIGHEST)
        quotients = jnp.diag(jnp.matmul(product, basis, precision=Precision.HIGHEST))
        order = jnp.argsort(quotients, descending=True)
        nu = jnp.take(nu, order, axis=axis)
        power = jnp.matmul(factor, basis[:, order], precision=Precision.HIGHEST)
        new.append(jnp.linalg.qr(power)[0])
    return tuple(new), nu
