"""Functions that users call beside the optimizer: they read parameters and states, and change none.

May import: every other wing, and every module but `partitioned`. Must never be imported by another
wing.
"""

from soap_optax.tools.assignment import Assignment, assignment_of
from soap_optax.tools.checkpoints import check_checkpoint
from soap_optax.tools.describe import (
    ONLY_OF_SOAP_ADAMW,
    Description,
    ParameterDescription,
    describe,
)
from soap_optax.tools.diagnostics import diagnostics
from soap_optax.tools.dimension_numbers import default_dimension_numbers
from soap_optax.tools.labels import default_labels
from soap_optax.tools.state_shardings import state_shardings

__all__ = [
    "ONLY_OF_SOAP_ADAMW",
    "Assignment",
    "Description",
    "ParameterDescription",
    "assignment_of",
    "check_checkpoint",
    "default_dimension_numbers",
    "default_labels",
    "describe",
    "diagnostics",
    "state_shardings",
]
