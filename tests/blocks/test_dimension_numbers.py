"""`dimension_numbers`: matrices made of several axes, and batch axes in any position."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cases import mostly_long
from jax import Array
from optax.contrib import MuonDimensionNumbers

from soap_optax import scale_by_soap

STEPS = 7


def run(params: Any, grads: list[Any], **options: Any) -> list[Any]:
    """The updates of all steps."""
    optimizer = scale_by_soap(precondition_frequency=2, **options)
    update = jax.jit(optimizer.update)
    state = optimizer.init(params)
    updates = []
    for grad in grads:
        update_, state = update(grad, state)
        updates.append(update_)
    return updates


def gradients(shape: tuple[int, ...]) -> list[Array]:
    rng = np.random.default_rng(len(shape))
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(STEPS)]


@pytest.mark.parametrize("axis", mostly_long([0, 1, 2], [1]))
def test_a_scanned_stack_equals_its_layers_one_by_one_wherever_the_layer_axis_stands(axis):
    layers, matrix = 3, (6, 5)
    stacked = gradients((*matrix[:axis], layers, *matrix[axis:]))
    apart = [[jnp.take(grad, layer, axis) for layer in range(layers)] for grad in stacked]
    rows, columns = [other for other in range(3) if other != axis]
    together = run(stacked[0], stacked, dimension_numbers=MuonDimensionNumbers(rows, columns))
    for whole, parts in zip(together, run(apart[0], apart), strict=True):
        np.testing.assert_array_equal(whole, jnp.stack(parts, axis))


@pytest.mark.parametrize(
    ("shape", "numbers", "copies"),
    [
        ((3, 6, 5), MuonDimensionNumbers(-2, -1), 0),  # Layers first.
        ((2, 3, 6, 5), MuonDimensionNumbers(-2, -1), 0),  # Layers, then experts.
        ((3, 6, 5, 2), MuonDimensionNumbers(1, (2, 3)), 0),  # Layers of d, heads, head_dim.
        ((6, 3, 5), MuonDimensionNumbers(0, 2), 2),  # Layers in between: one copy each way.
    ],
)
def test_a_scanned_stack_becomes_blocks_without_a_copy(shape, numbers, copies):
    optimizer = scale_by_soap(dimension_numbers=numbers)
    grads = jnp.ones(shape)
    program = jax.make_jaxpr(optimizer.update)(grads, optimizer.init(grads))
    assert sum(copies_all_of(grads.size, equation) for equation in program.eqns) == copies


def copies_all_of(size: int, equation: Any) -> bool:
    """Whether an operation moves all entries of a leaf, instead of only reshaping it."""
    if equation.outvars[0].aval.size != size:
        return False
    name = equation.primitive.name
    if name == "transpose":  # To transpose axes of length 1 moves nothing.
        order = equation.params["permutation"]
        longer = [axis for axis in order if equation.invars[0].aval.shape[axis] > 1]
        return longer != sorted(longer)
    return name in ("concatenate", "gather", "slice", "dynamic_slice", "pad", "copy")


@pytest.mark.long
def test_two_batch_axes_are_one_batch():
    grads = gradients((2, 3, 4, 5))
    flat = [grad.reshape(6, 4, 5) for grad in grads]
    numbers = MuonDimensionNumbers(-2, -1)
    wide = run(grads[0], grads, dimension_numbers=numbers)
    for update, expected in zip(wide, run(flat[0], flat, dimension_numbers=numbers), strict=True):
        np.testing.assert_array_equal(update.reshape(6, 4, 5), expected)


def test_several_axes_on_a_side_are_one_side_of_the_matrix():
    grads = gradients((6, 2, 4))  # d, heads, head_dim
    matrices = [grad.reshape(6, 8) for grad in grads]
    updates = run(grads[0], grads, dimension_numbers=MuonDimensionNumbers(0, (1, 2)))
    for update, expected in zip(updates, run(matrices[0], matrices), strict=True):
        np.testing.assert_array_equal(update.reshape(6, 8), expected)


def test_rows_and_columns_may_be_swapped():
    grads = gradients((6, 5))
    updates = run(grads[0], grads, dimension_numbers=MuonDimensionNumbers(1, 0))
    # Products of the transposed matrix add in another order, and float32 rounding adds up.
    for update, expected in zip(updates, run(grads[0], grads), strict=True):
        np.testing.assert_allclose(update, expected, atol=1e-4)


def test_none_means_adam():
    grads = gradients((6, 5))
    vectors = [grad.ravel() for grad in grads]
    updates = run({"w": grads[0]}, [{"w": g} for g in grads], dimension_numbers={"w": None})
    for update, expected in zip(updates, run(vectors[0], vectors), strict=True):
        # The compiler may vectorize the two programs differently: a few float32 roundings.
        np.testing.assert_allclose(update["w"].ravel(), expected, rtol=1e-5, atol=1e-6)


def test_a_prefix_a_function_and_any_object_with_both_axes_are_equal():
    class Numbers(NamedTuple):
        reduction_axis: int
        output_axis: int

    params = {"mlp": {"up": jnp.zeros((3, 6, 5)), "down": jnp.zeros((3, 5, 6))}, "b": jnp.zeros(4)}

    def stacks(numbers: Any) -> dict[str, tuple[int, ...]]:
        state: Any = jax.eval_shape(scale_by_soap(dimension_numbers=numbers).init, params)
        return {kind: stack.mu.shape for kind, stack in state.stacks.items()}

    expected = {"6x5": (3, 6, 5), "5x6": (3, 5, 6)}
    muon = MuonDimensionNumbers(1, 2)
    assert stacks({"mlp": {"up": muon, "down": muon}, "b": None}) == expected
    assert stacks({"mlp": muon, "b": None}) == expected
    assert stacks({"mlp": Numbers(1, 2), "b": None}) == expected
    assert (
        stacks(lambda tree: jax.tree.map(lambda p: muon if p.ndim > 2 else None, tree)) == expected
    )


def test_an_entry_may_be_a_function_of_the_leaf():
    muon = MuonDimensionNumbers(-2, -1)
    params = {"mlp": {"up": jnp.zeros((3, 6, 5)), "bias": jnp.zeros(5)}, "b": jnp.zeros(4)}
    seen = []

    def of_leaf(leaf: Any) -> Any:
        seen.append(leaf.shape)
        return muon if leaf.ndim > 1 else None

    def stacks(numbers: Any) -> dict[str, tuple[int, ...]]:
        state: Any = jax.eval_shape(scale_by_soap(dimension_numbers=numbers).init, params)
        return {kind: stack.mu.shape for kind, stack in state.stacks.items()}

    assert stacks({"mlp": of_leaf, "b": None}) == {"6x5": (3, 6, 5)}  # An entry of a subtree.
    assert set(seen) == {(3, 6, 5), (5,)}
    assert stacks({"mlp": {"up": of_leaf, "bias": None}, "b": of_leaf}) == {"6x5": (3, 6, 5)}
    assert stacks(lambda tree: jax.tree.map(lambda _: of_leaf, tree)) == {"6x5": (3, 6, 5)}


def test_a_wrong_result_of_a_function_of_the_leaf_is_named_at_init():
    rule = r"or be a function of the leaf that returns one of these, got 'rows' at \['w'\]"
    with pytest.raises(ValueError, match=rule):
        scale_by_soap(dimension_numbers={"w": lambda _: "rows"}).init({"w": jnp.zeros((3, 2))})


def test_tiles_are_cut_within_a_slice_and_a_rejected_gradient_affects_one_tile_only():
    numbers, params = MuonDimensionNumbers(1, 2), jnp.zeros((2, 8, 6))
    optimizer = scale_by_soap(dimension_numbers=numbers, block_size=4)
    state: Any = optimizer.init(params)
    assert {kind: stack.mu.shape for kind, stack in state.stacks.items()} == {"4x3": (8, 4, 3)}
    grad = jnp.ones(params.shape).at[1, 0, 0].set(jnp.nan)
    state = jax.jit(optimizer.update)(grad, state)[1]
    rejected = state.stacks["4x3"].rejected_gradients
    np.testing.assert_array_equal(rejected, [0, 0, 0, 0, 1, 0, 0, 0])


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"w": MuonDimensionNumbers(0, 2)}, "must name axes of the parameter"),
        ({"w": MuonDimensionNumbers(0, 0)}, "none twice"),
        ({"w": MuonDimensionNumbers((), 1)}, "at least one axis on each side"),
        ({"w": 3}, "got 3 at ['w']; optax.contrib.MuonDimensionNumbers has both"),
        ({"v": None}, "a prefix of it"),
    ],
)
def test_wrong_dimension_numbers_are_named_at_init(numbers, words):
    with pytest.raises(ValueError, match="dimension_numbers must") as caught:
        scale_by_soap(dimension_numbers=numbers).init({"w": jnp.zeros((3, 2))})
    assert words in str(caught.value)


@pytest.mark.parametrize("axis", [None, 1.0, "1", True, (0, None), (0, False)], ids=repr)
def test_axes_that_are_no_integers_are_named_at_init(axis):
    numbers = {"w": MuonDimensionNumbers(0, axis)}
    with pytest.raises(TypeError, match=r"dimension_numbers must name axes by integers.*\['w'\]"):
        scale_by_soap(dimension_numbers=numbers).init({"w": jnp.zeros((3, 2))})


def test_axes_may_be_numpy_integers_and_lists():
    rows: Any = [np.int32(0)]
    column: Any = np.int64(-1)
    numbers = {"w": MuonDimensionNumbers(rows, column)}
    state: Any = scale_by_soap(dimension_numbers=numbers).init({"w": jnp.zeros((3, 2))})
    assert list(state.stacks) == ["3x2"]


def test_dimension_numbers_exclude_merging_and_single_values_when_built():
    with pytest.raises(ValueError, match="merge_dims must be False"):
        scale_by_soap(dimension_numbers=MuonDimensionNumbers(), merge_dims=True)
    with pytest.raises(TypeError, match="dimension_numbers must be None, a tree"):
        scale_by_soap(dimension_numbers=2)
