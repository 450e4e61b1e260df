"""The recorded trajectories of the authors' code, reproduced at every step."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import reference, states, trajectories
from helpers.cases import mostly_long, named
from jax.typing import DTypeLike

import soap_optax
from soap_optax.linalg import decompositions

pytestmark = pytest.mark.usefixtures("optimized_programs")

TRAJECTORIES = trajectories.load_trajectories()
BY_NAME = named({trajectory.name: trajectory for trajectory in TRAJECTORIES})
SHORT = ("matrix_freq10", "conv4", "wide_one_sided", "no_side", "shampoo_beta")
every_trajectory = pytest.mark.parametrize("trajectory", BY_NAME)

# Parameters are of size 4 at most. Each step rounds them by 2e-16, half a unit in the last place
# below 4. Sixty steps add up to 2e-14 at worst. The largest difference seen is 3e-15. A different
# algorithm would move an update by a share of the learning rate, 3e-3.
FLOAT64_TOLERANCE = 1e-12

# In float32, each step rounds parameters of size 4 by 1.2e-7, half a unit in the last place below
# 4. Sixty steps add up to 1e-6 at random and 7e-6 at worst. Updates are of the learning rate's
# size, 3e-3, with a relative error of some 1e-5. That adds only 3e-8 a step. The largest difference
# seen is 1.5e-6. No case is chaotic in float32. The Rayleigh quotients, which order the columns,
# differ by at least 2e-5 of the largest. All factors have condition numbers below 50 at every
# refresh.
FLOAT32_TOLERANCE = 1e-5


def follow(trajectory: trajectories.Trajectory, dtype: DTypeLike) -> np.ndarray:
    """The parameters after every step, as the library computes them."""
    optimizer = soap_optax.soap(trajectory.learning_rate, weight_decay=0.0, **trajectory.options)

    @jax.jit
    def step(
        grad: jax.Array, state: optax.OptState, params: optax.Params
    ) -> tuple[optax.Params, optax.OptState]:
        updates, state = optimizer.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    params = jnp.asarray(trajectory.init, dtype)
    state = optimizer.init(params)
    followed = []
    for index, grad in enumerate(trajectory.grads):
        params, state = step(jnp.asarray(grad, dtype), state, params)
        followed.append(np.asarray(params))
        if index == 0 and not trajectory.initial_basis_is_unique:
            state = states.put_bases(state, list(trajectory.initial_bases.values()))
    return np.stack(followed)


def test_all_seventeen_cases_are_here() -> None:
    assert len(TRAJECTORIES) == 17


@every_trajectory
def test_numpy_reference_follows_the_authors_code_to_rounding(
    trajectory: trajectories.Trajectory,
) -> None:
    bases = None if trajectory.initial_basis_is_unique else trajectory.initial_bases
    directions = reference.run(
        trajectory.grads, reference.Options(**trajectory.options), initial_bases=bases
    )
    params = trajectory.init - trajectory.learning_rate * np.cumsum(directions, axis=0)
    np.testing.assert_allclose(params, trajectory.params, rtol=0, atol=FLOAT64_TOLERANCE)


@pytest.mark.parametrize("trajectory", mostly_long(BY_NAME, SHORT))
@pytest.mark.usefixtures("x64")
def test_float64_follows_the_authors_code_to_rounding(trajectory: trajectories.Trajectory) -> None:
    params = follow(trajectory, jnp.float64)
    assert params.dtype == np.float64
    np.testing.assert_allclose(params, trajectory.params, rtol=0, atol=FLOAT64_TOLERANCE)


@pytest.fixture
def decomposed_by_panels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Refreshes every basis with the QR by panels, which CPUs use for long axes only."""
    monkeypatch.setattr(decompositions, "BLOCKED_FROM", 1)
    jax.clear_caches()  # JAX would reuse refreshes that other tests traced.
    yield
    jax.clear_caches()


@pytest.mark.parametrize("trajectory", mostly_long(BY_NAME[::3], []))
@pytest.mark.usefixtures("x64", "decomposed_by_panels")
def test_float64_follows_the_authors_code_to_rounding_by_panels(
    trajectory: trajectories.Trajectory,
) -> None:
    params = follow(trajectory, jnp.float64)
    np.testing.assert_allclose(params, trajectory.params, rtol=0, atol=FLOAT64_TOLERANCE)


@pytest.mark.parametrize("trajectory", mostly_long(BY_NAME, ["matrix_freq1"]))
def test_float32_follows_the_authors_code_to_rounding(trajectory: trajectories.Trajectory) -> None:
    params = follow(trajectory, jnp.float32)
    assert params.dtype == np.float32
    np.testing.assert_allclose(params, trajectory.params, rtol=0, atol=FLOAT32_TOLERANCE)
