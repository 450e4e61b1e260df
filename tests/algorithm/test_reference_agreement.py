"""The library against the NumPy reference, and against itself where two computations must agree.

The inputs do not always determine the result of the algorithm. The Gram matrix of one gradient is
rank deficient unless the other axes are long enough. Its null space then has no unique
eigenvectors: rounding picks an orthonormal set. As long as `L` has a null space, a QR of `L Q`
completes that set by rounding again. Rayleigh quotients order the columns. Where they are rounding
errors of zero, rounding decides the order, too. Two correct implementations may then differ by the
size of an update.

The comparisons here therefore begin with factors that have no null space. Before the first call,
both sides replace the zero factors by `states.full_rank_factor`. Everything else runs as usual, the
first eigh included. The result is determined up to the signs of columns, on which no update
depends. With decays of 0.9 and more, a part of the first factors is left at the end (0.9^20 is
0.12). The factors stay well conditioned even where the gradients never fill them, as with a vector.
One risk remains: two quotients of random factors may come within rounding of each other, a relative
gap of 1e-13. Among the 1e5 pairs of all examples, its chance is less than one in a million.

The recorded trajectories begin at zero (`test_trajectories`). One test below does too, for shapes
that allow it.
"""

from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import optax
import pytest
from helpers import reference, states
from helpers.cases import mostly_long, named

import soap_optax

pytestmark = pytest.mark.usefixtures("x64")

STEPS = 20

# Updates are of size 1 to 30. Their rounding, 1e-15, is amplified by:
# - the condition numbers of the factors;
# - the gaps between the eigenvalues of the first factors;
# - entries of a rotated gradient that are small beside the others;
# - columns out of order. Until they are sorted, each step of orthogonal iteration drives them apart
#   by the ratio of their eigenvalues.
#
# Of 2,550 random runs, half differed by less than 2e-14, one in a thousand by 3e-11, the worst by
# 5e-11. Of 400 runs with the later options, none differed by more than 5e-12. A different algorithm
# would differ by 1e-3 and more.
TOLERANCE = 1e-8

Tree = dict[str, np.ndarray]  # A leaf has the shape (steps, *shape).


def random_grads(shapes: list[reference.Shape], seed: int, scale: float = 1.0) -> Tree:
    """Independent normal gradients for every step."""
    rng = np.random.default_rng(seed)
    return {
        f"leaf{i}": scale * rng.standard_normal((STEPS, *shape)) for i, shape in enumerate(shapes)
    }


def compile_run(
    prepare: Callable[[Any], Any] = states.put_full_rank_factors, **static: Any
) -> Callable[..., tuple[Tree, soap_optax.ScaleBySoapState]]:
    """A function of the gradients of all steps, and of options that may be traced.

    It returns the directions of all steps, and the states after them. `prepare` is applied to the
    initial state.
    """

    @jax.jit
    def run(grads: Tree, traced: dict[str, Any]) -> tuple[Tree, soap_optax.ScaleBySoapState]:
        transform = soap_optax.scale_by_soap(**static, **traced)

        def step(state: optax.OptState, grad: optax.Updates) -> tuple[optax.OptState, Any]:
            updates, state = transform.update(grad, state)
            return state, (updates, state)

        first = jax.tree.map(lambda leaf: leaf[0], grads)
        return jax.lax.scan(step, prepare(transform.init(first)), grads)[1]

    return lambda grads, **traced: jax.tree.map(np.asarray, run(grads, traced))


def shapes_of(ndim: int, longest: int, shortest: int = 1) -> st.SearchStrategy[reference.Shape]:
    return st.tuples(*[st.integers(shortest, longest)] * ndim)


any_shape = st.one_of(
    st.just(()), shapes_of(1, 12), shapes_of(2, 12), shapes_of(3, 6), shapes_of(4, 4)
)


@st.composite
def trees(draw: st.DrawFn) -> list[reference.Shape]:
    """Shapes of the leaves of a tree: a matrix, up to two others, and some of these repeated."""
    shapes = [draw(shapes_of(2, 12, shortest=2)), *draw(st.lists(any_shape, max_size=2))]
    return shapes + draw(st.lists(st.sampled_from(shapes), max_size=2))


