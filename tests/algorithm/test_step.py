"""One step: the sizes of updates, the changes of the state, and Adam for other leaves."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.one_matrix import B1, B2, EPS, NAME, SHAPE, State, gradients, init, run, step_of
from jax.typing import ArrayLike

import soap_optax
from soap_optax.algorithm import step


def adam_by_the_authors(grads: np.ndarray, b1: float, b2: float, eps: float) -> np.ndarray:
    """Adam that adds `eps` to the uncorrected root and ignores the first gradient."""
    mu = nu = np.zeros(grads.shape[1:])
    updates = [np.zeros(grads.shape[1:])]
    for t, grad in enumerate(grads[1:].astype(np.float64), start=1):
        mu = b1 * mu + (1 - b1) * grad
        nu = b2 * nu + (1 - b2) * grad**2
        updates.append(mu / (np.sqrt(nu) + eps) * np.sqrt(1 - b2**t) / (1 - b1**t))
    return np.stack(updates)


def plain_leaves(count: int) -> list[dict[str, np.ndarray]]:
    """Gradients of leaves without a preconditioner when `max_precond_dim` is 3."""
    rng = np.random.default_rng(2)
    shapes = {"both_too_long": SHAPE, "ones": (1, 4, 1), "scalar": (), "vector": (3,)}
    return [
        {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        for _ in range(count)
    ]


@pytest.mark.parametrize("eps", [1e-8, 0.1])
def test_adam_by_the_authors_is_recovered_when_no_axis_is_preconditioned(eps: float) -> None:
    b1, b2 = 0.9, 0.99
    found, grads = _updates_of_plain_leaves(b1, b2, eps), plain_leaves(8)
    for name in grads[0]:
        wanted = adam_by_the_authors(np.stack([grad[name] for grad in grads]), b1, b2, eps)
        # In float32, 1 - 0.99 has a relative error of 6e-6, and so has 1 - 0.99^t.
        np.testing.assert_allclose(found[name], wanted, rtol=0, atol=2e-5)


@pytest.mark.usefixtures("implicit_promotion")
def test_optax_adam_is_recovered_one_call_later_when_eps_is_negligible() -> None:
    b1, b2, eps = 0.9, 0.99, 1e-30
    found, grads = _updates_of_plain_leaves(b1, b2, eps), plain_leaves(8)
    adam = optax.scale_by_adam(b1, b2, eps)
    update, state = jax.jit(adam.update), adam.init(grads[0])
    for name in grads[0]:
        assert not found[name][0].any()
    for call, grad in enumerate(grads[1:], start=1):
        wanted, state = update(grad, state)
        for name in grad:
            np.testing.assert_allclose(found[name][call], wanted[name], rtol=0, atol=2e-5)


def _updates_of_plain_leaves(b1: float, b2: float, eps: float) -> dict[str, np.ndarray]:
    grads = plain_leaves(8)
    state: State = soap_optax.scale_by_soap(max_precond_dim=3).init(grads[0])
    assert not state.stacks
    updates = []
    for grad in grads:
        update, state = _plain_step()(grad, state, b1, b2, eps)
        updates.append(update)
    return jax.tree.map(lambda *leaves: np.stack(leaves), *updates)


@functools.cache
def _plain_step() -> Callable[..., Any]:
    @jax.jit
    def step(grads: Any, state: State, b1: ArrayLike, b2: ArrayLike, eps: ArrayLike) -> Any:
        return soap_optax.scale_by_soap(b1, b2, eps, max_precond_dim=3).update(grads, state)

    return step


@pytest.mark.long
def test_large_leaves_without_a_preconditioner_have_vectors_of_their_own_and_are_adam() -> None:
    rng = np.random.default_rng(4)
    shapes = {"a": (300, 300), "b": (300, 300), "c": (3,), "d": (256, 257)}
    grads = [
        {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        for _ in range(3)
    ]
    optimizer = soap_optax.scale_by_soap(max_precond_dim=200)
    updates: Any = None
    state: Any = optimizer.init(grads[0])
    assert sorted(state.adam) == ["256x257", "300x300", "300x300_2", "float32"]
    assert state.adam["300x300_2"].mu.shape == (300 * 300,)
    for grad in grads:
        updates, state = optimizer.update(grad, state)
    for name in shapes:
        # The first gradient is not applied, the other two are. Float32 rounds each by some 1e-7.
        first, second = grads[1][name], grads[2][name]
        mu = B1 * (1 - B1) * first + (1 - B1) * second
        nu = B2 * (1 - B2) * first**2 + (1 - B2) * second**2
        wanted = mu / (np.sqrt(nu) + EPS) * math.sqrt(1 - B2**2) / (1 - B1**2)
        np.testing.assert_allclose(updates[name], wanted, rtol=1e-5, atol=1e-6)
    assert float(state.adam["256x257"].nu[5]) == pytest.approx(
        float((B2 * (1 - B2) * grads[1]["d"] ** 2 + (1 - B2) * grads[2]["d"] ** 2).ravel()[5])
    )


def test_first_applied_update_has_full_size() -> None:
    grads = gradients(2)
    (zero, update), state = run(grads, init(), 10)
    assert not zero.any()
    bases = [q[0] for q in state.stacks[NAME].bases]
    # Adam's first update is one unit along every coordinate, here of the eigenbasis. A coordinate
    # below 1e-4 would show eps. These gradients have none.
    assert np.abs(step.rotate(jnp.asarray(grads[1]), bases, (0, 1))).min() > 1e-4
    rotated_update = step.rotate(jnp.asarray(update), bases, (0, 1))
    signs = np.sign(step.rotate(jnp.asarray(grads[1]), bases, (0, 1)))
    # eps is 1e-8, and the root at least sqrt(0.05) * 1e-4.
    np.testing.assert_allclose(rotated_update, signs, rtol=0, atol=1e-3)


def test_both_moments_and_the_factors_move_in_every_step_and_bases_only_when_due() -> None:
    state = init()
    for call, grad in enumerate(gradients(14)):
        before = state.stacks[NAME]
        _, state = step_of()(grad, state, 5)
        after = state.stacks[NAME]
        rows, columns = np.asarray(grad @ grad.T), np.asarray(grad.T @ grad)
        for new, old, gram in zip(after.factors, before.factors, (rows, columns), strict=True):
            # Two products and a sum, each rounded by 6e-8 of numbers of size 4.
            np.testing.assert_allclose(new[0], B2 * old[0] + (1 - B2) * gram, rtol=0, atol=2e-6)
        due = call in (1, 6, 11)
        moved = np.abs(after.bases[0] - before.bases[0]).max()
        assert (moved > 1e-4) == due
        if call and not due:
            rotated = step.rotate(jnp.asarray(grad), [q[0] for q in before.bases], (0, 1))
            nu = B2 * before.nu[0] + (1 - B2) * rotated**2
            mu = B1 * before.mu[0] + (1 - B1) * rotated
            np.testing.assert_allclose(after.nu[0], nu, rtol=0, atol=2e-6)
            np.testing.assert_allclose(after.mu[0], mu, rtol=0, atol=2e-6)
        assert (np.asarray(after.nu) != before.nu).any() == (call > 0)
