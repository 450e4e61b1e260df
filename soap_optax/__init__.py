"""SOAP, Adam in the eigenbasis of Shampoo's preconditioner, and Shampoo, for Optax."""

from soap_optax.alias import STATIC_ARGS, soap
from soap_optax.chain import clip_by_running_norm, hyperball
from soap_optax.partitioned import SOAP_ADAMW_STATIC_ARGS, soap_adamw
from soap_optax.schedules import thinning_frequency
from soap_optax.shampoo_alias import SHAMPOO_STATIC_ARGS, shampoo
from soap_optax.shampoo_transform import scale_by_shampoo
from soap_optax.state import (
    AdamState,
    ClipByRunningNormState,
    HyperballState,
    ScaleByShampooState,
    ScaleBySoapState,
    ShampooStackState,
    StackState,
)
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
    "SHAMPOO_STATIC_ARGS",
    "SOAP_ADAMW_STATIC_ARGS",
    "STATIC_ARGS",
    "AdamState",
    "ClipByRunningNormState",
    "Description",
    "HyperballState",
    "ParameterDescription",
    "ScaleByShampooState",
    "ScaleBySoapState",
    "ShampooStackState",
    "StackState",
    "check_checkpoint",
    "clip_by_running_norm",
    "default_dimension_numbers",
    "default_labels",
    "describe",
    "diagnostics",
    "hyperball",
    "scale_by_shampoo",
    "scale_by_soap",
    "shampoo",
    "soap",
    "soap_adamw",
    "state_shardings",
    "thinning_frequency",
]
