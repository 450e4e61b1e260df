"""Eigenbases: rotations, refreshes, and the moments that follow the columns."""

import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.one_matrix import (
    B1,
    B2,
    NAME,
    SHAPE,
    UPDATE_TOLERANCE,
    State,
    gradients,
    init,
    replace_in_stack,
    run,
    step_of,
)
from hypothesis import strategies as st

import soap_optax
from soap_optax.algorithm import step


@jax.jit
def bases_of_run(grads: jax.Array, frequency: int) -> tuple[State, list[jax.Array]]:
    """The final state, and the bases of every step, `(steps, d, d)` for each axis."""
    optimizer = soap_optax.scale_by_soap(precondition_frequency=frequency)

    def step(state: State, grad: jax.Array) -> tuple[State, list[jax.Array]]:
        _, state = optimizer.update(grad, state)
        return state, [q[0] for q in state.stacks[NAME].bases]

    return jax.lax.scan(step, optimizer.init(grads[0]), grads)


@pytest.mark.parametrize("frequency", [1, 7])
def test_bases_are_orthonormal_after_any_number_of_refreshes(frequency: int) -> None:
    state, bases = bases_of_run(jnp.asarray(gradients(200)), frequency)
    refreshes = state.stacks[NAME].refreshes
    departures = [
        np.abs(q.astype(np.float64).mT @ q - np.eye(q.shape[-1])).max()
        for q in map(np.asarray, bases)
    ]
    assert refreshes.tolist() == [math.ceil(199 / frequency)]
    # A Householder QR or eigh is orthonormal to a few roundings per column: 6 columns times the
    # epsilon of 1.2e-7. Every refresh computes a new basis, so that errors do not add up.
    assert max(departures) <= 2 * 6 * 1.2e-7


@hypothesis.given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    data=st.data(),
    seed=st.integers(0, 9),
)
def test_rotating_there_and_back_is_the_identity(
    shape: list[int], data: st.DataObject, seed: int
) -> None:
    axes = data.draw(
        st.lists(st.integers(0, len(shape) - 1), unique=True).map(sorted), label="axes"
    )
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=shape), jnp.float32)
    bases = [
        jnp.asarray(np.linalg.qr(rng.normal(size=(shape[axis],) * 2))[0], jnp.float32)
        for axis in axes
    ]
    rotated = step.rotate(x, bases, axes)
    # Eight products of at most five terms of size 1, each rounded by 6e-8.
    np.testing.assert_allclose(step.rotate_back(rotated, bases, axes), x, rtol=0, atol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(rotated), jnp.linalg.norm(x), rtol=1e-5)
    for axis in range(len(shape)):
        if axes == [axis]:
            expected = np.moveaxis(np.tensordot(bases[0].T, x, (1, axis)), 0, axis)
            np.testing.assert_allclose(rotated, expected, rtol=0, atol=1e-5)


def test_columns_may_be_permuted_with_their_moments() -> None:
    grads = gradients(12)
    _, state = run(grads[:5], init(), 3)
    rows, columns = [3, 0, 5, 1, 4, 2], [2, 0, 3, 1]
    stack = state.stacks[NAME]
    permuted = replace_in_stack(
        state,
        bases=(stack.bases[0][..., rows], stack.bases[1][..., columns]),
        mu=stack.mu[:, rows][:, :, columns],
        nu=stack.nu[:, rows][:, :, columns],
    )
    # Two plain steps, then refreshes, which sort the columns by their eigenvalues again.
    wanted, wanted_state = run(grads[5:], state, 3)
    found, found_state = run(grads[5:], permuted, 3)
    assert wanted_state.stacks[NAME].refreshes.tolist() == [4]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=UPDATE_TOLERANCE)
    np.testing.assert_allclose(
        np.abs(found_state.stacks[NAME].bases[0]),
        np.abs(wanted_state.stacks[NAME].bases[0]),
        rtol=0,
        atol=UPDATE_TOLERANCE,
    )
    # An unpermuted second moment belongs to the wrong columns. The updates show it.
    wrong, _ = run(grads[5:], replace_in_stack(permuted, nu=stack.nu), 3)
    assert np.abs(wrong - wanted).max() > 0.1


