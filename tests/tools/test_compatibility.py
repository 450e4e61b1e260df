"""States of this layout version are read by every version with the same layout."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import recorded_states
from helpers.cases import mostly_long
from helpers.recorded_states import CASES, GOLDEN, STEPS, by_path, grads, params, part_of

import soap_optax
from soap_optax.state import LAYOUT_VERSION

# Other processors and versions of XLA add in another order. No decomposition lies between.
TOLERANCE = 1e-4
NARROW_TOLERANCE = 1e-2  # bfloat16 has eight bits.


@pytest.fixture(scope="module")
def recorded() -> Mapping[str, np.ndarray]:
    return dict(np.load(GOLDEN / f"states_layout_{LAYOUT_VERSION}.npz"))


def filled(expected: Any, leaves: Mapping[str, jax.Array]) -> Any:
    """A state of the expected structure with recorded leaves."""
    assert by_path(expected).keys() == leaves.keys()
    return jax.tree.unflatten(jax.tree.structure(expected), [leaves[p] for p in by_path(expected)])


@pytest.mark.usefixtures("implicit_promotion")  # Optax promotes numbers and complex updates.
@pytest.mark.parametrize("case", mostly_long(CASES, ["soap"]))
def test_a_recorded_state_is_read_and_takes_the_recorded_step(
    case: str, recorded: Mapping[str, np.ndarray]
) -> None:
    optimizer = CASES[case]
    expected = jax.eval_shape(optimizer.init, params())
    state = filled(expected, part_of(recorded, case, "state"))
    soap_optax.check_checkpoint(state, expected)
    updates, _ = jax.jit(optimizer.update)(grads(STEPS), state, params())
    wanted = part_of(recorded, case, "update")
    tolerance = NARROW_TOLERANCE if "least" in case else TOLERANCE
    for path, update in by_path(updates).items():
        assert np.any(np.asarray(update) != 0), path
        np.testing.assert_allclose(
            update, wanted[path], rtol=tolerance, atol=1e-2 * tolerance, err_msg=path
        )


def test_every_recorded_case_is_tested(recorded: Mapping[str, np.ndarray]) -> None:
    assert {name.partition("/")[0] for name in recorded} == CASES.keys()


def test_a_recorded_state_of_another_layout_is_refused(recorded: Mapping[str, np.ndarray]) -> None:
    leaves = part_of(recorded, "soap", "state")
    leaves["0/layout_version"] = jnp.asarray(LAYOUT_VERSION + 1, jnp.int32)
    expected = jax.eval_shape(CASES["soap"].init, params())
    with pytest.raises(ValueError, match=f"layout version {LAYOUT_VERSION}"):
        soap_optax.check_checkpoint(filled(expected, leaves), expected)


def test_narrow_arrays_are_stored_without_loss() -> None:
    array = jnp.asarray([1.5, -3e-20, 0], jnp.bfloat16)
    path, stored = recorded_states.stored("mu", array)
    assert path == "mu:bfloat16"
    np.testing.assert_array_equal(recorded_states.restored(path, stored)[1], array)
