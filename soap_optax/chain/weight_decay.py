"""Optax's decoupled weight decay, which needs parameters only if it decays."""

from collections.abc import Callable
from typing import Any

import optax


def add_weight_decay(
    weight_decay: optax.ScalarOrSchedule, mask: Any | Callable[[optax.Params], Any] | None
) -> optax.GradientTransformationExtraArgs:
    """`optax.add_decayed_weights`, which `update` can call without parameters if the decay is 0.

    `optax.adam` needs no parameters either. A traced number or a schedule needs them: it may be
    positive. The state is that of `optax.add_decayed_weights`.

    Args:
      weight_decay: strength of the decay, a number or a schedule.
      mask: the parameters to decay, as for `soap`.

    Returns:
      A transformation.

    Raises:
      ValueError: Optax's, at ``update``, if the parameters are missing and the decay may be
        positive, with a note on `weight_decay`.
    """
    decay = optax.with_extra_args_support(optax.add_decayed_weights(weight_decay, mask))
    decays_nothing = isinstance(weight_decay, (int, float)) and weight_decay == 0

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        if decays_nothing:
            return updates, state
        try:
            return decay.update(updates, state, params, **extra_args)
        except ValueError as error:
            if params is None:
                error.add_note(
                    "soap_optax: if your program calls update without parameters, as it may for "
                    "optax.adam, pass weight_decay=0.0"
                )
            raise

    return optax.GradientTransformationExtraArgs(decay.init, update_fn)
