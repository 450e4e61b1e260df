"""How bases follow their factors: the methods, what they carry along, and what they reject."""

import functools
import re
from collections.abc import Callable
from typing import Any, get_args

import hypothesis
import hypothesis.strategies as st
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.bases import ROUNDING, factor_of, mass, near, random_basis
from helpers.cases import mostly_long

import soap_optax
from soap_optax.algorithm import jacobi, refresh_methods
from soap_optax.linalg import (
    decompositions,
    decoupled_rows,
    matmul,
    orthonormality,
    with_unit_vectors,
)

METHODS = [m for m in get_args(refresh_methods.RefreshMethod) if m != "auto"]  # One of these.
FULL = tuple(refresh_methods.METHODS)


@functools.cache
def refreshed_by(method: str) -> Callable[[Any, Any], refresh_methods.NewBasis]:
    def refresh(factor: jax.Array, basis: jax.Array) -> refresh_methods.NewBasis:
        rows, product = decoupled_rows(factor, basis), matmul(factor, basis)
        axis = refresh_methods.FactorInBasis(factor, basis, product, rows)
        new = refresh_methods.METHODS[method](axis)
        return new._replace(basis=with_unit_vectors(new.basis, rows))

    return jax.jit(refresh)


@pytest.mark.parametrize("d", mostly_long([3, 40], [40]))
@pytest.mark.parametrize("method", FULL)
def test_every_method_takes_a_basis_nearer_to_the_eigenvectors_and_keeps_it_orthonormal(
    method: str, d: int
) -> None:
    vectors = random_basis(d)
    factor = factor_of(vectors, 2.0 ** -np.linspace(0, 6, d))
    basis = near(vectors, 0.02)
    before = mass(factor, basis)
    new = refreshed_by(method)(factor, basis)
    # Neighbouring eigenvalues are 10% apart for d = 40, where one QR gains a tenth.
    assert mass(factor, new.basis) < 0.95 * before
    assert np.abs(new.basis.T @ new.basis - np.eye(d)).max() < ROUNDING
    assert sorted(new.permutation.tolist()) == list(range(d))


@pytest.mark.parametrize("method", FULL)
def test_every_method_finds_the_eigenvectors_of_a_still_factor_in_the_end(method: str) -> None:
    vectors = random_basis(12)
    factor = factor_of(vectors, 2.0 ** -np.arange(12))
    basis = jnp.eye(12)
    for _ in range(40):
        basis = refreshed_by(method)(factor, basis).basis
    assert mass(factor, basis) < ROUNDING
    found = np.sort(np.abs(vectors.T @ basis).max(axis=1))
    # The smallest eigenvalue is 2^-11, and its vector known to 1e-7 * 2^11.
    np.testing.assert_allclose(found, 1, atol=1e-3)


@pytest.mark.parametrize("method", ["qr", "cholesky_qr", "eigh"])
def test_columns_come_out_by_descending_eigenvalue_and_the_permutation_is_returned(
    method: str,
) -> None:
    vectors = random_basis(6)
    factor = factor_of(vectors, 2.0 ** -np.arange(6))
    shuffled = [3, 0, 5, 1, 4, 2]
    basis = jnp.asarray(vectors[:, shuffled], jnp.float32)
    new = refreshed_by(method)(factor, basis)
    assert [shuffled[column] for column in new.permutation] == list(range(6))
    np.testing.assert_allclose(np.abs(new.basis), np.abs(vectors), atol=ROUNDING)


def test_jacobi_sweeps_do_not_permute_columns() -> None:
    vectors = random_basis(6)
    factor = factor_of(vectors, 2.0 ** -np.arange(6))
    basis = jnp.asarray(vectors[:, [3, 0, 5, 1, 4, 2]], jnp.float32)
    new = refreshed_by("jacobi")(factor, basis)
    np.testing.assert_allclose(new.basis, basis, atol=ROUNDING)
    assert new.permutation.tolist() == list(range(6))


def test_one_angle_is_the_classical_jacobi_rotation() -> None:
    rotated = jnp.array([[3.0, 0.5], [0.5, 1.0]])
    angle = 0.5 * np.arctan2(2 * 0.5, 3.0 - 1.0)
    tangents = jacobi.rotation_angles(rotated)
    np.testing.assert_allclose(tangents[1, 0], np.tan(angle), rtol=1e-6)
    np.testing.assert_array_equal(tangents, -tangents.T)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    diagonal = rotation.T @ np.asarray(rotated) @ rotation
    assert abs(diagonal[0, 1]) < 1e-6


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("angle", [0.05, -0.1])
def test_a_rotation_departs_from_orthonormality_by_a_72nd_of_the_sixth_power(angle: float) -> None:
    rotation = np.asarray(jacobi.rotation(jnp.array([[0.0, angle], [-angle, 0.0]])))
    departure = rotation.T @ rotation - np.eye(2)
    np.testing.assert_allclose(departure, -(angle**6) / 72 * np.eye(2), rtol=5e-3, atol=1e-12)
    wanted = [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]
    np.testing.assert_allclose(rotation, wanted, atol=abs(angle) ** 5 / 60)


