"""When bases are refreshed: skipped with a tolerance, staggered, before or after the gradient."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.cases import mostly_long, named

import soap_optax
from soap_optax.stacks import refresh_gating

SHAPE = (12, 5)
NAME = "12x5"
ROUNDING = 1e-5  # The difference of updates of size one between two programs.


def gradients(count: int, blocks: int = 1, seed: int = 0) -> list[dict[str, jax.Array]]:
    rng = np.random.default_rng(seed)
    scales = np.multiply.outer(*[2.0 ** -np.linspace(0, 3, d) for d in SHAPE])
    return [
        {
            f"{block:03}": jnp.asarray(rng.normal(size=SHAPE) * scales, jnp.float32)
            for block in range(blocks)
        }
        for _ in range(count)
    ]


@functools.cache
def step_of(**options: Any) -> Callable[..., Any]:
    """A step that takes the frequency and the tolerance as operands."""

    @jax.jit
    def step(grads: Any, state: Any, frequency: int, tolerance: float | None = None) -> Any:
        optimizer = soap_optax.scale_by_soap(
            precondition_frequency=frequency, refresh_tolerance=tolerance, **options
        )
        return optimizer.update(grads, state)

    return step


def run(grads: list[Any], frequency: int, tolerance: float | None = None, **options: Any) -> Any:
    """The updates and the stacks of all steps."""
    state = soap_optax.scale_by_soap(**options).init(grads[0])
    updates, stacks = [], []
    for grad in grads:
        update, state = step_of(**options)(grad, state, frequency, tolerance)
        updates.append(update)
        stacks.append(state.stacks[NAME])
    return updates, stacks


def assert_close(found: Any, wanted: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=ROUNDING), found, wanted)


# Skipping.


def test_a_tolerance_of_one_skips_every_refresh_but_the_first() -> None:
    grads = gradients(10)
    _, stacks = run(grads, 2, 1.0)
    assert stacks[-1].refreshes.tolist() == [1]
    assert stacks[-1].rejected_refreshes.tolist() == [0]
    for last, first in zip(stacks[-1].bases, stacks[1].bases, strict=True):
        np.testing.assert_array_equal(last, first)


def test_a_block_that_skips_its_refresh_goes_on_as_if_it_had_not_been_due() -> None:
    grads = gradients(10)
    skipping, _ = run(grads, 2, 1.0)
    never, _ = run(grads, 1000)
    assert_close(skipping, never)


@pytest.mark.parametrize("method", mostly_long(["qr", "jacobi", "eigh", "cholesky_qr"], ["qr"]))
def test_a_tolerance_of_zero_skips_nothing(method: Any) -> None:
    grads = gradients(8)
    skipping, stacks = run(grads, 2, 0.0, refresh=method)
    plain, wanted = run(grads, 2, refresh=method)
    assert stacks[-1].refreshes.tolist() == wanted[-1].refreshes.tolist() == [4]
    assert_close(skipping, plain)


def test_only_blocks_beyond_the_tolerance_are_refreshed_and_each_when_it_is_due() -> None:
    """A block's off-diagonal mass is measured as in `diagnostics`, over its factors."""
    grads = gradients(30, blocks=5)
    tolerance, frequency = 0.3, 3
    state: Any = soap_optax.scale_by_soap().init(grads[0])
    skipped = refreshed = 0
    for call, grad in enumerate(grads):
        before = state.stacks[NAME]
        _, state = step_of()(grad, state, frequency, tolerance)
        after = state.stacks[NAME]
        for number in range(5):
            adopted = int(after.refreshes[number] - before.refreshes[number])
            if call <= 1 or before.age[number] < frequency:
                assert adopted == (call == 1)
                continue
            assert after.age[number] == 1
            masses = [
                off_diagonal_mass(factor[number], basis[number])
                for factor, basis in zip(before.factors, before.bases, strict=True)
            ]
            # The test measures in float64, the library in float32.
            if abs(max(masses) - tolerance) > 1e-5:
                assert adopted == (max(masses) > tolerance)
            refreshed += adopted
            skipped += 1 - adopted
    assert min(skipped, refreshed) >= 5  # The test has seen both.


def off_diagonal_mass(factor: Any, basis: Any) -> float:
    basis = np.asarray(basis, np.float64)
    rotated = basis.T @ np.asarray(factor, np.float64) @ basis
    return float(np.linalg.norm(rotated - np.diag(np.diag(rotated))) / np.linalg.norm(rotated))


