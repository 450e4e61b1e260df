"""Claim 1 of Vyas et al. (2024): one-shot Shampoo with exponent 1/2 is factored SOAP, up to scale.

Both sides are the public transformations. Decays of `(t - 1) / t` make their averages the means
over a set of gradients.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cases import mostly_long

import soap_optax

pytestmark = pytest.mark.usefixtures("x64")

# Relative to the largest entry. The largest difference in 40 random sets was 5e-15.
TOLERANCE = 1e-10
NEVER = 10**6


def means_of_shampoo(grads: np.ndarray) -> tuple[Any, Any]:
    """A step of Shampoo, and its state with the mean factors of a set of gradients."""

    @jax.jit
    def step(grad: jax.Array, state: Any, beta: float) -> Any:
        optimizer = soap_optax.scale_by_shampoo(
            b1=0.0,
            exponent=0.5,
            eps=1e-30,
            grafting=None,
            correct_bias=False,
            shampoo_beta=beta,
            precondition_frequency=1,
            refresh_order="before_gradient",
        )
        return optimizer.update(grad, state)

    state: Any = soap_optax.scale_by_shampoo(grafting=None).init(jnp.asarray(grads[0]))
    for number, grad in enumerate(grads):
        _, state = step(jnp.asarray(grad), state, number / (number + 1))
    return step, state


def shampoo_update(grads: np.ndarray) -> np.ndarray:
    """Shampoo's update for the last gradient, times the root of the trace of its factor."""
    step, state = means_of_shampoo(grads)
    [stack] = state.stacks.values()
    update, _ = step(jnp.asarray(grads[-1]), state, 0.0)
    return np.asarray(update) * np.sqrt(np.trace(stack.factors[0][0]))


def soap_update(grads: np.ndarray) -> np.ndarray:
    """The update of factored SOAP for the last gradient, without momentum."""

    @jax.jit
    def step(grad: jax.Array, state: Any, decay: float, frequency: int) -> Any:
        optimizer = soap_optax.scale_by_soap(
            b1=0.0,
            b2=decay,
            shampoo_beta=decay,
            eps=1e-30,
            correct_bias=False,
            factored=True,
            refresh="eigh",
            precondition_frequency=frequency,
        )
        return optimizer.update(grad, state)

    update, state = None, soap_optax.scale_by_soap(factored=True).init(jnp.asarray(grads[0]))
    for number, grad in enumerate(grads):  # The mean factors.
        _, state = step(jnp.asarray(grad), state, number / (number + 1), NEVER)
    for number, grad in enumerate(grads):  # Their bases, and the mean second moment in these.
        frequency = 1 if number == 0 else NEVER
        update, state = step(jnp.asarray(grad), state, number / (number + 1), frequency)
    return np.asarray(update)


@pytest.mark.parametrize("seed", mostly_long(range(4), [2]))
def test_one_shot_shampoo_with_exponent_one_half_and_trace_scaling_is_factored_soap(
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    lengths, scale = rng.integers(2, 9, 2), rng.choice([1e-3, 1.0, 1e3])
    # So many that no factor has a null space.
    enough = max(lengths) // min(lengths) + rng.integers(1, 7)
    mixings = [np.linalg.qr(rng.normal(size=(d, d)))[0] * rng.uniform(0.3, 3, d) for d in lengths]
    grads = scale * mixings[0] @ rng.normal(size=(enough, *lengths)) @ mixings[1].T
    found, wanted = shampoo_update(grads), soap_update(grads)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE * np.abs(wanted).max())


def test_the_eigenvalues_of_the_factors_are_the_sums_of_the_rotated_squares() -> None:
    grads = np.random.default_rng(0).normal(size=(4, 5, 3))
    _, state = means_of_shampoo(grads)
    [stack] = state.stacks.values()
    (left_values, left), (right_values, right) = (
        np.linalg.eigh(factor[0]) for factor in stack.factors
    )
    squares = np.mean((left.T @ grads @ right) ** 2, axis=0)
    np.testing.assert_allclose(squares.sum(axis=1), left_values, rtol=1e-12)
    np.testing.assert_allclose(squares.sum(axis=0), right_values, rtol=1e-12)


@pytest.mark.long
@pytest.mark.parametrize("exponent", [0.25, 0.4])
def test_other_exponents_are_another_method(exponent: float) -> None:
    """The claim needs the exponent: with others, the two updates are not parallel."""
    grads = np.random.default_rng(1).normal(size=(4, 5, 3)) * [4.0, 1.0, 0.25]
    _, state = means_of_shampoo(grads)
    optimizer: Any = soap_optax.scale_by_shampoo(
        b1=0.0,
        exponent=exponent,
        grafting=None,
        refresh_order="before_gradient",
        correct_bias=False,
    )
    update, _ = jax.jit(optimizer.update)(jnp.asarray(grads[-1]), state)
    found, wanted = np.ravel(update), np.ravel(soap_update(grads))
    cosine = found @ wanted / (np.linalg.norm(found) * np.linalg.norm(wanted))
    assert 0.5 < cosine < 0.99
