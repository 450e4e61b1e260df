"""SOAP, Adam in the eigenbasis of Shampoo's preconditioner, for Optax."""

from soap_optax.alias import STATIC_ARGS, soap
from soap_optax.hyperball import hyperball
from soap_optax.partitioned import soap_adamw
from soap_optax.schedules import thinning_frequency
from soap_optax.state import AdamState, HyperballState, ScaleBySoapState, StackState
from soap_optax.tools import (
    Description,
    ParameterDescription,
    check_checkpoint,
    default_dimension_numbers,
    default_labels,
    describe,
    diagnostics,
    state_shardings,
)
from soap_optax.transform import scale_by_soap

__version__ = "0.1.0"

__all__ = [
    "STATIC_ARGS",
    "AdamState",
    "Description",
    "HyperballState",
    "ParameterDescription",
    "ScaleBySoapState",
    "StackState",
    "check_checkpoint",
    "default_dimension_numbers",
    "default_labels",
    "describe",
    "diagnostics",
    "hyperball",
    "scale_by_soap",
    "soap",
    "soap_adamw",
    "state_shardings",
    "thinning_frequency",
]
