"""From parameters to blocks and back on one device, planned from shapes alone.

May import: `soap_optax.state`, JAX. Must never know: the equations, meshes and shardings, or when a
basis is refreshed.
"""

from soap_optax.blocks.checks import check_leaf, check_state, is_placeholder, plan_of, statistics_of
from soap_optax.blocks.complex_leaves import join_complex, split_complex
from soap_optax.blocks.gather import (
    concatenate,
    consecutive_slices,
    gather,
    scatter,
    slice_starts,
    split,
    tiles_of,
)
from soap_optax.blocks.padding import padding_sources, repad, take_or_zero
from soap_optax.blocks.plan import Group, Plan, Region
from soap_optax.blocks.prefixes import broadcast_prefix, is_function, tree_of
from soap_optax.blocks.views import (
    DEFAULT_MAX_PRECOND_DIM,
    Axes,
    AxesMark,
    BlockOptions,
    Shape,
    axes_of_leaves,
)

__all__ = [
    "DEFAULT_MAX_PRECOND_DIM",
    "Axes",
    "AxesMark",
    "BlockOptions",
    "Group",
    "Plan",
    "Region",
    "Shape",
    "axes_of_leaves",
    "broadcast_prefix",
    "check_leaf",
    "check_state",
    "concatenate",
    "consecutive_slices",
    "gather",
    "is_function",
    "is_placeholder",
    "join_complex",
    "padding_sources",
    "plan_of",
    "repad",
    "scatter",
    "slice_starts",
    "split",
    "split_complex",
    "statistics_of",
    "take_or_zero",
    "tiles_of",
    "tree_of",
]
