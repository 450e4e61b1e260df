"""Tiles and merged axes: every entry is in one block, and returns to its place in the leaf."""

import math
from typing import Any

import hypothesis
import jax
import numpy as np
import pytest
from helpers import reference
from hypothesis import strategies as st

import soap_optax
from soap_optax import stacks
from soap_optax.blocks import plan, views


@st.composite
def trees_and_options(draw: st.DrawFn) -> tuple[list[tuple[int, ...]], dict[str, Any]]:
    shape = st.lists(st.integers(0, 9), max_size=4).map(tuple)
    block_size = draw(st.none() | st.integers(2, 6))
    return draw(st.lists(shape, min_size=1, max_size=3)), {
        "block_size": block_size,
        "max_precond_dim": draw(st.integers(block_size or 1, 40)),
        "precondition_1d": draw(st.booleans()),
        "merge_dims": draw(st.booleans()),
        "one_sided": draw(st.booleans()),
    }


@pytest.mark.long
@hypothesis.settings(max_examples=2 * hypothesis.settings().max_examples)
@hypothesis.given(trees_and_options())
@hypothesis.example(([()], {"precondition_1d": True, "block_size": 4}))
@hypothesis.example(([(5, 0)], {"merge_dims": True, "max_precond_dim": 3}))
@hypothesis.example(([(7, 5), (5,), (2, 7)], {"block_size": 3, "precondition_1d": True}))
def test_blocks_hold_every_entry_once_and_scatter_to_the_same_leaves(
    tree_and_options: tuple[list[tuple[int, ...]], dict[str, Any]],
) -> None:
    shapes, options = tree_and_options
    total = sum(map(math.prod, shapes))
    entries = np.arange(1, total + 1, dtype=np.float32)  # No entry is 0, which padding is.
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    parts = np.split(entries, ends[:-1])
    leaves = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
    seen = [np.zeros(0)]

    def keep_stack(grads: jax.Array, state: soap_optax.StackState, group: Any, *_: Any) -> Any:
        block, longest = grads.shape[1:], options.get("max_precond_dim", 10000)
        assert grads.shape == state.mu.shape
        assert max(block) <= (options.get("block_size") or max(block))
        axes = [axis for axis, d in enumerate(block) if 1 < d <= longest]
        if options.get("one_sided"):
            axes = [min(axes, key=lambda axis: (block[axis], axis))]
        assert group.axes == tuple(axes)
        seen.append(np.ravel(grads))
        return grads, state

    def keep_adam(grads: list[jax.Array], state: soap_optax.AdamState, *_: Any) -> Any:
        assert sum(grad.size for grad in grads) == state.mu.size
        seen.extend(np.ravel(grad) for grad in grads)
        return grads, state

    # Without SOAP's equations, an update returns its input.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stacks, "update_stack", keep_stack)
        patch.setattr(stacks, "update_adam", keep_adam)
        optimizer = soap_optax.scale_by_soap(**options)
        updates: Any = optimizer.update(leaves, optimizer.init(leaves))[0]
    np.testing.assert_array_equal(np.sort(np.concatenate(seen)), entries)
    for update, leaf in zip(updates, leaves, strict=True):
        assert update.shape == leaf.shape
        np.testing.assert_array_equal(update, leaf)


@hypothesis.settings(max_examples=300)
@hypothesis.given(length=st.integers(1, 3000), block_size=st.integers(2, 300))
@hypothesis.example(length=10, block_size=4)  # Half of the block size divides the length.
def test_tiles_are_equal_if_a_divisor_allows_and_differ_by_at_most_one_if_not(
    length: int, block_size: int
) -> None:
    tiles = []
    for start, count, tile in plan.cut_axis(length, block_size):
        assert start == sum(tiles)
        tiles += [tile] * count
    assert sum(tiles) == length
    assert max(tiles) <= block_size
    assert tiles == sorted(tiles, reverse=True)
    if length <= block_size:
        assert tiles == [length]
    elif divisors := [
        d for d in range(2, block_size + 1) if 2 * d >= block_size and length % d == 0
    ]:
        assert tiles == [max(divisors)] * (length // max(divisors))
    else:
        assert max(tiles) - min(tiles) == 1
        assert len(tiles) == math.ceil(length / block_size)
    assert tiles == reference.lengths_of_tiles(length, block_size)


def merging_up_to(limit: int) -> views.BlockOptions:
    return views.BlockOptions(
        limit, precondition_1d=False, merge_dims=True, block_size=None, one_sided=False
    )


MERGED = [
    # The two examples with which Distributed Shampoo documents the same rule.
    ((1, 2, 512, 1, 2048, 1, 3, 4), 1024, (1024, 2048, 12)),
    ((1, 2, 768, 1, 2048), 1024, (2, 768, 2048)),
    # Kernels of convolutions, small and large.
    ((3, 3, 16, 32), 10000, (4608,)),
    ((3, 3, 64, 128), 10000, (576, 128)),
    ((7, 7, 3, 64), 100, (49, 3, 64)),
    # Exactly at the limit, and one beyond it.
    ((4, 5), 20, (20,)),
    ((4, 5), 19, (4, 5)),
    # An axis longer than the limit is not merged.
    ((2, 3, 100, 4, 5), 30, (6, 100, 20)),
    ((100, 100), 30, (100, 100)),
    # Axes of length 1 vanish, except if no other axis is left.
    ((1, 1, 1), 10, (1,)),
    ((1, 50, 1), 10, (50,)),
    # Vectors and scalars are not merged.
    ((12,), 10, (12,)),
    ((), 10, ()),
]


@pytest.mark.parametrize(("shape", "limit", "wanted"), MERGED, ids=lambda value: str(value))
def test_dimensions_are_merged_by_the_authors_rule(
    shape: tuple[int, ...], limit: int, wanted: tuple[int, ...]
) -> None:
    options = merging_up_to(limit)
    assert views.merged_shape(shape, options) == wanted


@hypothesis.settings(max_examples=300)
@hypothesis.given(
    shape=st.lists(st.integers(1, 12), min_size=2, max_size=6).map(tuple),
    limit=st.integers(1, 200),
)
def test_merging_agrees_with_the_reference_and_keeps_every_entry(
    shape: tuple[int, ...], limit: int
) -> None:
    options = merging_up_to(limit)
    merged = views.merged_shape(shape, options)
    assert math.prod(merged) == math.prod(shape)
    assert merged == reference.merged(shape, limit)
