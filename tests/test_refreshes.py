"""How bases follow their factors: the methods, what they carry along, and what they refuse."""

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

import soap_optax
from soap_optax.algorithm import jacobi, partial_refresh, refresh_methods
from soap_optax.linalg import decompositions, orthonormality, products
from soap_optax.linalg import matmul as times

METHODS = get_args(refresh_methods.RefreshMethod)
FULL = tuple(refresh_methods.METHODS)

# Entries of orthonormal matrices and of their products, after some ten operations in float32.
ROUNDING = 1e-5


@functools.cache
def turned_by(method: str) -> Callable[[Any, Any], refresh_methods.NewBasis]:
    full = refresh_methods.METHODS[method]
    return jax.jit(lambda factor, basis: full(factor, basis, times(factor, basis)))


def random_basis(d: int, seed: int = 0) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]


def factor_of(basis: np.ndarray, eigenvalues: np.ndarray) -> jax.Array:
    return jnp.asarray(basis * eigenvalues @ basis.T, jnp.float32)


def near(basis: np.ndarray, distance: float, seed: int = 1) -> jax.Array:
    """A basis that is turned away from another by a random rotation."""
    noise = distance * np.random.default_rng(seed).normal(size=basis.shape)
    return jnp.asarray(np.linalg.qr(basis + basis @ (noise - noise.T))[0], jnp.float32)


def mass(factor: jax.Array, basis: jax.Array) -> float:
    rotated = np.asarray(basis, np.float64).T @ np.asarray(factor, np.float64) @ basis
    off = rotated - np.diag(np.diag(rotated))
    return float(np.linalg.norm(off) / np.linalg.norm(rotated))


# The methods.


@pytest.mark.parametrize("d", [3, 40])
@pytest.mark.parametrize("method", FULL)
def test_every_method_takes_a_basis_nearer_to_the_eigenvectors_and_keeps_it_orthonormal(
    method: str, d: int
) -> None:
    vectors = random_basis(d)
    factor = factor_of(vectors, 2.0 ** -np.linspace(0, 6, d))
    basis = near(vectors, 0.02)
    before = mass(factor, basis)
    turned = turned_by(method)(factor, basis)
    # Neighbouring eigenvalues are 10% apart for d = 40, where one QR gains a tenth.
    assert mass(factor, turned.basis) < 0.95 * before
    assert np.abs(turned.basis.T @ turned.basis - np.eye(d)).max() < ROUNDING
    assert sorted(turned.permutation.tolist()) == list(range(d))


@pytest.mark.parametrize("method", FULL)
def test_every_method_finds_the_eigenvectors_of_a_still_factor_in_the_end(method: str) -> None:
    vectors = random_basis(12)
    factor = factor_of(vectors, 2.0 ** -np.arange(12))
    basis = jnp.eye(12)
    for _ in range(40):
        basis = turned_by(method)(factor, basis).basis
    assert mass(factor, basis) < ROUNDING
    found = np.sort(np.abs(vectors.T @ basis).max(axis=1))
    # The smallest eigenvalue is 2^-11, and its vector known to 1e-7 * 2^11.
    np.testing.assert_allclose(found, 1, atol=1e-3)


@pytest.mark.parametrize("method", ["qr", "cholesky_qr", "eigh"])
def test_columns_come_out_in_descending_order_and_the_order_says_where_they_were(
    method: str,
) -> None:
    vectors = random_basis(6)
    factor = factor_of(vectors, 2.0 ** -np.arange(6))
    shuffled = [3, 0, 5, 1, 4, 2]
    basis = jnp.asarray(vectors[:, shuffled], jnp.float32)
    turned = turned_by(method)(factor, basis)
    assert [shuffled[column] for column in turned.permutation] == list(range(6))
    np.testing.assert_allclose(np.abs(turned.basis), np.abs(vectors), atol=ROUNDING)


def test_jacobi_sweeps_keep_columns_in_their_places() -> None:
    vectors = random_basis(6)
    factor = factor_of(vectors, 2.0 ** -np.arange(6))
    basis = jnp.asarray(vectors[:, [3, 0, 5, 1, 4, 2]], jnp.float32)
    turned = turned_by("jacobi")(factor, basis)
    np.testing.assert_allclose(turned.basis, basis, atol=ROUNDING)
    assert turned.permutation.tolist() == list(range(6))


