"""The compiled functions of a run: initial arrays, one training step, and the evaluation."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from physics.equations import EQUATIONS
from physics.losses import condition_loss, relative_l2, residual_loss, sample_points
from physics.network import Apply, make_network
from physics.optimizers import OPTIMIZERS, Numbers
from physics.problems import Problem, Reference, conditions
from physics.specs import Setup

POINTS_ON_A_FACE = 128


class Arrays(NamedTuple):
    """The arrays of a run between two steps."""

    params: Any
    fixed: Any  # arrays of the network that are not trained
    state: Any  # of the optimizer
    key: Array  # of the points of all steps


class Program(NamedTuple):
    """The functions of all runs with the same `Setup`.

    Attributes:
      init: the arrays before the first step, from a seed.
      step: one training step: new arrays and the loss, from arrays, the number of the step and
        `Numbers`. It is compiled.
      evaluate: the solution on the reference grid and its relative L2 error.
      reference: the reference solution.
      compile_seconds: time to compile.
    """

    init: Callable[[int], Arrays]
    step: Callable[[Arrays, Any, Numbers], tuple[Arrays, Array]]
    evaluate: Callable[[Arrays], tuple[Array, Array]]
    reference: Reference
    compile_seconds: float


@contextmanager
def arithmetic(dtype: str) -> Iterator[None]:
    """Sets JAX to a dtype, with full precision in matrix products on all devices."""
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", dtype == "float64")
    try:
        with jax.default_matmul_precision("highest"):
            yield
    finally:
        jax.config.update("jax_enable_x64", before)


@functools.cache
def reference_of(equation: str) -> Reference:
    """Computes the reference solution of an equation, once."""
    return EQUATIONS[equation].reference()


Loss = Callable[[Any, Any, Array], Array]


def loss_of(setup: Setup, problem: Problem, apply: Apply) -> Loss:
    """Returns the loss, from parameters, fixed arrays and collocation points."""
    given, values = (
        jnp.asarray(array, setup.dtype) for array in conditions(problem, POINTS_ON_A_FACE)
    )

    def loss(params: Any, fixed: Any, points: Array) -> Array:
        def field(points: Array) -> Array:
            return apply(params, fixed, points)

        equation = residual_loss(problem, field, points, setup.causal_tolerance)
        return equation + problem.condition_weight * condition_loss(field, given, values)

    return loss


def step_of(setup: Setup, problem: Problem, loss: Loss) -> Callable:
    """Returns one training step."""
    optimizer = OPTIMIZERS[setup.optimizer]

    def take(arrays: Arrays, number: Array, numbers: Numbers) -> tuple[Arrays, Array]:
        draw = jnp.zeros_like(number) if optimizer.line_search else number
        key = jax.random.fold_in(arrays.key, draw)
        points = sample_points(problem, setup.points, jnp.dtype(setup.dtype), key)

        def at(params: Any) -> Array:
            return loss(params, arrays.fixed, points)

        transform = optax.with_extra_args_support(optimizer.make(numbers, setup.refresh))
        if optimizer.line_search:
            # The line search has the loss and the gradient of its last point in the state.
            value, grads = optax.value_and_grad_from_state(at)(arrays.params, state=arrays.state)
        else:
            value, grads = jax.value_and_grad(at)(arrays.params)
        updates, state = transform.update(
            grads, arrays.state, arrays.params, value=value, grad=grads, value_fn=at
        )
        params = optax.apply_updates(arrays.params, updates)
        return arrays._replace(params=params, state=state), jnp.asarray(value)

    return take


def numbers_of(dtype: str, rate: float, b1: float, b2: float, frequency: int) -> Numbers:
    """The arguments of a step, in the dtypes for which it is compiled."""
    kind: Any = np.dtype(dtype).type
    whole: Any = np.int32
    return Numbers(kind(rate), kind(b1), kind(b2), whole(frequency))


@functools.lru_cache(maxsize=8)
def compile_program(setup: Setup) -> Program:
    """Compiles the step and the evaluation of a setup, or takes those of an earlier call.

    Call it, and the functions of the result, inside `arithmetic(setup.dtype)`.
    """
    problem, reference = EQUATIONS[setup.equation], reference_of(setup.equation)
    started = time.perf_counter()
    _, _, apply = make_network(setup.size, problem, jax.random.key(0))
    numbers = numbers_of(setup.dtype, 0.0, 0.9, 0.9, 1)

    def init(seed: int) -> Arrays:
        weights, points = jax.random.split(jax.random.key(seed))
        params, fixed, _ = make_network(setup.size, problem, weights)
        state = OPTIMIZERS[setup.optimizer].make(numbers, setup.refresh).init(params)
        return Arrays(params, fixed, state, points)

    def evaluate(arrays: Arrays) -> tuple[Array, Array]:
        points, values = (
            jnp.asarray(array, setup.dtype) for array in (reference.points, reference.values)
        )
        prediction = apply(arrays.params, arrays.fixed, points).reshape(values.shape)
        return prediction, relative_l2(prediction, values)

    arrays = init(0)
    take = jax.jit(step_of(setup, problem, loss_of(setup, problem, apply)))
    step = take.lower(arrays, np.int32(0), numbers).compile()
    evaluation = jax.jit(evaluate).lower(arrays).compile()
    return Program(init, step, evaluation, reference, time.perf_counter() - started)