def test_a_refresh_from_a_non_finite_factor_is_rejected_and_not_skipped() -> None:
    grads = gradients(5)
    _, stacks = run(grads[:4], 1, 1.0)
    state: Any = soap_optax.scale_by_soap().init(grads[0])
    factors = (stacks[-1].factors[0].at[0, 1, 2].set(jnp.nan), stacks[-1].factors[1])
    planted = state._replace(
        stacks={NAME: stacks[-1]._replace(factors=factors)}, count=jnp.int32(4)
    )
    _, after = step_of()(grads[4], planted, 1, 1.0)
    assert after.stacks[NAME].rejected_refreshes.tolist() == [1]


def test_the_tolerance_may_be_injected() -> None:
    optimizer = optax.inject_hyperparams(
        soap_optax.scale_by_soap, static_args=soap_optax.STATIC_ARGS[1:]
    )(refresh_tolerance=0.5)
    state: Any = optimizer.init(gradients(1)[0])
    assert float(state.hyperparams["refresh_tolerance"]) == 0.5


# Staggering.


@pytest.mark.parametrize("frequency", [1, 2, 7])
def test_staggered_blocks_refresh_as_if_each_had_begun_at_another_time(frequency: int) -> None:
    """A block without `stagger` runs the same if its age is set right after the first bases."""
    grads = gradients(20, blocks=5)
    found, stacks = run(grads, frequency, stagger=True)
    offsets = np.floor(refresh_gating.stagger_phases(range(5)) * frequency).astype(int)
    # Call 1 computes the first bases. The next refresh is due in the first call at a block's phase
    # that is at least half a cycle later.
    first = [
        next(
            call
            for call in range(2, 99)
            if call % frequency == offset and 2 * call >= frequency + 2
        )
        for offset in offsets
    ]

    state: Any = soap_optax.scale_by_soap().init(grads[0])
    for call, grad in enumerate(grads):
        update, state = step_of()(grad, state, frequency)
        if call == 1:  # This call computes the first bases, and also applies the first update.
            begun = frequency + 2 - np.asarray(first)  # The next refresh is due in call `first`.
            stack = state.stacks[NAME]._replace(age=jnp.asarray(begun, jnp.int32))
            state = state._replace(stacks={NAME: stack})
        assert_close(found[call], update)
        assert stacks[call].refreshes.tolist() == state.stacks[NAME].refreshes.tolist()
    assert stacks[-1].refreshes.min() >= 1 + 18 // frequency


def test_the_age_of_a_staggered_block_counts_its_updates_since_its_last_refresh() -> None:
    grads = gradients(20, blocks=5)
    _, stacks = run(grads, 7, stagger=True)
    ages = np.zeros(5, int)
    for before, after in itertools.pairwise(stacks):
        refreshed = np.asarray(after.refreshes > before.refreshes)
        ages = np.where(refreshed, 0, ages) + 1
        assert after.age.tolist() == ages.tolist()
    assert ages.max() <= 7


def test_blocks_are_spread_over_every_cycle_after_the_frequency_has_changed() -> None:
    """Frequency 1 refreshes all blocks together. After that they must spread over cycles again."""
    grads = gradients(60, blocks=24)
    schedule = [10] * 20 + [1] * 5 + [6] * 35
    state: Any = soap_optax.scale_by_soap().init(grads[0])
    totals = [0]
    for grad, frequency in zip(grads, schedule, strict=True):
        _, state = step_of(stagger=True)(grad, state, frequency)
        totals.append(int(state.stacks[NAME].refreshes.sum()))
    in_a_step = np.diff(totals)
    assert in_a_step[20:25].tolist() == [24] * 5
    assert in_a_step[25:].max() <= 5  # Blocks spread at once, although all had the same age.
    for start in range(33, 55):  # They spread evenly after one and a half cycles.
        assert in_a_step[start : start + 6].sum() == 24


