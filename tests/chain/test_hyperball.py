"""`hyperball`: every matrix keeps its norm, and all other leaves get the plain update."""

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from helpers import hyperball as reference
from helpers.cases import mostly_long

import soap_optax

Matrix = optax.contrib.MuonDimensionNumbers
RATE = 0.02


def build(learning_rate: Any = RATE, **options: Any) -> Any:
    return soap_optax.hyperball(learning_rate, **options)


def draw(shape: tuple[int, ...], seed: int = 0, dtype: Any = np.float32) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def moved(
    params: Any, directions: Any, learning_rate: Any = RATE, **options: Any
) -> tuple[Any, Any]:
    """The parameters after one step from the start, and the state."""
    optimizer = build(learning_rate, **options)
    updates, state = jax.jit(optimizer.update)(directions, optimizer.init(params), params)
    return optax.apply_updates(params, updates), state


def norm(array: Any) -> float:
    return float(np.linalg.norm(np.asarray(array).astype(np.complex128).ravel()))


# The equations.

SHAPES: dict[str, tuple[tuple[int, ...], Any, tuple[int, ...] | None]] = {
    "matrix": ((4, 6), Matrix(0, 1), (0, 1)),
    "layers": ((3, 4, 5), Matrix(1, 2), (1, 2)),
    "heads": ((4, 3, 5), Matrix(0, -1), (0, 2)),
    "attention": ((2, 4, 2, 3), Matrix(1, (2, 3)), (1, 2, 3)),
    "none": ((4, 4), None, None),
    "vector": ((5,), None, None),
    "scalar": ((), None, None),
}


@pytest.mark.usefixtures("implicit_promotion")
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("with_numbers", "with_mask"),
    mostly_long(
        [
            pytest.param(True, True, id="both"),
            pytest.param(True, False, id="numbers"),
            pytest.param(False, True, id="mask"),
            pytest.param(False, False, id="neither"),
        ],
        ["both"],
    ),
)
def test_steps_equal_the_reference_matrix_by_matrix(with_numbers: bool, with_mask: bool) -> None:
    def schedule(count: Any) -> Any:
        return 0.3 / (1.0 + count)

    numbers = {name: number for name, (_, number, _) in SHAPES.items()}
    mask = {name: name != "matrix" for name in SHAPES}
    optimizer = build(
        schedule,
        dimension_numbers=(lambda _: numbers) if with_numbers else None,
        mask=mask if with_mask else None,
    )
    start = {name: draw(shape, dtype=np.float64) for name, (shape, *_) in SHAPES.items()}
    wanted = dict(start)
    params: Any = jax.tree.map(jnp.asarray, start)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for call in range(4):
        directions = {
            name: 10**call * draw(leaf.shape, seed=call + 1, dtype=np.float64)
            for name, leaf in start.items()
        }
        updates, state = update(directions, state, params)
        params = optax.apply_updates(params, updates)
        for name, (shape, _, axes) in SHAPES.items():
            if not with_numbers:
                axes = tuple(range(len(shape))) if len(shape) > 1 else None
            axes = None if with_mask and not mask[name] else axes
            wanted[name] = reference.step(
                wanted[name], directions[name], schedule(call), start[name], axes
            )
            # Rounding in float64. A wrong norm would change the second digit.
            np.testing.assert_allclose(params[name], wanted[name], rtol=0, atol=1e-12 * 10**call)


def test_learning_rate_is_the_tangent_of_the_angle() -> None:
    weights, direction = draw((6, 4)), draw((6, 4), seed=1)
    direction -= weights * np.sum(weights * direction) / np.sum(weights**2)
    for rate in (1e-3, 0.1, 1.0):
        new, _ = moved(weights, direction, rate)
        cosine = np.sum(new * weights) / norm(new) / norm(weights)
        sine = norm(new / norm(new) - weights * cosine / norm(weights))
        assert math.atan2(sine, cosine) == pytest.approx(math.atan(rate), rel=1e-3)


