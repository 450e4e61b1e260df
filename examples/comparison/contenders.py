"""The optimizers that are compared, from the settings of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax import Array
from recipe import CLIP_NORM

import soap_optax
from comparison.specs import Spec, options_of
from comparison.widths import scale_by_width

SHORTEST_FACTORED = 8  # Adafactor factors matrices whose axes are at least this long.
SHAMPOO_EXPONENT = 1 / 2.5  # tuned by the authors of SOAP, as is the grafting to Adam


class Numbers(NamedTuple):
    """The numbers of a step that one compiled program takes as arguments."""

    learning_rate: Array
    b1: Array
    b2: Array
    weight_decay: Array
    frequency: Array


Optimizer = optax.GradientTransformation
Make = Callable[..., Optimizer]


class Contender(NamedTuple):
    """An optimizer in the comparison.

    Attributes:
      label: its printed name.
      learning_rate: where the search for the best rate begins.
      make: the optimizer without clipping, from `Numbers` and options.
      tuned: settings besides the learning rate that are tuned.
      b1: decay of the first moment.
      b2: decay of the second moment before it is tuned.
      refreshes: whether it has a refresh frequency.
    """

    label: str
    learning_rate: float
    make: Make
    tuned: tuple[str, ...] = ("b2", "weight_decay")
    b1: float = 0.95
    b2: float = 0.95
    refreshes: bool = True


# Directions ---------------------------------------------------------------------------------------


def decayed(direction: Optimizer, numbers: Numbers) -> Optimizer:
    """Adds decoupled weight decay and the learning rate to a direction."""
    return optax.chain(
        direction,
        optax.add_decayed_weights(numbers.weight_decay),
        optax.scale_by_learning_rate(numbers.learning_rate),
    )


def frequency_of(numbers: Numbers, dense: int | None, most: int | None) -> Any:
    """The frequency, or the schedule `thinning_frequency` if its arguments are given."""
    if dense is None or most is None:
        return numbers.frequency
    return soap_optax.thinning_frequency(dense, most)


def soap_direction(
    numbers: Numbers, dense: int | None = None, most: int | None = None, **options: Any
) -> Optimizer:
    """SOAP's direction."""
    frequency = frequency_of(numbers, dense, most)
    return soap_optax.scale_by_soap(
        numbers.b1, numbers.b2, precondition_frequency=frequency, **options
    )


def soap(numbers: Numbers, **options: Any) -> Optimizer:
    """SOAP with any of its options."""
    return decayed(soap_direction(numbers, **options), numbers)


def hyperball(numbers: Numbers, **options: Any) -> Optimizer:
    """SOAP with constant norms of the matrices between embedding and head, without decay."""
    return optax.chain(
        soap_direction(numbers, **options),
        soap_optax.hyperball(numbers.learning_rate, mask=between_embedding_and_head),
    )


def between_embedding_and_head(params: Any) -> Any:
    """Whether each parameter is a matrix, and neither an embedding nor a head."""
    return jax.tree.map(lambda label: label == "soap", soap_optax.default_labels(params))


def shampoo(
    numbers: Numbers, dense: int | None = None, most: int | None = None, **options: Any
) -> Optimizer:
    """Shampoo as the SOAP paper tuned it."""
    direction = soap_optax.scale_by_shampoo(
        numbers.b1,
        numbers.b2,
        exponent=SHAMPOO_EXPONENT,
        precondition_frequency=frequency_of(numbers, dense, most),
        **options,
    )
    return decayed(direction, numbers)


def adamw(numbers: Numbers) -> Optimizer:
    """AdamW."""
    return decayed(optax.scale_by_adam(numbers.b1, numbers.b2), numbers)


def adafactor(numbers: Numbers) -> Optimizer:
    """Adafactor with momentum; the size of parameters does not scale updates."""
    direction = optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=SHORTEST_FACTORED),
        optax.clip_by_block_rms(1.0),
        optax.ema(numbers.b1, debias=False),
    )
    return decayed(direction, numbers)


def muon(numbers: Numbers) -> Optimizer:
    """Muon for all matrices and Adam for vectors."""
    rate, beta, b2, decay, _ = numbers
    return optax.contrib.muon(
        rate, beta=beta, weight_decay=decay, adam_b1=beta, adam_b2=b2, adam_weight_decay=decay
    )


def lion(numbers: Numbers) -> Optimizer:
    """Lion."""
    return decayed(optax.scale_by_lion(numbers.b1, numbers.b2), numbers)


def sgd(numbers: Numbers) -> Optimizer:
    """Gradient descent with momentum."""
    return decayed(optax.trace(numbers.b1), numbers)


def soap_with(**fixed: Any) -> Make:
    """SOAP with these options."""

    def make(numbers: Numbers, **options: Any) -> Optimizer:
        return soap(numbers, **fixed, **options)

    return make


CONTENDERS = {
    "adamw": Contender("AdamW", 1e-2, adamw, refreshes=False),
    "soap": Contender("SOAP", 1e-2, soap),
    "soap-one-sided": Contender("SOAP, one-sided", 1e-2, soap_with(one_sided=True)),
    "soap-factored": Contender("SOAP, factored", 1e-2, soap_with(factored=True)),
    "soap-kl": Contender("SOAP, KL", 1e-2, soap_with(factor_estimator="kl")),
    "soap-hyperball": Contender("SOAP, hyperball", 3.16e-2, hyperball, tuned=("b2",)),
    "shampoo": Contender("Shampoo", 1e-2, shampoo),
    "adafactor": Contender("Adafactor", 1e-2, adafactor, tuned=("weight_decay",), refreshes=False),
    "muon": Contender("Muon", 3.16e-2, muon, tuned=("weight_decay",), refreshes=False),
    "lion": Contender(
        "Lion", 1e-3, lion, tuned=("weight_decay",), b1=0.9, b2=0.99, refreshes=False
    ),
    "sgd": Contender(
        "SGD, momentum", 3.16e-1, sgd, tuned=("weight_decay",), b1=0.9, refreshes=False
    ),
}


# One run ------------------------------------------------------------------------------------------


def make_optimizer(spec: Spec, numbers: Numbers) -> Optimizer:
    """Chains clipping, the contender and, with the option `width_rules`, scales by width."""
    options = options_of(spec.options)
    width_rules = options.pop("width_rules", None)
    parts = [
        optax.clip_by_global_norm(CLIP_NORM),
        CONTENDERS[spec.contender].make(numbers, **options),
    ]
    if width_rules:
        parts.append(scale_by_width(width_rules, options.get("block_size")))
    return optax.chain(*parts)


def numbers_of(spec: Spec, learning_rate: float) -> Numbers:
    """The arguments of a step, in the dtypes for which it is compiled."""
    rate, b1, b2, decay = map(jnp.float32, (learning_rate, spec.b1, spec.b2, spec.weight_decay))
    return Numbers(rate, b1, b2, decay, jnp.int32(spec.frequency))


def diagnose(spec: Spec, state: optax.OptState) -> dict[str, Array]:
    """The numbers of rejected refreshes and gradients, for contenders that count them."""
    if not CONTENDERS[spec.contender].refreshes:
        return {}
    scalars = soap_optax.diagnostics(state)
    return {
        name: scalar
        for key, scalar in scalars.items()
        if (name := key.rpartition("/")[2]).startswith("rejected_") and key.count("/") == 1
    }
