"""Runs of SOAP on one matrix, whose factors have well separated eigenvalues."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import soap_optax

State = Any  # A `ScaleBySoapState`, but Optax's signatures say any tree.
Step = Callable[..., tuple[jax.Array, State]]
SHAPE = (6, 4)
NAME = "6x4"
B1, B2, EPS = 0.95, 0.95, 1e-8  # The defaults.
# Updates are of size 1. They come from some ten products and sums in some ten steps. Each rounds by
# 6e-8, half of float32's epsilon. A wrong coordinate moves an update by a tenth or more.
UPDATE_TOLERANCE = 1e-4


@functools.cache
def step_of(**options: Any) -> Step:
    """One jitted step for each set of static options, the frequency traced."""

    @jax.jit
    def step(grad: jax.Array, state: State, frequency: int) -> Any:
        optimizer = soap_optax.scale_by_soap(precondition_frequency=frequency, **options)
        return optimizer.update(grad, state)

    return step


def gradients(
    count: int, shape: Sequence[int] = SHAPE, ratio: float = 2.0, dtype: Any = np.float32
) -> np.ndarray:
    """Gradients, `(count, *shape)`, whose directions along each axis scale by powers of `ratio`.

    No two eigenvalues of a factor are therefore close.
    """
    rng = np.random.default_rng(0)
    grads = rng.normal(size=(count, *shape))
    for axis, length in enumerate(shape):
        scale = ratio ** -np.arange(length).reshape([-1] + [1] * (len(shape) - axis - 1))
        mixing, _ = np.linalg.qr(rng.normal(size=(length, length)))
        grads = np.moveaxis(np.tensordot(grads * scale, mixing, (axis + 1, 0)), -1, axis + 1)
    return grads.astype(dtype)


def run(grads: np.ndarray, state: State, frequency: int) -> tuple[np.ndarray, State]:
    updates = []
    for grad in grads:
        update, state = step_of()(grad, state, frequency)
        updates.append(np.asarray(update))
    return np.stack(updates), state


def init(shape: Sequence[int] = SHAPE, **options: Any) -> State:
    return soap_optax.scale_by_soap(**options).init(jnp.zeros(shape))


def replace_in_stack(state: State, **fields: Any) -> State:
    return state._replace(stacks={NAME: state.stacks[NAME]._replace(**fields)})
