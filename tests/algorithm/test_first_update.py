"""`first_update="apply"`: the first gradient makes bases, and an update in them.

`test_reference_agreement` compares its steps with the NumPy reference.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import kl_reference, reference
from helpers.cases import mostly_long, named
from helpers.one_matrix import gradients

import soap_optax
from soap_optax.algorithm.first_gradient import unresolved

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    **{name: {"refresh": name} for name in ("cholesky_qr", "eigh", "jacobi", "partial", "auto")},
    "tolerance": {"refresh_tolerance": 0.1},
    "after": {"refresh_order": "after_gradient"},
    "stagger": {"stagger": True},
    "kl": {"factor_estimator": "kl"},
    "kl after": {"factor_estimator": "kl", "refresh_order": "after_gradient"},
    "factored": {"factored": True},
    "folded": {"fold_factors": True},
    "mu in bfloat16": {"mu_dtype": jnp.bfloat16},
    "padding": {"stack_multiple": 3},
}
# One tree for many tests, so that they share a program.
GRADS = {"w": jnp.asarray(gradients(1)[0]), "b": jnp.asarray([2.0, -3.0, 0.0, 1e-3])}


@functools.cache
def update_of(**options: Any) -> Any:
    return jax.jit(soap_optax.scale_by_soap(first_update="apply", **options).update)


def first_update(grads: Any, **options: Any) -> tuple[Any, soap_optax.ScaleBySoapState]:
    state = soap_optax.scale_by_soap(first_update="apply", **options).init(grads)
    return update_of(**options)(grads, state)


def matrix_of(singular_values: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A matrix with these singular values, as `U, V` and the matrix itself in float32."""
    rng, columns = np.random.default_rng(0), len(singular_values)
    left = np.linalg.qr(rng.normal(size=(rows, columns)))[0]
    right = np.linalg.qr(rng.normal(size=(columns, columns)))[0]
    return left, right, (left * singular_values @ right.T).astype(np.float32)


# What the first update is -------------------------------------------------------------------------


@pytest.mark.parametrize("name", mostly_long(OPTIONS, ["defaults"]))
def test_the_first_update_of_a_matrix_is_its_polar_factor(name: str) -> None:
    left, right, grad = matrix_of(np.linspace(1, 3, 12), rows=20)
    update, state = first_update({"w": jnp.asarray(grad)}, **OPTIONS[name])
    # Bases have errors of 1e-6 over the gaps between the squares of singular values; bfloat16
    # rounds by 4e-3.
    tolerance = 5e-3 if name == "mu in bfloat16" else 1e-4
    np.testing.assert_allclose(update["w"], left @ right.T, rtol=0, atol=tolerance)
    stack = state.stacks["20x12"]
    for counter, wanted in (("accepted_gradients", 1), ("age", 1), ("refreshes", 1)):
        assert getattr(stack, counter)[0] == wanted, counter


@pytest.mark.parametrize(
    ("dtype", "smallest"),
    [
        pytest.param(jnp.float32, 1e-3, id="float32"),
        pytest.param(jnp.bfloat16, 0.1, id="bfloat16", marks=pytest.mark.long),
    ],
)
def test_errors_of_the_first_bases_add_nothing_to_the_first_update(
    dtype: Any, smallest: float
) -> None:
    """Without a floor, the norm was 45 in place of 9.5, and 127 in place of 5.8 in bfloat16."""
    left, right, grad = matrix_of(np.logspace(0, -4, 128), rows=128)
    update, _ = first_update({"w": jnp.asarray(grad)}, preconditioner_dtype=dtype)
    rotated = left.T @ np.asarray(update["w"], float) @ right
    resolved = np.logspace(0, -4, 128) > 2 * smallest
    # Directions near the level may count in part, and neighbors may mix. No entry is above one.
    assert np.sum(rotated**2) < 1.2 * np.sum(np.logspace(0, -4, 128) > smallest)
    assert np.sum(np.diag(rotated)[resolved]) > 0.85 * np.sum(resolved)


