"""Eigenbases of one block: the first ones, their refresh, and the guard that may refuse either.

Every function takes one block; `soap_optax.execution` decides when they run, and
`soap_optax.refreshes` has the methods.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.lax import Precision

from soap_optax import matrices, refreshes, second_moment
from soap_optax.block import multiply_along
from soap_optax.products import times
from soap_optax.refreshes import Method, Turned
from soap_optax.second_moment import SecondMoment
from soap_optax.state import Eigenframe


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RefreshRule:
    """How the bases of a block that is due are refreshed.

    Attributes:
      tolerance: the off-diagonal mass up to which a block keeps its bases, a scalar; None where
        every block that is due is refreshed.
      method: how.
    """

    tolerance: Array | None
    method: Method = field(metadata={"static": True})


class Moved(NamedTuple):
    """Bases, and the moments in their coordinates; or those of before, kept on purpose."""

    bases: tuple[Array, ...]
    mu: Array
    nu: SecondMoment
    kept: Array


def refresh(
    frame: Eigenframe,
    factors: Sequence[Array],
    axes: Sequence[int],
    rule: RefreshRule,
) -> Eigenframe:
    """Refreshes the bases of a block, or makes the first ones, where they can be trusted.

    Args:
      frame: the bases, moments and counters before.
      factors: the Kronecker factors, `(d, d)` each, in the dtype of the statistics.
      axes: the preconditioned axes of the block, ascending.
      rule: how to refresh.

    Returns:
      The new frame, or the old one, counted as refused, where a factor or a basis is not finite or
      a basis is not orthonormal.
    """
    dtype = factors[0].dtype
    wide = frame._replace(
        bases=tuple(basis.astype(dtype) for basis in frame.bases), mu=frame.mu.astype(dtype)
    )
    has_bases = frame.refreshes > 0
    moved = lax.cond(has_bases, partial(_later, axes, rule), partial(_first, axes), wide, factors)
    return adopt(frame, factors, moved)


def adopt(frame: Eigenframe, factors: Sequence[Array], moved: Moved) -> Eigenframe:
    """Moves a block to new bases if they can be trusted, and counts it either way.

    Args:
      frame: the bases, moments and counters before.
      factors: the factors that the new bases were made of, `(d, d)` each.
      moved: the new bases, and the moments in their coordinates.
    """
    trusted = jnp.asarray(True)
    for factor, basis in zip(factors, moved.bases, strict=True):
        trusted &= jnp.all(jnp.isfinite(factor)) & matrices.is_orthonormal(basis)
    trusted |= moved.kept
    frame = frame._replace(age=jnp.zeros_like(frame.age))
    new = frame._replace(
        bases=moved.bases, mu=moved.mu, nu=moved.nu, refreshes=frame.refreshes + ~moved.kept
    )
    stayed = frame._replace(refused_refreshes=frame.refused_refreshes + 1)
    return jax.tree.map(
        lambda new, old: jnp.where(trusted, new.astype(old.dtype), old), new, stayed
    )


def _first(axes: Sequence[int], frame: Eigenframe, factors: Sequence[Array]) -> Moved:
    """The exact eigenvectors of the factors."""
    bases = _over_axes(matrices.descending_eigenvectors, factors)
    return _carried(axes, frame, [Turned(basis, jnp.arange(len(basis))) for basis in bases])


def _later(
    axes: Sequence[int], rule: RefreshRule, frame: Eigenframe, factors: Sequence[Array]
) -> Moved:
    """The bases turned toward the eigenvectors, unless they are near enough."""
    if rule.method == "partial":
        return _turned_in_part(axes, frame, factors)
    products = tuple(map(times, factors, frame.bases))  # L Q
    turn = partial(_turned, axes, rule.method)
    if rule.tolerance is None:
        return turn(frame, factors, products)
    masses = map(matrices.off_diagonal_mass, products, frame.bases)
    near = jnp.all(jnp.stack(list(masses)) <= rule.tolerance)
    return lax.cond(near, _kept, turn, frame, factors, products)


def _kept(frame: Eigenframe, _factors: Sequence[Array], _products: Sequence[Array]) -> Moved:
    return Moved(frame.bases, frame.mu, frame.nu, _flag(True, frame))


def _flag(value: bool, frame: Eigenframe) -> Array:
    """A flag that in a `shard_map` may differ between devices, as the frame does.

    What a conditional returns has to, where devices decide differently: `vmap` makes it a select.
    """
    return jnp.full_like(frame.refreshes, value, dtype=bool)


def _turned(
    axes: Sequence[int],
    method: Method,
    frame: Eigenframe,
    factors: Sequence[Array],
    products: Sequence[Array],
) -> Moved:
    turned = _over_axes(refreshes.FULL[method], factors, frame.bases, products)
    return _carried(axes, frame, turned)


def _turned_in_part(axes: Sequence[int], frame: Eigenframe, factors: Sequence[Array]) -> Moved:
    """A quarter of each basis turned, and nothing done with the rest."""
    bases, mu, nu = [], frame.mu, frame.nu
    for axis, factor, basis in zip(axes, factors, frame.bases, strict=True):
        starts = refreshes.chunks_in_turn(len(basis), frame.refreshes)
        part = refreshes.turn_columns(factor, basis, starts)
        mu = refreshes.turn_moment(mu, axis, starts, part.turn)
        nu = second_moment.reorder(nu, part.order, axis)
        bases.append(part.basis)
    return Moved(tuple(bases), mu, nu, _flag(False, frame))


def _carried(axes: Sequence[int], frame: Eigenframe, turned: Sequence[Turned]) -> Moved:
    """Expresses the moments in new bases.

    The first moment is a vector: it keeps its direction and gets new coordinates. The second
    belongs to columns and follows them.
    """
    mu, nu = frame.mu, frame.nu
    for axis, old, new in zip(axes, frame.bases, turned, strict=True):
        mu = multiply_along(old, mu, axis, Precision.HIGHEST)
        mu = multiply_along(new.basis.T, mu, axis, Precision.HIGHEST)
        nu = second_moment.reorder(nu, new.order, axis)
    return Moved(tuple(new.basis for new in turned), mu, nu, _flag(False, frame))


def _over_axes(function: Callable[..., Any], *arguments: Sequence[Array]) -> list[Any]:
    """Calls a function for every axis of a block.

    Axes of the same length share a program where decompositions take a compiler long, which is on
    TPUs. On CPUs they may run at the same time.
    """

    def each(*arguments: Sequence[Array]) -> list[Any]:
        return [function(*of_axis) for of_axis in zip(*arguments, strict=True)]

    def by_length(*arguments: Sequence[Array]) -> list[Any]:
        results: dict[int, Any] = {}
        for length in dict.fromkeys(lengths):
            alike = [axis for axis, other in enumerate(lengths) if other == length]
            stacked = [jnp.stack([arrays[axis] for axis in alike]) for arrays in arguments]
            together = lax.map(lambda one: function(*one), stacked)
            for place, axis in enumerate(alike):
                results[axis] = jax.tree.map(lambda array, place=place: array[place], together)
        return [results[axis] for axis in range(len(lengths))]

    lengths = [len(array) for array in arguments[0]]
    if len(set(lengths)) == len(lengths):
        return each(*arguments)
    return lax.platform_dependent(*arguments, cpu=each, default=by_length)
