"""Trains a network with one optimizer, and measures losses and errors after every epoch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import Array
from recipe import warmed_up

from vision.contenders import Contender
from vision.datasets import Dataset, Examples


class Task(NamedTuple):
    """The network, the data, and how long it is trained on them."""

    network: nn.Module
    data: Dataset
    epochs: int
    batch_size: int

    @property
    def steps_per_epoch(self) -> int:
        """The number of whole batches in the training examples."""
        return len(self.data.training.labels) // self.batch_size

    @property
    def steps(self) -> int:
        """The number of steps of a run."""
        return self.epochs * self.steps_per_epoch


class Point(NamedTuple):
    """Measurements after an epoch.

    Attributes:
      step: the number of steps so far.
      seconds: of training so far, without compilation and evaluation.
      train_loss: mean over the epoch.
      validation_loss: on the examples that choose the learning rate.
      test_error: the share of test examples whose class is not the likeliest one.
    """

    step: int
    seconds: float
    train_loss: float
    validation_loss: float
    test_error: float


class Program(NamedTuple):
    """The compiled functions of an optimizer, for any seed and learning rate.

    Attributes:
      init: the optimizer's state, from parameters and the highest learning rate.
      step: parameters, state, highest rate, inputs and labels to parameters, state and loss.
      measure: the mean loss and the error of parameters on examples.
    """

    init: Callable[..., Any]
    step: Callable[..., tuple[Any, Any, Array]]
    measure: Callable[[Any, Examples], tuple[Array, Array]]


def loss_of(logits: Array, labels: Array) -> Array:
    """The mean cross-entropy of logits, `(n, classes)`, and classes, `(n,)`."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def logits_of(network: nn.Module, params: Any, inputs: np.ndarray | Array) -> Array:
    """The network's output, `(n, classes)`."""
    return jnp.asarray(network.apply({"params": params}, inputs))


def compile_program(contender: Contender, task: Task) -> Program:
    """The functions of an optimizer on a task; each compiles when it is first called."""
    unit = warmed_up(1.0, task.steps)

    def optimizer(params: Any, rate: Array) -> optax.GradientTransformation:
        return contender.make(lambda count: rate * unit(count), params)

    def step(
        params: Any, state: Any, rate: Array, inputs: Array, labels: Array
    ) -> tuple[Any, Any, Array]:
        def loss(params: Any) -> Array:
            return loss_of(logits_of(task.network, params, inputs), labels)

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer(params, rate).update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    def measure(params: Any, examples: Examples) -> tuple[Array, Array]:
        logits = logits_of(task.network, params, examples.inputs)
        labels = jnp.asarray(examples.labels)
        return loss_of(logits, labels), jnp.mean(logits.argmax(axis=1) != labels)

    init = jax.jit(lambda params, rate: optimizer(params, rate).init(params))
    return Program(init, jax.jit(step, donate_argnums=(0, 1)), jax.jit(measure))


def train(
    program: Program, task: Task, learning_rate: float, seed: int, advance: Callable[[Point], Any]
) -> list[Point]:
    """Trains one network; the seed decides its initial weights and the batches.

    Returns:
      A point for each epoch. After a loss that is not finite, training ends with that point.
    """
    sample = task.data.training.inputs[:1]
    params = task.network.init(jax.random.key(seed), sample)["params"]
    rate = jnp.float32(learning_rate)
    state = program.init(params, rate)
    points: list[Point] = []
    seconds = 0.0
    for epoch, batches in enumerate(epochs_of(task, seed), start=1):
        losses = []
        for inputs, labels in batches:
            started = time.perf_counter()
            params, state, loss = program.step(params, state, rate, inputs, labels)
            losses.append(float(loss))
            if epoch > 1 or len(losses) > 1:  # The first call compiles.
                seconds += time.perf_counter() - started
        validation, _ = program.measure(params, task.data.validation)
        _, error = program.measure(params, task.data.test)
        steps = epoch * task.steps_per_epoch
        points.append(
            Point(steps, seconds, float(np.mean(losses)), float(validation), float(error))
        )
        advance(points[-1])
        if not np.isfinite(points[-1].train_loss + points[-1].validation_loss):
            break
    return points


def epochs_of(task: Task, seed: int) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
    """The shuffled batches of each epoch."""
    rng = np.random.default_rng(seed)
    inputs, labels = task.data.training
    for _ in range(task.epochs):
        order = rng.permutation(len(labels))[: task.steps_per_epoch * task.batch_size]
        rows = np.split(order, task.steps_per_epoch)
        yield [(inputs[row], labels[row]) for row in rows]