@pytest.mark.long
def test_the_first_update_has_at_most_the_norm_of_adams() -> None:
    rng = np.random.default_rng(1)
    shapes = {"tall": (30, 4), "wide": (4, 30), "tensor": (4, 5, 6), "vector": (7,), "one": (1, 5)}
    grads = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    updates, _ = first_update(grads, precondition_1d=True, max_precond_dim=20)
    for name, update in updates.items():
        assert 0.5 < np.linalg.norm(update) <= np.sqrt(update.size) * 1.001, name
    # With one factor, each rotated entry has size one.
    np.testing.assert_allclose(np.linalg.norm(updates["tall"]), np.sqrt(120), rtol=1e-4)


def test_a_leaf_without_a_preconditioner_gets_the_signs_of_its_gradient() -> None:
    updates, state = first_update(GRADS)
    # `eps` is added before the bias correction: 1e-8 over 1e-3 times the root of 0.05.
    np.testing.assert_allclose(updates["b"], [1, -1, 0, 1], rtol=0, atol=1e-4)
    assert state.adam["float32"].accepted_gradients.tolist() == [1]


def test_a_gradient_of_zeros_gets_a_first_update_of_zero() -> None:
    update, state = first_update(jax.tree.map(jnp.zeros_like, GRADS))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(update))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


@pytest.mark.long
def test_normalized_first_updates_have_a_root_mean_square_of_one() -> None:
    updates, _ = first_update(GRADS, normalize_grads=True, correct_bias=False)
    for update in updates.values():
        np.testing.assert_allclose(jnp.sqrt(jnp.mean(jnp.square(update))), 1, rtol=1e-5)


# What it changes, and what it does not ------------------------------------------------------------


def test_the_state_has_the_same_leaves_with_and_without_it() -> None:
    params = {"w": jnp.ones((6, 4)), "b": jnp.ones(4)}
    applied, zero = (
        soap_optax.scale_by_soap(first_update=choice).init(params) for choice in ("apply", "zero")
    )
    jax.tree.map(np.testing.assert_array_equal, applied, zero)


def test_schedules_count_the_first_update() -> None:
    def frequency(count: Any) -> jax.Array:
        return jnp.where(count < 2, 1, 100)

    optimizer: Any = soap_optax.scale_by_soap(
        first_update="apply", precondition_frequency=frequency
    )
    update, state = jax.jit(optimizer.update), optimizer.init(GRADS)
    refreshes = []
    for _ in range(4):
        _, state = update(GRADS, state)
        refreshes.append(int(state.stacks["6x4"].refreshes[0]))
    assert refreshes == [1, 2, 2, 2]  # After 0, 1, 2 and 3 updates.


@pytest.mark.parametrize("stagger", mostly_long([False, True], [True]))
def test_refreshes_are_due_by_the_number_of_updates_from_the_first_call_on(stagger: bool) -> None:
    options: dict[str, Any] = {"precondition_frequency": 3, "stagger": stagger}
    state: Any = soap_optax.scale_by_soap(**options).init(jnp.ones((6, 4)))
    refreshes = []
    for grad in gradients(10):
        _, state = update_of(**options)(jnp.asarray(grad), state)
        refreshes.append(int(state.stacks["6x4"].refreshes[0]))
    assert refreshes == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4]


@pytest.mark.long
@pytest.mark.parametrize("name", ["stagger", "folded", "padding", "cholesky_qr"])
def test_options_that_change_no_equation_change_no_later_update(name: str) -> None:
    runs = []
    for extra in ({}, OPTIONS[name]):
        options: dict[str, Any] = {"precondition_frequency": 1} | extra
        state: Any = soap_optax.scale_by_soap(**options).init(jnp.ones((4, 4)))
        updates = []
        for grad in gradients(8, (4, 4)):
            update, state = update_of(**options)(jnp.asarray(grad), state)
            updates.append(update)
        runs.append(np.stack(updates))
    np.testing.assert_allclose(*runs, rtol=0, atol=1e-3)  # Rounding, over the eigenvalues' gaps.


# Against the reference of KL factors --------------------------------------------------------------


