"""KL factors against an independent reference in NumPy, and by identities.

The first factors of the runs are made full rank on both sides, because rounding decides the basis
of a null space (see `test_reference_agreement`).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import kl_reference, reference, states
from helpers.cases import mostly_long, named

import soap_optax
from soap_optax import algorithm

STEPS = 60
SHAPES: dict[str, reference.Shape] = {"square": (6, 6), "tall": (9, 4), "wide": (4, 9)}
# Updates are of size 1 and differ by rounding, 1e-16, times the condition of the factors and of the
# gaps between their eigenvalues, which the scales of `gradients` keep apart.
TOLERANCE = 1e-12


def gradients(shape: reference.Shape, steps: int = STEPS) -> np.ndarray:
    """Gradients whose directions have different sizes along every axis, `(steps, *shape)`."""
    rng = np.random.default_rng(0)
    grads = rng.normal(size=(steps, *shape))
    for axis, length in enumerate(shape):
        scale = 1.6 ** -np.arange(length).reshape([-1] + [1] * (len(shape) - axis - 1))
        mixing, _ = np.linalg.qr(rng.normal(size=(length, length)))
        grads = np.moveaxis(np.tensordot(grads * scale, mixing, (axis + 1, 0)), -1, axis + 1)
    return grads


def library_run(grads: np.ndarray, **options: Any) -> tuple[np.ndarray, soap_optax.StackState]:
    """The directions of all steps, and the stack's state after the last."""
    optimizer = soap_optax.scale_by_soap(factor_estimator="kl", **options)
    update = jax.jit(optimizer.update)
    direction, state = update(jnp.asarray(grads[0]), optimizer.init(jnp.asarray(grads[0])))
    state = add_to_factors(state)
    directions = [direction]
    for grad in grads[1:]:
        direction, state = update(jnp.asarray(grad), state)
        directions.append(direction)
    (stack,) = state.stacks.values()
    return np.stack(directions), stack


def add_to_factors(state: Any) -> Any:
    """Adds `states.full_rank_factor` to every factor."""
    full = states.put_full_rank_factors(state)
    return jax.tree.map(
        lambda stack, other: stack._replace(
            factors=tuple(jnp.add(*pair) for pair in zip(stack.factors, other.factors, strict=True))
        ),
        state,
        full,
        is_leaf=lambda node: isinstance(node, soap_optax.StackState),
    ) if False else _added(state, full)


def _added(state: Any, full: Any) -> Any:
    stacks = {
        name: stack._replace(
            factors=tuple(map(jnp.add, stack.factors, full.stacks[name].factors))
        )
        for name, stack in state.stacks.items()
    }
    return state._replace(stacks=stacks)


def reference_run(
    grads: np.ndarray, **options: Any
) -> tuple[np.ndarray, kl_reference.KlState]:
    priors = {axis: states.full_rank_factor(d) for axis, d in enumerate(grads.shape[1:])}
    return kl_reference.run(grads, reference.Options(**options), first_factors=priors)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("frequency", [1, 7])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kl_soap_equals_the_reference_for_sixty_steps(
    shape: reference.Shape, frequency: int
) -> None:
    grads = gradients(shape)
    directions, stack = library_run(grads, precondition_frequency=frequency)
    expected, state = reference_run(grads, precondition_frequency=frequency)
    print(np.abs(directions - expected).max(), np.abs(expected).max())
    np.testing.assert_allclose(directions, expected, rtol=0, atol=TOLERANCE)
    for axis, factor in state.leaf.factors.items():
        np.testing.assert_allclose(stack.factors[axis][0], factor, rtol=TOLERANCE)
