"""Compile times of updates, and the compiler's report of their memory."""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
from contenders import Contender, soap_stacks
from shapes import Model, count_bytes, count_entries, params_of


@dataclasses.dataclass(frozen=True)
class CompileTime:
    """Times of one contender's `update` at one depth; every layer has separate leaves."""

    contender: str
    layers: int
    trace_seconds: float
    compile_seconds: float


@dataclasses.dataclass(frozen=True)
class Memory:
    """The memory of one contender's `update`, in bytes."""

    contender: str
    layers: int
    state: int
    state_per_parameter: float
    temporaries: int
    in_use: int  # operands, results and temporaries together, donated operands counted once
    largest_stack: int | None  # the state of soap_optax's largest stack; None for the others


def operands_of(contender: Contender, model: Model, layers: int) -> tuple[Any, ...]:
    """The shapes of the operands of `update`."""
    params = params_of(model, layers)
    grads = jax.eval_shape(contender.prepare, params)
    frequency = jax.ShapeDtypeStruct((), jnp.int32)
    return grads, jax.eval_shape(contender.init, params), params, frequency


def compile_time(name: str, contender: Contender, model: Model, layers: int) -> CompileTime:
    """Compiles the update alone, with empty caches, and does not run it."""
    jax.clear_caches()
    operands = operands_of(contender, model, layers)
    started = time.perf_counter()
    lowered = contender.update.lower(*operands)
    traced = time.perf_counter()
    lowered.compile()
    compiled = time.perf_counter()
    return CompileTime(name, layers, traced - started, compiled - traced)


def memory_of(name: str, contender: Contender, model: Model, layers: int) -> Memory:
    """The memory of the update, from its compiled program."""
    operands = operands_of(contender, model, layers)
    analysis = contender.update.lower(*operands).compile().memory_analysis()
    _, state, params, _ = operands
    stacks = soap_stacks(state)
    return Memory(
        name,
        layers,
        state=count_bytes(state),
        state_per_parameter=count_bytes(state) / count_entries(params),
        temporaries=analysis.temp_size_in_bytes,
        in_use=analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
        + analysis.temp_size_in_bytes,
        largest_stack=max(map(count_bytes, stacks.values())) if stacks else None,
    )
