"""SOAP leaf by leaf, as in a textbook: Algorithm 3 of Vyas et al. (2024), and nothing else.

Ports of the algorithm share this structure, and `soap_optax` is measured against it:

- every leaf has its own products, its own conditional and its own decompositions;
- the first moment stays in the parameters' coordinates and is projected in every step, eight
  products for a matrix instead of six;
- a refresh comes at the end of the step that makes it due.

Within that structure it wastes nothing. The second moment is permuted along with the columns. A
refresh that is not due costs nothing. The Rayleigh quotients reuse the product that the QR
decomposition needs. Options, guards and mixed precision are left out.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.lax import Precision
from jax.typing import ArrayLike


class LeafState(NamedTuple):
    """The state of one leaf; a vector has no factors and no bases."""

    factors: tuple[Array, ...]  # L, R: (d, d)
    bases: tuple[Array, ...]  # Q_L, Q_R: (d, d)
    mu: Array  # M, in the coordinates of the parameters
    nu: Array  # V, in the coordinates of the eigenbasis


class TextbookState(NamedTuple):
    """The state of `scale_by_textbook_soap`."""

    step: Array
    refreshes: Array  # of all bases at once, including the first bases
    leaves: tuple[LeafState, ...]


def scale_by_textbook_soap(
    b1: float = 0.95,
    b2: float = 0.95,
    eps: float = 1e-8,
    *,
    precondition_frequency: ArrayLike = 10,
) -> optax.GradientTransformation:
    """Rescales updates by SOAP. Leaves of two axes or more are preconditioned along all of them.

    Args:
      b1: decay of the first moment.
      b2: decay of the second moment and of the factors.
      eps: added to the root of the second moment, before bias correction.
      precondition_frequency: steps from one refresh to the next. It may be traced.
    """

    def init_fn(params: optax.Params) -> TextbookState:
        leaves = tuple(init_leaf(leaf) for leaf in jax.tree.leaves(params))
        return TextbookState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), leaves)

    def update_fn(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, TextbookState]:
        del params
        assert isinstance(state, TextbookState)
        grads, treedef = jax.tree.flatten(updates)
        due = state.step % precondition_frequency == 0
        step = partial(step_leaf, step=state.step, due=due, b1=b1, b2=b2, eps=eps)
        pairs = [step(grad, leaf) for grad, leaf in zip(grads, state.leaves, strict=True)]
        new_updates, leaves = zip(*pairs, strict=True)
        new_state = TextbookState(state.step + 1, state.refreshes + due, leaves)
        return jax.tree.unflatten(treedef, new_updates), new_state

    return optax.GradientTransformation(init_fn, update_fn)


def init_leaf(leaf: Array) -> LeafState:
    lengths = leaf.shape if leaf.ndim > 1 else ()
    return LeafState(
        factors=tuple(jnp.zeros((d, d), leaf.dtype) for d in lengths),
        bases=tuple(jnp.eye(d, dtype=leaf.dtype) for d in lengths),
        mu=jnp.zeros_like(leaf),
        nu=jnp.zeros_like(leaf),
    )


def step_leaf(
    grad: Array, state: LeafState, step: Array, due: Array, b1: float, b2: float, eps: float
) -> tuple[Array, LeafState]:
    """One step of one leaf; step 0 fills the factors, computes the first bases, returns zeros."""
    applied = step > 0
    rotated_grad = rotate(grad, state.bases)  # G' = Q_L^T G Q_R
    mu = jnp.where(applied, b1 * state.mu + (1 - b1) * grad, state.mu)  # M
    rotated_mu = rotate(mu, state.bases)  # M' = Q_L^T M Q_R
    nu = jnp.where(applied, b2 * state.nu + (1 - b2) * rotated_grad**2, state.nu)  # V
    count = jnp.maximum(step, 1).astype(grad.dtype)
    correction = jnp.sqrt(1 - b2**count) / (1 - b1**count)
    direction = rotated_mu / (jnp.sqrt(nu) + eps)  # N'
    update = rotate_back(direction * jnp.where(applied, correction, 0), state.bases)  # N
    factors = tuple(  # L, R
        b2 * factor + (1 - b2) * gram_matrix(grad, axis)
        for axis, factor in enumerate(state.factors)
    )
    bases = state.bases
    if bases:
        refresh = partial(lax.cond, applied, iterate_bases, first_bases)
        bases, nu = lax.cond(due, refresh, keep_bases, factors, bases, nu)
    return update, LeafState(factors, bases, mu, nu)


# Bases --------------------------------------------------------------------------------------------

Bases = tuple[Array, ...]


def keep_bases(factors: Bases, bases: Bases, nu: Array) -> tuple[Bases, Array]:
    del factors
    return bases, nu


def first_bases(factors: Bases, bases: Bases, nu: Array) -> tuple[Bases, Array]:
    """All eigenvectors, by descending eigenvalue."""
    del bases
    return tuple(jnp.linalg.eigh(factor)[1][:, ::-1] for factor in factors), nu


def iterate_bases(factors: Bases, bases: Bases, nu: Array) -> tuple[Bases, Array]:
    """Algorithm 4: one step of orthogonal iteration, columns sorted by Rayleigh quotients."""
    new_bases = []
    for axis, (factor, basis) in enumerate(zip(factors, bases, strict=True)):
        product = jnp.matmul(factor, basis, precision=Precision.HIGHEST)
        order = jnp.argsort(jnp.sum(basis * product, axis=0), descending=True)
        nu = jnp.take(nu, order, axis=axis)
        new_bases.append(jnp.linalg.qr(product[:, order])[0])
    return tuple(new_bases), nu


# Products -----------------------------------------------------------------------------------------


def rotate(x: Array, bases: Sequence[Array]) -> Array:
    """`Q_L^T x Q_R`; no change without bases."""
    for axis, basis in enumerate(bases):
        x = multiply_along(basis.T, x, axis)
    return x


def rotate_back(x: Array, bases: Sequence[Array]) -> Array:
    """`Q_L x Q_R^T`; no change without bases."""
    for axis, basis in enumerate(bases):
        x = multiply_along(basis, x, axis)
    return x


def multiply_along(matrix: Array, x: Array, axis: int) -> Array:
    """Multiplies every vector along an axis of `x` by a matrix, from the left."""
    if axis == 0:  # For a matrix `x` this is `matrix @ x`: no axis needs to move.
        return jnp.tensordot(matrix, x, axes=1)
    return jnp.moveaxis(jnp.tensordot(x, matrix, axes=(axis, 1)), -1, axis)


def gram_matrix(grad: Array, axis: int) -> Array:
    """`G G^T` for the first axis of a matrix, `G^T G` for the second, `(d, d)`."""
    others = [other for other in range(grad.ndim) if other != axis]
    return jnp.tensordot(grad, grad, axes=(others, others), precision=Precision.HIGHEST)
