"""Stacks under Shampoo: rejected gradients and refreshes, rows without a gradient, storage."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cases import mostly_long
from helpers.states import put_full_rank_factors as full_rank
from optax.contrib import MuonDimensionNumbers

import soap_optax
from soap_optax import algorithm

NAME = "6x4"
SHAPES = {"first": (6, 4), "second": (6, 4), "vector": (5,)}
FREQUENCY = 3


@functools.cache
def step_of(**options: Any) -> Callable[..., Any]:
    """One jitted step for each set of static options, the frequency traced."""

    @jax.jit
    def step(grads: Any, state: Any, frequency: int) -> Any:
        optimizer = soap_optax.scale_by_shampoo(precondition_frequency=frequency, **options)
        return optimizer.update(grads, state)

    return step


def gradients(count: int = 12) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [
        {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
        for _ in range(count)
    ]


def run(calls: int, frequency: int = FREQUENCY, **options: Any) -> Any:
    """The state after some calls."""
    state = soap_optax.scale_by_shampoo(**options).init(gradients()[0])
    for grads in gradients(calls):
        _, state = step_of(**options)(grads, state, frequency)
    return state


def with_factor(state: Any, block: int, factor: Any) -> Any:
    """The state with another first factor of one block."""
    stack = state.stacks[NAME]
    factors = (stack.factors[0].at[block].set(factor), *stack.factors[1:])
    return state._replace(stacks={NAME: stack._replace(factors=factors)})


@pytest.mark.long
def test_refreshes_are_due_as_with_soap() -> None:
    shampoo, soap = run(9), soap_optax.scale_by_soap(precondition_frequency=FREQUENCY)
    update, state = jax.jit(soap.update), soap.init(gradients()[0])
    for grads in gradients(9):
        _, state = update(grads, state)
    for name in ("age", "refreshes", "rejected_refreshes", "accepted_gradients"):
        found, wanted = (getattr(s.stacks[NAME], name).tolist() for s in (shampoo, state))  # pyright: ignore[reportAttributeAccessIssue]  # a tree
        assert found == wanted
    assert state.stacks[NAME].refreshes.tolist() == [3, 3]  # pyright: ignore[reportAttributeAccessIssue]


# Rejected gradients and refreshes.


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e19])
@pytest.mark.parametrize("call", mostly_long([0, 1, 4, 6], [4]))  # Refreshes are due at 1 and 4.
def test_an_unacceptable_gradient_changes_nothing_of_its_block_but_a_counter(
    value: float, call: int
) -> None:
    before, grads = run(call), gradients(call + 1)[call]
    good_updates, good = step_of()(grads, before, FREQUENCY)
    bad = dict(grads, first=grads["first"].copy())
    bad["first"][2, 3] = value
    updates, after = step_of()(bad, before, FREQUENCY)
    np.testing.assert_array_equal(updates["first"], np.zeros((6, 4)))
    np.testing.assert_array_equal(updates["second"], good_updates["second"])
    stack = after.stacks[NAME]
    assert stack.rejected_gradients.tolist() == [1, 0]
    same = stack._replace(rejected_gradients=before.stacks[NAME].rejected_gradients)
    for found, old, good_leaf in zip(
        *map(jax.tree.leaves, (same, before.stacks[NAME], good.stacks[NAME])), strict=True
    ):
        np.testing.assert_array_equal(found[0], old[0])
        np.testing.assert_array_equal(found[1], good_leaf[1])


# The last three differ from a symmetric positive matrix by far more than rounding.
UNSOUND = {
    "nan": np.full((6, 6), np.nan),
    "infinity": np.diag([np.inf, 1, 1, 1, 1, 1]),
    "negative": -np.eye(6),
    "slightly indefinite": np.diag([2, 1, 1, 1, 1, -0.01]),
    "not symmetric": np.diag([2, 1, 1, 1, 1, 1]) + 0.01 * np.eye(6, k=1),
}


@pytest.mark.parametrize("name", UNSOUND)
def test_an_unsound_refresh_leaves_the_old_roots_and_is_counted(name: str) -> None:
    before = run(4)
    broken = with_factor(before, 1, UNSOUND[name])
    grads = gradients(5)[4]
    updates, after = step_of(refresh_order="before_gradient")(grads, broken, FREQUENCY)
    stack, old = after.stacks[NAME], before.stacks[NAME]
    assert stack.rejected_refreshes.tolist() == [0, 1]
    assert stack.refreshes.tolist() == [2, 1]
    assert stack.age.tolist() == [1, 1]
    for new_root, old_root in zip(stack.roots, old.roots, strict=True):
        np.testing.assert_array_equal(new_root[1], old_root[1])
        assert np.any(new_root[0] != old_root[0])
        assert np.all(np.isfinite(new_root))
    # The update of the block is that of a step without a refresh.
    plain, _ = step_of(refresh_order="before_gradient")(grads, before, 1000)
    np.testing.assert_array_equal(updates["second"], plain["second"])
    assert np.all(np.isfinite(updates["first"]))


@pytest.mark.parametrize("argument", ["exponent", "eps"])
def test_roots_that_are_not_finite_are_rejected(argument: str) -> None:
    """A traced argument can become NaN during a run, as from a schedule."""
    before, grads = run(4), gradients(5)[4]

    @jax.jit
    def step(value: float) -> Any:
        options: Any = {argument: value}
        optimizer = soap_optax.scale_by_shampoo(precondition_frequency=1, **options)
        return optimizer.update(grads, before)

    updates, after = step(np.nan)
    stack, old = after.stacks[NAME], before.stacks[NAME]
    np.testing.assert_array_equal(stack.rejected_refreshes, old.rejected_refreshes + 1)
    for new_root, old_root in zip(stack.roots, old.roots, strict=True):
        np.testing.assert_array_equal(new_root, old_root)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((updates, after)))


def test_a_rejected_first_refresh_leaves_the_identity_and_is_tried_again() -> None:
    state = with_factor(run(1), 0, UNSOUND["negative"])
    step = step_of(refresh_order="before_gradient")
    updates, state = step(gradients()[1], state, FREQUENCY)
    stack = state.stacks[NAME]
    assert (stack.refreshes.tolist(), stack.rejected_refreshes.tolist()) == ([0, 1], [1, 0])
    np.testing.assert_array_equal(stack.roots[0][0], np.eye(6))
    # The direction is then that of momentum, with the norm of Adam's update, all signs.
    expected = gradients()[1]["first"]
    expected = expected * (np.sqrt(24) / np.linalg.norm(expected))
    np.testing.assert_allclose(updates["first"], expected, rtol=1e-5)
    _, state = step(gradients()[2], with_factor(state, 0, np.eye(6)), FREQUENCY)
    assert state.stacks[NAME].refreshes.tolist() == [1, 1]


def test_factors_with_a_null_space_are_sound() -> None:
    """Rounding makes eigenvalues of a null space negative, by about a machine epsilon."""
    optimizer = soap_optax.scale_by_shampoo(precondition_frequency=1)
    update, state = jax.jit(optimizer.update), optimizer.init(jnp.zeros((64, 3)))
    for call in range(6):
        rng = np.random.default_rng(call)
        grad = np.outer(rng.normal(size=64), rng.normal(size=3)).astype(np.float32)
        updates, state = update(jnp.asarray(grad), state)
        assert np.all(np.isfinite(updates))
    stack: Any = state.stacks["64x3"]  # pyright: ignore[reportAttributeAccessIssue]  # a tree
    assert (stack.refreshes.tolist(), stack.rejected_refreshes.tolist()) == ([5], [0])


def test_eigenvalues_below_rounding_are_raised_to_it() -> None:
    factor = jnp.diag(jnp.asarray([4.0, 1.0, 1e-9, 1e-20]))
    level = 1e-6
    found = algorithm.inverse_root(factor, jnp.float32(1e-12), jnp.float32(0.5), level, 1e-3)
    assert found.is_sound
    expected = np.diag([0.5, 1, (4 * level) ** -0.5, (4 * level) ** -0.5])
    np.testing.assert_allclose(found.root, expected, rtol=1e-5)


@pytest.mark.long
def test_a_direction_that_overflows_gives_a_zero_update() -> None:
    options = {"exponent": 1.0, "eps": 1e-30, "grafting": None, "correct_bias": False}
    optimizer = soap_optax.scale_by_shampoo(**options)
    tiny = jnp.full((4, 4), 1e-15, jnp.float32)
    _, state = optimizer.update(tiny, optimizer.init(tiny))
    _, state = optimizer.update(tiny, state)
    updates, state = optimizer.update(jnp.full((4, 4), 1e12, jnp.float32), state)
    np.testing.assert_array_equal(updates, np.zeros((4, 4)))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))


# Rows without a gradient.

CALLS, REVIVED = 7, 4
LAYERS = MuonDimensionNumbers(reduction_axis=1, output_axis=2)
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "every step": {"precondition_frequency": 1, "exponent": 0.5},
    "before_gradient": {"precondition_frequency": 2, "refresh_order": "before_gradient"},
    "staggered": {"precondition_frequency": 3, "stagger": True},
    "folded": {"fold_factors": True, "precondition_frequency": 2},
    "bfloat16": {
        "preconditioner_dtype": jnp.bfloat16,
        "mu_dtype": jnp.bfloat16,
        "precondition_frequency": 2,
    },
    "tiles": {"block_size": 7, "precondition_frequency": 2},
    "one-sided": {"one_sided": True, "precondition_frequency": 2},
    "layers": {"dimension_numbers": LAYERS, "precondition_frequency": 2},
    "no grafting": {"grafting": None, "precondition_frequency": 2},
    "sgd": {"grafting": "sgd", "precondition_frequency": 2},
    "rmsprop": {"grafting": "rmsprop", "precondition_frequency": 2},
}


@pytest.mark.parametrize("name", mostly_long(OPTIONS, ["every step", "bfloat16"]))
def test_rows_and_columns_without_a_gradient_get_an_update_of_exactly_zero(name: str) -> None:
    shape = (2, 24, 16) if name == "layers" else (24, 16)
    rows, columns = np.arange(24) % 3 == 0, np.arange(16) % 5 == 2
    optimizer = soap_optax.scale_by_shampoo(**OPTIONS[name])
    update, state = jax.jit(optimizer.update), optimizer.init(jnp.zeros(shape))
    for call in range(CALLS):
        grad = np.random.default_rng(call).normal(size=shape).astype(np.float32)
        never = rows & (np.arange(24) != 3 if call >= REVIVED else True)
        grad[..., never, :] = 0
        grad[..., columns] = 0
        found, state = update(jnp.asarray(grad), state)
        found = np.asarray(found)
        assert np.all(found[..., never, :] == 0)
        assert np.all(found[..., columns] == 0)
        if call >= 1:
            assert np.all(np.abs(found[..., ~never, :][..., ~columns]).max(axis=-1) > 0)


# Storage.


@pytest.mark.parametrize("grafting", ["adam", "rmsprop", "sgd", None])
def test_a_second_moment_is_stored_only_where_grafting_needs_it(grafting: Any) -> None:
    state: Any = soap_optax.scale_by_shampoo(grafting=grafting).init(jnp.zeros((4, 3)))
    stack = state.stacks["4x3"]
    assert [leaf.shape for leaf in jax.tree.leaves(stack.nu)] == [(1, 4, 3)] * (
        grafting in ("adam", "rmsprop")
    )
    assert [root.shape for root in stack.roots] == [(1, 4, 4), (1, 3, 3)]
    assert (stack.bases, stack.eigenvalues) == ((), ())


STORED: dict[str, dict[str, Any]] = {
    "folded": {"fold_factors": True},
    "bfloat16": {"preconditioner_dtype": jnp.bfloat16, "mu_dtype": jnp.bfloat16},
    "all": {
        "preconditioner_dtype": jnp.bfloat16,
        "mu_dtype": jnp.bfloat16,
        "fold_factors": True,
        "grafting": None,
    },
}


@pytest.mark.long
@pytest.mark.parametrize("name", STORED)
def test_storage_changes_updates_by_its_rounding_only(name: str) -> None:
    options = STORED[name]
    plain = {"grafting": options["grafting"]} if "grafting" in options else {}
    # Factors of full rank: a root multiplies rounding errors in a null space.
    state = full_rank(soap_optax.scale_by_shampoo(**options).init(gradients()[0]))
    wanted_state = full_rank(soap_optax.scale_by_shampoo(**plain).init(gradients()[0]))
    dtypes = jax.tree.map(lambda leaf: leaf.dtype, state)
    for grads in gradients(8):
        found, state = step_of(**options)(grads, state, FREQUENCY)
        wanted, wanted_state = step_of(**plain)(grads, wanted_state, FREQUENCY)
        for leaf in SHAPES:
            # Roots and the moment are rounded to 2^-9, and the factors accumulate more.
            tolerance = 1e-5 if name == "folded" else 0.05
            error = np.linalg.norm(found[leaf] - wanted[leaf])
            assert error <= tolerance * np.linalg.norm(wanted[leaf])
    assert jax.tree.map(lambda leaf: leaf.dtype, state) == dtypes
    stack = state.stacks[NAME]
    assert stack.rejected_refreshes.tolist() == [0, 0]
    assert stack.factors[0].shape == ((2, 3, 7) if "fold_factors" in options else (2, 6, 6))


@pytest.mark.usefixtures("x64")
def test_a_state_without_a_second_moment_keeps_its_dtype_of_statistics() -> None:
    narrow = {"mu_dtype": jnp.bfloat16, "preconditioner_dtype": jnp.bfloat16}
    for dtype in (jnp.float32, jnp.float64):
        optimizer = soap_optax.scale_by_shampoo(grafting=None, **narrow)
        state = optimizer.init(jnp.zeros((4, 3), dtype))
        grads = jnp.ones((4, 3), jnp.float64 if dtype == jnp.float32 else jnp.float32)
        updates, after = jax.eval_shape(optimizer.update, grads, state)
        assert updates.dtype == grads.dtype  # pyright: ignore[reportAttributeAccessIssue]  # a tree
        jax.tree.map(lambda a, b: np.testing.assert_equal(a.dtype, b.dtype), after, state)


# Tracing.


def test_one_program_serves_plain_steps_and_refreshes_and_copies_of_the_state_stay_equal() -> None:
    optimizer = soap_optax.scale_by_shampoo(precondition_frequency=2, stagger=True)
    update = jax.jit(optimizer.update)
    state = optimizer.init(gradients()[0])
    for grads in gradients(6):
        _, after = update(grads, state)
        for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
            assert (old.shape, old.dtype, old.weak_type) == (new.shape, new.dtype, new.weak_type)
        state = after
    assert update._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]  # jit has it


@pytest.mark.long
def test_updates_over_seeds_under_vmap_equal_those_alone() -> None:
    optimizer = soap_optax.scale_by_shampoo(precondition_frequency=2)
    rng = np.random.default_rng(3)
    grads = jnp.asarray(rng.normal(size=(5, 3, 6, 4)), jnp.float32)  # Calls, seeds.
    state = jax.vmap(optimizer.init)(grads[0])
    update, alone = jax.jit(jax.vmap(optimizer.update)), jax.jit(optimizer.update)
    states = [optimizer.init(grad) for grad in grads[0]]
    for call in grads:
        found, state = update(call, state)
        for seed, grad in enumerate(call):
            wanted, states[seed] = alone(grad, states[seed])
            np.testing.assert_allclose(found[seed], wanted, rtol=0, atol=1e-4)  # pyright: ignore[reportIndexIssue]  # a tree
