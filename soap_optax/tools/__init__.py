"""Functions that users call beside the optimizer: they read parameters and states, and change none.

May import: every other wing and module. Must never be imported by another wing.
"""

from soap_optax.tools.checkpoints import check_checkpoint
from soap_optax.tools.describe import Description, ParameterDescription, describe
from soap_optax.tools.diagnostics import diagnostics
from soap_optax.tools.labels import default_labels
from soap_optax.tools.state_shardings import state_shardings

__all__ = [
    "Description",
    "ParameterDescription",
    "check_checkpoint",
    "default_labels",
    "describe",
    "diagnostics",
    "state_shardings",
]