@pytest.mark.long
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        pytest.param((5, 5), {"precondition_frequency": 1}, id="square"),
        pytest.param(
            (5, 5),
            {"precondition_frequency": 3, "refresh_order": "after_gradient"},
            id="square after",
        ),
        pytest.param((3, 4, 3), {"precondition_frequency": 2}, id="three axes"),
        pytest.param((4, 9), {"precondition_frequency": 2, "one_sided": True}, id="one-sided"),
    ],
)
def test_kl_soap_equals_the_reference_from_the_first_gradient_on(
    shape: reference.Shape, options: dict[str, Any]
) -> None:
    grads = np.random.default_rng(3).normal(size=(12, *shape))
    optimizer: Any = soap_optax.scale_by_soap(factor_estimator="kl", **options)
    state = optimizer.init(jnp.asarray(grads[0]))
    directions = []
    for grad in grads:
        update, state = update_of(factor_estimator="kl", **options)(jnp.asarray(grad), state)
        directions.append(update)
    expected, last = kl_reference.run(grads, reference.Options(first_update="apply", **options))
    # Rounding, 1e-16, times the condition of the first factors, up to 1e4 here.
    np.testing.assert_allclose(np.stack(directions), expected, rtol=0, atol=1e-8)
    [stack] = state.stacks.values()
    for number, axis in enumerate(sorted(last.eigenvalues)):
        found, wanted = np.sort(stack.eigenvalues[number][0]), np.sort(last.eigenvalues[axis])
        np.testing.assert_allclose(found, wanted, rtol=1e-8)


# Guards -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", mostly_long(named({"before": {}, "after, kl": OPTIONS["kl after"]}), ["before"])
)
def test_a_rejected_first_gradient_leaves_the_next_one_the_first(options: dict[str, Any]) -> None:
    bad = {"w": GRADS["w"].at[1, 2].set(jnp.nan), "b": GRADS["b"].at[0].set(jnp.inf)}
    update = update_of(**options)
    start: Any = soap_optax.scale_by_soap(**options).init(GRADS)
    nothing, state = update(bad, start)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(nothing))
    found, later = update(GRADS, state)
    wanted, expected = update(GRADS, start)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert later.stacks["6x4"].rejected_gradients == 1
    without_count = later.stacks["6x4"]._replace(
        rejected_gradients=expected.stacks["6x4"].rejected_gradients
    )
    jax.tree.map(np.testing.assert_array_equal, without_count, expected.stacks["6x4"])


@pytest.mark.long
def test_blocks_whose_first_gradient_comes_later_start_then() -> None:
    first, second = gradients(2)
    state: Any = soap_optax.scale_by_soap().init({"a": jnp.asarray(first), "b": jnp.asarray(first)})
    bad = jnp.full((6, 4), jnp.nan)
    _, state = update_of()({"a": jnp.asarray(first), "b": bad}, state)
    together, _ = update_of()({"a": jnp.asarray(second), "b": jnp.asarray(second)}, state)
    alone, _ = first_update({"w": jnp.asarray(second)})
    np.testing.assert_allclose(together["b"], alone["w"], rtol=0, atol=1e-6)
    assert np.abs(together["a"] - together["b"]).max() > 0.1


@pytest.mark.long
@pytest.mark.parametrize("factored", [False, True])
def test_if_the_first_bases_are_rejected_the_first_update_is_adams(factored: bool) -> None:
    grad = GRADS["w"]
    state: Any = soap_optax.scale_by_soap(factored=factored).init(grad)
    stack = state.stacks["6x4"]
    unsound = (stack.factors[0].at[0, 0, 0].set(jnp.nan), stack.factors[1])
    state = state._replace(stacks={"6x4": stack._replace(factors=unsound)})
    update, state = update_of(factored=factored)(grad, state)
    # `eps` is 1e-8 beside a fifth of the gradient, whose smallest entry is above 1e-3.
    np.testing.assert_allclose(update, np.sign(grad), rtol=0, atol=1e-3)
    assert state.stacks["6x4"].rejected_refreshes == 1
    assert np.isfinite(state.stacks["6x4"].mu).all()


def test_the_level_of_errors_follows_the_dtypes() -> None:
    np.testing.assert_allclose(unresolved(jnp.float32, jnp.float32), 1.4e-3, rtol=0.02)
    np.testing.assert_allclose(unresolved(jnp.float32, jnp.bfloat16), 0.0884, rtol=0.02)
    np.testing.assert_allclose(unresolved(jnp.float64, jnp.float64), 6e-8, rtol=0.02)