def test_one_angle_is_the_classical_jacobi_rotation() -> None:
    rotated = jnp.array([[3.0, 0.5], [0.5, 1.0]])
    angle = 0.5 * np.arctan2(2 * 0.5, 3.0 - 1.0)
    tangents = jacobi.rotation_angles(rotated)
    np.testing.assert_allclose(tangents[1, 0], np.tan(angle), rtol=1e-6)
    np.testing.assert_array_equal(tangents, -tangents.T)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    diagonal = turn.T @ np.asarray(rotated) @ turn
    assert abs(diagonal[0, 1]) < 1e-6


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
    assert mass(factor, turned_by("jacobi")(factor, little).basis) < 0.2 * mass(factor, little)
    assert mass(factor, turned_by("jacobi")(factor, much).basis) < 0.2 * mass(factor, much)


def test_cholesky_qr_is_qr_up_to_signs() -> None:
    vectors = random_basis(24)
    factor = factor_of(vectors, 10.0 ** -np.linspace(0, 3, 24))
    basis = near(vectors, 0.01)
    fast, sound = (turned_by(method)(factor, basis) for method in ("cholesky_qr", "qr"))
    assert fast.permutation.tolist() == sound.permutation.tolist()
    # Condition numbers of 1e3 cost three of float32's seven digits.
    np.testing.assert_allclose(np.abs(fast.basis), np.abs(sound.basis), atol=1e-3)


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_cholesky_qr_falls_back_to_qr_where_the_factor_has_no_full_rank(rank: int) -> None:
    vectors = random_basis(40)
    factor = factor_of(vectors, np.arange(40) < rank)
    direct = decompositions.orthonormalize_by_cholesky(times(factor, jnp.eye(40)))
    assert not orthonormality.is_orthonormal(direct)
    fast, sound = (turned_by(name)(factor, jnp.eye(40)) for name in ("cholesky_qr", "qr"))
    np.testing.assert_allclose(fast.basis, sound.basis, atol=ROUNDING)
    assert orthonormality.is_orthonormal(fast.basis)


# The partial refresh.


def columns_in(d: int, starts: jax.Array) -> np.ndarray:
    return np.asarray(partial_refresh.take_chunks(jnp.arange(d), 0, starts))


@pytest.mark.parametrize("d", [2, 31, 32, 37, 39, 64, 71])
def test_partial_refreshes_meet_every_pair_of_columns(d: int) -> None:
    met = np.zeros((d, d), bool)
    chunks_in_turn = jax.jit(partial_refresh.scheduled_chunks, static_argnums=0)
    rounds = 5 if d % partial_refresh.CHUNKS else 1
    for turn in range(len(partial_refresh.PAIRS) * rounds):
        columns = columns_in(d, chunks_in_turn(d, turn))
        assert len(set(columns)) == len(columns) == (d if d < 32 else d // 8 * 2)
        assert columns.min() >= 0
        assert columns.max() < d
        met[np.ix_(columns, columns)] = True
    assert met.all()


@pytest.mark.parametrize("turn", [3, 28 * 4 + 20])
def test_a_partial_refresh_turns_its_columns_and_leaves_the_others_alone(turn: int) -> None:
    d = 43
    vectors = random_basis(d)
    factor = factor_of(vectors, 2.0 ** -np.linspace(0, 6, d))
    basis = near(vectors, 0.05)
    starts = partial_refresh.scheduled_chunks(d, jnp.int32(turn))
    columns = columns_in(d, starts)
    part = partial_refresh.rotate_chunks(factor, basis, starts)
    others = np.setdiff1d(np.arange(d), columns)
    np.testing.assert_array_equal(part.basis[:, others], basis[:, others])
    assert part.permutation[others].tolist() == others.tolist()
    # The columns span what they did, and diagonalize their part, by descending Rayleigh quotients.
    old, new = basis[:, columns], part.basis[:, columns]
    np.testing.assert_allclose(new @ new.T, old @ old.T, atol=ROUNDING)
    assert mass(factor, new) < ROUNDING
    quotients = np.diag(basis.T @ factor @ basis)[part.permutation[columns]]
    assert (np.diff(quotients) <= 0).all()
    mu = jnp.asarray(np.random.default_rng(0).normal(size=(3, d)), jnp.float32)
    turned = partial_refresh.rotate_moment(mu, 1, starts, part.rotation)
    np.testing.assert_allclose(turned @ part.basis.T, mu @ basis.T, atol=ROUNDING)


def test_partial_refreshes_find_the_eigenvectors_of_a_still_factor() -> None:
    vectors = random_basis(40)
    factor = factor_of(vectors, 2.0 ** -np.linspace(0, 6, 40))
    basis = near(vectors, 0.05)
    masses = [mass(factor, basis)]

    @jax.jit
    def turn_one(basis: jax.Array, turn: Any) -> jax.Array:
        starts = partial_refresh.scheduled_chunks(40, turn)
        return partial_refresh.rotate_chunks(factor, basis, starts).basis

    for turn in range(4 * len(partial_refresh.PAIRS)):
        basis = turn_one(basis, turn)
        masses.append(mass(factor, basis))
    assert masses[28] < 0.5 * masses[0]
    assert masses[-1] < 1e-3
    assert orthonormality.is_orthonormal(basis)


# Gram matrices.


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((5, 7), 0), ((5, 7), 1), ((512, 3), 0), ((2, 515), 1), ((2, 518, 3), 1), ((3, 4, 600), 2)],
)
def test_a_gram_matrix_is_the_same_in_parts(shape: tuple[int, ...], axis: int) -> None:
    array = np.random.default_rng(0).normal(size=shape)
    others = [other for other in range(len(shape)) if other != axis]
    wanted = np.tensordot(array, array, (others, others))
    for gram in (products.gram_matrix, jax.jit(products.gram_matrix, static_argnums=1)):
        found = gram(jnp.asarray(array, jnp.float32), axis)
        np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


