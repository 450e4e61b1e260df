"""Report how each parameter will be preconditioned, and its state size, from shapes alone."""

import dataclasses
import inspect
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from soap_optax.alias import soap
from soap_optax.blocks import BlockOptions, Plan, plan_of, split_complex
from soap_optax.chain import clip_by_running_norm, scale_by_guarded_adam
from soap_optax.shampoo_alias import shampoo
from soap_optax.shampoo_transform import scale_by_shampoo
from soap_optax.state import AdamState, AnyStackState, PreconditionerState
from soap_optax.tools.assignment import assignment_of
from soap_optax.transform import scale_by_soap

# The arguments of `soap_adamw` alone, without `labels`.
ONLY_OF_SOAP_ADAMW = ("adamw_learning_rate", "adamw_b1", "adamw_b2", "report", "max_norm_ratio")


@dataclasses.dataclass(frozen=True)
class ParameterDescription:
    """How one parameter is preconditioned.

    Attributes:
      path: its path in the tree, such as ``"layers/0/kernel"``.
      shape: its shape.
      dtype: its dtype.
      blocks: its blocks, such as ``"4 x 384x512"``. ``"Adam"`` means no preconditioner, and
        ``"nothing"`` a parameter without entries. Parameters of AdamW have ``"AdamW"``.
      axes: the preconditioned axes of its blocks. They are the parameter's own axes unless
        ``merge_dims`` or ``dimension_numbers`` rearrange them.
      state_bytes: its share of the optimizer's state, in bytes.
      optimizer: ``"soap"`` or ``"adamw"``; None without ``labels``.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    blocks: str
    axes: tuple[int, ...]
    state_bytes: int
    optimizer: str | None = None


@dataclasses.dataclass(frozen=True)
class Description:
    """How every parameter is preconditioned; `str` returns an aligned table.

    Attributes:
      rows: one row for each parameter, sorted as `jax.tree.leaves` sorts.
      shared_bytes: bytes of state that belong to no parameter, such as the count of calls.
    """

    rows: tuple[ParameterDescription, ...]
    shared_bytes: int

    @property
    def entries(self) -> int:
        """The number of entries of all parameters."""
        return sum(math.prod(row.shape) for row in self.rows)

    @property
    def state_bytes(self) -> int:
        """The bytes of the state that `init` makes, with each replicated array counted once."""
        return sum(row.state_bytes for row in self.rows) + self.shared_bytes

    def __str__(self) -> str:
        table = [("parameter", "optimizer", "shape", "dtype", "blocks", "axes", "state bytes")]
        for row in self.rows:
            shape, axes = _shape_text(row.shape), ", ".join(map(str, row.axes))
            cells = (row.path, row.optimizer or "", shape, row.dtype.name, row.blocks, axes)
            table.append((*cells, f"{row.state_bytes:,}"))
        table.append(("shared", "", "", "", "", "", f"{self.shared_bytes:,}"))
        table.append(("total", "", f"{self.entries:,}", "", "", "", f"{self.state_bytes:,}"))
        if not any(row.optimizer for row in self.rows):
            table = [(first, *rest) for first, _, *rest in table]
        return _aligned(table)


def describe(
    params: Any,
    *,
    optimizer: Callable[..., Any] = soap,
    labels: Any = None,
    **options: Any,
) -> Description:
    """Reports each parameter's blocks, preconditioned axes and bytes of state.

    Reads shapes and dtypes only, and allocates nothing. Blocks and bytes are exact: they come from
    the plan and the abstract state of `init`. A complex parameter has two rows, one for its real
    and one for its imaginary part.

    Example:
      >>> import jax, jax.numpy as jnp, soap_optax
      >>> params = {"bias": jnp.zeros(768), "kernel": jnp.zeros((768, 512))}
      >>> print(soap_optax.describe(params, block_size=512))
      parameter  shape    dtype    blocks       axes  state bytes
      bias       768      float32  Adam                     6,152
      kernel     768x512  float32  2 x 384x512  0, 1    9,699,368
      shared                                                    8
      total      393,984                                9,705,528
      >>> print(soap_optax.describe(params, labels=soap_optax.default_labels))
      parameter  optimizer  shape    dtype    blocks       axes  state bytes
      bias       adamw      768      float32  AdamW                    6,144
      kernel     soap       768x512  float32  1 x 768x512  0, 1    9,961,492
      shared                                                              12
      total                 393,984                                9,967,648

    Args:
      params: the parameters, as arrays or as `jax.ShapeDtypeStruct`, such as `jax.eval_shape`
        returns.
      optimizer: the function that makes the optimizer, `soap` or `shampoo`.
      labels: None describes `optimizer`. Anything else describes `soap_adamw` with these labels,
        such as `default_labels`, and with its default for ``dimension_numbers``.
      **options: arguments of the optimizer by name, so that one dictionary serves both. Options
        that do not decide shapes have no effect.

    Returns:
      A description to print, or to read row by row.

    Raises:
      TypeError: for an option that the optimizer does not have, and if the optimizer raises it.
      ValueError: if `optimizer` is another function, or is `shampoo` and there are labels, and if
        the optimizer raises it.
    """
    _check_optimizer(optimizer, labels)
    known = _defaults_and(options, optimizer, () if labels is None else ONLY_OF_SOAP_ADAMW)
    if labels is None:
        return _described(params, optimizer, known)
    assignment = assignment_of(params, labels, known["dimension_numbers"])
    known["dimension_numbers"] = assignment.dimension_numbers
    if known["precondition_frequency"] is None:  # The default of `soap_adamw`.
        known["precondition_frequency"] = 1
    soap_only = _described(assignment.of_soap(params), soap, known)
    adam = scale_by_guarded_adam(0.9, 0.95, 1e-8, known["mu_dtype"])
    count_bytes = _bytes(jax.eval_shape(adam.init, {}))
    has_limit = known.get("max_norm_ratio") is not None
    limit_bytes = _bytes(jax.eval_shape(clip_by_running_norm().init, params)) if has_limit else 0
    soap_rows = iter(soap_only.rows)
    rows = []
    labels_of_parts = jax.tree.map(
        lambda leaf, label: jax.tree.map(lambda _: label, split_complex(leaf)),
        params,
        assignment.labels,
    )
    leaves = jax.tree_util.tree_leaves_with_path(split_complex(params))
    for (path, leaf), label in zip(leaves, jax.tree.leaves(labels_of_parts), strict=True):
        if label == "soap":
            rows.append(dataclasses.replace(next(soap_rows), optimizer=label))
        else:
            state_bytes = _bytes(jax.eval_shape(adam.init, leaf)) - count_bytes
            row = ParameterDescription(*_identity(path, leaf), "AdamW", (), state_bytes, label)
            rows.append(row)
    return Description(tuple(rows), soap_only.shared_bytes + count_bytes + limit_bytes)


# The transformation of each optimizer, which has the state.
_TRANSFORMATIONS = ((soap, scale_by_soap), (shampoo, scale_by_shampoo))


def _check_optimizer(optimizer: Any, labels: Any) -> None:
    if all(optimizer is not known for known, _ in _TRANSFORMATIONS):
        raise ValueError(
            f"optimizer must be soap_optax.soap or soap_optax.shampoo, got {optimizer!r}; pass the "
            "function, not what it returns"
        )
    if labels is not None and optimizer is not soap:
        raise ValueError(
            f"labels must be None where optimizer is soap_optax.shampoo, got {labels!r}: labels "
            "describe soap_adamw; drop labels or optimizer"
        )


def _defaults_and(
    options: dict[str, Any], optimizer: Callable[..., Any], more: Collection[str]
) -> dict[str, Any]:
    """The options given, and the defaults of the optimizer for all others."""
    parameters = inspect.signature(optimizer).parameters
    known = {name: option.default for name, option in parameters.items()}
    for name in options:
        if name not in known and name not in more:
            raise TypeError(
                f"describe takes the options of soap_optax."
                f"{'soap_adamw' if more else optimizer.__name__}, which has no {name!r}; it has "
                + ", ".join([*known, *more])
            )
    return known | options


def _described(params: Any, optimizer: Callable[..., Any], options: dict[str, Any]) -> Description:
    """The description of an optimizer with these options."""
    build = next(made for given, made in _TRANSFORMATIONS if given is optimizer)
    transformation = build(**{name: options[name] for name in _arguments_of(build)})
    block_options = BlockOptions(**{name: options[name] for name in _arguments_of(BlockOptions)})
    plan = plan_of(params, block_options, options["dimension_numbers"])
    return _from_plan(params, plan, jax.eval_shape(transformation.init, params))


def _from_plan(params: Any, plan: Plan, state: Any) -> Description:
    shares = _bytes_by_leaf(plan, state)
    blocks: list[list[str]] = [[] for _ in shares]
    axes: list[set[int]] = [set() for _ in shares]
    for group in plan.stacks.values():
        for region in group.regions:
            count, block = math.prod(region.tiles), _shape_text(region.block)
            blocks[region.leaf].append(f"{count} x {block}")
            axes[region.leaf].update(group.axes)
    for group in plan.adam.values():
        for region in group.regions:
            blocks[region.leaf].append("Adam")
    rows = tuple(
        ParameterDescription(
            *_identity(path, leaf),
            blocks=" + ".join(blocks[number]) or "nothing",
            axes=tuple(sorted(axes[number])),
            state_bytes=shares[number],
        )
        for number, (path, leaf) in enumerate(
            jax.tree_util.tree_leaves_with_path(split_complex(params))
        )
    )
    return Description(rows, shared_bytes=_bytes(state) - sum(shares))


def _identity(path: Sequence[Any], leaf: Any) -> tuple[str, tuple[int, ...], np.dtype]:
    """A parameter's path, shape and dtype."""
    name = jax.tree_util.keystr(tuple(path), simple=True, separator="/") or "(root)"
    return name, jnp.shape(leaf), jnp.result_type(leaf)


