"""What the suites of other implementations test, written anew, and what they would fail.

The behaviour and the tolerances are those of Distributed Shampoo, Emerging-Optimizers, HeavyBall
and Optax's two open pull requests on SOAP, as their test suites describe them.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import bases
from helpers.cases import mostly_long

import soap_optax
from soap_optax import linalg
from soap_optax.algorithm import refresh_methods

METHODS = ["qr", "cholesky_qr", "eigh", "jacobi", "auto", "partial"]
FULL = METHODS[:-1]


def run(optimizer: optax.GradientTransformation, grads: Any) -> tuple[Any, Any]:
    """The updates of all steps, stacked, and the last state."""

    @jax.jit
    def scan(grads: Any) -> Any:
        first = jax.tree.map(lambda leaf: leaf[0], grads)

        def step(state: Any, grad: Any) -> Any:
            updates, state = optimizer.update(grad, state, first)
            return state, updates

        return jax.lax.scan(step, optimizer.init(first), grads)

    state, updates = scan(grads)
    return updates, state


def normal(*shape: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


# Distributed Shampoo ------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64", "implicit_promotion")
@pytest.mark.parametrize("refresh", mostly_long(METHODS, ["qr"]))
def test_adam_is_recovered_where_the_basis_is_the_identity(refresh: Any) -> None:
    """Diagonal gradients have diagonal factors. The first call makes no update."""
    grads = np.stack([np.diag([5.0, 3.0, 2.0, 1.0]) * scale for scale in normal(12) + 3])
    soap = soap_optax.scale_by_soap(0.9, 0.99, 1e-30, precondition_frequency=1, refresh=refresh)
    updates, _ = run(soap, grads)
    adam, _ = run(optax.scale_by_adam(0.9, 0.99, eps=1e-30), grads[1:])
    np.testing.assert_array_equal(updates[0], 0)
    np.testing.assert_allclose(updates[1:], adam, rtol=0, atol=1e-12)


def test_a_block_whose_basis_is_near_enough_is_skipped_and_another_is_not() -> None:
    still = np.broadcast_to(np.diag([5.0, 3.0, 2.0, 1.0]).astype(np.float32), (6, 4, 4))
    grads = {"still": still, "moving": normal(6, 5, 3)}
    soap = soap_optax.scale_by_soap(precondition_frequency=1, refresh_tolerance=0.01)
    _, state = run(soap, grads)
    assert state.stacks["4x4"].refreshes.tolist() == [1]
    assert state.stacks["5x3"].refreshes.tolist() == [5]


@pytest.mark.long
def test_neighbouring_dimensions_are_merged_and_cut_as_documented() -> None:
    optimizer = soap_optax.scale_by_soap(merge_dims=True, max_precond_dim=1024)
    state: Any = optimizer.init(jnp.zeros((1, 2, 512, 1, 2048, 1, 3, 4)))
    assert list(state.stacks) == ["1024x2048x12"]
    # The axis of 2048 is longer than max_precond_dim.
    assert [factor.shape[-1] for factor in state.stacks["1024x2048x12"].factors] == [1024, 12]

    grads = normal(4, 6, 10)
    whole, _ = run(soap_optax.scale_by_soap(block_size=5), grads)
    cut, _ = run(
        soap_optax.scale_by_soap(),
        {f"{i} {j}": grads[:, i : i + 3, j : j + 5] for i in (0, 3) for j in (0, 5)},
    )
    for name, tile in cut.items():
        i, j = map(int, name.split())
        np.testing.assert_allclose(whole[:, i : i + 3, j : j + 5], tile, atol=1e-5)


# Emerging-Optimizers ------------------------------------------------------------------------------


def test_the_kronecker_factors_of_one_gradient_are_its_gram_matrices() -> None:
    grads = normal(2, 3, 10)
    _, state = run(soap_optax.scale_by_soap(shampoo_beta=0.5), grads)
    left, right = state.stacks["3x10"].factors
    expected = [0.5 * 0.5 * g @ g.T for g in grads[:1]] + [0.5 * g @ g.T for g in grads[1:]]
    np.testing.assert_allclose(left[0], sum(expected), rtol=0, atol=1e-6 * np.abs(left).max())
    expected = [0.5 * 0.5 * g.T @ g for g in grads[:1]] + [0.5 * g.T @ g for g in grads[1:]]
    np.testing.assert_allclose(right[0], sum(expected), rtol=0, atol=1e-6 * np.abs(right).max())


@pytest.mark.parametrize("shape", [(3, 10), (8, 4), (33, 8)])
def test_a_matrix_comes_back_from_its_eigenbases(shape: tuple[int, int]) -> None:
    matrix = normal(*shape)
    rotated = jnp.asarray(matrix)
    rotations = [jnp.asarray(bases.random_basis(length), jnp.float32) for length in shape]
    for axis, basis in enumerate(rotations):
        rotated = linalg.multiply_along(basis.T, rotated, axis)
    assert np.abs(rotated - matrix).max() > 0.1
    for axis, basis in enumerate(rotations):
        rotated = linalg.multiply_along(basis, rotated, axis)
    np.testing.assert_allclose(rotated, matrix, rtol=0, atol=1e-6 * np.abs(matrix).max())


@pytest.mark.parametrize("rows", mostly_long([8, 16, 33], [33]))
@pytest.mark.parametrize("columns", mostly_long([4, 8, 33], [8]))
def test_a_refresh_preserves_the_first_moment_and_keeps_bases_orthonormal(
    rows: int, columns: int
) -> None:
    grads = normal(6, rows, columns)
    soap = soap_optax.scale_by_soap(0.9, precondition_frequency=2)
    _, state = run(soap, grads)
    [stack] = state.stacks.values()
    moment = jnp.asarray(stack.mu[0])
    for axis, basis in enumerate(stack.bases):
        q = np.asarray(basis[0], np.float64)
        np.testing.assert_allclose(q.T @ q, np.eye(len(q)), rtol=0, atol=1e-5)
        moment = linalg.multiply_along(jnp.asarray(basis[0]), moment, axis)
    # The first gradient only fills the factors.
    expected = sum(0.1 * 0.9 ** (5 - i) * grads[i] for i in range(1, 6))
    np.testing.assert_allclose(moment, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("d", mostly_long([128, 512], [128]))
def test_eigenvectors_of_long_axes_are_orthonormal(d: int) -> None:
    factor = jnp.asarray(np.cov(normal(d, 2 * d)), jnp.float32)
    rows = jnp.zeros(d, bool)
    basis = np.asarray(jax.jit(linalg.descending_eigenvectors)(factor, rows), np.float64)
    np.testing.assert_allclose(basis.T @ basis, np.eye(d), rtol=0, atol=1e-3)


def test_updates_of_white_gradients_have_a_root_mean_square_of_one() -> None:
    """Without a first moment, each entry is divided by its own root mean square."""
    soap = soap_optax.scale_by_soap(b1=0.0, b2=0.99)
    updates, _ = run(soap, normal(200, 32, 16))
    assert float(jnp.sqrt(jnp.mean(jnp.square(updates[100:])))) == pytest.approx(1, abs=0.05)


# HeavyBall ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64", "implicit_promotion")
def test_the_second_call_is_adam_in_the_basis_of_the_first_gradient() -> None:
    grads = normal(2, 2, 2, dtype=np.float64)
    updates, _ = run(soap_optax.scale_by_soap(0.9, 0.99, 1e-30, precondition_frequency=100), grads)
    left = np.linalg.eigh(grads[0] @ grads[0].T)[1]
    right = np.linalg.eigh(grads[0].T @ grads[0])[1]
    adam, _ = run(optax.scale_by_adam(0.9, 0.99, eps=1e-30), (left.T @ grads[1] @ right)[None])
    np.testing.assert_allclose(updates[1], left @ adam[0] @ right.T, rtol=0, atol=1e-12)


def test_bfloat16_follows_float32() -> None:
    grads = normal(20, 12, 8).astype(jnp.bfloat16)
    narrow, state = run(soap_optax.scale_by_soap(), grads)
    wide, _ = run(soap_optax.scale_by_soap(), grads.astype(np.float32))
    assert narrow.dtype == jnp.bfloat16
    assert state.stacks["12x8"].nu.dtype == jnp.float32
    np.testing.assert_allclose(narrow.astype(np.float32), wide, rtol=0, atol=2**-7 * 3)


# Optax's pull requests ----------------------------------------------------------------------------


@pytest.mark.parametrize("frequency", [1, 3])
def test_bases_change_at_the_frequency_and_at_no_other_step(frequency: int) -> None:
    optimizer = soap_optax.scale_by_soap(precondition_frequency=frequency)
    update = jax.jit(optimizer.update)
    grads = normal(8, 6, 4)
    state: Any = optimizer.init(grads[0])
    changed = []
    for grad in grads:
        before = state.stacks["6x4"].bases[0]
        _, state = update(grad, state)
        stack = state.stacks["6x4"]
        changed.append(not np.array_equal(before, stack.bases[0]))
        factor = np.asarray(stack.factors[0][0])
        np.testing.assert_allclose(factor, factor.T, atol=1e-6 * np.abs(factor).max())
    # The first call makes no update. The second has the first bases.
    assert changed == [call > 0 and (call - 1) % frequency == 0 for call in range(8)]
    assert update._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]  # jit has it


# What these would fail ----------------------------------------------------------------------------


def refreshed_by(method: str) -> Callable[[Any, Any], Any]:
    def refresh(factor: jax.Array, basis: jax.Array) -> jax.Array:
        rows = jnp.zeros(len(factor), bool)
        axis = refresh_methods.FactorInBasis(factor, basis, factor @ basis, rows)
        return refresh_methods.METHODS[method](axis).basis

    return jax.jit(refresh)


@pytest.mark.parametrize("decades", [1, 2, 4])
@pytest.mark.parametrize("method", FULL)
def test_the_off_diagonal_mass_of_a_still_factor_falls_at_every_refresh(
    method: str, decades: int
) -> None:
    d = 24
    vectors = bases.random_basis(d)
    factor = bases.factor_of(vectors, np.logspace(0, -decades, d))
    basis = bases.near(vectors, 0.1)
    refresh, masses = refreshed_by(method), [bases.mass(factor, basis)]
    for _ in range(12):
        basis = refresh(factor, basis)
        masses.append(bases.mass(factor, basis))
    # What is left in the end is rounding.
    for before, after in itertools.pairwise(masses):
        assert after < before or after < bases.ROUNDING, masses
    assert masses[-1] < 0.3 * masses[0]


@pytest.mark.long
@pytest.mark.parametrize("method", FULL)
def test_a_relabelled_basis_makes_the_same_updates_while_eigenvalues_cross(method: Any) -> None:
    """The rows' scales swap their order, so that the columns of the left basis do, too."""
    d, calls = 6, 24
    growing = np.linspace(0, 1, calls)[:, None]
    scales = 2.0 ** -(np.arange(d) * (1 - growing) + np.arange(d)[::-1] * growing)
    left, right = bases.random_basis(d), bases.random_basis(4, seed=1)
    grads = left @ (scales[:, :, None] * normal(calls, d, 4)) @ right.T
    grads = grads.astype(np.float32)
    soap = soap_optax.scale_by_soap(0.9, 0.9, precondition_frequency=1, refresh=method)
    _, state = run(soap, grads[:3])
    stack = state.stacks["6x4"]
    order, others = np.array([3, 0, 5, 1, 4, 2]), np.array([2, 0, 3, 1])
    relabelled = stack._replace(
        bases=(stack.bases[0][:, :, order], stack.bases[1][:, :, others]),
        mu=stack.mu[:, order][:, :, others],
        nu=stack.nu[:, order][:, :, others],
    )
    update = jax.jit(soap.update)
    one, other = state, state._replace(stacks={"6x4": relabelled})
    for grad in grads[3:]:
        expected, one = update(grad, one)
        found, other = update(grad, other)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("method", mostly_long(FULL, ["qr"]))
def test_a_wide_spectrum_keeps_its_tail_in_float32(method: Any) -> None:
    """From 2.5e6 to 0.1: squares of gradients in the eigenbasis are known far below rounding."""
    d, calls = 12, 40
    eigenvalues = np.logspace(np.log10(2.5e6), -1, d)
    vectors = bases.random_basis(d)
    rng = np.random.default_rng(2)
    rows = [np.linalg.qr(rng.normal(size=(2 * d, d)))[0].T for _ in range(calls)]
    grads = np.stack([vectors * np.sqrt(eigenvalues) @ row for row in rows]).astype(np.float32)
    soap = soap_optax.scale_by_soap(
        0.9, 0.9, precondition_frequency=1, refresh=method, one_sided=True
    )
    _, state = run(soap, grads)
    nu = np.asarray(state.stacks["12x24"].nu[0], np.float64).sum(axis=1)
    found = np.sort(nu)[::-1] / (1 - 0.9 ** (calls - 1))
    np.testing.assert_allclose(found, eigenvalues, rtol=0.05)