@pytest.mark.long
@pytest.mark.usefixtures("implicit_promotion")
@pytest.mark.parametrize(
    "schedule",
    named(
        {
            "thinning": [min(30, max(1, count // 3)) for count in range(260)],
            "to and fro": [7 + count % 2 for count in range(260)],
            "ever longer": [10 + count for count in range(260)],
            "ever shorter": [max(1, 100 - count) for count in range(260)],
        }
    ),
)
def test_no_staggered_block_is_forgotten_or_favoured_while_the_frequency_changes(
    schedule: list[int],
) -> None:
    grads = gradients(260, blocks=5)
    state: Any = soap_optax.scale_by_soap().init(grads[0])
    refreshes = []
    for grad, frequency in zip(grads, schedule, strict=True):
        before = state.stacks[NAME]
        _, state = step_of(stagger=True)(grad, state, frequency)
        after = state.stacks[NAME]
        later = np.asarray((after.refreshes > before.refreshes) & (before.refreshes > 0))
        assert np.all(before.age[later] >= frequency / 2)
        assert np.all(after.age[~later] <= 1 + 1.5 * frequency)
        refreshes.append(after.refreshes)
    assert refreshes[-1].max() <= 2 * refreshes[-1].min()


def test_a_block_that_rejects_gradients_keeps_its_phase_and_delays_no_other() -> None:
    grads = gradients(20, blocks=5)
    bad = [grad | {"001": jnp.full(SHAPE, jnp.nan)} for grad in grads[:4]]
    _, stacks = run([*grads[:5], *bad, *grads[5:]], 4, stagger=True)
    _, wanted = run(grads, 4, stagger=True)
    assert stacks[-1].accepted_gradients.tolist() == [24, 20, 24, 24, 24]
    last, plain = stacks[-1], wanted[-1]
    assert last.refreshes[1] == plain.refreshes[1]
    assert last.age[1] == plain.age[1]
    for array, other in zip(last.bases, plain.bases, strict=True):
        np.testing.assert_allclose(array[1], other[1], atol=ROUNDING)
    assert last.refreshes[0] == plain.refreshes[0] + 1


@pytest.mark.parametrize("blocks", [1, 4, 12, 48, 100])
@pytest.mark.parametrize("start", [0, 7, 123])
def test_phases_are_spread_evenly_over_the_cycle_for_any_consecutive_blocks(
    start: int, blocks: int
) -> None:
    for frequency in (1, 2, 5, 10, 100):
        numbers = range(start, start + blocks)
        phases = refresh_gating.stagger_phases(numbers)
        assert phases.min() >= 0
        assert phases.max() < 1
        counts = np.bincount(np.floor(phases * frequency).astype(int), minlength=frequency)
        # Neighbours have three distances, and the largest is at most 2.7 times the smallest.
        assert counts.max() <= np.ceil(blocks / frequency) + 1
        if blocks >= 4 * frequency:
            assert counts.min() >= np.floor(blocks / frequency) - 1


@pytest.mark.parametrize("frequency", [3, 10**6, 2**30, 2**31 - 1])
def test_every_phase_comes_in_a_cycle_of_any_length(frequency: int) -> None:
    """Float32 rounds a phase just below 1 to 1."""
    phases = np.asarray([1 - 1e-9], np.float32)
    assert phases == 1
    timing = refresh_gating.RefreshTiming(jnp.int32(frequency), "before_gradient", stagger=True)
    _, stacks = run(gradients(2), 1)
    due = [
        bool(
            refresh_gating.is_due(
                stacks[-1]._replace(
                    accepted_gradients=jnp.full(1, count, jnp.int32),
                    age=jnp.full(1, frequency - frequency // 2, jnp.int32),
                ),
                jnp.asarray(phases),
                timing,
            )[0]
        )
        for count in range(max(1, frequency - 200), frequency)
    ]
    assert any(due)


def test_no_step_refreshes_many_more_blocks_than_another() -> None:
    grads = gradients(45, blocks=24)
    _, stacks = run(grads, 10, stagger=True)
    totals = [int(stack.refreshes.sum()) for stack in stacks]
    # These steps come after the first bases, which are computed all at once, and one more cycle.
    in_a_step = np.diff(totals)[-30:]
    assert in_a_step.sum() == 24 * 3
    assert in_a_step.max() <= 1.5 * np.median(in_a_step)


# Before or after the gradient.


def test_a_refresh_after_the_gradient_sees_it_and_one_before_does_not() -> None:
    grads = gradients(3)
    other = [*grads[:2], {"000": 10 * grads[2]["000"][::-1]}]
    for order, sees in (("before_gradient", False), ("after_gradient", True)):
        _, stacks = run(grads, 1, refresh_order=order)
        _, others = run(other, 1, refresh_order=order)
        assert stacks[2].refreshes.tolist() == [2]
        differs = np.abs(stacks[2].bases[0] - others[2].bases[0]).max() > 1e-3
        assert differs == sees


def test_both_refresh_orders_have_the_same_factors() -> None:
    grads = gradients(6)
    _, before = run(grads, 2)
    _, after = run(grads, 2, refresh_order="after_gradient")
    for call in range(6):
        assert_close(after[call].factors, before[call].factors)


def test_a_rejected_gradient_changes_nothing_in_either_refresh_order() -> None:
    grads = gradients(5)
    bad = {"000": grads[0]["000"].at[0, 0].set(jnp.nan)}
    for order in ("before_gradient", "after_gradient"):
        updates, stacks = run([*grads[:4], bad], 1, refresh_order=order)
        assert not np.asarray(updates[-1]["000"]).any()
        jax.tree.map(
            np.testing.assert_array_equal,
            stacks[-1]._replace(rejected_gradients=stacks[-2].rejected_gradients),
            stacks[-2],
        )
