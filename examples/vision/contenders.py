"""The optimizers that are compared, from the parameters and a learning rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import optax
import optax.contrib

import soap_optax

WEIGHT_DECAY = 0.01  # decoupled
SGD_WEIGHT_DECAY = 5e-4  # added to the gradient
MOMENTUM = 0.9


class Contender(NamedTuple):
    """An optimizer.

    Attributes:
      label: its printed name.
      learning_rate: the rate where the search begins.
      make: the optimizer, from a schedule and the parameters.
    """

    label: str
    learning_rate: float
    make: Callable[[optax.Schedule, Any], optax.GradientTransformation]


def adamw(rate: optax.Schedule, _params: Any) -> optax.GradientTransformation:
    """AdamW."""
    return optax.adamw(rate, weight_decay=WEIGHT_DECAY)


def sgd(rate: optax.Schedule, _params: Any) -> optax.GradientTransformation:
    """Gradient descent with Nesterov's momentum."""
    return optax.chain(
        optax.add_decayed_weights(SGD_WEIGHT_DECAY),
        optax.sgd(rate, momentum=MOMENTUM, nesterov=True),
    )


def muon(rate: optax.Schedule, params: Any) -> optax.GradientTransformation:
    """Muon for the matrices that `soap_adamw` preconditions too, and Adam for everything else."""
    numbers = soap_optax.default_dimension_numbers(params)
    return optax.contrib.muon(
        rate,
        weight_decay=WEIGHT_DECAY,
        adam_weight_decay=WEIGHT_DECAY,
        muon_weight_dimension_numbers=numbers,
    )


def soap(rate: optax.Schedule, _params: Any) -> optax.GradientTransformation:
    """SOAP for kernels, as matrices, and AdamW for everything else."""
    return soap_optax.soap_adamw(rate, weight_decay=WEIGHT_DECAY)


CONTENDERS = {
    "adamw": Contender("AdamW", 3.16e-3, adamw),
    "sgd": Contender("SGD, momentum", 1e-1, sgd),
    "muon": Contender("Muon", 1e-2, muon),
    "soap": Contender("SOAP", 3.16e-3, soap),
}
