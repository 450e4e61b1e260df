"""The trees and states that `init` and `update` accept, and the errors that others raise."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.cases import mostly_long

import soap_optax

KERNEL = np.ones((6, 4), np.float32)


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (jax.nn.relu, r"must be an array, got .* at \['leaf'\]; filter the tree .*eqx\.filter"),
        ("dense", r"must be an array, got 'dense' at \['leaf'\]; filter the tree"),
        (np.ones(3, np.int32), r"got int32 at \['leaf'\]; leave it out with optax\.masked"),
    ],
)
def test_a_leaf_that_is_no_floating_point_array_raises_with_its_path_and_the_way_out(
    leaf: Any, message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        soap_optax.soap(1e-3).init({"kernel": KERNEL, "leaf": leaf})


def test_an_eps_that_float16_rounds_to_zero_raises_with_the_way_out() -> None:
    injected = optax.inject_hyperparams(soap_optax.soap, static_args=soap_optax.STATIC_ARGS)
    params = {"kernel": jnp.ones((3, 2), jnp.float16)}
    with pytest.raises(ValueError, match=r"hyperparam_dtype=jnp\.float32"):
        injected(1e-3).init(params)
    wide = optax.inject_hyperparams(
        soap_optax.soap, static_args=soap_optax.STATIC_ARGS, hyperparam_dtype=jnp.float32
    )
    wide(1e-3).init(params)


# Dtypes -------------------------------------------------------------------------------------------


def run(params: Any, grads: list[Any], **options: Any) -> tuple[Any, Any]:
    optimizer = soap_optax.soap(1e-2, precondition_frequency=2, **options)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    updates: Any = None
    for grad in grads:
        updates, state = update(grad, state, params)
    return updates, state


@pytest.mark.usefixtures("implicit_promotion")
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "options", mostly_long([{}, {"factored": True}, {"mu_dtype": jnp.bfloat16}], [{}])
)
def test_the_state_decides_the_dtype_of_statistics_and_the_gradient_that_of_updates(
    options: dict[str, Any],
) -> None:
    params = {"kernel": KERNEL, "bias": np.ones(4, np.float32)}
    grads = [
        jax.tree.map(lambda p, n=n: np.random.default_rng(n).normal(size=p.shape), params)
        for n in range(4)
    ]
    narrow = [jax.tree.map(lambda g: g.astype(np.float32), grad) for grad in grads]
    found, state = run(params, grads, **options)
    wanted, _ = run(params, narrow, **options)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.dtype != jnp.int32}
    assert np.dtype(np.float64) not in dtypes
    for name, leaf in found.items():
        assert leaf.dtype == np.float64  # As in `optax.adamw`.
        # Decay and learning rate multiply in float64 here, and in float32 there.
        np.testing.assert_allclose(leaf, wanted[name], rtol=1e-6)
    applied = optax.apply_updates(jax.tree.map(jnp.asarray, params), found)
    assert {leaf.dtype for leaf in jax.tree.leaves(applied)} == {np.dtype(np.float32)}


@pytest.mark.usefixtures("implicit_promotion")
@pytest.mark.usefixtures("x64")
def test_a_state_of_two_dtypes_gets_gradients_of_one_if_it_gets_the_parameters() -> None:
    params = {"narrow": jnp.asarray(KERNEL), "wide": jnp.ones((6, 4), jnp.float64)}
    grads = [jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), params)] * 3
    _, state = run(params, grads)
    assert sorted(state[0].stacks) == ["6x4", "6x4_float64"]


def test_a_float64_state_outside_of_x64_raises_with_the_way_out() -> None:
    optimizer = soap_optax.scale_by_soap()
    with jax.enable_x64(True):
        state = optimizer.init({"kernel": jnp.ones((6, 4), jnp.float64)})
    with pytest.raises(ValueError, match="jax_enable_x64 is off: it was made under"):
        optimizer.update({"kernel": jnp.asarray(KERNEL)}, state)