@pytest.mark.parametrize("scale", mostly_long([1e-8, 1e12], [1e-8]))
def test_size_of_the_direction_has_no_effect(scale: float) -> None:
    weights, direction = draw((6, 4)), draw((6, 4), seed=1)
    new, _ = moved(weights, direction)
    # Numbers of size 1 are rounded.
    np.testing.assert_allclose(
        moved(weights, np.float32(scale) * direction)[0], new, rtol=0, atol=1e-6
    )


# The norm.


@functools.partial(jax.jit, static_argnames=("optimizer", "steps"))
def run(optimizer: optax.GradientTransformation, params: Any, steps: int) -> Any:
    """The parameters after many steps in random directions."""

    def step(carry: Any, call: jax.Array) -> Any:
        params, state = carry
        direction = jax.random.normal(jax.random.key(call), params.shape, params.dtype)
        updates, state = optimizer.update(direction, state, params)
        return (optax.apply_updates(params, updates), state), None

    carry = (params, optimizer.init(params))
    return jax.lax.scan(step, carry, jnp.arange(steps))[0][0]


@pytest.mark.parametrize("rate", mostly_long([1e-4, RATE], [RATE]))
def test_norms_stay_within_1e6_over_ten_thousand_float32_steps(rate: float) -> None:
    """A norm measured again in every step would drift by 1e-5 to 1e-4 here."""
    start = 0.1 * jnp.asarray(draw((2, 16, 8)))
    optimizer = build(rate, dimension_numbers=Matrix(1, 2))
    end = run(optimizer, start, 10_000)
    for before, after in zip(start, end, strict=True):
        assert norm(after) == pytest.approx(norm(before), rel=1e-6)
        assert norm(after - before) > min(0.5, 50 * rate) * norm(before)  # It moved.


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_norms_of_narrow_matrices_stay_within_the_unit_roundoff(dtype: Any) -> None:
    """Rounded weights change a norm by the unit roundoff at most, after any number of steps."""
    start = jnp.asarray(draw((4, 3)), dtype)
    end = run(build(), start, 2000)
    assert end.dtype == dtype
    unit_roundoff = float(jnp.finfo(dtype).eps) / 2
    # The update is rounded too. It is smaller than the weights by the learning rate.
    assert norm(end) == pytest.approx(norm(start), rel=unit_roundoff * (1 + 2 * RATE))
    assert norm(end - start) > 0.1 * norm(start)


def test_norms_are_those_of_the_first_update() -> None:
    """Frameworks load weights after `init`."""
    loaded: Any = {"kernel": 7 * draw((4, 3))}
    optimizer = build()
    state = optimizer.init({"kernel": draw((4, 3))})
    for call in range(3):
        updates, state = optimizer.update({"kernel": draw((4, 3), seed=call)}, state, loaded)
        new: Any = optax.apply_updates(loaded, updates)
        assert norm(new["kernel"]) == pytest.approx(norm(7 * draw((4, 3))), rel=1e-6)
        loaded = jax.tree.map(lambda leaf: 1.5 * leaf, new)  # This changes no recorded norm.


def test_complex_matrices_keep_their_norm() -> None:
    weights = draw((4, 3)) + 1j * draw((4, 3), seed=1)
    direction = draw((4, 3), seed=2) + 1j * draw((4, 3), seed=3)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        new, state = moved(weights, direction, 0.5)
    assert new.dtype == np.complex64
    assert state.norms[0].dtype == np.float32
    assert norm(new) == pytest.approx(norm(weights), rel=1e-6)
    expected = reference.step_of_matrix(weights, direction, 0.5, norm(weights))
    np.testing.assert_allclose(new, expected, rtol=0, atol=1e-6)


# The plain update.


