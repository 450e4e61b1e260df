"""Shampoo against an independent reference in NumPy, and by identities.

The runs begin with factors of full rank on both sides, because rounding decides the eigenvalues of
a null space, and the inverse root multiplies them by up to a million.
"""

from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import reference, shampoo_reference, states
from helpers.cases import mostly_long, named

import soap_optax
from soap_optax import algorithm
from soap_optax.linalg import frobenius_norm, inverse_power

pytestmark = pytest.mark.usefixtures("x64")

STEPS = 20
# Relative to the largest entry of an update, or to 1. In 900 random runs of a leaf, the largest
# difference was 3e-14.
TOLERANCE = 1e-10

Tree = dict[str, np.ndarray]  # A leaf has the shape (steps, *shape).


def random_grads(shapes: list[reference.Shape], seed: int, scale: float = 1.0) -> Tree:
    rng = np.random.default_rng(seed)
    return {
        f"leaf{i}": scale * rng.standard_normal((STEPS, *shape)) for i, shape in enumerate(shapes)
    }


def compile_run(**static: Any) -> Callable[..., Tree]:
    """A function of the gradients of all steps, and of options that may be traced."""

    @jax.jit
    def run(grads: Tree, traced: dict[str, Any]) -> Any:
        transform = soap_optax.scale_by_shampoo(**static, **traced)

        def step(state: optax.OptState, grad: optax.Updates) -> tuple[optax.OptState, Any]:
            updates, state = transform.update(grad, state)
            return state, updates

        first = transform.init(jax.tree.map(lambda leaf: leaf[0], grads))
        return jax.lax.scan(step, states.put_full_rank_factors(first), grads)[1]

    return lambda grads, **traced: jax.tree.map(np.asarray, run(grads, traced))


def assert_agreement(grads: Tree, static: dict[str, Any], traced: list[dict[str, Any]]) -> None:
    """Compares all steps, for each choice of numbers."""
    run = compile_run(**static)
    options = {name: static[name] for name in static if name != "fold_factors"}
    block_size = options.pop("block_size", None)
    for numbers in traced:
        directions = run(grads, **numbers)
        settings = shampoo_reference.Options(**options, **numbers)
        for name, leaf_grads in grads.items():
            expected = shampoo_reference.run_in_tiles(leaf_grads, settings, block_size)
            scale = max(1.0, float(np.abs(expected).max()))
            np.testing.assert_allclose(
                directions[name], expected, rtol=0, atol=TOLERANCE * scale, err_msg=name
            )


def shapes_of(ndim: int, longest: int, shortest: int = 1) -> st.SearchStrategy[reference.Shape]:
    return st.tuples(*[st.integers(shortest, longest)] * ndim)


any_shape = st.one_of(
    st.just(()), shapes_of(1, 12), shapes_of(2, 12), shapes_of(3, 6), shapes_of(4, 4)
)


@st.composite
def trees(draw: st.DrawFn) -> list[reference.Shape]:
    shapes = [draw(shapes_of(2, 12, shortest=2)), *draw(st.lists(any_shape, max_size=2))]
    return shapes + draw(st.lists(st.sampled_from(shapes), max_size=2))


@st.composite
def static_options(draw: st.DrawFn) -> dict[str, Any]:
    max_precond_dim = draw(st.sampled_from([24, 8, 5]))
    return {
        "grafting": draw(st.sampled_from(["adam", "rmsprop", "sgd", None])),
        "max_precond_dim": max_precond_dim,
        "block_size": draw(st.none() | st.integers(2, min(max_precond_dim, 7))),
        "precondition_1d": draw(st.booleans()),
        "merge_dims": draw(st.booleans()),
        "correct_bias": draw(st.booleans()),
        "refresh_order": draw(st.sampled_from(["before_gradient", "after_gradient"])),
        "one_sided": draw(st.booleans()),
        "fold_factors": draw(st.booleans()),
    }