def test_large_gram_matrices_are_multiplied_in_parts_on_cpus_alone() -> None:
    def flops(rows: int, columns: int) -> float:
        matrix = jax.ShapeDtypeStruct((rows, columns), jnp.float32)
        lowered = jax.jit(products.gram_matrix, static_argnums=1).trace(matrix, 0)
        analysis: Any = lowered.lower(lowering_platforms=("cpu",)).compile().cost_analysis()
        return analysis["flops"] / (2 * rows**2 * columns)

    assert flops(256, 64) == pytest.approx(1, abs=0.05)
    assert flops(512, 64) == pytest.approx(10 / 16, abs=0.05)
    matrix = jax.ShapeDtypeStruct((512, 64), jnp.float32)
    for platform in ("cuda", "tpu"):
        exported = jax.export.export(
            jax.jit(products.gram_matrix, static_argnums=1), platforms=[platform]
        )(matrix, 0)
        assert exported.mlir_module().count("stablehlo.dot_general") == 1


# The guard.


@pytest.mark.parametrize("d", [8, 32, 33, 64, 200, 256])
def test_the_probed_departure_sees_what_is_there(d: int) -> None:
    basis = jnp.asarray(random_basis(d), jnp.float32)
    tolerance = orthonormality.orthonormality_tolerance(basis)
    assert orthonormality.probed_departure(basis) < tolerance / 10
    for spoiled in (
        basis.at[-1, 0].set(jnp.nan),
        jnp.full_like(basis, jnp.nan),
        basis.at[0, -1].set(jnp.inf),
        basis * 1.001,
        basis.at[:, 0].set(basis[:, 1]),
        basis.at[:, 0].add(3 * tolerance * basis[:, 1]),
        jnp.zeros_like(basis),
    ):
        assert not orthonormality.is_orthonormal(spoiled)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("size", [1, 31, 32, 4095, 4096, 100_000])
def test_the_largest_magnitude_of_any_number_of_entries_tells_of_a_nan(
    size: int, dtype: Any
) -> None:
    array = jnp.linspace(-3, 2, size, dtype=dtype)
    assert orthonormality.largest_magnitude(array) == 3
    for spoiled in (array.at[0].set(jnp.nan), array.at[-1].set(jnp.nan), array * jnp.nan):
        assert jnp.isnan(orthonormality.largest_magnitude(spoiled))
        assert orthonormality.largest_magnitude(spoiled).dtype == dtype