def test_everything_but_matrices_gets_the_plain_learning_rate() -> None:
    params = {
        "masked": draw((4, 3)),
        "none": draw((2, 3)),
        "vector": draw((3,)),
        "scalar": draw(()),
        "empty": draw((0, 3)),
        "narrow": jnp.ones(3, jnp.bfloat16),
    }
    numbers = {name: Matrix(0, 1) for name in ("masked", "empty")}
    optimizer = build(
        RATE,
        dimension_numbers=lambda tree: {name: numbers.get(name) for name in tree},
        mask={name: name != "masked" for name in params},
    )
    directions = jax.tree.map(lambda leaf: (0.5 + leaf).astype(leaf.dtype), params)
    state = optimizer.init(params)
    updates: Any = optimizer.update(directions, state, params)[0]
    plain = optax.scale_by_learning_rate(RATE)
    wanted: Any = plain.update(directions, plain.init(params))[0]
    assert state.norms == ()
    # The product of two bfloat16 numbers has one more rounding than in float32.
    np.testing.assert_allclose(
        updates.pop("narrow").astype(np.float32),
        wanted.pop("narrow").astype(np.float32),
        rtol=2**-7,
    )
    jax.tree.map(np.testing.assert_array_equal, updates, wanted)


def test_a_matrix_of_zeros_gets_the_plain_update_in_all_steps() -> None:
    start = np.stack([np.zeros((4, 3), np.float32), draw((4, 3))])
    optimizer = build(RATE, dimension_numbers=Matrix(1, 2))
    params: Any = start
    state = optimizer.init(start)
    directions = [draw((2, 4, 3), seed=call) for call in range(1, 4)]
    for direction in directions:
        updates, state = optimizer.update(direction, state, params)
        np.testing.assert_allclose(updates[0], -RATE * direction[0], rtol=1e-6)
        params = optax.apply_updates(params, updates)
    assert norm(params[1]) == pytest.approx(norm(start[1]), rel=1e-6)


@pytest.mark.parametrize("of_direction", [1e30, 1e20, 1e-9, 1e-12, 1e-30])
@pytest.mark.parametrize("of_weights", [1e25, 1.0, 1e-19, 1e-30])
def test_no_square_overflows_or_underflows(of_direction: float, of_weights: float) -> None:
    """Directions below 1e-10 move the weights by a smaller angle, as in the equation."""
    weights, direction = draw((2, 4, 3)), draw((2, 4, 3), seed=1)
    numbers = Matrix(1, 2)
    big, step = np.float32(of_weights) * weights, np.float32(of_direction) * direction
    new, state = moved(big, step, 0.5, dimension_numbers=numbers)
    wide = big.astype(np.float64), step.astype(np.float64)
    wanted = reference.step(*wide, 0.5, wide[0], (1, 2))
    np.testing.assert_allclose(new / of_weights, wanted / of_weights, atol=2e-6)
    sizes = np.linalg.norm(wide[0], axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(state.norms[0], sizes, rtol=1e-6)


# Directions that leave weights unchanged.


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf], ids=str)
def test_a_direction_that_is_zero_or_not_finite_leaves_its_matrix_unchanged(bad: float) -> None:
    weights, direction = draw((3, 4, 3)), draw((3, 4, 3), seed=1)
    direction[1] = 0
    direction[1, 2, 1] = bad
    new, _ = moved(weights, direction, dimension_numbers=Matrix(1, 2))
    changed = [bool(np.any(new[i] != weights[i])) for i in range(3)]
    assert changed == [True, False, True]
    assert np.isfinite(new).all()


def test_a_step_to_the_origin_leaves_the_matrix_unchanged() -> None:
    """At the origin only rounding errors are left, which have no direction."""
    for seed in range(3):
        weights = draw((5, 3), seed)
        np.testing.assert_array_equal(moved(weights, 3 * weights, 1.0)[0], weights)


def test_a_learning_rate_that_is_not_a_number_is_not_hidden() -> None:
    new, _ = moved(draw((4, 3)), draw((4, 3), seed=1), lambda _: jnp.nan)
    assert np.isnan(new).all()


def test_derivatives_through_a_step_are_finite_where_the_direction_is_zero() -> None:
    optimizer = build()
    weights = jnp.asarray(draw((4, 3)))

    def after(direction: jax.Array, weights: jax.Array) -> jax.Array:
        updates, _ = optimizer.update(direction, optimizer.init(weights), weights)
        return jnp.sum(jnp.sin(weights + updates))

    slopes = jax.grad(after, argnums=(0, 1))(jnp.zeros((4, 3)), weights)
    assert all(np.isfinite(slope).all() for slope in slopes)


# Weight decay before or after it.


