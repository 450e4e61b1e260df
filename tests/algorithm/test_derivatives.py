"""Derivatives of a training run, in which bases are constants."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.cases import mostly_long
from helpers.one_matrix import gradients

import soap_optax


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("normalize_grads", mostly_long([False, True], [True]))
def test_forward_and_reverse_derivatives_agree_and_are_finite_from_the_first_call(
    normalize_grads: bool,
) -> None:
    optimizer: Any = soap_optax.soap(
        1e-2, precondition_frequency=1, eps=1e-3, normalize_grads=normalize_grads
    )
    matrices = jnp.asarray(gradients(4), float)
    grads = {"w": matrices, "v": matrices[:, 0]}

    def path(scale: jax.Array) -> jax.Array:
        params = jax.tree.map(lambda leaf: jnp.ones_like(leaf[0]), grads)

        def step(state: Any, numbered: Any) -> tuple[Any, jax.Array]:
            number, grad = numbered
            bent = jax.tree.map(lambda g: g * (1 + scale * number * g), grad)
            updates, state = optimizer.update(bent, state, params)
            products = jax.tree.map(lambda u, g: jnp.sum(u * g), updates, grad)
            return state, jax.tree.reduce(jnp.add, products)

        state = optimizer.init(params)
        return jnp.sum(jax.lax.scan(step, state, (jnp.arange(4.0), grads))[1])

    forward = jax.jit(jax.jacfwd(path))(0.1)
    reverse = jax.jit(jax.grad(path))(0.1)
    assert np.isfinite(forward)
    assert float(forward) != 0
    # The same sums in another order.
    np.testing.assert_allclose(forward, reverse, rtol=1e-9)


@pytest.mark.usefixtures("x64")
def test_derivative_with_respect_to_the_learning_rate_takes_the_bases_as_constants() -> None:
    rng = np.random.default_rng(3)
    target, start = rng.normal(size=(2, 3, 2))
    weights = np.exp(rng.normal(size=(3, 2)))
    calls, frequency, beta, eps = 7, 2, 0.9, 1.0

    def loss(params: jax.Array) -> jax.Array:
        return jnp.sum(weights * (params - target) ** 4)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def train(learning_rate: float) -> Any:
        # b2=0 makes the second moment the last gradient's square, so that only the first moment
        # remembers the bases of the steps before; the large eps keeps the loss smooth.
        optimizer: Any = soap_optax.soap(
            learning_rate,
            b2=0.0,
            eps=eps,
            shampoo_beta=beta,
            precondition_frequency=frequency,
        )

        def step(carry: Any, _: None) -> tuple[Any, Any]:
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            bases = [q[0] for q in state[0].stacks["3x2_float64"].bases]
            return (optax.apply_updates(params, updates), state), bases

        carry = (jnp.asarray(start), optimizer.init(jnp.asarray(start)))
        (params, _), bases = jax.lax.scan(step, carry, length=calls)
        return loss(params), bases

    (_, bases), found = train(0.05)
    assert np.abs(np.diff(bases[0], axis=0)).max(axis=(1, 2)).astype(bool).tolist() == [
        call in (1, 3, 5) for call in range(1, calls)
    ]

    def train_by_hand(learning_rate: float) -> float:
        mu = np.zeros((3, 2))
        params = start - learning_rate * 0.01 * start  # The first call only decays the weights.
        for call in range(1, calls):
            grad = 4 * weights * (params - target) ** 3
            mu = 0.95 * mu + 0.05 * grad
            left, right = bases[0][call], bases[1][call]
            rotated = left.T @ mu @ right / (np.abs(left.T @ grad @ right) + eps)
            direction = left @ rotated @ right.T / (1 - 0.95**call)
            params = params - learning_rate * (direction + 0.01 * params)
        return float(np.sum(weights * (params - target) ** 4))

    h = 1e-6
    wanted = (train_by_hand(0.05 + h) - train_by_hand(0.05 - h)) / (2 * h)
    # A central difference in float64: h^2 from the third derivative, 1e-16 / h from rounding.
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
