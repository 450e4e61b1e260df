"""From parameters to blocks and back on devices: `layout_of` returns a `Layout` for both ways.

May import: `soap_optax.blocks`, `soap_optax.state`, JAX. Must never know: the equations, or when a
basis is refreshed.
"""

from soap_optax.devices.explicit_axes import replicate_explicit
from soap_optax.devices.layout import Layout
from soap_optax.devices.mesh import shard_count
from soap_optax.devices.sharded import layout_of
from soap_optax.devices.state_shardings import shardings_of_state

__all__ = ["Layout", "layout_of", "replicate_explicit", "shard_count", "shardings_of_state"]