def test_weight_decay_before_it_only_makes_the_angle_smaller() -> None:
    weights, direction = draw((6, 4)), draw((6, 4), seed=1)
    direction -= weights * np.sum(weights * direction) / np.sum(weights**2)
    decay: Any = optax.chain(optax.add_decayed_weights(3.0), build())
    updates, _ = decay.update(direction, decay.init(weights), weights)
    decayed: Any = optax.apply_updates(weights, updates)
    assert norm(decayed) == pytest.approx(norm(weights), rel=1e-6)
    # Only the tangential share of the direction moves the weights. The step toward the origin
    # makes the angle larger by the factor that the projection takes.
    size = norm(direction + 3 * weights)
    tangent = RATE * norm(direction) / size / (1 - RATE * 3 * norm(weights) / size)
    expected, _ = moved(weights, direction, tangent)
    np.testing.assert_allclose(decayed, expected, rtol=0, atol=1e-6)
    assert tangent < 0.5 * RATE


def test_weight_decay_after_it_is_undone_by_the_next_step() -> None:
    weights = draw((6, 4))
    optimizer: Any = optax.chain(build(), optax.add_decayed_weights(-0.1))
    params: Any = weights
    state, sizes = optimizer.init(weights), []
    for call in range(20):
        updates, state = optimizer.update(draw((6, 4), seed=call), state, params)
        params = optax.apply_updates(params, updates)
        sizes.append(norm(params) / norm(weights))
    np.testing.assert_allclose(sizes, sizes[-1], rtol=0.02)  # The norm does not decay further.


# Dtypes, and JAX's strict modes.


@pytest.mark.parametrize("of_direction", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("of_params", ["float32", "bfloat16"])
def test_updates_have_the_dtype_of_the_direction(of_params: str, of_direction: str) -> None:
    params = {"kernel": jnp.ones((4, 3), of_params), "bias": jnp.ones(3, of_params)}
    directions = jax.tree.map(lambda leaf: leaf.astype(of_direction), params)
    optimizer = build(jnp.float32(RATE))
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        state = optimizer.init(params)
        updates, after = jax.jit(optimizer.update)(directions, state, params)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(updates)} == {of_direction}
    assert [leaf.dtype for leaf in jax.tree.leaves(after)] == [jnp.int32, jnp.float32]


# The state.


def test_state_holds_one_array_of_norms_for_each_parameter_with_matrices() -> None:
    params = {"mlp": [{"kernel": draw((2, 4, 3)), "bias": draw((3,))}]}
    numbers = {"mlp": [{"kernel": Matrix(1, 2), "bias": None}]}
    state = build(RATE, dimension_numbers=numbers).init(params)
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(state)
    ]
    assert paths == ["count", "norms/0"]
    assert state.norms[0].shape == (2, 1, 1)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))


def test_tree_map_params_maps_no_norm() -> None:
    optimizer: Any = optax.chain(optax.trace(0.9), build())
    state = optimizer.init({"kernel": draw((4, 3))})
    mapped: Any = optax.tree_map_params(optimizer, lambda _: "parameter", state)
    assert mapped[0].trace == {"kernel": "parameter"}
    assert mapped[1] == state[1]


# Errors.


def test_a_missing_params_argument_raises_as_in_optax() -> None:
    optimizers: list[Any] = [build(), optax.add_decayed_weights(0.1)]
    messages = []
    for optimizer in optimizers:
        with pytest.raises(ValueError, match="params") as error:
            optimizer.update({"a": 1.0}, optimizer.init({"a": 1.0}), None)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"learning_rate": np.nan}, ValueError, "must be finite, got nan; 0.02 is a good start"),
        ({"learning_rate": "0.1"}, TypeError, "learning_rate must be a number or a schedule"),
        ({"learning_rate": 0.1, "mask": "kernel"}, TypeError, "mask must be None, a tree"),
        ({"learning_rate": 0.1, "mask": False}, TypeError, "add 'mask' to static_args"),
        ({"learning_rate": 0.1, "dimension_numbers": 2}, TypeError, "dimension_numbers must be"),
    ],
)
def test_arguments_out_of_range_raise_when_it_is_built(
    options: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=re.escape(words)):
        soap_optax.hyperball(**options)