ANGLES_OF = jax.jit(jacobi.rotation_angles)


@hypothesis.given(d=st.sampled_from([2, 5, 9]), seed=st.integers(0, 99), decades=st.floats(0, 12))
@hypothesis.settings(max_examples=15, deadline=None)
def test_angles_are_antisymmetric_bounded_and_finite(d: int, seed: int, decades: float) -> None:
    rng = np.random.default_rng(seed)
    half = rng.normal(size=(d, d)) * 10.0 ** -rng.uniform(0, decades, size=d)
    for rotated in (half @ half.T, np.zeros((d, d)), np.ones((d, d)), 1e30 * half @ half.T):
        angles = np.asarray(ANGLES_OF(jnp.asarray(rotated, jnp.float32)))
        np.testing.assert_array_equal(angles, -angles.T)
        # Columns are scaled to a norm of one half, and rounding may add some units of 6e-8.
        assert np.linalg.norm(angles, axis=0).max() <= 0.5 + 1e-6


def test_sweeps_go_on_only_while_there_is_something_left() -> None:
    """One sweep, where little is off the diagonal, squares it; three do as well as an eigh."""
    vectors = random_basis(24)
    factor = factor_of(vectors, 2.0 ** -np.linspace(0, 6, 24))
    little, much = near(vectors, 0.002), near(vectors, 0.1)
    assert mass(factor, little) < jacobi.ENOUGH < mass(factor, much)
    assert mass(factor, refreshed_by("jacobi")(factor, little).basis) < 0.2 * mass(factor, little)
    assert mass(factor, refreshed_by("jacobi")(factor, much).basis) < 0.2 * mass(factor, much)


def test_cholesky_qr_is_qr_up_to_signs() -> None:
    vectors = random_basis(24)
    factor = factor_of(vectors, 10.0 ** -np.linspace(0, 3, 24))
    basis = near(vectors, 0.01)
    fast, sound = (refreshed_by(method)(factor, basis) for method in ("cholesky_qr", "qr"))
    assert fast.permutation.tolist() == sound.permutation.tolist()
    # Condition numbers of 1e3 cost three of float32's seven digits.
    np.testing.assert_allclose(np.abs(fast.basis), np.abs(sound.basis), atol=1e-3)


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_cholesky_qr_falls_back_to_qr_where_the_factor_has_no_full_rank(rank: int) -> None:
    vectors = random_basis(40)
    factor = factor_of(vectors, np.arange(40) < rank)
    direct = decompositions.orthonormalize_by_cholesky(matmul(factor, jnp.eye(40)))
    assert not orthonormality.is_orthonormal(direct)
    fast, sound = (refreshed_by(name)(factor, jnp.eye(40)) for name in ("cholesky_qr", "qr"))
    np.testing.assert_allclose(fast.basis, sound.basis, atol=ROUNDING)
    assert orthonormality.is_orthonormal(fast.basis)


def test_cholesky_qr_falls_back_to_qr_where_its_basis_is_hardly_orthonormal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vectors = random_basis(24)
    factor, basis = factor_of(vectors, 10.0 ** -np.linspace(0, 3, 24)), near(vectors, 0.01)

    def refreshed_with(departure: float) -> float:
        """The departure of the new basis if that of the Cholesky basis is the given one."""
        monkeypatch.setattr(
            refresh_methods,
            "orthonormalize_by_cholesky",
            lambda matrix: (1 - departure / 2) * decompositions.orthonormalize(matrix),
        )
        new = refreshed_by.__wrapped__("cholesky_qr")(factor, basis).basis  # Compiled anew.
        return float(orthonormality.departure_from_orthonormality(new))

    assert refreshed_with(1e-4) < 1e-5
    assert refreshed_with(2e-5) > 1.5e-5  # This one is kept.


STEPS, SHAPE = 60, (40, 6)


def gradients(seed: int = 0) -> jax.Array:
    rng = np.random.default_rng(seed)
    scales = np.multiply.outer(*[2.0 ** -np.linspace(0, 3, d) for d in SHAPE])
    return jnp.asarray(rng.normal(size=(STEPS, *SHAPE)) * scales, jnp.float32)


@functools.cache
def run_of(method: Any) -> Callable[..., Any]:
    """The updates and the stacks of all steps; one program serves all tests of a method."""

    @jax.jit
    def run(grads: jax.Array, frequency: int) -> Any:
        optimizer = soap_optax.scale_by_soap(refresh=method, precondition_frequency=frequency)

        def step(state: Any, grad: jax.Array) -> Any:
            updates, state = optimizer.update(grad, state)
            return state, (updates, state)

        return jax.lax.scan(step, optimizer.init(grads[0]), grads)[1]

    def updates_and_stacks(grads: jax.Array, frequency: int) -> Any:
        updates, states = run(grads, frequency)
        return updates, stack_of(states)

    return updates_and_stacks


def stack_of(states: Any) -> Any:
    ((_, stack),) = states.stacks.items()
    return stack