def test_a_large_factor_or_basis_with_a_nan_has_no_off_diagonal_mass() -> None:
    factor, basis = jnp.eye(80), jnp.asarray(random_basis(80), jnp.float32)
    for product, columns in (
        (factor.at[3, 3].set(jnp.nan) @ basis, basis),
        (factor @ basis, basis.at[:, 3].set(jnp.nan)),
    ):
        assert jnp.isnan(orthonormality.off_diagonal_mass(product, columns))


@pytest.mark.parametrize("scale", [0.1, 1.0, 1e3])
@pytest.mark.parametrize("d", [5, 40])
def test_a_matrix_is_polished_to_the_nearest_orthonormal_one(d: int, scale: float) -> None:
    rng = np.random.default_rng(d)
    noise = 0.2 * rng.normal(size=(d, d))
    matrix = scale * random_basis(d) @ (np.eye(d) + noise - noise.T)
    left, _, right = np.linalg.svd(matrix)
    found = orthonormality.nearest_orthonormal(jnp.asarray(matrix, jnp.float32))
    assert orthonormality.is_orthonormal(found)
    # An eighth of the tolerance remains, 4e-5, as several vectors of signs see it.
    np.testing.assert_allclose(found, left @ right, atol=1e-4)


@pytest.mark.parametrize("matrix", [jnp.zeros((40, 40)), jnp.full((256, 256), jnp.nan)])
def test_what_cannot_be_polished_ends_and_is_not_orthonormal(matrix: jax.Array) -> None:
    assert not orthonormality.is_orthonormal(orthonormality.nearest_orthonormal(matrix))


def test_a_basis_that_drifts_is_made_orthonormal_and_another_one_not_touched() -> None:
    basis = jnp.asarray(random_basis(40), jnp.float32)
    np.testing.assert_array_equal(orthonormality.nearest_orthonormal(basis), basis)
    drifted = basis * (1 + 2e-4)
    assert orthonormality.departure_from_orthonormality(orthonormality.nearest_orthonormal(drifted)) < ROUNDING


# In the optimizer.


STEPS, SHAPE = 60, (40, 6)


def gradients(seed: int = 0) -> jax.Array:
    rng = np.random.default_rng(seed)
    scales = np.multiply.outer(*[2.0 ** -np.linspace(0, 3, d) for d in SHAPE])
    return jnp.asarray(rng.normal(size=(STEPS, *SHAPE)) * scales, jnp.float32)


@functools.cache
def run_of(method: Any) -> Callable[..., Any]:
    """Gives the updates and the stacks of all steps; one program for all tests of a method."""

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


@pytest.mark.parametrize("method", METHODS)
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


@pytest.mark.parametrize("method", METHODS)
def test_bases_follow_factors_and_stay_orthonormal(method: str) -> None:
    _, stack = run_of(method)(gradients(), 1)
    for factors, bases in zip(stack.factors, stack.bases, strict=True):
        found, idle = (mass(factors[-1, 0], bases[call, 0]) for call in (-1, 1))
        # The last gradient's turn is left to do, and more where a quarter turns at a time.
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


@pytest.mark.parametrize("method", METHODS)
def test_a_large_factor_of_low_rank_leaves_every_basis_finite(method: Any) -> None:
    """It has no Cholesky factor, and its 256 columns are many enough for XLA to miss the NaN."""
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


@pytest.mark.parametrize("method", METHODS)
def test_a_refresh_from_a_factor_that_is_not_finite_is_refused_by_every_method(
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
        kept = stack_of(after)
        assert kept.rejected_refreshes.tolist() == [1]
        assert kept.refreshes.tolist() == stack.refreshes.tolist()
        assert np.isfinite(updates).all()
        for new, old in zip(kept.bases, stack.bases, strict=True):
            np.testing.assert_array_equal(new, old)
        # The next one starts from the basis that was kept.
        healed = after._replace(stacks={"40x6": kept._replace(factors=stack.factors)})
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
    matrix = jax.ShapeDtypeStruct((length, length), jnp.float32)
    exported = jax.export.export(jax.jit(refresh_methods.METHODS["auto"]), platforms=[platform])(
        matrix, matrix, matrix
    )
    calls = re.findall(r"custom_call @(\w+)", exported.mlir_module())
    assert {call for call in calls if "sharding" not in call.lower()} == decompositions
