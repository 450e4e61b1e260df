"""The equations over all blocks of one shape: when they run, in which loop, and in which storage.

May import: `soap_optax.devices`, `soap_optax.blocks`, `soap_optax.algorithm`, `soap_optax.linalg`,
`soap_optax.state`, JAX. Must never know: how a tree is cut into blocks, or how arrays are
resharded. The equations of a block are in `soap_optax.algorithm`.
"""

from soap_optax.stacks.adam import update_adam
from soap_optax.stacks.equations import SOAP, Equations
from soap_optax.stacks.hidden_scalars import hide_from_cpu_compiler
from soap_optax.stacks.initial import initial_state, placeholder_state
from soap_optax.stacks.refresh_gating import RefreshOrder, RefreshTiming
from soap_optax.stacks.shampoo_equations import ShampooEquations
from soap_optax.stacks.storage import StorageOptions
from soap_optax.stacks.update import StepSettings, update_stack

__all__ = [
    "SOAP",
    "Equations",
    "RefreshOrder",
    "RefreshTiming",
    "ShampooEquations",
    "StepSettings",
    "StorageOptions",
    "hide_from_cpu_compiler",
    "initial_state",
    "placeholder_state",
    "update_adam",
    "update_stack",
]
