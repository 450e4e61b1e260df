"""Each defect of the old port does what it says, and nothing else."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from old_port import scale_by_old_port

import soap_optax

PARAMS = {"kernel": jnp.zeros((4, 4)), "bias": jnp.zeros(3)}
BETA = 0.95


def run(optimizer: Any, calls: int = 7) -> list[tuple[Any, Any]]:
    """Updates and states of some calls."""
    state, update, results = optimizer.init(PARAMS), jax.jit(optimizer.update), []
    rng = np.random.default_rng(0)
    for _ in range(calls):
        grads = {name: jnp.asarray(rng.normal(size=p.shape), p.dtype) for name, p in PARAMS.items()}
        updates, state = update(grads, state)
        results.append((updates, state))
    return results


def old_port(frequency: int = 2, frozen_nu: bool = False, counted_first_call: bool = False) -> Any:
    return scale_by_old_port(
        BETA,
        BETA,
        precondition_frequency=frequency,
        frozen_nu=frozen_nu,
        counted_first_call=counted_first_call,
    )


def correction(count: int) -> float:
    return float(np.sqrt(1 - BETA**count) / (1 - BETA**count))


def second_moments(state: Any) -> list[np.ndarray]:
    parts = (*state.soap.stacks.values(), *state.soap.adam.values())
    return [np.sort(np.asarray(part.nu), axis=None) for part in parts]  # A refresh permutes them.


@pytest.mark.long
@pytest.mark.parametrize("frozen_nu", [False, True])
def test_without_a_defect_and_with_a_refresh_in_every_call_it_is_soap(frozen_nu: bool) -> None:
    found = run(old_port(frequency=1, frozen_nu=frozen_nu))
    expected = run(soap_optax.scale_by_soap(BETA, BETA, precondition_frequency=1))
    for (updates, _), (others, _) in zip(found, expected, strict=True):
        for name, update in updates.items():
            # Both round in float32, in different programs.
            np.testing.assert_allclose(update, others[name], rtol=2e-4, atol=2e-5)


@pytest.mark.long
def test_a_frozen_second_moment_moves_in_every_second_call_only() -> None:
    states = [state for _, state in run(old_port(frozen_nu=True))]
    moments = [second_moments(state) for state in states]
    for calls, (before, after) in enumerate(itertools.pairwise(moments), start=2):
        for old, new in zip(before, after, strict=True):
            assert np.array_equal(old, new) == (calls % 2 == 1)


def test_without_the_defect_the_second_moment_moves_in_every_call() -> None:
    moments = [second_moments(state) for _, state in run(old_port())]
    for before, after in itertools.pairwise(moments):
        assert not any(map(np.array_equal, before, after))


def test_a_frozen_second_moment_still_contains_the_gradient_of_its_step() -> None:
    """The third call starts from the second moment of the second one, as without the defect."""
    found, expected = run(old_port(frozen_nu=True)), run(old_port())
    for calls in (1, 2, 3):
        for name, update in found[calls - 1][0].items():
            np.testing.assert_array_equal(update, expected[calls - 1][0][name])
    assert not np.array_equal(found[3][0]["kernel"], expected[3][0]["kernel"])


@pytest.mark.long
def test_a_counted_first_call_shortens_the_first_update_to_0716() -> None:
    found, expected = run(old_port(counted_first_call=True)), run(old_port())
    for calls, ((updates, _), (others, _)) in enumerate(
        zip(found[1:], expected[1:], strict=True), start=2
    ):
        ratio = correction(calls) / correction(calls - 1)
        assert ratio == pytest.approx(0.716, abs=5e-4) or calls > 2
        for name, update in updates.items():
            np.testing.assert_allclose(update, ratio * others[name], rtol=1e-5, atol=1e-7)
