"""One exported program for CPUs, GPUs and TPUs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.cases import mostly_long, named
from jax import export

import soap_optax

PLATFORMS = ["cpu", "cuda", "tpu"]


@pytest.mark.parametrize(
    "alias", mostly_long(named({"soap": soap_optax.soap, "shampoo": soap_optax.shampoo}), ["soap"])
)
def test_one_exported_step_is_lowered_for_all_platforms_and_equals_the_jitted_one(
    alias: Any,
) -> None:
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), alias(1e-2, precondition_frequency=2))
    params = {
        name: jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)
        for seed, (name, shape) in enumerate({"kernel": (300, 6), "bias": (6,)}.items())
    }

    def step(params: Any, state: Any) -> Any:
        updates, state = optimizer.update(jax.tree.map(jnp.cos, params), state, params)
        return optax.apply_updates(params, updates), state

    jitted = jax.jit(step)
    exported = export.export(jitted, platforms=PLATFORMS)(params, optimizer.init(params))
    assert list(exported.platforms) == PLATFORMS

    one, other = (params, optimizer.init(params)), (params, optimizer.init(params))
    for _ in range(5):  # The first basis, and a refresh.
        one, other = exported.call(*one), jitted(*other)
    for found, wanted in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(found, wanted)