@st.composite
def static_options(draw: st.DrawFn) -> dict[str, Any]:
    max_precond_dim = draw(st.sampled_from([24, 8, 5]))
    return {
        "max_precond_dim": max_precond_dim,
        "block_size": draw(st.none() | st.integers(2, min(max_precond_dim, 7))),
        "precondition_1d": draw(st.booleans()),
        "merge_dims": draw(st.booleans()),
        "normalize_grads": draw(st.booleans()),
        "correct_bias": draw(st.booleans()),
        "first_update": draw(st.sampled_from(["zero", "apply"])),
        "refresh": draw(st.sampled_from(["qr", "eigh"])),
        "refresh_order": draw(st.sampled_from(["before_gradient", "after_gradient"])),
        "one_sided": draw(st.booleans()),
        "factored": draw(st.booleans()),
        "fold_factors": draw(st.booleans()),
    }


@st.composite
def traced_options(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Three sets of numbers for one compiled program, with or without a `shampoo_beta`."""
    ranges = {
        "b1": st.floats(0.0, 0.99),
        "b2": st.floats(0.9, 0.999),
        "eps": st.sampled_from([1e-12, 1e-8, 1e-2]),
        "precondition_frequency": st.integers(1, 7),
    }
    if draw(st.booleans()):
        ranges["shampoo_beta"] = st.floats(0.9, 0.99)
    return [draw(st.fixed_dictionaries(ranges)) for _ in range(3)]


@hypothesis.given(
    shapes=trees(),
    static=static_options(),
    traced=traced_options(),
    scale=st.sampled_from([0.1, 1.0, 10.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_step_agrees_with_the_reference_on_any_tree_with_any_options(
    shapes: list[reference.Shape],
    static: dict[str, Any],
    traced: list[dict[str, Any]],
    scale: float,
    seed: int,
) -> None:
    assert_agreement(random_grads(shapes, seed, scale), static, traced)


def assert_agreement(grads: Tree, static: dict[str, Any], traced: list[dict[str, Any]]) -> None:
    """Compares all steps from factors of full rank, for each set of numbers."""
    run = compile_run(**static)
    changes_result = {name: static[name] for name in static if name != "fold_factors"}
    block_size = changes_result.pop("block_size", None)
    for numbers in traced:
        directions, _ = run(grads, **numbers)
        options = reference.Options(**changes_result, **numbers)
        for name, leaf_grads in grads.items():
            expected = reference.run_in_tiles(
                leaf_grads,
                options,
                block_size=block_size,
                initial_factor=states.full_rank_factor,
            )
            np.testing.assert_allclose(
                directions[name], expected, rtol=0, atol=TOLERANCE, err_msg=name
            )


@pytest.mark.parametrize(
    "options",
    mostly_long(
        named(
            {
                "eigh factored": {"refresh": "eigh", "factored": True},
                "apply": {"first_update": "apply"},
                "apply after_gradient": {
                    "first_update": "apply",
                    "refresh_order": "after_gradient",
                    "normalize_grads": True,
                },
                "apply all": {
                    "first_update": "apply",
                    "refresh": "eigh",
                    "one_sided": True,
                    "factored": True,
                    "fold_factors": True,
                    "block_size": 4,
                },
                "after_gradient one_sided folded": {
                    "refresh_order": "after_gradient",
                    "one_sided": True,
                    "fold_factors": True,
                },
                "all": {
                    "refresh": "eigh",
                    "refresh_order": "after_gradient",
                    "one_sided": True,
                    "factored": True,
                    "block_size": 4,
                },
            }
        ),
        short=["all"],
    ),
)
def test_every_option_agrees_with_the_reference_on_every_shape_of_leaf(
    options: dict[str, Any],
) -> None:
    # A square matrix, a wide one, one with an axis too long for a factor, one with an axis of
    # length 1. Three dimensions with two shortest axes. A vector with a factor, one without.
    shapes = [(5, 5), (4, 7), (9, 6), (1, 5), (3, 4, 3), (6,), (9,)]
    static = {"max_precond_dim": 8, "precondition_1d": True, **options}
    numbers = {"b1": 0.9, "b2": 0.95, "shampoo_beta": 0.9}
    traced = [{"precondition_frequency": frequency, **numbers} for frequency in (1, 4)]
    assert_agreement(random_grads(shapes, seed=4), static, traced)


# Shapes whose first Gram matrices have full rank: no axis is longer than the others' product.
FULL_RANK_SHAPES: list[reference.Shape] = [(6, 6), (6, 6), (4, 3, 5), (7,), ()]


@pytest.mark.parametrize("first_update", mostly_long(["zero", "apply"], ["zero"]))
def test_every_frequency_agrees_with_the_reference_from_zero_factors(first_update: Any) -> None:
    grads = random_grads(FULL_RANK_SHAPES, seed=0)
    run = compile_run(prepare=lambda state: state, first_update=first_update)
    for frequency in range(1, 8):
        directions, _ = run(grads, precondition_frequency=frequency)
        options = reference.Options(precondition_frequency=frequency, first_update=first_update)
        for name, leaf_grads in grads.items():
            expected = reference.run(leaf_grads, options)
            np.testing.assert_allclose(directions[name], expected, rtol=0, atol=TOLERANCE)


def test_bases_in_use_are_those_left_by_a_refresh_at_the_end_of_the_previous_step() -> None:
    frequency = 3
    shape = (5, 3)
    ((name, grads),) = random_grads([shape], seed=1).items()
    run = compile_run(precondition_frequency=frequency)
    _, soap_states = run({name: grads})
    (stack,) = soap_states.stacks.values()

    options = reference.Options(precondition_frequency=frequency)
    priors = {axis: states.full_rank_factor(length) for axis, length in enumerate(shape)}
    state = reference.init(shape, options, priors)
    for call, grad in enumerate(grads):
        bases_before = state.bases
        reference.step(grad, state, options)
        for axis, factor in state.factors.items():
            np.testing.assert_allclose(stack.factors[axis][call, 0], factor, atol=TOLERANCE)
        if bases_before is None:
            assert stack.refreshes[call, 0] == 0
            continue
        bases = {axis: np.asarray(stack.bases[axis][call, 0]) for axis in state.factors}
        for axis, basis in bases.items():
            # The same columns in the same order; their signs are arbitrary.
            overlap = np.abs(basis.T @ bases_before[axis])
            np.testing.assert_allclose(overlap, np.eye(shape[axis]), atol=TOLERANCE)
        mu = reference.rotate_back(np.asarray(stack.mu[call, 0]), bases)
        np.testing.assert_allclose(mu, state.mu, atol=TOLERANCE)
        if call % frequency != 0:  # Else the reference has already permuted it for the next step.
            np.testing.assert_allclose(np.asarray(stack.nu)[call, 0], state.nu, atol=TOLERANCE)
        assert stack.refreshes[call, 0] == 1 + (call - 1) // frequency


@pytest.mark.long
def test_equal_leaves_in_one_stack_move_as_each_would_alone() -> None:
    shape = (6, 4)
    grads = random_grads([shape, shape, shape, (5,), (5,)], seed=2)
    together, _ = compile_run(precondition_frequency=3)(grads)
    alone = compile_run(precondition_frequency=3)
    for name, leaf_grads in grads.items():
        directions, _ = alone({"leaf": leaf_grads})
        np.testing.assert_allclose(
            together[name], directions["leaf"], rtol=0, atol=TOLERANCE, err_msg=name
        )


@pytest.mark.long
def test_tiles_move_as_leaves_of_their_own() -> None:
    block_size = 4
    # Cut evenly into 4x3, unevenly into 4x3 and 3x3, and not at all.
    grads = random_grads([(8, 6), (7, 9), ()], seed=3)
    options = {"precondition_frequency": 3, "precondition_1d": True, "normalize_grads": True}
    whole, _ = compile_run(block_size=block_size, **options)(grads)

    cuts = {
        f"{name}/{i}": (name, (slice(None), *cut))
        for name, leaf_grads in grads.items()
        for i, cut in enumerate(reference.tiles(leaf_grads.shape[1:], block_size))
    }
    assert len(cuts) == 4 + 6 + 1
    tiles, _ = compile_run(**options)({key: grads[name][cut] for key, (name, cut) in cuts.items()})
    for key, (name, cut) in cuts.items():
        np.testing.assert_allclose(
            whole[name][cut], tiles[key], rtol=0, atol=TOLERANCE, err_msg=key
        )
