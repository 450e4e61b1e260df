"""SOAP, Adam in the eigenbasis of Shampoo's preconditioner, for Optax."""

from soap_optax.alias import STATIC_ARGS, soap
from soap_optax.checkpoints import check_checkpoint
from soap_optax.description import Description, ParameterDescription, describe
from soap_optax.diagnostics import diagnostics
from soap_optax.labels import default_labels
from soap_optax.schedules import thinning_frequency
from soap_optax.shardings import state_shardings
from soap_optax.state import RavelledState, ScaleBySoapState, StackState
from soap_optax.transform import scale_by_soap

__version__ = "0.1.0"

__all__ = [
    "STATIC_ARGS",
    "Description",
    "ParameterDescription",
    "RavelledState",
    "ScaleBySoapState",
    "StackState",
    "check_checkpoint",
    "default_labels",
    "describe",
    "diagnostics",
    "scale_by_soap",
    "soap",
    "state_shardings",
    "thinning_frequency",
]
