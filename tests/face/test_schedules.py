"""Schedules for `precondition_frequency`: allowed return values, and `thinning_frequency`."""

import itertools
import re
from collections.abc import Callable
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.one_matrix import NAME, UPDATE_TOLERANCE, State, gradients, init, run
from hypothesis import strategies as st

import soap_optax
from soap_optax import schedules

LARGEST = 2**31 - 1


@hypothesis.given(dense=st.integers(1, LARGEST), most=st.integers(1, LARGEST))
def test_the_interval_is_one_at_first_then_grows_in_proportion_up_to_the_most(
    dense: int, most: int
) -> None:
    frequency = soap_optax.thinning_frequency(dense, most)
    counts = [0, dense, 2 * dense - 1, 2 * dense, 7 * dense, dense * most, LARGEST]
    for count in counts:
        count = min(count, LARGEST)
        interval = frequency(count)
        assert interval.dtype == jnp.int32
        assert int(interval) == min(most, max(1, count // dense))


def test_refreshes_of_a_run_follow_the_thinning_schedule() -> None:
    """The first twenty updates refresh. Then the interval is a tenth of the updates, at most 5."""
    optimizer = soap_optax.scale_by_soap(
        precondition_frequency=soap_optax.thinning_frequency(10, 5)
    )
    grads = gradients(100)
    update = jax.jit(optimizer.update)
    state: Any = init()
    refreshes = []
    for grad in grads:
        _, state = update(grad, state)
        refreshes.append(int(state.stacks[NAME].refreshes[0]))
    updates = [call - 1 for call in range(1, 100) if refreshes[call] > refreshes[call - 1]]
    assert updates[:20] == list(range(20))
    for before, after in itertools.pairwise(updates):
        assert after - before == min(5, max(1, after // 10))
    assert updates[-1] - updates[-2] == 5


@pytest.mark.parametrize("name", ["dense", "most"])
@pytest.mark.parametrize(
    ("value", "error", "rule"),
    [
        (0, ValueError, "must be at least 1"),
        (-3, ValueError, "must be at least 1"),
        (2**31, ValueError, "must be at most 2147483647"),
        (2**40, ValueError, "must be at most 2147483647"),
        (2.0, TypeError, "must be an integer of at least 1"),
        (True, TypeError, "must be an integer of at least 1"),
        ("20", TypeError, "must be an integer of at least 1"),
        (None, TypeError, "must be an integer of at least 1"),
    ],
)
def test_thinning_with_bad_arguments_raises_when_it_is_built(
    name: str, value: Any, error: type[Exception], rule: str
) -> None:
    arguments: dict[str, Any] = {"dense": 20, "most": 10, name: value}
    with pytest.raises(error, match=rf"{name} {rule}, got {re.escape(repr(value))}(;|$)"):
        soap_optax.thinning_frequency(**arguments)


INFINITY = float("inf")
# Numbers that a schedule may return, and the resulting frequency.
NUMBERS = [
    (1, 1),
    (0, 1),
    (-5, 1),
    (True, 1),
    (2, 2),
    (LARGEST, LARGEST),
    (3_000_000_000, LARGEST),
    (0.5, 1),
    (1.9, 1),
    (2.0, 2),
    (3e9, LARGEST),
    (-3e9, 1),
    (INFINITY, LARGEST),
    (-INFINITY, 1),
    (float("nan"), 1),
    (np.float64(1e300), LARGEST),
]
ARRAYS = [
    (np.int8(1), 1),
    (np.int8(100), 100),
    (np.uint32(2**32 - 1), LARGEST),
    (np.float32(0.5), 1),
    (np.float32(2), 2),
    (np.float32(3e9), LARGEST),
    (np.float32(-3e9), 1),
    (np.float32(INFINITY), LARGEST),
    (np.float32("nan"), 1),
    (np.float16(INFINITY), LARGEST),
    (jnp.bfloat16(3e9), LARGEST),
]


@pytest.mark.parametrize(("returned", "frequency"), NUMBERS + ARRAYS)
def test_a_schedule_may_return_any_number_and_it_counts_as_the_nearest_frequency(
    returned: Any, frequency: int
) -> None:
    found = schedules.frequency_at(lambda _count: returned, jnp.int32(5))
    assert found.dtype == jnp.int32
    # A float32 rounds integers above 2^24.
    assert int(found) == pytest.approx(frequency, rel=1e-6)


@pytest.mark.parametrize(("returned", "frequency"), ARRAYS)
def test_a_schedule_may_compute_any_number_in_the_trace(returned: Any, frequency: int) -> None:
    found = jax.jit(lambda value: schedules.frequency_at(lambda _count: value, jnp.int32(5)))
    assert int(found(returned)) == pytest.approx(frequency, rel=1e-6)


@pytest.mark.parametrize(("returned", "refreshed"), [(-3e9, True), (INFINITY, False)])
def test_a_schedule_without_a_sensible_number_refreshes_always_or_never(
    returned: float, refreshed: bool
) -> None:
    optimizer = soap_optax.scale_by_soap(precondition_frequency=lambda _count: returned)
    update = jax.jit(optimizer.update)
    state = init()
    for grad in gradients(3):  # The second call makes the first basis, and the third refreshes it.
        _, state = update(grad, state)
    assert (state.stacks[NAME].refreshes[0] == 2) == refreshed


def test_a_frequency_for_each_block_raises_when_the_update_is_traced() -> None:
    grads = jnp.ones((4, 3))
    rule = r"precondition_frequency must be one number for all blocks, got .* shape \(2,\)"
    for frequency in (lambda _count: jnp.array([1, 2]), lambda _count: np.array([3.0, 4.0])):
        optimizer = soap_optax.scale_by_soap(precondition_frequency=frequency)
        state = optimizer.init(grads)
        with pytest.raises(ValueError, match=rule):
            jax.jit(optimizer.update)(grads, state)


def refreshes_by_rule(frequency_at: Callable[[int], int], calls: int) -> list[int]:
    """The number of adopted bases after every call, from the documented rule."""
    age = refreshes = 0
    counts = []
    for call in range(calls):
        if call == 1:
            refreshes += 1
        elif call > 1 and age >= frequency_at(call - 1):  # The number of updates so far.
            refreshes += 1
            age = 0
        age += call > 0
        counts.append(refreshes)
    return counts


def test_schedule_makes_refreshes_dense_and_then_thin_in_one_program() -> None:
    traces = []
    schedule = optax.join_schedules(
        [optax.constant_schedule(1), optax.constant_schedule(2), optax.constant_schedule(5)],
        [4, 10],
    )
    optimizer = soap_optax.scale_by_soap(precondition_frequency=schedule)

    @jax.jit
    def step(grad: jax.Array, state: State) -> Any:
        traces.append(None)
        return optimizer.update(grad, state)

    state, counts = init(), []
    for grad in gradients(25):
        _, state = step(grad, state)
        counts += state.stacks[NAME].refreshes.tolist()
    assert counts == refreshes_by_rule(lambda done: 1 if done < 4 else 2 if done < 10 else 5, 25)
    assert counts == [0, 1, 2, 3, 4, 4, 5, 5, 6, 6, *[7] * 5, *[8] * 5, *[9] * 5]
    assert len(traces) == 1


@jax.jit
def scheduled(grad: jax.Array, state: State, frequency: jax.Array) -> Any:
    """A step whose frequency is a constant schedule."""
    optimizer = soap_optax.scale_by_soap(
        precondition_frequency=lambda count: frequency + 0 * jnp.asarray(count)
    )
    return optimizer.update(grad, state)


@pytest.mark.parametrize("frequency", [1, 3, 10])
def test_constant_schedule_is_the_integer(frequency: int) -> None:
    grads = gradients(14)
    wanted, wanted_state = run(grads, init(), frequency)
    state = init()
    for grad, update in zip(grads, wanted, strict=True):
        found, state = scheduled(grad, state, jnp.asarray(frequency))
        # Two programs may round differently.
        np.testing.assert_allclose(found, update, rtol=0, atol=UPDATE_TOLERANCE)
    counts = [refreshes_by_rule(lambda _: frequency, 14)[-1]]
    assert state.stacks[NAME].refreshes.tolist() == counts
    assert wanted_state.stacks[NAME].refreshes.tolist() == counts
