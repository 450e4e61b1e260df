"""The tools on the state of Shampoo."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import soap_optax

PARAMS = {"kernel": jnp.ones((6, 4)), "bias": jnp.zeros(4)}


@functools.cache
def trained(calls: int = 4, **options: Any) -> Any:
    optimizer = soap_optax.shampoo(0.1, **options)
    update, state = jax.jit(optimizer.update), optimizer.init(PARAMS)
    for call in range(calls):
        rng = np.random.default_rng(call)
        grads = {"kernel": rng.normal(size=(6, 4)), "bias": rng.normal(size=4)}
        _, state = update(jax.tree.map(jnp.float32, grads), state, PARAMS)
    return state


def test_describe_counts_the_bytes_of_the_state() -> None:
    for options in ({}, {"grafting": None, "block_size": 3, "mu_dtype": jnp.bfloat16}):
        description = soap_optax.describe(PARAMS, optimizer=soap_optax.shampoo, **options)
        state = soap_optax.scale_by_shampoo(**options).init(PARAMS)
        assert description.state_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    blocks = [(row.blocks, row.axes) for row in description.rows]  # pyright: ignore[reportPossiblyUnboundVariable]  # set above
    assert blocks == [("Adam", ()), ("4 x 3x2", (0, 1))]


def test_describe_names_the_options_and_the_optimizers_that_it_takes() -> None:
    with pytest.raises(TypeError, match=r"options of soap_optax\.shampoo, which has no 'refresh_t"):
        soap_optax.describe(PARAMS, optimizer=soap_optax.shampoo, refresh_tolerance=0.1)
    with pytest.raises(TypeError, match=r"options of soap_optax\.soap, which has no 'grafting'"):
        soap_optax.describe(PARAMS, grafting=None)
    for other in (optax.adamw, soap_optax.shampoo(0.1), None, []):
        with pytest.raises(ValueError, match=r"optimizer must be soap_optax\.soap or .*the func"):
            soap_optax.describe(PARAMS, optimizer=other)  # pyright: ignore[reportArgumentType]  # on purpose


def test_diagnostics_measure_roots() -> None:
    scalars = jax.jit(soap_optax.diagnostics)(trained())
    assert set(scalars) == {
        "shampoo/6x4/commutator",
        "shampoo/6x4/direction_rms",
        "shampoo/adam/direction_rms",
        "shampoo/age",
        "shampoo/refreshes",
        "shampoo/rejected_refreshes",
        "shampoo/rejected_gradients",
    }
    assert {leaf.dtype.name for leaf in scalars.values()} == {"float32", "int32"}
    assert int(scalars["shampoo/refreshes"]) == 1
    assert "shampoo/6x4/direction_rms" not in soap_optax.diagnostics(trained(grafting="sgd"))


def test_the_commutator_vanishes_after_a_refresh_and_grows_after_it() -> None:
    fresh, stale = (
        float(soap_optax.diagnostics(trained(calls))["shampoo/6x4/commutator"]) for calls in (2, 8)
    )
    assert fresh < 1e-6 < 0.01 < stale < 1


def test_diagnostics_number_states_of_the_same_kind_only() -> None:
    shampoo, soap = soap_optax.scale_by_shampoo(), soap_optax.scale_by_soap()
    both = optax.chain(shampoo, soap, shampoo).init(PARAMS)
    prefixes = {key.partition("/")[0] for key in soap_optax.diagnostics(both)}
    assert prefixes == {"shampoo_0", "shampoo_1", "soap"}


def test_state_shardings_shard_every_stack() -> None:
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    optimizer = soap_optax.shampoo(0.1, stack_sharding=sharding)
    state = jax.eval_shape(optimizer.init, PARAMS)
    shardings: Any = soap_optax.state_shardings(state, sharding)
    stack = shardings[0].stacks["6x4"]
    assert {leaf.spec[0] for leaf in jax.tree.leaves(stack)} == {"data"}
    assert jax.tree.structure(stack) == jax.tree.structure(state[0].stacks["6x4"])


def test_check_checkpoint_names_the_leaf_and_the_options_that_differ() -> None:
    state = trained()
    soap_optax.check_checkpoint(state, jax.eval_shape(lambda: state))
    with pytest.raises(ValueError, match=r"stacks/6x4/nu as .*grafting"):
        soap_optax.check_checkpoint(trained(grafting=None), jax.eval_shape(lambda: state))
    old = state[0]._replace(layout_version=jnp.int32(0))
    with pytest.raises(ValueError, match="must have layout version 1"):
        soap_optax.check_checkpoint(old, jax.eval_shape(lambda: state[0]))


def test_a_state_of_another_optimizer_or_grafting_raises_at_update() -> None:
    shampoo, soap = soap_optax.scale_by_shampoo(), soap_optax.scale_by_soap()
    with pytest.raises(TypeError, match="state must be a ScaleByShampooState, got ScaleBySoapStat"):
        shampoo.update(PARAMS, soap.init(PARAMS))
    with pytest.raises(TypeError, match="state must be a ScaleBySoapState, got ScaleByShampooStat"):
        soap.update(PARAMS, shampoo.init(PARAMS))
    without = soap_optax.scale_by_shampoo(grafting=None).init(PARAMS)
    with pytest.raises(ValueError, match=r"nu has shape \(absent\).*grafting changed after init"):
        shampoo.update(PARAMS, without)


def test_default_labels_leave_heads_to_adamw_beside_shampoo() -> None:
    params = {"mlp": {"kernel": jnp.ones((6, 4))}, "lm_head": {"kernel": jnp.ones((4, 9))}}
    optimizer = optax.partition(
        {"soap": soap_optax.shampoo(0.1), "adamw": optax.adamw(0.1)}, soap_optax.default_labels
    )
    state = optimizer.init(params)
    assert list(optax.tree.get(state, "stacks")) == ["6x4"]  # pyright: ignore[reportArgumentType]  # a dict
