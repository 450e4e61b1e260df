"""What `param_shardings` may be, on a mesh of one device: it changes nothing that is computed."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import soap_optax

MESH = jax.make_mesh((1, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
STACKS = NamedSharding(MESH, PartitionSpec(("data", "model")))
ROWS = NamedSharding(MESH, PartitionSpec("data"))
SHAPES = {"layers": {"query": (4, 3), "out": (3, 4)}, "bias": (3,)}


def params() -> Any:
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        SHAPES,
        is_leaf=lambda node: isinstance(node, tuple),
    )


@pytest.mark.parametrize(
    "said",
    [
        None,
        ROWS,
        {"layers": ROWS, "bias": None},
        {"layers": {"query": ROWS, "out": NamedSharding(MESH, PartitionSpec())}, "bias": ROWS},
        lambda tree: jax.tree.map(lambda _: ROWS, tree),
    ],
    ids=["nothing", "one", "prefix", "tree", "function"],
)
def test_it_is_a_tree_a_prefix_or_a_function(said: Any) -> None:
    optimizer = soap_optax.soap(0.1, stack_sharding=STACKS, param_shardings=said)
    alone = soap_optax.soap(0.1)
    grads, state, wanted_state = params(), optimizer.init(params()), alone.init(params())
    for _ in range(3):
        updates, state = jax.jit(optimizer.update)(grads, state, grads)
        wanted, wanted_state = jax.jit(alone.update)(grads, wanted_state, grads)
        for one, other in zip(jax.tree.leaves(updates), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)


def test_it_is_of_all_parameters_where_soap_has_some_of_them() -> None:
    said = jax.tree.map(lambda _: ROWS, params())
    optimizer = optax.partition(
        {
            "soap": soap_optax.soap(0.1, stack_sharding=STACKS, param_shardings=said),
            "adamw": optax.adamw(0.1),
        },
        {"layers": {"query": "soap", "out": "adamw"}, "bias": "adamw"},
    )
    updates, _ = jax.jit(optimizer.update)(params(), optimizer.init(params()), params())
    assert jax.tree.structure(updates) == jax.tree.structure(params())


@pytest.mark.parametrize("wrap", ["masked", "partition"])
def test_it_may_say_more_than_a_mask_leaves(wrap: str) -> None:
    """Optax takes whole subtrees out, and says nothing of what was in them."""
    said = jax.tree.map(lambda _: ROWS, params())
    soap = soap_optax.soap(0.1, stack_sharding=STACKS, param_shardings=said)
    optimizer = {
        "masked": optax.masked(soap, {"layers": False, "bias": True}),
        "partition": optax.partition(
            {"soap": soap, "adamw": optax.adamw(0.1)}, {"layers": "adamw", "bias": "soap"}
        ),
    }[wrap]
    updates, _ = jax.jit(optimizer.update)(params(), optimizer.init(params()), params())
    assert jax.tree.structure(updates) == jax.tree.structure(params())


def test_updates_come_back_where_parameters_are_said_to_lie() -> None:
    optimizer = soap_optax.scale_by_soap(stack_sharding=STACKS, param_shardings=ROWS)
    text = jax.jit(optimizer.update).lower(params(), optimizer.init(params())).as_text()
    without = soap_optax.scale_by_soap(stack_sharding=STACKS)
    plain = jax.jit(without.update).lower(params(), without.init(params())).as_text()
    # Three gradients on their way in, and three updates on their way out.
    assert constraints_in(text) == constraints_in(plain) + 6


def constraints_in(program: str) -> int:
    return program.count("sharding_constraint") + program.count("@Sharding")
