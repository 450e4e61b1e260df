"""`precondition_frequency`: the one in force, and a ready schedule for it."""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from soap_optax import arguments

Frequency = ArrayLike | Callable[[ArrayLike], ArrayLike]


def thinning_frequency(dense: int, most: int = 10) -> Callable[[ArrayLike], Array]:
    """A schedule for ``precondition_frequency`` that starts dense and thins out.

    Bases turn fastest when training begins and ever more slowly afterwards. The interval from one
    refresh to the next is 1 for the first ``2 * dense`` updates and grows in proportion to the
    updates so far, ``count // dense``, up to `most`. Until then, from `dense` on, each doubling of
    the number of updates takes about as many refreshes.

    Example:
      >>> import soap_optax
      >>> frequency = soap_optax.thinning_frequency(dense=20, most=10)
      >>> [int(frequency(count)) for count in (0, 20, 40, 100, 1000)]
      [1, 1, 2, 5, 10]
      >>> optimizer = soap_optax.soap(3e-3, precondition_frequency=frequency)

    Args:
      dense: after how many more updates the interval grows by one, from 1 to 2147483647.
      most: the longest interval, from 1 to 2147483647.

    Returns:
      A function from the number of updates so far to the interval, an integer scalar.

    Raises:
      TypeError, ValueError: where an argument is not such an integer.
    """
    check = partial(arguments.check_integer, least=1, hint="", most=np.iinfo(np.int32).max)
    check("dense", dense, way_out="1 lengthens the interval in every update")
    check("most", most, way_out="1 refreshes in every step")

    def frequency(count: ArrayLike) -> Array:
        return jnp.clip(jnp.asarray(count) // dense, 1, most).astype(jnp.int32)

    return frequency


def frequency_at(frequency: Frequency, count: Array) -> Array:
    """The frequency in force, a whole number of at least 1, after `count` calls of `update`."""
    if callable(frequency):
        frequency = frequency(jnp.maximum(count - 1, 0))  # The first call applies no update.
    return jnp.maximum(jnp.asarray(frequency).astype(jnp.int32), 1)
