"""Trains the byte-level GPT of the examples, one seed after another by the same compiled step."""

import dataclasses
import functools
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import soap_optax

sys.path.append(str(Path(__file__).parents[2] / "examples"))

from byte_gpt import (
    Size,
    even_batches,
    make_model,
    random_batches,
    read_text,
    standard_library,
)
from pretrain_lm import OPTIMIZERS, WEIGHT_DECAY
from recipe import CLIP_NORM, HELD_OUT_BATCHES, HELD_OUT_FRACTION, warmed_up

EVALUATIONS = 20  # in a run, after the one before the first step
LONGEST_STRETCH = 50  # the number of steps to dispatch before waiting for the last one
LEARNING_RATES = {name: OPTIMIZERS[name].learning_rate for name in ("soap", "adamw")}


@dataclasses.dataclass(frozen=True)
class Task:
    """The model, the text and the number of steps, equal for all optimizers."""

    size: Size
    steps: int
    batch_size: int
    text: np.ndarray

    @property
    def held_out_bytes(self) -> int:
        return int(len(self.text) * HELD_OUT_FRACTION)

    @property
    def held_out(self) -> np.ndarray:
        text = self.text[-self.held_out_bytes :]
        return even_batches(text, *HELD_OUT_BATCHES, self.size.context)

    def batches(self, seed: int) -> Iterator[np.ndarray]:
        text = self.text[: -self.held_out_bytes]
        return random_batches(text, self.batch_size, self.size.context, seed)

    def params(self, seed: int) -> list[Array]:
        return jax.tree.leaves(make_model(self.size, seed)[0])

    def loss(self) -> Callable[[list[Array], Array], Array]:
        """The loss from a list of parameters, which JAX passes on faster than a Flax state."""
        made = {}

        def params() -> Any:
            state, made["loss"] = make_model(self.size, 0)
            return state

        treedef = jax.tree.structure(jax.eval_shape(params))
        return lambda leaves, windows: made["loss"](treedef.unflatten(leaves), windows)


def standard_text() -> np.ndarray:
    """The source of Python's standard library."""
    return read_text(standard_library())


# Optimizers ---------------------------------------------------------------------------------------

EXAMPLES_OPTIONS: Mapping[str, Any] = {"weight_decay": WEIGHT_DECAY}


def soap(
    learning_rate: float, steps: int, options: Mapping[str, Any]
) -> optax.GradientTransformation:
    """The example's SOAP, with these options."""
    rate = warmed_up(learning_rate, steps)
    return clipped(soap_optax.soap(rate, **{**EXAMPLES_OPTIONS, **options}))


def adamw(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """The example's AdamW."""
    rate = warmed_up(learning_rate, steps)
    return clipped(optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=WEIGHT_DECAY))


def clipped(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(CLIP_NORM), optimizer)


# One run ------------------------------------------------------------------------------------------


class Evaluation(NamedTuple):
    """Measurements at every twentieth of a run; NaN if the optimizer does not have one.

    Attributes:
      step: steps so far.
      train_loss: mean since the last evaluation; NaN before the first step.
      held_out_loss: NaN where this or a training loss is not finite, which ends the run.
      mass_step: the step of the next attribute. Its place between two evaluations varies, so that
        it falls on a refresh no more often than other steps.
      off_diagonal_mass: the largest over block shapes, from `soap_optax.diagnostics` with
        `sample=1`. The step used these bases, and the factors include the step's gradient.
      adopted: the number of adopted bases so far, summed over blocks.
      adoptable: the same number if every step had refreshed all bases.
      rejected_refreshes: so far, summed over blocks.
      rejected_gradients: so far, summed over blocks and parameters with no preconditioner.
      seconds_per_step: mean since the last evaluation, of training alone; NaN before the first.
    """

    step: int
    train_loss: float
    held_out_loss: float
    mass_step: int
    off_diagonal_mass: float
    adopted: float
    adoptable: float
    rejected_refreshes: float
    rejected_gradients: float
    seconds_per_step: float


class Program(NamedTuple):
    """The compiled programs of an optimizer on a task, for any seed.

    Attributes:
      init: the state, from parameters.
      step: `(params, state, windows)` to parameters, state and loss; donates the first two.
      evaluate: the held-out loss, from parameters.
      examine: scalars of `Evaluation` by name, from a state.
      state_bytes: the size of a state.
    """

    init: Callable[[list[Array]], Any]
    step: Callable[..., tuple[list[Array], Any, Array]]
    evaluate: Callable[[list[Array]], Array]
    examine: Callable[[Any], dict[str, Array]]
    state_bytes: int