@pytest.mark.parametrize(
    ("options", "params", "error", "words"),
    [
        ({}, {"a": np.ones((2, 2), np.int32)}, TypeError, "got int32 at ['a']; leave it out with"),
        ({"mask": {"b": True}}, {"a": 1.0}, ValueError, "no entry for the parameter ['a']"),
        ({"mask": {"a": 1}}, {"a": 1.0}, TypeError, "mask must have True or False"),
        ({"mask": {"a": None}}, {"a": 1.0}, TypeError, "mask must have True or False"),
        ({"dimension_numbers": Matrix(0, 2)}, {"a": np.ones((2, 2))}, ValueError, "has 2 axes"),
    ],
)
def test_parameters_that_do_not_fit_raise_at_init(
    options: Any, params: Any, error: type[Exception], words: str
) -> None:
    init: Callable[..., Any] = build(RATE, **options).init
    for runner in (init, functools.partial(jax.eval_shape, init)):
        with pytest.raises(error, match=re.escape(words)):
            runner(params)


@pytest.mark.parametrize("leaf", ["word", abs], ids=str)
def test_a_leaf_that_is_no_array_raises_at_init(leaf: Any) -> None:
    words = re.escape(f"must be an array, got {leaf!r} at ['a']; filter the tree before init")
    with pytest.raises(TypeError, match=words):
        build().init({"a": leaf})


@pytest.mark.parametrize(
    ("updates", "error", "words"),
    [
        ({"a": np.ones((4, 3)), "b": None}, ValueError, "got none for [\"['b']\"]"),
        ({"a": np.ones((4, 3))}, ValueError, "got none for [\"['b']\"]"),
        ({"a": np.ones((4, 3)), "b": np.ones(3), "c": np.ones(2)}, ValueError, "[\"['c']\"]"),
        ({"a": np.ones((4, 1)), "b": np.ones(3)}, ValueError, "(4, 1) at ['a'] and must have (4,"),
        ({"a": np.ones((4, 3)), "b": np.ones(1)}, ValueError, "(1,) at ['b'] and must have (3,)"),
        ({"a": np.ones((4, 3)), "b": np.ones(3, int)}, TypeError, "int64 at ['b']"),
        ({"a": "word", "b": np.ones(3)}, TypeError, "must be an array, got 'word' at ['a']"),
    ],
)
def test_directions_that_do_not_fit_raise_at_update(updates: Any, error: Any, words: str) -> None:
    optimizer, params = build(), {"a": draw((4, 3)), "b": draw((3,))}
    with pytest.raises(error, match=re.escape(words)):
        optimizer.update(updates, optimizer.init(params), params)


def test_a_mask_that_injection_called_with_the_step_raises() -> None:
    """Optax takes functions for schedules; the mask of a number without axes is False."""

    def mask(params: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.ndim(leaf) > 1, params)

    for make in (soap_optax.hyperball, soap_optax.soap, soap_optax.shampoo, soap_optax.soap_adamw):
        injected: Any = optax.inject_hyperparams(make)
        with pytest.raises(TypeError, match="add 'mask' to static_args"):
            injected(learning_rate=RATE, mask=mask).init({"a": draw((4, 3))})


def test_a_state_of_other_parameters_raises() -> None:
    optimizer = build()
    params = {"kernel": draw((4, 3))}
    with pytest.raises(ValueError, match=r"the shapes \[\] and must have .*kernel.*\(1, 1\)"):
        optimizer.update(params, optimizer.init({"bias": draw((3,))}), params)
    stacked = build(RATE, dimension_numbers=Matrix(1, 2))
    kernels = {"kernel": draw((2, 4, 3))}
    with pytest.raises(
        ValueError, match=r"shapes \[\(2, 1, 1\)\] .* dimension_numbers or mask changed"
    ):
        optimizer.update(kernels, stacked.init(kernels), kernels)
    with pytest.raises(TypeError, match="must be a HyperballState, got EmptyState"):
        optimizer.update(params, optax.EmptyState(), params)
