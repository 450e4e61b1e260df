"""Schedules of `precondition_frequency`: the frequency in force, and a ready schedule."""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from soap_optax import value_checks

# The longest interval, in effect never: counters of updates have 32 bits.
LONGEST = np.iinfo(np.int32).max

Frequency = ArrayLike | Callable[[ArrayLike], ArrayLike]


def thinning_frequency(dense: int, most: int = 10) -> Callable[[ArrayLike], Array]:
    """A schedule for ``precondition_frequency`` with dense refreshes first and rare ones later.

    Eigenbases rotate fastest at the start of training. So the interval from one refresh to the next
    grows with the number of updates: it is ``count // dense``, at least 1 and at most `most`. The
    first ``2 * dense`` updates have an interval of 1. Then each doubling of the number of updates
    takes about the same number of refreshes, until the interval reaches `most`.

    Example:
      >>> import soap_optax
      >>> frequency = soap_optax.thinning_frequency(dense=20, most=10)
      >>> [int(frequency(count)) for count in (0, 20, 40, 100, 1000)]
      [1, 1, 2, 5, 10]
      >>> optimizer = soap_optax.soap(3e-3, precondition_frequency=frequency)

    Args:
      dense: number of updates after which the interval grows by one, from 1 to 2147483647.
      most: longest interval, from 1 to 2147483647.

    Returns:
      A function from the number of updates so far to the interval, an integer scalar.

    Raises:
      TypeError, ValueError: if an argument is not such an integer.
    """
    check = partial(value_checks.check_integer, least=1, hint="", most=LONGEST)
    check("dense", dense, way_out="1 lengthens the interval in every update")
    check("most", most, way_out="1 refreshes in every step")

    def frequency(count: ArrayLike) -> Array:
        return jnp.clip(jnp.asarray(count) // dense, 1, most).astype(jnp.int32)

    return frequency


def frequency_at(frequency: Frequency, updates: Array) -> Array:
    """The frequency in force after this number of updates, an integer from 1 to `LONGEST`.

    Fractions are truncated. Larger values, infinity included, become `LONGEST`. Values below 1, and
    NaN, become 1.
    """
    if callable(frequency):
        frequency = frequency(updates)
    if isinstance(frequency, (int, float)):
        frequency = min(frequency, LONGEST)  # An array of 32 bits may not hold more.
    frequency = jnp.asarray(frequency)
    if frequency.ndim:
        raise ValueError(
            "precondition_frequency must be one number for all blocks, got an array of shape "
            f"{frequency.shape}; return a scalar from the schedule"
        )
    size = frequency.astype(jnp.float32)  # To compare it with what its own dtype may not hold.
    in_range = (size >= 1) & (size < LONGEST)
    whole = jnp.where(in_range, frequency, jnp.ones_like(frequency)).astype(jnp.int32)
    return jnp.where(size >= LONGEST, LONGEST, whole)
