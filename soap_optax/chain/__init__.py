"""Transformations for chains and partitions with SOAP: limits, weight decay, hyperball, Adam.

May import: `arguments`, `devices`, `blocks`, `linalg`, `state`. Must never know: the equations of
SOAP, stacks.
"""

from soap_optax.chain.clipping import clip_by_running_norm
from soap_optax.chain.constant_norms import hyperball
from soap_optax.chain.guarded_adam import scale_by_guarded_adam
from soap_optax.chain.weight_decay import add_weight_decay

__all__ = ["add_weight_decay", "clip_by_running_norm", "hyperball", "scale_by_guarded_adam"]
