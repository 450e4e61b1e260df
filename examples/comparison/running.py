"""Trains one run, from its first step or from its newest checkpoint."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import paper_gpt
from byte_gpt import Size, even_batches, make_model, random_batches
from jax import Array
from recipe import Text, warmed_up
from saving import Checkpoints

from comparison.contenders import Numbers, diagnose, make_optimizer, numbers_of
from comparison.specs import Model, Spec
from comparison.widths import with_scaled_kernels

UNSCALED_WIDTH = 32  # where the model `scaled` starts as `byte` does


class Data(NamedTuple):
    """The text, and how it is fed to the model.

    Attributes:
      text: training and held-out tokens.
      evaluations: number of evaluations in a run.
      held_out_batches: number of batches, and of windows in each.
      micro_batch: largest number of windows whose gradients are computed at once, or None.
    """

    text: Text
    evaluations: int
    held_out_batches: tuple[int, int]
    micro_batch: int | None


class Point(NamedTuple):
    """One evaluation. Seconds count training steps alone."""

    step: int
    train_loss: float  # mean since the last point
    held_out_loss: float
    seconds: float


class Result(NamedTuple):
    """The curve of a run and its costs."""

    points: list[Point]
    compile_seconds: float
    parameters: int
    state_bytes: int
    counters: dict[str, float]

    @property
    def diverged(self) -> bool:
        """Whether a loss was not finite. The run ended there."""
        last = self.points[-1]
        return not math.isfinite(last.held_out_loss + (last.train_loss if last.step else 0))


# Programs -----------------------------------------------------------------------------------------


def model_of(model: Model, seed: int) -> tuple[Any, Callable[[Any, Array], Array]]:
    """Returns the initial parameters, and the loss from parameters and windows."""
    if model.kind == "paper":
        return paper_gpt.make_model(model[1:], seed)
    params, loss = make_model(Size(*model[1:5]), seed)
    if model.kind == "scaled":
        params = with_scaled_kernels(params, math.sqrt(UNSCALED_WIDTH / model.width))
    return params, loss


def loss_of(model: Model) -> Callable[[Any, Array], Array]:
    """The loss alone, without computing initial parameters."""
    made = {}

    def params() -> Any:
        tree, made["loss"] = model_of(model, 0)
        return tree

    jax.eval_shape(params)
    return made["loss"]


class Step(NamedTuple):
    """The functions of a run before they are compiled, and the shapes of their arguments."""

    params: Any
    state: Any
    init: Callable[[Any], Any]
    take: Callable[[Any, Any, Array, Numbers], tuple[Any, Any, Array]]
    evaluate: Callable[[Any, Array], Array]


def step_of(spec: Spec, micro_batch: int | None) -> Step:
    """The functions of a run, without computing anything."""
    loss = loss_of(spec.model)
    params = jax.eval_shape(lambda: model_of(spec.model, 0)[0])

    def init(params: Any) -> Any:
        return make_optimizer(spec, numbers_of(spec, 0.0)).init(params)

    def take(params: Any, state: Any, windows: Array, numbers: Numbers) -> tuple[Any, Any, Array]:
        value, grads = mean_gradient(loss, params, windows, micro_batch)
        updates, state = make_optimizer(spec, numbers).update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    def evaluate(params: Any, batches: Array) -> Array:
        return jax.lax.map(lambda windows: loss(params, windows), batches).mean()

    return Step(params, jax.eval_shape(init, params), init, take, evaluate)


def mean_gradient(
    loss: Callable[[Any, Array], Array], params: Any, windows: Array, micro_batch: int | None
) -> tuple[Array, Any]:
    """The loss of a batch and its gradient, by parts of `micro_batch` windows."""
    gradient = jax.value_and_grad(loss)
    if micro_batch is None or micro_batch >= len(windows):
        return gradient(params, windows)
    parts = windows.reshape(-1, micro_batch, windows.shape[-1])

    def add(total: Any, part: Array) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(params, part)), None

    zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(gradient, params, parts[0]))
    total, _ = jax.lax.scan(add, zero, parts)
    return jax.tree.map(lambda array: array / len(parts), total)


class Program(NamedTuple):
    """The compiled functions of all runs with the same `Spec.program`."""

    init: Callable[[Any], Any]
    step: Callable[..., tuple[Any, Any, Array]]
    evaluate: Callable[[Any], Array]
    diagnose: Callable[[Any], dict[str, Array]]
    compile_seconds: float
    parameters: int
    state_bytes: int


def compile_program(spec: Spec, data: Data) -> Program:
    """Compiles the step and the evaluation."""
    started = time.perf_counter()
    step = step_of(spec, data.micro_batch)
    context = spec.model.context
    windows = jax.ShapeDtypeStruct((spec.batch_size, context + 1), data.text.training.dtype)
    held_out = jnp.asarray(even_batches(data.text.held_out, *data.held_out_batches, context))
    numbers = numbers_of(spec, 0.0)
    take = jax.jit(step.take, donate_argnums=(0, 1))
    compiled = take.lower(step.params, step.state, windows, numbers).compile()
    evaluate = jax.jit(step.evaluate).lower(step.params, held_out).compile()
    return Program(
        jax.jit(step.init),
        compiled,
        lambda params: evaluate(params, held_out),
        jax.jit(lambda state: diagnose(spec, state)),
        time.perf_counter() - started,
        sum(leaf.size for leaf in jax.tree.leaves(step.params)),
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(step.state)),
    )


# Training -----------------------------------------------------------------------------------------


class Hooks(NamedTuple):
    """Functions and flags of the caller for a run.

    Attributes:
      advance: called after each step with the number of the step and its loss.
      stop: if set, the run writes a checkpoint and stops after the step.
      open_checkpoints: the checkpoints of the run, opened at the first use.
      has_checkpoints: whether there may be one already.
      seconds: time between two checkpoints.
    """

    advance: Callable[[int, float], Any]
    stop: threading.Event
    open_checkpoints: Callable[[], Checkpoints]
    has_checkpoints: bool
    seconds: float


class Progress:
    """Arrays and record of a run between two steps."""

    def __init__(self, spec: Spec, program: Program):
        self.params, _ = model_of(spec.model, spec.seed)
        self.state = program.init(self.params)
        self.step = 0
        self.points: list[Point] = []
        self.losses: list[float] = []  # since the last point
        self.seconds = 0.0

    def save(self, checkpoints: Checkpoints) -> None:
        """Writes a checkpoint."""
        record = {"points": self.points, "losses": self.losses, "seconds": self.seconds}
        checkpoints.save(self.step, (self.params, self.state), record)

    def restore(self, checkpoints: Checkpoints) -> None:
        """Reads the newest checkpoint, if there is one."""
        if checkpoints.step:
            self.params, self.state = checkpoints.arrays((self.params, self.state))
            record = checkpoints.record()
            self.step, self.seconds = checkpoints.step, record["seconds"]
            self.points = [Point(*point) for point in record["points"]]
            self.losses = list(record["losses"])

    def close_point(self, held_out_loss: float) -> None:
        """Adds a point to the curve."""
        mean = sum(self.losses) / len(self.losses) if self.losses else math.nan
        self.points.append(Point(self.step, mean, held_out_loss, self.seconds))
        self.losses = []


def train(spec: Spec, program: Program, data: Data, hooks: Hooks) -> Result | None:
    """Trains to the last step, or until a loss is not finite.

    Returns:
      The result, or None if `hooks.stop` was set. Then a checkpoint is written, from which the next
      call continues.
    """
    progress = Progress(spec, program)
    if hooks.has_checkpoints:
        progress.restore(hooks.open_checkpoints())
    if not progress.step:
        progress.close_point(float(program.evaluate(progress.params)))
    evaluated = evaluated_steps(spec.steps, data.evaluations)
    saved = time.perf_counter()
    for loss in steps_of(spec, program, data.text.training, progress):
        hooks.advance(progress.step, loss)
        if not math.isfinite(loss):
            progress.close_point(math.nan)
            break
        if progress.step in evaluated:
            progress.close_point(float(program.evaluate(progress.params)))
        is_due = time.perf_counter() - saved > hooks.seconds
        if (is_due or hooks.stop.is_set()) and progress.step < spec.steps:
            progress.save(hooks.open_checkpoints())
            saved = time.perf_counter()
            if hooks.stop.is_set():
                return None
    counters = {name: float(value) for name, value in program.diagnose(progress.state).items()}
    costs = (program.compile_seconds, program.parameters, program.state_bytes)
    return Result(progress.points, *costs, counters)


def steps_of(
    spec: Spec, program: Program, tokens: np.ndarray, progress: Progress
) -> Iterator[float]:
    """Takes the remaining steps, and yields the loss of each."""
    batches = random_batches(tokens, spec.batch_size, spec.model.context, spec.seed)
    batches = islice(batches, progress.step, None)
    rates = np.asarray(jax.vmap(warmed_up(spec.learning_rate, spec.steps))(jnp.arange(spec.steps)))
    windows = next(batches)
    while progress.step < spec.steps:
        numbers = numbers_of(spec, rates[progress.step])
        started = time.perf_counter()
        progress.params, progress.state, loss = program.step(
            progress.params, progress.state, windows, numbers
        )
        windows = next(batches)  # while the device computes
        value = float(loss)
        progress.seconds += time.perf_counter() - started
        progress.step += 1
        progress.losses.append(value)
        yield value


def evaluated_steps(steps: int, evaluations: int) -> set[int]:
    """The steps after which the model is evaluated, the last among them."""
    return {round(steps * number / evaluations) for number in range(1, evaluations + 1)}