def test_columns_may_change_their_signs_with_the_first_moment() -> None:
    grads = gradients(12)
    _, state = run(grads[:5], init(), 3)
    rows, columns = np.array([[1, -1, -1, 1, -1, 1.0]]), np.array([[-1, 1, 1, -1.0]])
    stack = state.stacks[NAME]
    flipped = replace_in_stack(
        state,
        bases=(stack.bases[0] * rows[None], stack.bases[1] * columns[None]),
        mu=stack.mu * (rows.T * columns)[None],
    )
    wanted, _ = run(grads[5:], state, 3)
    found, _ = run(grads[5:], flipped, 3)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=UPDATE_TOLERANCE)
    wrong, _ = run(grads[5:], replace_in_stack(flipped, mu=stack.mu), 3)
    assert np.abs(wrong - wanted).max() > 0.1


def test_a_refresh_permutes_the_second_moment_and_rotates_the_first() -> None:
    # The unit vectors are the eigenvectors, by ascending eigenvalue. A refresh reverses them.
    nu = np.arange(1, 25, dtype=np.float32).reshape(1, 6, 4)
    mu = np.sin(nu)
    state = replace_in_stack(
        init(),
        factors=(jnp.diag(jnp.arange(1.0, 7))[None], jnp.diag(jnp.arange(1.0, 5))[None]),
        mu=jnp.asarray(mu),
        nu=jnp.asarray(nu),
        accepted_gradients=jnp.array([5]),
        refreshes=jnp.array([1]),
        age=jnp.array([3]),
    )
    _, refreshed = step_of()(jnp.zeros(SHAPE), state, 3)
    stack = refreshed.stacks[NAME]
    assert stack.refreshes.tolist() == [2]
    # The zero gradient decays both moments once. A product with a signed permutation is exact. A
    # decay rounds once, by 6e-8 of its value.
    np.testing.assert_allclose(stack.nu, B2 * nu[:, ::-1, ::-1], rtol=1e-6)
    bases = [q[0] for q in stack.bases]
    for q in bases:
        np.testing.assert_allclose(np.abs(q), np.eye(len(q))[::-1], rtol=0, atol=1e-6)
    np.testing.assert_allclose(
        step.rotate_back(stack.mu[0], bases, (0, 1)), B1 * mu[0], rtol=0, atol=1e-5
    )


def test_basis_comes_nearer_to_the_eigenvectors_of_a_still_factor_with_every_refresh() -> None:
    rng = np.random.default_rng(1)
    factors = []
    for length in SHAPE:
        vectors, _ = np.linalg.qr(rng.normal(size=(length, length)))
        factors.append(vectors * 2.0 ** -np.arange(length) @ vectors.T)
    state = replace_in_stack(
        init(),
        factors=tuple(jnp.asarray(factor, jnp.float32)[None] for factor in factors),
        accepted_gradients=jnp.array([1]),
        refreshes=jnp.array([1]),
    )
    departures, rotated = [], np.zeros(0)
    for _ in range(21):  # The first step refreshes nothing; zero gradients keep the eigenvectors.
        _, state = step_of()(jnp.zeros(SHAPE), state, 1)
        basis = np.asarray(state.stacks[NAME].bases[0][0], np.float64)
        rotated = basis.T @ factors[0] @ basis
        departures.append(np.linalg.norm(rotated - np.diag(np.diag(rotated))))
    # Neighbouring eigenvalues differ by a factor of 2. In the long run, each refresh therefore
    # halves the departure. 1e-5 is the rounding of a factor of norm 1.2.
    assert departures[0] > 0.1
    assert departures[10] < departures[5] < departures[0]
    assert departures[20] < 1e-5 + departures[0] * 2.0**-10
    assert np.diff(np.diag(rotated)).max() < 0
