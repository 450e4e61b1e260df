"""Storage options change the size of the state, and updates only by the information they lose."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cases import mostly_long
from helpers.states import put_full_rank_factors

import soap_optax
from soap_optax.algorithm import second_moment
from soap_optax.linalg import triangle

Tree = dict[str, jax.Array]
State = Any  # A `ScaleBySoapState`, but Optax's signatures say any tree.

BFLOAT16 = jnp.bfloat16
LEAST: dict[str, Any] = {
    "mu_dtype": BFLOAT16,
    "preconditioner_dtype": BFLOAT16,
    "fold_factors": True,
    "factored": True,
    "one_sided": True,
}
STORAGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one sided": {"one_sided": True},
    "factored": {"factored": True},
    "bfloat16 mu": {"mu_dtype": BFLOAT16},
    "bfloat16 preconditioner": {"preconditioner_dtype": BFLOAT16},
    "folded": {"fold_factors": True},
    "least": LEAST,
}
every_storage = pytest.mark.parametrize(
    "storage", mostly_long(STORAGES, ["plain", "factored", "least"])
)

# Blocks have an odd and an even length, and two of them share a stack.
SHAPES = {"first": (5, 4), "second": (5, 4), "vector": (5,)}
CALLS, FREQUENCY = 30, 4


def gradients(calls: int = CALLS) -> Tree:
    """Gradients of `calls` steps, `(calls, *shape)`, some rows and columns larger than others.

    A rotation mixes each axis, so that no factor is nearly diagonal. No two eigenvalues of a factor
    are close, so that rounding changes bases little.
    """
    rng = np.random.default_rng(0)
    grads = {}
    for name, shape in SHAPES.items():
        grad = rng.normal(size=(calls, *shape))
        for axis, length in enumerate(shape, start=1):
            mixing, _ = np.linalg.qr(rng.normal(size=(length, length)))
            mixing = mixing * 0.6 ** np.arange(length)
            grad = np.moveaxis(np.tensordot(mixing, grad, (1, axis)), 0, axis)
        grads[name] = jnp.asarray(grad, jnp.float32)
    return grads


def optimizer_of(storage: str) -> Any:
    options = STORAGES[storage]
    return soap_optax.scale_by_soap(precondition_frequency=FREQUENCY, **options)


@functools.cache
def step_of(storage: str) -> Any:
    return jax.jit(optimizer_of(storage).update)


@functools.cache
def run(storage: str) -> tuple[list[Tree], list[State]]:
    """Updates of every call and states after it, from factors without a null space.

    A null space has no unique basis, so that two programs would not agree on it.
    """
    grads = gradients()
    zeros = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
    state = put_full_rank_factors(optimizer_of(storage).init(zeros))
    updates, states = [], []
    for call in range(CALLS):
        update, state = step_of(storage)({name: grad[call] for name, grad in grads.items()}, state)
        updates.append(update)
        states.append(state)
    return updates, states


def stored_plainly(state: State, storage: str) -> State:
    """The same state, in the storage of `init` without these options."""

    def plain(stack: soap_optax.StackState) -> soap_optax.StackState:
        lengths = [basis.shape[-1] for basis in stack.bases]
        factors = [
            jax.vmap(functools.partial(triangle.unfolded, d=d))(factor)
            for factor, d in zip(stack.factors, lengths, strict=True)
        ]
        stack = stack._replace(
            factors=tuple(factors), nu=jax.vmap(second_moment.estimate)(stack.nu)
        )
        return jax.tree.map(
            lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == BFLOAT16 else leaf, stack
        )

    return state._replace(stacks={name: plain(stack) for name, stack in state.stacks.items()})


# Size.


def bytes_of(m: int, n: int, options: dict[str, Any]) -> int:
    """The bytes of one matrix's state, by the documented formula."""
    narrow = 2 if "preconditioner_dtype" in options else 4
    preconditioned = [min(m, n)] if "one_sided" in options else [m, n]
    bases = sum(d**2 for d in preconditioned)
    # Every row of a rectangle holds two rows of a triangle, d + 1 entries together.
    factors = sum(
        (d + 1) // 2 * (d + 1) if "fold_factors" in options else d**2 for d in preconditioned
    )
    mu = m * n * (2 if "mu_dtype" in options else 4)
    nu = 4 * (m + n if "factored" in options else m * n)
    counters = 5 * 4
    return narrow * (bases + factors) + mu + nu + counters


