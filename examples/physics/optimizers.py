"""The optimizers that are compared, from the numbers of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
import optax.contrib
from jax import Array

import soap_optax

REFRESH_METHODS = ("qr", "cholesky_qr", "eigh", "jacobi", "partial", "auto")


class Numbers(NamedTuple):
    """The numbers of a step that one compiled program takes as arguments."""

    learning_rate: Array
    b1: Array
    b2: Array
    frequency: Array


class Optimizer(NamedTuple):
    """An optimizer in the comparison.

    Attributes:
      label: its printed name.
      make: makes it from `Numbers` and a refresh method.
      learning_rate: the default learning rate.
      b1: default decay of the first moment.
      b2: default decay of the second moment.
      refreshes: whether it has a refresh frequency and a refresh method.
      line_search: whether it finds the size of its steps itself. Then the learning rate has no
        schedule, and the points are drawn once.
    """

    label: str
    make: Callable[[Numbers, str], optax.GradientTransformation]
    learning_rate: float
    b1: float = 0.9
    b2: float = 0.999
    refreshes: bool = False
    line_search: bool = False


def soap_direction(numbers: Numbers, refresh: Any, **options: Any) -> optax.GradientTransformation:
    """SOAP's direction."""
    return soap_optax.scale_by_soap(
        numbers.b1,
        numbers.b2,
        precondition_frequency=numbers.frequency,
        refresh=refresh,
        **options,
    )


def soap(numbers: Numbers, refresh: str) -> optax.GradientTransformation:
    """SOAP without weight decay."""
    return optax.chain(
        soap_direction(numbers, refresh), optax.scale_by_learning_rate(numbers.learning_rate)
    )


def soap_kl(numbers: Numbers, refresh: str) -> optax.GradientTransformation:
    """SOAP with Kronecker factors that minimize a KL divergence."""
    return optax.chain(
        soap_direction(numbers, refresh, factor_estimator="kl"),
        optax.scale_by_learning_rate(numbers.learning_rate),
    )


def soap_hyperball(numbers: Numbers, refresh: str) -> optax.GradientTransformation:
    """SOAP with constant norms of the square kernels."""
    return optax.chain(
        soap_direction(numbers, refresh),
        soap_optax.hyperball(numbers.learning_rate, mask=inner_kernels),
    )


def inner_kernels(params: Any) -> Any:
    """Whether each parameter is a square kernel, as in all layers but the first and the last."""
    return jax.tree.map(lambda leaf: leaf.ndim == 2 and len(set(leaf.shape)) == 1, params)


def adam(numbers: Numbers, _: str) -> optax.GradientTransformation:
    """Adam."""
    return optax.adam(numbers.learning_rate, numbers.b1, numbers.b2)


def muon(numbers: Numbers, _: str) -> optax.GradientTransformation:
    """Muon for all matrices and Adam for vectors."""
    return optax.contrib.muon(
        numbers.learning_rate, beta=numbers.b1, adam_b1=numbers.b1, adam_b2=numbers.b2
    )


def lbfgs(numbers: Numbers, _: str) -> optax.GradientTransformation:
    """L-BFGS with the zoom line search."""
    return optax.lbfgs(numbers.learning_rate)


# Final relative L2 error on Burgers' equation by learning rate, one run each, not all from
# the same initial weights (--optimizer NAME --learning-rate RATE):
#
#           1e-3     3e-3     1e-2
#   SOAP      -     1.3e-3   1.7e-3
#   Adam   4.2e-2   2.8e-2   1.1e-1
#
# The other rates are not tuned.
OPTIMIZERS = {
    "soap": Optimizer("SOAP", soap, 3e-3, 0.95, 0.95, refreshes=True),
    "adam": Optimizer("Adam", adam, 3e-3),
    "muon": Optimizer("Muon", muon, 1e-2, b1=0.95),
    "lbfgs": Optimizer("L-BFGS", lbfgs, 1.0, line_search=True),
    "soap-kl": Optimizer("SOAP, KL", soap_kl, 3e-3, 0.95, 0.95, refreshes=True),
    "soap-hyperball": Optimizer(
        "SOAP, hyperball", soap_hyperball, 1e-2, 0.95, 0.95, refreshes=True
    ),
}
