"""Shampoo on blocks and rows of zeros at first, and on gradients of any size."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cases import mostly_long
from optax.contrib import MuonDimensionNumbers

import soap_optax

LAYERS = MuonDimensionNumbers(reduction_axis=1, output_axis=2)
ASLEEP = 5  # The number of gradients of zeros.
CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "no grafting": {"grafting": None},
    "sgd": {"grafting": "sgd"},
    "rmsprop": {"grafting": "rmsprop"},
    "before_gradient": {"grafting": None, "refresh_order": "before_gradient"},
    "staggered": {"grafting": None, "stagger": True},
    "folded": {"grafting": None, "fold_factors": True},
    "kl": {"grafting": None, "factor_estimator": "kl", "exponent": 0.5},
    "kl, before_gradient": {
        "grafting": None,
        "factor_estimator": "kl",
        "exponent": 0.5,
        "refresh_order": "before_gradient",
    },
}


@pytest.mark.parametrize("name", mostly_long(CASES, ["no grafting", "kl"]))
def test_a_block_asleep_at_first_is_refreshed_from_its_first_nonzero_factors(name: str) -> None:
    """One layer of a stack sleeps while the other is awake."""
    optimizer: Any = soap_optax.scale_by_shampoo(**CASES[name], dimension_numbers=LAYERS)
    update, state = jax.jit(optimizer.update), optimizer.init(jnp.zeros((2, 6, 4)))
    rng = np.random.default_rng(0)
    sizes, stack = [], None
    for call in range(ASLEEP + 12):
        grad = rng.normal(size=(2, 6, 4)).astype(np.float32)
        grad[1] *= call >= ASLEEP
        updates, state = update(jnp.asarray(grad), state)
        sizes.append(np.sqrt(np.mean(np.square(updates), axis=(1, 2))))
        stack = state.stacks["6x4"]
        waits = call < ASLEEP + ("before_gradient" in name)
        assert (stack.refreshes[1] == 0) == waits
        assert (stack.refreshes[0] > 0) == (call > 0)
        if call < ASLEEP:
            assert sizes[-1][1] == 0
    assert stack is not None
    assert stack.rejected_refreshes.tolist() == [0, 0]
    assert np.all(np.asarray(sizes) < 8)  # Roots of zeros made updates of 1e5.
    assert np.all(np.asarray(sizes)[ASLEEP + 1 :] > 0)


@pytest.mark.parametrize("grafting", [None, "adam"])
def test_a_row_that_wakes_moves_as_far_as_the_others(grafting: Any) -> None:
    optimizer = soap_optax.scale_by_shampoo(grafting=grafting)
    update, state = jax.jit(optimizer.update), optimizer.init(jnp.zeros((6, 4)))
    rng = np.random.default_rng(0)
    shares = []
    for call in range(19):
        grad = rng.normal(size=(6, 4)).astype(np.float32)
        grad[2] *= call >= 15  # Refreshes are due at the calls 1, 11 and 21.
        updates, state = update(jnp.asarray(grad), state)
        norms = np.linalg.norm(updates, axis=1)
        if call > 0:
            shares.append(norms[2] / np.delete(norms, 2).max())
    assert np.all(np.asarray(shares[:14]) == 0)
    assert np.all(np.asarray(shares[14:]) < 1.5)  # It was above 5.


SCALES = (1e-15, 1e-14, 1e-8, 1.0, 1e8, 1e14, 1e15)


@pytest.mark.parametrize("estimator", mostly_long(["gram", "kl"], ["kl"]))
def test_a_grafted_direction_does_not_depend_on_the_size_of_the_gradients(estimator: Any) -> None:
    """With an `eps` below every eigenvalue, in float32."""
    rng = np.random.default_rng(0)
    grads = rng.normal(size=(3, 6, 4)).astype(np.float32)

    @jax.jit
    def last_update(scale: jax.Array, exponent: jax.Array) -> jax.Array:
        optimizer: Any = soap_optax.scale_by_shampoo(
            eps=1e-35, exponent=exponent, grafting="sgd", factor_estimator=estimator
        )
        state, updates = optimizer.init(grads[0]), jnp.zeros((6, 4))
        for grad in grads:
            updates, state = optimizer.update(scale * grad, state)
        return updates / scale

    for exponent in (0.25, 1 / 2.5, 0.5, 1.0):
        found = [np.asarray(last_update(jnp.float32(scale), exponent)) for scale in SCALES]
        for one in found if estimator == "gram" else []:
            np.testing.assert_allclose(one, found[3], rtol=1e-3, atol=1e-3)
        for one in found:
            norm = np.linalg.norm(grads[-1])
            np.testing.assert_allclose(np.linalg.norm(one), norm, rtol=1e-5)


def test_an_ungrafted_update_follows_the_equation_at_every_size() -> None:
    """The update is proportional to a power of the size; beyond float32 it is zero."""
    rng = np.random.default_rng(0)
    grads = rng.normal(size=(3, 6, 4)).astype(np.float32)

    @jax.jit
    def last_update(scale: jax.Array, exponent: jax.Array) -> jax.Array:
        optimizer: Any = soap_optax.scale_by_shampoo(eps=1e-35, exponent=exponent, grafting=None)
        state, updates = optimizer.init(grads[0]), jnp.zeros((6, 4))
        for grad in grads:
            updates, state = optimizer.update(scale * grad, state)
        return updates

    for exponent, scale in itertools.product((0.25, 1 / 2.5, 0.5, 1.0), SCALES):
        wanted = np.asarray(last_update(jnp.float32(1), exponent), np.float64)
        wanted = wanted * scale ** (1 - 4 * exponent)
        found = np.asarray(last_update(jnp.float32(scale), exponent))
        if np.abs(wanted).max() > 1e38 or np.abs(wanted).max() < 1e-37:
            assert np.all(found == 0) or np.abs(wanted).max() < 1e-37
        else:
            size = np.abs(wanted).max()
            np.testing.assert_allclose(found / size, wanted / size, rtol=2e-3, atol=2e-3)