def compile_program(optimizer: optax.GradientTransformation, task: Task) -> Program:
    loss = task.loss()

    def take_step(params: list[Array], state: Any, windows: Array) -> tuple:
        value, grads = jax.value_and_grad(loss)(params, windows)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    def evaluate(params: list[Array], batches: Array) -> Array:
        return jax.lax.map(lambda windows: loss(params, windows), batches).mean()

    params = jax.eval_shape(lambda: task.params(0))
    state = jax.eval_shape(optimizer.init, params)
    held_out = jnp.asarray(task.held_out)
    step = jax.jit(take_step, donate_argnums=(0, 1))
    compiled = jax.jit(evaluate).lower(params, held_out).compile()
    return Program(
        init=jax.jit(optimizer.init),
        step=step.lower(params, state, next(task.batches(0))).compile(),
        evaluate=lambda params: compiled(params, held_out),
        examine=jax.jit(examine).lower(state).compile(),
        state_bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)),
    )


def examine(state: Any) -> dict[str, Array]:
    """Scalars of `Evaluation`, if the state is SOAP's."""
    stacks = optax.tree_utils.tree_get(state, "stacks", {})
    if not stacks:
        return {}
    scalars = soap_optax.diagnostics(state, sample=1)
    masses = [scalar for name, scalar in scalars.items() if name.endswith("/off_diagonal_mass")]
    # The first gradient only fills the factors, and a rejected gradient refreshes nothing.
    updates = [jnp.sum(jnp.maximum(stack.accepted_gradients - 1, 0)) for stack in stacks.values()]
    return {
        "off_diagonal_mass": functools.reduce(jnp.maximum, masses),
        "adopted": scalars["soap/refreshes"],
        "adoptable": functools.reduce(jnp.add, updates),
        "rejected_refreshes": scalars["soap/rejected_refreshes"],
        "rejected_gradients": scalars["soap/rejected_gradients"],
    }


def train(
    program: Program, task: Task, seed: int, advance: Callable[[int], Any]
) -> Iterator[Evaluation]:
    """Trains until the last step, or until a loss is not finite.

    Args:
      program: the compiled programs to run.
      task: the task for which they were compiled.
      seed: decides the initial weights and the batches.
      advance: called with the number of steps that were just taken.
    """
    params = task.params(seed)
    state = program.init(params)
    batches = task.batches(seed)
    yield evaluation(program, params, state)
    for number, (start, stop) in enumerate(itertools.pairwise(evaluated_steps(task.steps))):
        mass_step = start + place_of(number, stop - start)
        losses, seconds, mass = [], 0.0, math.nan
        for step, until in itertools.pairwise(stretches(start, mass_step, stop)):
            started = time.perf_counter()
            values = []
            for _ in range(step, until):
                params, state, value = program.step(params, state, next(batches))
                values.append(value)
            jax.block_until_ready((params, state))
            seconds += time.perf_counter() - started
            losses += map(float, values)
            advance(until - step)
            if until == mass_step:
                mass = float(program.examine(state).get("off_diagonal_mass", math.nan))
        row = evaluation(program, params, state)._replace(
            step=stop,
            train_loss=sum(losses) / len(losses),
            mass_step=mass_step,
            off_diagonal_mass=mass,
            seconds_per_step=seconds / (stop - start),
        )
        if not math.isfinite(row.train_loss + row.held_out_loss):
            yield row._replace(held_out_loss=math.nan)
            return
        yield row


def evaluation(program: Program, params: list[Array], state: Any) -> Evaluation:
    """The evaluation of parameters and state, without the attributes that need training steps."""
    values: dict[str, Any] = dict.fromkeys(Evaluation._fields, math.nan)
    values |= {name: float(scalar) for name, scalar in program.examine(state).items()}
    values |= {"step": 0, "mass_step": 0, "off_diagonal_mass": math.nan}
    values["held_out_loss"] = float(program.evaluate(params))
    return Evaluation(**values)


def evaluated_steps(steps: int) -> list[int]:
    return sorted({*range(0, steps, max(1, steps // EVALUATIONS)), steps})


def place_of(number: int, length: int) -> int:
    """A place from 1 to `length`; multiples of the golden ratio, modulo 1, spread it evenly."""
    golden = (math.sqrt(5) - 1) / 2
    return 1 + math.floor(math.modf((number + 1) * golden)[0] * length)


def stretches(start: int, middle: int, stop: int) -> list[int]:
    """The steps at which to wait, at most `LONGEST_STRETCH` apart."""
    return sorted({*range(start, stop, LONGEST_STRETCH), middle, stop})