def _bytes_by_leaf(plan: Plan, state: PreconditionerState) -> list[int]:
    """Each leaf's bytes: stacks are shared by blocks, and Adam's vectors by entries."""
    shares = [0] * len(plan.shapes)
    for name, group in plan.stacks.items():
        bytes_per_block = _bytes_of_a_block(state.stacks[name])
        for region in group.regions:
            shares[region.leaf] += math.prod(region.tiles) * bytes_per_block
    for name, group in plan.adam.items():
        per_tile, per_entry = _bytes_of_a_tile_and_an_entry(state.adam[name])
        for region in group.regions:
            tiles, entries = math.prod(region.tiles), math.prod(region.tiles + region.tile)
            shares[region.leaf] += tiles * per_tile + entries * per_entry
    return shares


def _bytes_of_a_block(stack: AnyStackState) -> int:
    return _bytes(stack) // stack.age.size


def _bytes_of_a_tile_and_an_entry(adam: AdamState) -> tuple[int, int]:
    counters = (adam.accepted_gradients, adam.rejected_gradients)
    moments = (adam.mu, adam.nu)
    return sum(a.dtype.itemsize for a in counters), sum(a.dtype.itemsize for a in moments)


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _arguments_of(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def _shape_text(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _aligned(table: Sequence[Sequence[str]]) -> str:
    """Pads every column to its widest cell; the last one is flush right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for *cells, last in table:
        padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=False)]
        lines.append("  ".join([*padded, last.rjust(widths[-1])]))
    return "\n".join(lines)
