"""Scalars whose values XLA cannot see when it compiles for a CPU."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from soap_optax.stacks.refresh_gating import any_unbatched


def hide_from_cpu_compiler(numbers: Sequence[int], count: Array) -> dict[int, ArrayLike]:
    """Returns scalars of these numbers whose values XLA cannot see when it compiles for a CPU.

    XLA compiles one kernel for each slice at a constant position, in 25 ms, and one kernel for all
    slices whose position is an operand. With 600 leaves, compile time falls from 13 s to 1 s. The
    result of a conditional is such an operand. Other platforms compile constants best.

    Args:
      numbers: distinct numbers, at least 0.
      count: a scalar of the state that is never negative, which XLA does not know.
    """
    return dict(zip(numbers, _hidden(tuple(numbers), count), strict=True))


@partial(jax.jit, static_argnames="numbers")
def _hidden(numbers: tuple[int, ...], count: Array) -> tuple[Array, ...]:
    known = tuple(jnp.asarray(number, jnp.int32) for number in numbers)

    def behind_a_conditional() -> tuple[Array, ...]:
        return lax.cond(any_unbatched(count >= 0), lambda: known, lambda: known[:1] * len(known))

    return lax.platform_dependent(cpu=behind_a_conditional, default=lambda: known) if known else ()