@pytest.mark.parametrize(
    ("storage", "square", "oblong"),
    [
        ("plain", 24.00, 42.00),
        ("one sided", 16.00, 10.00),
        ("factored", 20.02, 38.01),
        ("bfloat16 mu", 22.00, 40.00),
        ("bfloat16 preconditioner", 16.00, 25.00),
        ("folded", 20.01, 33.50),
        ("least", 5.02, 2.76),
    ],
)
def test_state_takes_so_many_bytes_per_parameter(
    storage: str, square: float, oblong: float
) -> None:
    for shape, per_parameter in (((512, 512), square), ((512, 2048), oblong)):
        params = jax.ShapeDtypeStruct(shape, jnp.float32)
        description = soap_optax.describe(params, **STORAGES[storage])
        (row,) = description.rows
        assert row.state_bytes == bytes_of(*shape, STORAGES[storage])
        assert description.shared_bytes == 8  # The layout's version and the count of calls.
        assert round(row.state_bytes / math.prod(shape), 2) == per_parameter


@every_storage
@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (5, 5)], ids=str)
def test_formula_holds_for_odd_lengths(storage: str, shape: tuple[int, int]) -> None:
    options = STORAGES[storage]
    (row,) = soap_optax.describe(jax.ShapeDtypeStruct(shape, jnp.float32), **options).rows
    assert row.state_bytes == bytes_of(*shape, options)


@every_storage
def test_only_what_is_stored_narrowly_is_narrow_and_stays_so(storage: str) -> None:
    options = STORAGES[storage]
    mu, preconditioner = (
        jnp.dtype(options.get(name, jnp.float32)) for name in ("mu_dtype", "preconditioner_dtype")
    )
    updates, states = run(storage)
    assert {update.dtype.name for update in updates[-1].values()} == {"float32"}
    for state in (states[0], states[-1]):
        for stack in state.stacks.values():
            assert {leaf.dtype for leaf in (*stack.factors, *stack.bases)} == {preconditioner}
            assert {leaf.dtype for leaf in jax.tree.leaves(stack.nu)} == {jnp.dtype("float32")}
            assert isinstance(stack.nu, tuple) == ("factored" in options)
        for part in (*state.stacks.values(), *state.adam.values()):
            assert part.mu.dtype == mu


# Properties of every storage.


@every_storage
def test_refreshes_are_made_when_due_and_none_is_rejected(storage: str) -> None:
    _, states = run(storage)
    due = math.ceil((CALLS - 1) / FREQUENCY)  # Calls 1, 5, 9 and so on.
    for stack in states[-1].stacks.values():
        assert stack.refreshes.tolist() == [due] * len(stack.age)
        assert stack.rejected_refreshes.tolist() == [0] * len(stack.age)
    # The last basis is not the first one: its columns have rotated.
    first, last = (np.asarray(s.stacks["5x4"].bases[-1], float) for s in (states[1], states[-1]))
    assert np.abs(np.sum(first * last, axis=1)).min() < 0.99


@every_storage
def test_a_rejected_gradient_changes_no_bit_but_its_counter(storage: str) -> None:
    _, states = run(storage)
    for call in (2, 1 + FREQUENCY):  # After the second of these a refresh is due.
        grads = {name: jnp.full(shape, jnp.nan, jnp.float32) for name, shape in SHAPES.items()}
        updates, after = step_of(storage)(grads, states[call - 1])
        assert all(not update.any() for update in updates.values())
        for (path, new), old in zip(
            jax.tree_util.tree_leaves_with_path(after),
            jax.tree.leaves(states[call - 1]),
            strict=True,
        ):
            name = jax.tree_util.keystr(path)
            if name.endswith(".rejected_gradients"):
                assert (new == old + 1).all()
            elif not name.endswith(".count"):
                assert np.asarray(new).tobytes() == np.asarray(old).tobytes(), name


@every_storage
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-20, 1e-10, 1e15])
def test_gradients_of_any_size_leave_nothing_that_is_not_finite(storage: str, size: float) -> None:
    grads = gradients(FREQUENCY + 2)
    state = optimizer_of(storage).init({name: grad[0] for name, grad in grads.items()})
    for call in range(FREQUENCY + 2):
        grad = {name: size * leaf[call] for name, leaf in grads.items()}
        updates, state = step_of(storage)(grad, state)
        for leaf in jax.tree.leaves((updates, state)):
            assert np.isfinite(np.asarray(leaf, np.float64)).all()
        if not size:
            assert all(not update.any() for update in updates.values())


