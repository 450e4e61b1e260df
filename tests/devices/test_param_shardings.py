"""The forms of `param_shardings`, on a mesh of one device: no hint changes an update."""

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


def program_with(hint: Any) -> str:
    """The update with this value of `param_shardings`, before it is compiled."""
    optimizer = soap_optax.soap(0.1, stack_sharding=STACKS, param_shardings=hint)
    state = optimizer.init(params())
    return jax.jit(optimizer.update).lower(params(), state, params()).as_text()


@pytest.mark.parametrize(
    "hint",
    [
        {"layers": ROWS, "bias": ROWS},
        pytest.param(
            {"layers": {"query": ROWS, "out": ROWS}, "bias": ROWS}, marks=pytest.mark.long
        ),
        lambda tree: jax.tree.map(lambda _: ROWS, tree),
    ],
    ids=["prefix", "tree", "function"],
)
def test_a_prefix_a_tree_and_a_function_are_equal_to_one_sharding_for_all(hint: Any) -> None:
    assert program_with(hint) == program_with(ROWS)


@pytest.mark.long
def test_hints_for_some_parameters_change_no_update() -> None:
    hint = {"layers": {"query": ROWS, "out": NamedSharding(MESH, PartitionSpec())}, "bias": None}
    optimizer = soap_optax.soap(0.1, stack_sharding=STACKS, param_shardings=hint)
    alone = soap_optax.soap(0.1)
    update, update_alone = jax.jit(optimizer.update), jax.jit(alone.update)
    grads, state, wanted_state = params(), optimizer.init(params()), alone.init(params())
    for _ in range(3):
        updates, state = update(grads, state, grads)
        wanted, wanted_state = update_alone(grads, wanted_state, grads)
        for one, other in zip(jax.tree.leaves(updates), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.usefixtures("implicit_promotion")
def test_it_covers_all_parameters_where_soap_has_some_of_them() -> None:
    hints = jax.tree.map(lambda _: ROWS, params())
    optimizer = optax.partition(
        {
            "soap": soap_optax.soap(0.1, stack_sharding=STACKS, param_shardings=hints),
            "adamw": optax.adamw(0.1),
        },
        {"layers": {"query": "soap", "out": "adamw"}, "bias": "adamw"},
    )
    state = jax.eval_shape(optimizer.init, params())
    updates, _ = jax.eval_shape(optimizer.update, params(), state, params())
    assert jax.tree.structure(updates) == jax.tree.structure(params())


@pytest.mark.usefixtures("implicit_promotion")
@pytest.mark.parametrize("wrap", ["masked", "partition"])
def test_it_may_have_more_entries_than_a_mask_leaves(wrap: str) -> None:
    """Optax removes masked subtrees and leaves no trace of their leaves."""
    hints = jax.tree.map(lambda _: ROWS, params())
    soap = soap_optax.soap(0.1, stack_sharding=STACKS, param_shardings=hints)
    optimizer = {
        "masked": optax.masked(soap, {"layers": False, "bias": True}),
        "partition": optax.partition(
            {"soap": soap, "adamw": optax.adamw(0.1)}, {"layers": "adamw", "bias": "soap"}
        ),
    }[wrap]
    state = jax.eval_shape(optimizer.init, params())
    updates, _ = jax.eval_shape(optimizer.update, params(), state, params())
    assert jax.tree.structure(updates) == jax.tree.structure(params())


def test_updates_have_the_specified_shardings() -> None:
    optimizer = soap_optax.scale_by_soap(stack_sharding=STACKS, param_shardings=ROWS)
    text = jax.jit(optimizer.update).lower(params(), optimizer.init(params())).as_text()
    without = soap_optax.scale_by_soap(stack_sharding=STACKS)
    plain = jax.jit(without.update).lower(params(), without.init(params())).as_text()
    # There is one constraint for each of three gradients, and one for each of three updates.
    assert constraints_in(text) == constraints_in(plain) + 6


def constraints_in(program: str) -> int:
    return program.count("sharding_constraint") + program.count("@Sharding")
