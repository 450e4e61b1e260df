"""The factored second moment: exact where squared gradients have rank one, and only there."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import states
from helpers.cases import mostly_long

import soap_optax
from soap_optax.algorithm import second_moment

Shape = tuple[int, ...]
SHAPES: list[Shape] = [(6, 4), (3, 4, 5), (2, 3, 2, 4), (5,), (1, 7)]
B2 = 0.95  # The default.

# Float32 rounds by 6e-8 in each of some ten operations; a square root halves it.
ROUNDING = 1e-6


def outer(vectors: Sequence[np.ndarray]) -> np.ndarray:
    """The outer product of the vectors, `(*block)`."""
    product = np.ones(())
    for vector in vectors:
        product = np.multiply.outer(product, vector)
    return product


def gradients_with_squares_of_rank_one(shape: Shape, calls: int = 6) -> np.ndarray:
    """Gradients with random signs, whose sizes are an outer product of vectors."""
    rng = np.random.default_rng(0)
    sizes = outer([np.exp(rng.normal(size=d)) for d in shape])
    signs = rng.choice([-1.0, 1.0], size=(calls, *shape))
    lengths = rng.uniform(0.5, 2, size=(calls, *[1] * len(shape)))
    return (signs * sizes * lengths).astype(np.float32)


def run(grads: np.ndarray, **options: Any) -> tuple[np.ndarray, Any]:
    """Updates and the stack after them, with the identity as basis throughout.

    The rotated gradient then equals the gradient, and the rank of its squares is known.
    """
    optimizer = soap_optax.scale_by_soap(
        precondition_frequency=1000, precondition_1d=True, **options
    )
    state: Any = optimizer.init(jnp.asarray(grads[0]))
    ((_, stack),) = state.stacks.items()
    state = states.put_bases(state, [np.eye(basis.shape[-1]) for basis in stack.bases])
    step, updates = jax.jit(optimizer.update), []
    for grad in grads:
        update, state = step(jnp.asarray(grad), state)
        updates.append(np.asarray(update))
    ((_, stack),) = state.stacks.items()
    assert stack.refreshes.tolist() == [1]
    return np.stack(updates), stack


@pytest.mark.parametrize("shape", mostly_long(SHAPES, [(3, 4, 5)]), ids=str)
def test_factored_is_the_dense_second_moment_where_squares_have_rank_one(shape: Shape) -> None:
    grads = gradients_with_squares_of_rank_one(shape)
    updates, stack = run(grads, factored=True)
    wanted, dense = run(grads)
    assert [nu.shape for nu in stack.nu] == [(1, d) for d in shape]
    estimate = second_moment.estimate(tuple(nu[0] for nu in stack.nu))
    np.testing.assert_allclose(estimate, dense.nu[0], rtol=ROUNDING)
    np.testing.assert_allclose(updates, wanted, rtol=0, atol=10 * ROUNDING)


@pytest.mark.long
def test_factored_is_another_second_moment_where_squares_have_full_rank() -> None:
    grads = np.random.default_rng(1).normal(size=(6, 6, 4)).astype(np.float32)
    updates, stack = run(grads, factored=True)
    wanted, dense = run(grads)
    assert np.abs(updates - wanted).max() > 0.1
    # The marginals are the means of the dense second moment over the other axis.
    for axis, nu in enumerate(stack.nu):
        np.testing.assert_allclose(nu[0], dense.nu[0].mean(1 - axis), rtol=ROUNDING)
    estimate = second_moment.estimate(tuple(nu[0] for nu in stack.nu))
    for axis, nu in enumerate(stack.nu):
        np.testing.assert_allclose(estimate.mean(1 - axis), nu[0], rtol=ROUNDING)


def test_marginals_follow_their_columns_through_a_refresh() -> None:
    """The unit vectors are the eigenvectors, by ascending eigenvalue. A refresh reverses them."""
    lengths = (6, 4)
    optimizer = soap_optax.scale_by_soap(precondition_frequency=1, factored=True)
    state: Any = optimizer.init(jnp.zeros(lengths))
    nu = [np.arange(1, d + 1, dtype=np.float32) for d in lengths]
    state = states.put_bases(state, [np.eye(d) for d in lengths])
    stack = state.stacks["6x4"]._replace(
        factors=tuple(jnp.diag(jnp.arange(1.0, d + 1))[None] for d in lengths),
        nu=tuple(jnp.asarray(marginal)[None] for marginal in nu),
        accepted_gradients=jnp.array([5]),
        age=jnp.array([1]),
    )
    _, after = jax.jit(optimizer.update)(jnp.zeros(lengths), state._replace(stacks={"6x4": stack}))
    assert after.stacks["6x4"].refreshes.tolist() == [2]
    for found, marginal in zip(after.stacks["6x4"].nu, nu, strict=True):
        # The zero gradient decays the marginals once.
        np.testing.assert_allclose(found[0], B2 * marginal[::-1], rtol=ROUNDING)


@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-30, 1.0, 1e30])
@pytest.mark.parametrize("shape", [(6, 4), (3, 4, 5)], ids=str)
def test_estimate_keeps_the_scale_of_its_marginals(shape: Shape, size: float) -> None:
    """A float32 holds the estimate of three marginals of 1e-30, but not their product."""
    rng = np.random.default_rng(2)
    dense = outer([rng.uniform(0.5, 2, size=d) for d in shape])
    marginals = second_moment.marginals(jnp.asarray(dense, jnp.float32))
    estimate = np.asarray(second_moment.estimate(tuple(jnp.float32(size) * m for m in marginals)))
    assert np.isfinite(estimate).all()
    if size >= np.finfo(np.float32).tiny:
        # Below the smallest normal number, a mean has few bits left, or is flushed to zero.
        np.testing.assert_allclose(estimate, size * dense, rtol=ROUNDING)


def test_nothing_is_estimated_of_nothing() -> None:
    zeros = tuple(jnp.zeros(d) for d in (3, 4))
    np.testing.assert_array_equal(second_moment.estimate(zeros), np.zeros((3, 4)))


def test_leaves_without_a_preconditioner_store_a_second_moment_for_every_entry() -> None:
    params = {"bias": jnp.zeros(5), "embedding": jnp.zeros((9, 8))}
    optimizer = soap_optax.scale_by_soap(factored=True, max_precond_dim=4)
    state: Any = optimizer.init(params)
    assert not state.stacks
    assert state.adam["float32"].nu.shape == (5 + 9 * 8,)
