"""Padding of stacks, and which leaves share a bucket."""

import jax.numpy as jnp
import numpy as np
import pytest

from soap_optax import blocks
from soap_optax.blocks import plan, views


def plan_of(shapes: list[tuple[int, ...]], multiple: int = 1) -> plan.Plan:
    options = views.BlockOptions(
        None, precondition_1d=False, merge_dims=False, block_size=None, one_sided=False
    )
    return plan.make_plan(
        shapes,
        [np.float32] * len(shapes),
        options,
        [views.AxesMark.DEFAULT] * len(shapes),
        multiple,
    )


@pytest.mark.parametrize(
    ("length", "wanted"),
    [(3, [1, 2, 3]), (4, [1, 2, 3, 0]), (6, [1, 0, 2, 0, 3, 0]), (8, [1, 0, 2, 0, 0, 3, 0, 0])],
)
def test_blocks_are_spread_evenly_and_padding_is_zero(length: int, wanted: list[int]) -> None:
    [group] = plan_of([(2, 2)] * 3).stacks.values()
    stack = jnp.broadcast_to(jnp.arange(1.0, 4)[:, None, None], (3, 2, 2))
    padded = blocks.repad(stack, group, length)
    np.testing.assert_array_equal(
        padded, np.broadcast_to(np.reshape(wanted, (-1, 1, 1)), padded.shape)
    )
    np.testing.assert_array_equal(blocks.repad(padded, group, 3), stack)


def test_a_leaf_of_65536_entries_has_vectors_of_its_own() -> None:
    vectors = plan_of([(65_536,), (65_535,), (3,), (65_536,)]).adam
    assert {name: len(group.regions) for name, group in vectors.items()} == {
        "65536": 1,
        "float32": 2,
        "65536_2": 1,
    }