@st.composite
def traced_options(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Three choices of numbers for one compiled program."""
    ranges = {
        "b1": st.floats(0.0, 0.99),
        "b2": st.floats(0.9, 0.999),
        "eps": st.sampled_from([1e-12, 1e-6, 1e-2]),
        "grafting_eps": st.sampled_from([1e-12, 1e-8, 1e-2]),
        "precondition_frequency": st.integers(1, 7),
    }
    if draw(st.booleans()):
        ranges["shampoo_beta"] = st.floats(0.9, 0.99)
    if draw(st.booleans()):
        ranges["exponent"] = st.floats(0.1, 1.0)
    return [draw(st.fixed_dictionaries(ranges)) for _ in range(3)]


@pytest.mark.long
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


@pytest.mark.parametrize(
    "options",
    mostly_long(
        named(
            {
                "defaults": {},
                "before_gradient one_sided": {
                    "refresh_order": "before_gradient",
                    "one_sided": True,
                },
                "rmsprop folded tiles": {
                    "grafting": "rmsprop",
                    "fold_factors": True,
                    "block_size": 4,
                },
                "no grafting": {"grafting": None, "refresh_order": "before_gradient"},
                "sgd uncorrected": {"grafting": "sgd", "correct_bias": False},
            }
        ),
        short=["no grafting"],
    ),
)
def test_every_option_agrees_with_the_reference_on_every_shape_of_leaf(
    options: dict[str, Any],
) -> None:
    shapes = [(5, 5), (4, 7), (9, 6), (1, 5), (3, 4, 3), (6,), (9,)]
    static = {"max_precond_dim": 8, "precondition_1d": True, **options}
    numbers = {"b1": 0.9, "b2": 0.95, "shampoo_beta": 0.9}
    traced = [{"precondition_frequency": frequency, **numbers} for frequency in (1, 4)]
    assert_agreement(random_grads(shapes, seed=4), static, traced)


# Identities ---------------------------------------------------------------------------------------


def one_shot(grad: Any, **options: Any) -> np.ndarray:
    """The update from the factors of this gradient alone, without momentum or grafting."""
    settings = {"b1": 0.0, "shampoo_beta": 0.0, "grafting": None, "eps": 1e-30, **options}
    optimizer = soap_optax.scale_by_shampoo(**settings)
    grad = jnp.asarray(grad)
    update = jax.jit(optimizer.update)
    _, state = update(grad, optimizer.init(grad))
    return np.asarray(update(grad, state)[0])


def test_diagonal_factors_give_the_closed_form() -> None:
    # A gradient with one entry in every row and column has diagonal factors of their squares.
    entries = np.asarray([3.0, -2.0, 0.5, -0.125])
    grad = np.zeros((4, 4))
    grad[np.arange(4), [2, 0, 3, 1]] = entries
    for exponent in (0.25, 0.4, 0.5):
        sizes = np.where(grad == 0, 1, np.abs(grad)) ** (1 - 4 * exponent)
        found = one_shot(grad, exponent=exponent)
        np.testing.assert_allclose(found, np.sign(grad) * sizes, rtol=1e-12)


def test_the_default_exponent_makes_the_singular_values_of_one_gradient_equal() -> None:
    # 1/4 for each side of a matrix: (G G^T)^(-1/4) G (G^T G)^(-1/4) = U V^T.
    grad = np.random.default_rng(0).normal(size=(5, 5))
    left, _, right = np.linalg.svd(grad)
    np.testing.assert_allclose(one_shot(grad), left @ right, atol=1e-11)
    # 1/2 for the only side: (G G^T)^(-1/2) G = U V^T.
    wide = np.random.default_rng(1).normal(size=(4, 9))
    left, _, right = np.linalg.svd(wide, full_matrices=False)
    np.testing.assert_allclose(one_shot(wide, one_sided=True), left @ right, atol=1e-11)


@pytest.mark.long
def test_the_default_exponent_depends_on_the_number_of_preconditioned_axes() -> None:
    grad = np.random.default_rng(2).normal(size=(3, 4, 5))
    for options, exponent in [({}, 1 / 6), ({"max_precond_dim": 4}, 1 / 4)]:
        expected = one_shot(grad, exponent=exponent, **options)
        np.testing.assert_array_equal(one_shot(grad, **options), expected)


def test_exponent_one_half_on_a_full_rank_quadratic_is_newtons_direction() -> None:
    """For the loss `tr(W^T A W B) / 2`, whose gradient is `A W B` and Newton's direction `W`.

    Over all unit matrices `W`, the mean of `G G^T` is `A^2 |B|^2 / mn`, and `B^2 |A|^2 / mn` that
    of `G^T G`. So `L^(-1/2) G R^(-1/2)` is a multiple of `A^-1 (A W B) B^-1 = W`.
    """
    rng = np.random.default_rng(3)
    left, right = (x @ x.T + np.eye(len(x)) for x in (rng.normal(size=(d, d)) for d in (5, 4)))
    grads = [np.outer(left[:, i], right[j]) for i in range(5) for j in range(4)]
    factors = [sum(g @ g.T for g in grads) / 20, sum(g.T @ g for g in grads) / 20]
    weights = rng.normal(size=(5, 4))
    grad = jnp.asarray(left @ weights @ right)
    optimizer: Any = soap_optax.scale_by_shampoo(
        b1=0.0, exponent=0.5, grafting=None, correct_bias=False, refresh_order="before_gradient"
    )
    step = jax.jit(optimizer.update)
    _, state = step(grad, optimizer.init(grad))
    stack = state.stacks["5x4_float64"]
    stack = stack._replace(factors=tuple(jnp.asarray(factor)[None] for factor in factors))
    state = state._replace(stacks={"5x4_float64": stack})
    update, _ = step(grad, state)
    scale = 20 / (np.linalg.norm(left) * np.linalg.norm(right))
    np.testing.assert_allclose(update, scale * weights, rtol=1e-10, atol=1e-12)


GRAFTING_OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "tiles": {"block_size": 4},
    "exponent": {"exponent": 0.4, "precondition_frequency": 1},
    "uncorrected": {"correct_bias": False, "b1": 0.8, "b2": 0.99, "grafting_eps": 1e-3},
}


@pytest.mark.long
@pytest.mark.parametrize("options", named(GRAFTING_OPTIONS))
def test_with_grafting_every_block_has_the_norm_of_adams_update(options: dict[str, Any]) -> None:
    grads = random_grads([(8, 6), (5, 9)], seed=5)
    grafted = compile_run(**options)(grads)
    shared = {name: options[name] for name in ("b1", "b2", "correct_bias") if name in options}
    adam: Any = soap_optax.scale_by_soap(
        eps=options.get("grafting_eps", 1e-8), max_precond_dim=1, **shared
    )
    state = adam.init({name: leaf[0] for name, leaf in grads.items()})
    update = jax.jit(adam.update)
    for call in range(STEPS):
        expected, state = update({name: leaf[call] for name, leaf in grads.items()}, state)
        for name, leaf in expected.items():
            for tile in reference.tiles(leaf.shape, options.get("block_size", 100)):
                found = np.linalg.norm(grafted[name][call][tile])
                np.testing.assert_allclose(found, np.linalg.norm(leaf[tile]), rtol=1e-12)


def test_parameters_without_a_preconditioner_get_adam() -> None:
    grads = random_grads([(6,), (), (9, 9)], seed=6)
    found = compile_run(max_precond_dim=8, grafting="sgd")(grads)
    adam: Any = soap_optax.scale_by_soap(max_precond_dim=1)
    state = adam.init({name: leaf[0] for name, leaf in grads.items()})
    update = jax.jit(adam.update)
    for call in range(3):
        expected, state = update({name: leaf[call] for name, leaf in grads.items()}, state)
        for name, leaf in expected.items():
            np.testing.assert_allclose(found[name][call], leaf, rtol=0, atol=1e-14)


# Inverse powers -----------------------------------------------------------------------------------


def power_of(matrix: jax.Array, shift: Any, exponent: Any, floor: float = 0.0) -> jax.Array:
    values, vectors = jnp.linalg.eigh(matrix)
    values, vectors = jax.lax.stop_gradient((values, vectors))
    arguments = (jnp.asarray(number, matrix.dtype) for number in (shift, floor, exponent))
    return inverse_power(matrix, vectors, values, *arguments)


def test_inverse_powers_are_those_of_numpy() -> None:
    matrix = np.cov(np.random.default_rng(7).normal(size=(5, 9)))
    inverse = power_of(jnp.asarray(matrix), 0.25, 0.5)
    np.testing.assert_allclose(inverse @ inverse @ (matrix + np.eye(5) / 4), np.eye(5), atol=1e-12)
    np.testing.assert_array_equal(inverse, inverse.T)
    raised = power_of(jnp.diag(jnp.asarray([1e-9, 0.0, 4.0])), 1e-12, 0.5, floor=0.01)
    np.testing.assert_allclose(raised, np.diag([10, 10, 0.5]), atol=1e-12)


SPECTRA = {"distinct": [5.0, 2.0, 1.0, 0.5], "equal": [3.0] * 4, "null space": [2.0, 2.0, 0, 0]}


@pytest.mark.long
@pytest.mark.parametrize("argument", ["matrix", "shift", "exponent"])
@pytest.mark.parametrize("values", named(SPECTRA))
def test_derivatives_of_inverse_powers_hold_for_equal_eigenvalues_too(
    argument: str, values: list[float]
) -> None:
    rng = np.random.default_rng(8)
    basis, _ = np.linalg.qr(rng.normal(size=(4, 4)))
    matrix = jnp.asarray(basis * values @ basis.T)
    tangent = jnp.asarray((lambda x: x + x.T)(rng.normal(size=(4, 4))))

    def along(t: Any) -> jax.Array:
        return power_of(
            matrix + t * tangent * float(argument == "matrix"),
            0.5 + t * float(argument == "shift"),
            0.4 + t * float(argument == "exponent"),
        )

    _, found = jax.jvp(along, (0.0,), (1.0,))
    step = 1e-5
    expected = (along(step) - along(-step)) / (2 * step)
    np.testing.assert_allclose(found, expected, atol=1e-8)
    pulled = jax.grad(lambda t: jnp.sum(along(t) * tangent))(0.0)
    np.testing.assert_allclose(pulled, jnp.sum(found * tangent), rtol=1e-10)


@pytest.mark.long
@pytest.mark.parametrize("name", ["learning rate", "eps", "exponent"])
def test_derivatives_through_updates_agree_with_central_differences(name: str) -> None:
    grads = random_grads([(4, 3)], seed=9)["leaf0"][:6]

    def loss(number: Any) -> jax.Array:
        options: dict[str, Any] = {"precondition_frequency": 2, "exponent": 0.4, "eps": 0.1}
        if name in options:
            options[name] = number
        rate = number if name == "learning rate" else 0.1
        optimizer: Any = soap_optax.scale_by_shampoo(**options)
        first, target = jnp.asarray(grads[0]), jnp.asarray(grads[1])

        def step(carry: Any, noise: jax.Array) -> tuple[Any, None]:
            params, state = carry
            update, state = optimizer.update((params - target) * (1 + noise**2), state)
            return (params - rate * update, state), None

        (params, _), _ = jax.lax.scan(step, (first, optimizer.init(first)), jnp.asarray(grads))
        return jnp.sum(params**3)

    at, step = {"learning rate": 0.1, "eps": 0.1, "exponent": 0.4}[name], 1e-5
    loss = jax.jit(loss)
    expected = (loss(at + step) - loss(at - step)) / (2 * step)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(at), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.jacfwd(loss))(at), expected, rtol=1e-6)


@pytest.mark.long
def test_the_norm_neither_overflows_nor_underflows_and_has_a_derivative_at_zero() -> None:
    for size in (1e-300, 1.0, 1e300):
        np.testing.assert_allclose(frobenius_norm(jnp.full((3, 3), size)), 3 * size, rtol=1e-14)
    assert np.all(np.isfinite(jax.grad(frobenius_norm)(jnp.zeros((2, 2)))))
    assert np.isnan(frobenius_norm(jnp.asarray([1.0, jnp.nan])))


def test_multiplying_by_roots_is_the_product_along_every_axis() -> None:
    rng = np.random.default_rng(10)
    x, left, right = rng.normal(size=(3, 4)), rng.normal(size=(3, 3)), rng.normal(size=(4, 4))
    found = algorithm.multiply_by_roots(jnp.asarray(x), (left, right), (0, 1))  # pyright: ignore[reportArgumentType]  # arrays
    np.testing.assert_allclose(found, left @ x @ right.T, atol=1e-12)
