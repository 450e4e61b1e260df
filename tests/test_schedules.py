"""`thinning_frequency`, the ready schedule for `precondition_frequency`."""

import itertools
import re
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
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
