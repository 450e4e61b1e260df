"""Derivatives of training runs: they pass through the bases, which depend on the gradients."""

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

# The finite differences come from optimized programs, which round less.
pytestmark = pytest.mark.usefixtures("x64", "optimized_programs")


@pytest.mark.long
@pytest.mark.parametrize("first_update", ["zero", "apply"])
@pytest.mark.parametrize("normalize_grads", [False, True])
def test_forward_and_reverse_derivatives_agree_and_are_finite_from_the_first_call(
    normalize_grads: bool, first_update: Any
) -> None:
    optimizer: Any = soap_optax.soap(
        1e-2,
        precondition_frequency=1,
        eps=1e-3,
        normalize_grads=normalize_grads,
        first_update=first_update,
    )
    sequence = gradients(4).astype(float)
    grads = {"w": jnp.asarray(sequence), "v": jnp.asarray(sequence[:, 0])}

    def path(scale: jax.Array) -> jax.Array:
        params = jax.tree.map(lambda leaf: jnp.ones_like(leaf[0]), grads)

        def step(state: Any, call: tuple[Any, jax.Array]) -> tuple[Any, Any]:
            grad, number = call
            bent = jax.tree.map(lambda g: g * (1 + scale * number * g), grad)
            updates, state = optimizer.update(bent, state, params)
            return state, optax.tree.vdot(updates, grad)

        _, totals = jax.lax.scan(step, optimizer.init(params), (grads, jnp.arange(4.0)))
        return jnp.sum(totals)

    forward = jax.jit(jax.jacfwd(path))(0.1)
    reverse = jax.jit(jax.grad(path))(0.1)
    assert np.isfinite(forward)
    assert float(forward) != 0
    # The same sums in another order.
    np.testing.assert_allclose(forward, reverse, rtol=1e-9)


# A linear regression, trained by SOAP. The loss after training depends on three numbers: the
# learning rate, a penalty, and the scale of the initial parameters.

RNG = np.random.default_rng(0)
INPUTS, TARGETS, START = (RNG.normal(size=shape) for shape in ((20, 4), (20, 3), (4, 3)))
BATCHES = RNG.integers(0, 20, size=(10, 8))
THETA = np.array([1e-2, 0.1, 1.0])

OPTIONS: dict[str, dict[str, Any]] = {
    **{
        method: {"refresh": method, "precondition_frequency": 1}
        for method in ("qr", "eigh", "jacobi", "partial")
    },
    "every second step, one-sided, folded": {
        "precondition_frequency": 2,
        "one_sided": True,
        "fold_factors": True,
    },
    "kl after": {
        "factor_estimator": "kl",
        "precondition_frequency": 1,
        "refresh_order": "after_gradient",
    },
    "applied, factored and after": {
        "first_update": "apply",
        "factored": True,
        "normalize_grads": True,
        "precondition_frequency": 1,
        "refresh_order": "after_gradient",
    },
    "tolerance": {"refresh_tolerance": 0.01, "precondition_frequency": 1},
    "staggered": {"stagger": True, "precondition_frequency": 2},
}


def loss_after_training(name: str, steps: int, batches: bool, theta: jax.Array) -> jax.Array:
    rate, penalty, scale = theta
    optimizer = soap_optax.soap(rate, weight_decay=0.0, **OPTIONS[name])

    def step(carry: tuple[Any, Any], batch: jax.Array) -> tuple[Any, None]:
        params, state = carry
        x, y = jnp.asarray(INPUTS), jnp.asarray(TARGETS)
        if batches:
            x, y = x[batch], y[batch]

        def loss(params: jax.Array) -> jax.Array:
            return jnp.mean((x @ params - y) ** 2) + penalty * jnp.sum(params**2)

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    start = scale * jnp.asarray(START)
    (params, _), _ = jax.lax.scan(
        step, (start, optimizer.init(start)), jnp.asarray(BATCHES[:steps])
    )
    return jnp.mean((jnp.asarray(INPUTS) @ params - jnp.asarray(TARGETS)) ** 2)


def difference(function: Any, number: int, h: float) -> float:
    """A central difference; one at half the distance removes its second-order error."""
    step = np.zeros(3)
    step[number] = h

    def central(step: np.ndarray) -> float:
        return float(function(THETA + step) - function(THETA - step)) / (2 * step[number])

    return (4 * central(step / 2) - central(step)) / 3


CASES = [
    pytest.param(name, *case, id=f"{name}, {case[0]} steps" + ", batches" * case[1])
    for name in OPTIONS
    for case in [(10, True) if name in ("qr", "eigh", "jacobi", "partial") else (3, False)]
]


@pytest.mark.long
@pytest.mark.parametrize(("name", "steps", "batches"), CASES)
def test_derivatives_through_training_equal_differences_in_which_bases_move(
    name: str, steps: int, batches: bool
) -> None:
    train = functools.partial(loss_after_training, name, steps, batches)
    found = np.asarray(jax.jit(jax.grad(train))(THETA))
    function = jax.jit(train)
    wanted = np.array([difference(function, number, 1e-5) for number in range(3)])
    # The differences have errors of 1e-16 of the loss over 1e-5, and of 1e-20 from the fourth
    # derivative. The sizes of the derivatives amplify both. Constant bases gave derivatives of
    # 52,016 instead of 0.002.
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("refresh", mostly_long(["qr", "eigh", "jacobi"], ["qr"]))
def test_derivatives_are_finite_where_rows_have_no_gradient(refresh: Any) -> None:
    """Rows of zeros share an eigenvalue, and some of their Jacobi angles are zero."""
    optimizer = soap_optax.scale_by_soap(refresh=refresh, precondition_frequency=1)
    dead = np.arange(6) % 2 == 0

    grads = np.stack([np.random.default_rng(call).normal(size=(6, 4)) for call in range(4)])
    grads[:, dead] = 0
    calls = (jnp.asarray(grads), jnp.arange(4.0))

    def path(scale: jax.Array) -> jax.Array:
        def step(state: Any, call: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
            grad, number = call
            updates, state = optimizer.update(grad * (1 + scale * number), state)
            return state, jnp.sum(jnp.square(jnp.asarray(updates)))

        _, sums = jax.lax.scan(step, optimizer.init(jnp.zeros((6, 4))), calls)
        return jnp.sum(sums)

    value_and_derivative, h = jax.jit(jax.value_and_grad(path)), 1e-5
    _, derivative = value_and_derivative(0.1)
    (above, _), (below, _) = value_and_derivative(0.1 + h), value_and_derivative(0.1 - h)
    wanted = (above - below) / (2 * h)
    np.testing.assert_allclose(derivative, wanted, rtol=1e-5, atol=1e-7)
