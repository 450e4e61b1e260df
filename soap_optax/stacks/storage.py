"""How the state of a stack is stored."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax.typing import DTypeLike

from soap_optax.algorithm import FactorEstimator


@dataclass(frozen=True)
class StorageOptions:
    """How the state is stored. The fields are arguments of `scale_by_soap`.

    A dtype that is wider than the dtype of the statistics has no effect.
    """

    mu_dtype: DTypeLike | None
    preconditioner_dtype: DTypeLike | None
    fold_factors: bool
    factored: bool
    factor_estimator: FactorEstimator = "gram"


def narrower(wanted: DTypeLike | None, statistics: DTypeLike) -> DTypeLike:
    """The dtype to store in: the wanted one, unless it is wider than the statistics."""
    if wanted is None or jnp.finfo(wanted).bits > jnp.finfo(statistics).bits:
        return statistics
    return wanted