@pytest.mark.parametrize("method", mostly_long(METHODS, ["partial"]))
def test_the_first_moment_keeps_its_direction_through_every_refresh(method: str) -> None:
    grads = gradients()
    _, stack = run_of(method)(grads, 3)
    assert stack.refreshes[-1].tolist() == [20]
    assert stack.rejected_refreshes[-1].tolist() == [0]
    wanted = np.zeros(SHAPE)
    for call, grad in enumerate(grads):
        wanted = 0.95 * wanted + 0.05 * np.asarray(grad) * (call > 0)
        bases = [np.asarray(basis[call, 0]) for basis in stack.bases]
        found = bases[0] @ np.asarray(stack.mu[call, 0]) @ bases[1].T
        np.testing.assert_allclose(found, wanted, atol=ROUNDING)


@pytest.mark.parametrize("method", mostly_long(METHODS, ["jacobi", "partial"]))
def test_bases_follow_factors_and_stay_orthonormal(method: str) -> None:
    _, stack = run_of(method)(gradients(), 1)
    for factors, bases in zip(stack.factors, stack.bases, strict=True):
        found, idle = (mass(factors[-1, 0], bases[call, 0]) for call in (-1, 1))
        # The last gradient has not rotated the basis yet; `partial` rotates a quarter at a time.
        assert found < (0.8 if method == "partial" else 0.4) * idle
        assert orthonormality.departure_from_orthonormality(bases[-1, 0]) < 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_factors_without_full_rank_are_refreshed_all_the_same(method: str) -> None:
    left, right = (np.random.default_rng(0).normal(size=d) for d in SHAPE)
    sizes = 1 + np.arange(STEPS) % 4
    grads = jnp.asarray(np.multiply.outer(sizes, np.outer(left, right)), jnp.float32)
    updates, stack = run_of(method)(grads, 1)
    assert stack.refreshes[-1].tolist() == [STEPS - 1]
    assert np.isfinite(updates).all()


@pytest.mark.long
# On CPUs, the maxima of optimized programs ignore NaN.
@pytest.mark.usefixtures("optimized_programs")
@pytest.mark.parametrize("method", METHODS)
def test_a_large_factor_of_low_rank_leaves_every_basis_finite(method: Any) -> None:
    """It has no Cholesky factor, and with 256 columns XLA missed the NaN."""
    optimizer = soap_optax.scale_by_soap(refresh=method, precondition_frequency=1)
    grads = np.random.default_rng(0).normal(size=(4, 256, 4)).astype(np.float32)
    update = jax.jit(optimizer.update)
    state: Any = optimizer.init(grads[0])
    for grad in grads:
        _, state = update(grad, state)
    stack = stack_of(state)
    assert stack.refreshes.tolist() == [3]
    for basis in stack.bases:
        assert orthonormality.is_orthonormal(basis[0])
        assert np.isfinite(basis).all()


@pytest.mark.parametrize("method", mostly_long(METHODS, ["qr", "partial"]))
def test_every_method_rejects_a_refresh_from_a_non_finite_factor(
    method: Any,
) -> None:
    grads = gradients()
    optimizer = soap_optax.scale_by_soap(refresh=method, precondition_frequency=1)
    update = jax.jit(optimizer.update)
    state: Any = optimizer.init(grads[0])
    for grad in grads[:4]:
        _, state = update(grad, state)
    stack = stack_of(state)
    for value in (jnp.nan, jnp.inf):
        factors = (stack.factors[0].at[0, 1, 2].set(value), stack.factors[1])
        planted = state._replace(stacks={"40x6": stack._replace(factors=factors)})
        updates, after = update(grads[4], planted)
        unchanged = stack_of(after)
        assert unchanged.rejected_refreshes.tolist() == [1]
        assert unchanged.refreshes.tolist() == stack.refreshes.tolist()
        assert np.isfinite(updates).all()
        for new, old in zip(unchanged.bases, stack.bases, strict=True):
            np.testing.assert_array_equal(new, old)
        # The next one starts from the basis that was unchanged.
        healed = after._replace(stacks={"40x6": unchanged._replace(factors=stack.factors)})
        _, after = update(grads[5], healed)
        assert stack_of(after).refreshes.tolist() == [int(stack.refreshes[0]) + 1]


@pytest.mark.parametrize(
    ("platform", "length", "decompositions"),
    [
        ("cpu", 32, {"lapack_sgeqrf_ffi", "lapack_sorgqr_ffi"}),
        ("cpu", 300, {"lapack_sgeqrf_ffi", "lapack_sorgqr_ffi"}),
        ("cuda", 32, set()),
        ("tpu", 256, {"Eigh"}),
        ("tpu", 257, set()),
    ],
)
def test_auto_chooses_by_platform_and_length(
    platform: str, length: int, decompositions: set[str]
) -> None:
    matrix = jnp.zeros((length, length))
    rows = jnp.zeros(length, bool)
    axis = refresh_methods.FactorInBasis(matrix, matrix, matrix, rows)
    method = jax.jit(refresh_methods.METHODS["auto"])
    exported = jax.export.export(method, platforms=[platform])(axis)
    calls = re.findall(r"custom_call @(\w+)", exported.mlir_module())
    assert {call for call in calls if "sharding" not in call.lower()} == decompositions