@pytest.mark.parametrize("storage", mostly_long(STORAGES, []))
def test_diagnostics_are_those_of_the_same_state_stored_plainly(storage: str) -> None:
    state = run(storage)[1][-1]
    found = soap_optax.diagnostics(state, sample=None)
    wanted = soap_optax.diagnostics(stored_plainly(state, storage), sample=None)
    assert found.keys() == wanted.keys()
    for name, scalar in wanted.items():
        # Both read the same numbers in float32. An orthonormal basis departs by rounding only.
        assert float(found[name]) == pytest.approx(float(scalar), rel=1e-5, abs=1e-6), name
    assert 0.01 < float(found["soap/5x4/off_diagonal_mass"]) < 1


# Folded factors.


def test_folded_factors_change_no_update_and_no_state() -> None:
    (updates, states), (plain_updates, plain_states) = run("folded"), run("plain")
    # Two programs compute updates of size 1. They round by 6e-8 in some ten operations of 30 steps.
    for update, wanted in zip(updates, plain_updates, strict=True):
        for name, leaf in wanted.items():
            np.testing.assert_allclose(update[name], leaf, rtol=0, atol=1e-4)
    last = stored_plainly(states[-1], "folded")
    assert jax.tree.structure(last) == jax.tree.structure(plain_states[-1])
    for found, wanted in zip(jax.tree.leaves(last), jax.tree.leaves(plain_states[-1]), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)


# A narrow preconditioner.


@pytest.mark.long
def test_refresh_from_a_narrow_preconditioner_is_the_wide_one_of_the_same_numbers() -> None:
    storage = "bfloat16 preconditioner"
    _, states = run(storage)
    for call in range(1 + FREQUENCY, CALLS, 2 * FREQUENCY):  # In these calls a refresh is due.
        before = states[call - 1]
        grads = {name: grad[call] for name, grad in gradients().items()}
        _, narrow = step_of(storage)(grads, before)
        _, wide = step_of("plain")(grads, stored_plainly(before, storage))
        for name, stack in narrow.stacks.items():
            assert (stack.refreshes == before.stacks[name].refreshes + 1).all()
            for found, wanted in zip(stack.bases, wide.stacks[name].bases, strict=True):
                # One rounding is half of bfloat16's spacing below 1, which is 2^-8. Half as much
                # again allows for the rounding of two programs. Products in bfloat16 would add up
                # many roundings.
                np.testing.assert_allclose(found.astype(float), wanted, rtol=0, atol=1.5 * 2.0**-9)


@pytest.mark.long
@pytest.mark.parametrize("storage", ["bfloat16 preconditioner", "bfloat16 mu"])
def test_updates_from_narrow_storage_stay_near_those_from_wide(storage: str) -> None:
    (updates, _), (plain_updates, _) = run(storage), run("plain")
    for update, wanted in zip(updates, plain_updates, strict=True):
        for name, leaf in wanted.items():
            # A bfloat16 rounds by up to 2^-9, 0.2 percent. Close eigenvalues amplify that in bases.
            # The largest difference seen is two percent. An update from a wrong basis would differ
            # by its whole size.
            assert jnp.linalg.norm(update[name] - leaf) <= 0.05 * jnp.linalg.norm(leaf)


@pytest.mark.usefixtures("x64")
def test_nothing_is_stored_wider_than_it_is_computed() -> None:
    """The float32 leaf has float32 statistics. A wider dtype would add no digit to them."""
    params = {"wide": jnp.zeros((3, 2), jnp.float64), "narrow": jnp.zeros((3, 2), jnp.float32)}
    optimizer = soap_optax.scale_by_soap(mu_dtype=float, preconditioner_dtype=np.float64)
    state: State = optimizer.init(params)
    for name, dtype in (("3x2", np.float32), ("3x2_float64", np.float64)):
        stack = state.stacks[name]
        arrays = [stack.mu, stack.nu, *stack.factors, *stack.bases]
        assert {array.dtype for array in arrays} == {np.dtype(dtype)}
