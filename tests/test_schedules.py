"""Schedules for `precondition_frequency`: what they may return, and the ready one."""

import itertools
import re
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import soap_optax

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


def test_refreshes_of_a_run_thin_out_as_the_schedule_says() -> None:
    """Twenty dense updates, then an interval that has passed since the last one."""
    optimizer = soap_optax.scale_by_soap(
        precondition_frequency=soap_optax.thinning_frequency(10, 5)
    )
    grads = {"w": jax.random.normal(jax.random.key(0), (100, 4, 3))}
    update = jax.jit(optimizer.update)
    state: Any = optimizer.init({"w": grads["w"][0]})
    refreshes = []
    for grad in grads["w"]:
        _, state = update({"w": grad}, state)
        refreshes.append(int(state.stacks["4x3"].refreshes[0]))
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
def test_a_schedule_that_could_not_be_is_refused_when_it_is_made(
    name: str, value: Any, error: type[Exception], rule: str
) -> None:
    arguments: dict[str, Any] = {"dense": 20, "most": 10, name: value}
    with pytest.raises(error, match=rf"{name} {rule}, got {re.escape(repr(value))}(;|$)"):
        soap_optax.thinning_frequency(**arguments)


INFINITY = float("inf")
# What a schedule may return, and whether a basis that is one update old is refreshed then.
NUMBERS = [
    (1, True),
    (0, True),
    (-5, True),
    (True, True),
    (2, False),
    (LARGEST, False),
    (3_000_000_000, False),
    (0.5, True),
    (1.9, True),
    (2.0, False),
    (3e9, False),
    (-3e9, True),
    (INFINITY, False),
    (-INFINITY, True),
    (float("nan"), True),
    (np.float64(1e300), False),
]
ARRAYS = [
    (np.int8(1), True),
    (np.int8(100), False),
    (np.uint32(2**32 - 1), False),
    (np.float32(0.5), True),
    (np.float32(2), False),
    (np.float32(3e9), False),
    (np.float32(-3e9), True),
    (np.float32(INFINITY), False),
    (np.float32("nan"), True),
    (np.float16(INFINITY), False),
    (jnp.bfloat16(3e9), False),
]


def is_refreshed(grads: jax.Array, frequency: Any) -> jax.Array:
    """Whether the third call replaces the basis that the second one made."""
    optimizer = soap_optax.scale_by_soap(precondition_frequency=lambda _count: frequency)
    state: Any = optimizer.init(grads[0])
    for grad in grads:
        _, state = optimizer.update(grad, state)
    return state.stacks["4x3"].refreshes[0] == 2


@pytest.mark.parametrize(("returned", "refreshed"), NUMBERS + ARRAYS)
def test_what_a_schedule_returns_counts_as_the_nearest_frequency_there_is(
    returned: Any, refreshed: bool
) -> None:
    grads = jax.random.normal(jax.random.key(0), (3, 4, 3))
    assert jax.jit(lambda grads: is_refreshed(grads, returned))(grads) == refreshed


@pytest.mark.parametrize(("returned", "refreshed"), ARRAYS)
def test_so_does_what_it_calculates(returned: Any, refreshed: bool) -> None:
    grads = jax.random.normal(jax.random.key(0), (3, 4, 3))
    assert jax.jit(is_refreshed)(grads, returned) == refreshed


def test_a_frequency_for_each_block_is_refused_when_the_update_is_traced() -> None:
    grads = jnp.ones((4, 3))
    rule = r"precondition_frequency must be one number for all blocks, got .* shape \(2,\)"
    for frequency in (lambda _count: jnp.array([1, 2]), lambda _count: np.array([3.0, 4.0])):
        optimizer = soap_optax.scale_by_soap(precondition_frequency=frequency)
        state = optimizer.init(grads)
        with pytest.raises(ValueError, match=rule):
            jax.jit(optimizer.update)(grads, state)
