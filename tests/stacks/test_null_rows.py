"""Rows without a gradient get zero updates, and null directions get no updates from rounding."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cases import mostly_long
from optax.contrib import MuonDimensionNumbers

import soap_optax

CALLS = 9
REVIVED = 5  # The call in which a row without a gradient gets its first one.

LAYERS = MuonDimensionNumbers(reduction_axis=1, output_axis=2)
METHODS = ("qr", "cholesky_qr", "eigh", "jacobi", "partial")
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    **{method: {"refresh": method, "precondition_frequency": 2} for method in METHODS},
    **{
        f"{method} after": {
            "refresh": method,
            "precondition_frequency": 2,
            "refresh_order": "after_gradient",
        }
        for method in METHODS
    },
    "every step": {"precondition_frequency": 1},
    "staggered": {"precondition_frequency": 3, "stagger": True},
    "folded": {"fold_factors": True, "precondition_frequency": 2},
    "factored": {"factored": True, "precondition_frequency": 2},
    "bfloat16": {
        "preconditioner_dtype": jnp.bfloat16,
        "mu_dtype": jnp.bfloat16,
        "precondition_frequency": 2,
    },
    "tiles": {"block_size": 7, "precondition_frequency": 2},
    "one-sided": {"one_sided": True, "precondition_frequency": 2},
    "normalized": {"normalize_grads": True, "precondition_frequency": 2},
    "layers": {"dimension_numbers": LAYERS, "precondition_frequency": 2},
    "three axes": {"precondition_frequency": 2},
    "kl": {"factor_estimator": "kl", "precondition_frequency": 2},
    "apply": {"first_update": "apply", "precondition_frequency": 2},
    "apply after": {
        "first_update": "apply",
        "refresh_order": "after_gradient",
        "factored": True,
        "precondition_frequency": 2,
    },
    "apply kl": {"first_update": "apply", "factor_estimator": "kl"},
    "apply bfloat16": {"first_update": "apply", "preconditioner_dtype": jnp.bfloat16},
    "kl after": {
        "factor_estimator": "kl",
        "precondition_frequency": 2,
        "refresh": "eigh",
        "refresh_order": "after_gradient",
    },
    "kl of three axes": {"factor_estimator": "kl", "precondition_frequency": 2},
    "merged": {"merge_dims": True, "max_precond_dim": 60, "precondition_frequency": 2},
}
SHAPES = {
    "layers": (2, 24, 16),
    "three axes": (6, 24, 8),
    "kl of three axes": (6, 24, 8),
    "merged": (2, 24, 16),
}
SHORT = ("defaults", "jacobi", "tiles", "kl")


def dead(shape: tuple[int, ...]) -> np.ndarray:
    """A mask of entries without any gradient: every third row and every fourth column."""
    rows, columns = np.arange(shape[-2]) % 3 == 0, np.arange(shape[-1]) % 4 == 1
    return np.broadcast_to(rows[:, None] | columns[None, :], shape)


def gradient(call: int, shape: tuple[int, ...], scale: float, revived: bool = False) -> np.ndarray:
    grad = np.random.default_rng(call).normal(size=shape) * scale
    never = np.array(dead(shape))
    if revived and call >= REVIVED:
        never[..., 3, :] = dead(shape)[..., 1, :]  # Row 3 gets gradients, as row 1 does.
    return np.where(never, 0.0, grad)


@functools.cache
def step_of(name: str) -> Callable[..., Any]:
    return jax.jit(soap_optax.scale_by_soap(**OPTIONS[name]).update)


def updates_of(name: str, scale: float, dtype: Any, revived: bool = False) -> list[np.ndarray]:
    shape = SHAPES.get(name, (24, 16))
    state: Any = soap_optax.scale_by_soap(**OPTIONS[name]).init(jnp.zeros(shape, dtype))
    updates = []
    for call in range(CALLS):
        grad = jnp.asarray(gradient(call, shape, scale, revived), dtype)
        update, state = step_of(name)(grad, state)
        updates.append(np.asarray(update, float))
    return updates


SCALED = [pytest.param(name, 1.0, id=name) for name in OPTIONS] + [
    pytest.param(name, scale, id=f"{name}, {scale}")
    for name, scale in (("defaults", 1e-4), ("jacobi", 1e4))
]


@pytest.mark.parametrize(("name", "scale"), mostly_long(SCALED, SHORT))
def test_rows_and_columns_without_a_gradient_get_an_update_of_exactly_zero(
    name: str, scale: float
) -> None:
    updates = updates_of(name, scale, jnp.float32)
    never = dead(updates[0].shape)
    moves_at_first = OPTIONS[name].get("first_update") == "apply"
    for update in updates if moves_at_first else updates[1:]:
        assert np.all(update[never] == 0)
        assert np.all(np.abs(update).max(where=~never, initial=0) > 0.1)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "name", mostly_long([name for name in OPTIONS if " " not in name], ("defaults",))
)
def test_a_row_moves_from_its_first_gradient_on_as_in_float64(name: str) -> None:
    if name == "bfloat16":
        pytest.skip("rounds by 4e-3")
    found = updates_of(name, 1.0, jnp.float32, revived=True)
    wanted = updates_of(name, 1.0, jnp.float64, revived=True)
    assert np.abs(wanted[REVIVED][..., 3, :]).max() > 0.05
    # The difference is float32's rounding. Null directions contribute to the scale that all rows
    # share. A wrong basis would change a row's update by its whole size.
    if "factor_estimator" not in OPTIONS[name]:
        # With KL factors, the basis of the null space of the first `L` decides how `R` is whitened,
        # and rounding decides that basis.
        np.testing.assert_allclose(
            found[REVIVED][..., 3, :], wanted[REVIVED][..., 3, :], rtol=0.02, atol=1e-3
        )
    for update in found[REVIVED:]:
        assert np.abs(update[..., 3, :]).max() > 0.05
        assert np.all(update[..., 6, :] == 0)  # A row that still has no gradient.


def centralized(call: int) -> np.ndarray:
    grad = np.random.default_rng(call).normal(size=(24, 16))
    return grad - grad.mean(axis=0, keepdims=True)


LEFT, RIGHT = np.random.default_rng(1).normal(size=(24, 1)), np.ones((1, 16)) / 4


def rank_one(call: int) -> np.ndarray:
    return LEFT @ RIGHT * np.random.default_rng(call).normal()


# Centralized gradients have one null direction, and the first gradient alone has several. Bases
# separate that direction from the others after this number of calls. The sweeps of `jacobi` take
# more calls.
LEARNED = dict.fromkeys(METHODS, 3) | {"jacobi": 18}


def in_null_directions(kind: str, update: np.ndarray) -> np.ndarray:
    if kind == "centralized":
        return update.mean(axis=0)
    left = LEFT / np.linalg.norm(LEFT)
    return update - left @ (left.T @ update @ RIGHT.T) @ RIGHT


@pytest.mark.parametrize("method", mostly_long(METHODS, ["qr", "cholesky_qr"]))
@pytest.mark.parametrize(("kind", "make"), [("centralized", centralized), ("rank one", rank_one)])
def test_null_directions_get_nothing_made_of_rounding(
    kind: str, make: Callable[[int], np.ndarray], method: str
) -> None:
    optimizer = soap_optax.scale_by_soap(refresh=method, precondition_frequency=2)  # pyright: ignore[reportArgumentType]  # one of the methods
    update_fn = jax.jit(optimizer.update)
    state: Any = optimizer.init(jnp.zeros((24, 16)))
    moved = 0.0
    for call in range(20):
        update, state = update_fn(jnp.asarray(make(call), jnp.float32), state)
        found = np.asarray(update, float)
        moved += np.abs(found).max()
        if call >= LEARNED[method]:
            # The update is rounded by 1e-7 times the number of its entries. Without a floor, null
            # directions would move as far as the others.
            assert np.abs(in_null_directions(kind, found)).max() < 1e-5
    assert moved > 0.1


@pytest.mark.parametrize("decades", [6, 12])
def test_the_floor_leaves_every_direction_of_a_wide_spectrum(decades: int) -> None:
    """The factor's eigenvalues span these decades; the gradient's directions span half of them."""
    rotation, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(24, 24)))
    scales = np.logspace(0, -decades / 2, 24)
    optimizer = soap_optax.scale_by_soap(precondition_frequency=2)
    update_fn = jax.jit(optimizer.update)
    state: Any = optimizer.init(jnp.zeros((24, 24)))
    moved = np.zeros(24)
    for call in range(20):
        grad = rotation * scales @ np.random.default_rng(call).normal(size=(24, 24))
        update, state = update_fn(jnp.asarray(grad, jnp.float32), state)
        moved += np.sum((rotation.T @ np.asarray(update, float)) ** 2, axis=1)
    root = np.sqrt(np.asarray(state.stacks["24x24"].nu[0], float))
    assert np.all(root > 32 * float(jnp.finfo(jnp.float32).eps) * root.max())
    assert np.sqrt(moved.min() / moved.max()) > 0.05
