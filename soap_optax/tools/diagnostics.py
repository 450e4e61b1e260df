"""Scalars for a logger that measure the health of an optimizer's state.

The scalars of bases need one factor `L` and its basis `Q`, both `(d, d)`, and no decomposition.
Products use the highest precision, because a TF32 product has errors as large as these scalars.
"""

import functools
import numbers
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from soap_optax.algorithm import rounding_level, second_moment_estimate
from soap_optax.devices import replicate_explicit
from soap_optax.linalg import (
    departure_from_orthonormality,
    frobenius_norm,
    largest_magnitude,
    matmul,
    off_diagonal_mass,
    rayleigh_quotients,
    unfolded,
)
from soap_optax.state import (
    AdamState,
    AnyStackState,
    PreconditionerState,
    ScaleByShampooState,
    ShampooStackState,
)


def diagnostics(state: Any, *, sample: int | None = 1) -> dict[str, Array]:
    r"""Returns scalars for a logger that measure the health of an optimizer's state.

    For each block shape, such as ``"512x2048"``:

    - ``soap/512x2048/off_diagonal_mass``: distance of the bases from the factors' eigenvectors,
      :math:`\|B - \mathrm{diag}(B)\|_F / \|B\|_F` of :math:`B = Q^\top L Q`. It is 0 in the
      eigenbasis and at most 1.
    - ``soap/512x2048/departure_from_orthonormality``: the largest entry of
      :math:`|Q^\top Q - I|`. A refresh is rejected if it exceeds the square root of the machine
      epsilon (3.5e-4 in float32). Bases stored in bfloat16 are then rounded to about 4e-3.
    - ``soap/512x2048/condition_number``: the largest entry of the diagonal of :math:`B` over the
      smallest. These Rayleigh quotients are the eigenvalues if the off-diagonal mass is 0.
      Otherwise they are between the smallest and the largest eigenvalue, so the true condition
      number is at least this large. Ratios beyond the inverse of the machine epsilon (8.4e6 in
      float32) are rounding and reported as that bound. A zero factor is reported as 1.
    - ``soap/512x2048/direction_rms``: the root mean square of :math:`M' / \sqrt{V'}`. It is the
      size of an update before ``eps``, bias correction, ``normalize_grads``, weight decay and
      learning rate, which the state does not contain. Entries count if their :math:`\sqrt{V'}`
      is above 0 and above rounding: 32 machine epsilons times the block's largest. The result is
      0 if no entry counts.

    The first three are the largest over the factors of the first `sample` blocks. The fourth covers
    all blocks. ``soap/adam/direction_rms`` is the same for parameters without a preconditioner,
    where all entries with :math:`V > 0` count.

    The keys of `shampoo` begin with ``shampoo/``. Its ``direction_rms`` is that of the grafting
    method, if that has a second moment. Its roots have one scalar in place of the first three:

    - ``shampoo/512x2048/commutator``: :math:`\|L P - P L\|_F / (\|L\|_F \|P\|_F)` of a factor and
      its root. It is 0 right after a refresh, up to rounding, and grows while the factor's
      eigenvectors move away from those of the root.

    These scalars are for all blocks and parameters together:

    - ``soap/age``: the largest number of updates since a block's last refresh was due.
    - ``soap/refreshes``: number of refreshes adopted so far, summed over the blocks.
    - ``soap/rejected_refreshes``: number of refreshes rejected so far, summed over the blocks.
    - ``soap/rejected_gradients``: number of gradients rejected so far, summed over the blocks and
      the parameters without a preconditioner.

    The two products for each factor take :math:`4 (m^3 + n^3)` operations for a sampled block of
    shape `(m, n)`; a step takes :math:`6 m n (m + n)` for every block.

    Example:
      >>> import jax, jax.numpy as jnp, soap_optax
      >>> optimizer = soap_optax.soap(3e-3)
      >>> @jax.jit
      ... def step(grads, state, params):
      ...     updates, state = optimizer.update(grads, state, params)
      ...     return updates, state, soap_optax.diagnostics(state)
      >>> params = {"kernel": jnp.ones((4, 3))}
      >>> _, state, scalars = step(params, optimizer.init(params), params)
      >>> int(scalars["soap/rejected_gradients"])
      0

    Args:
      state: the state of any Optax transformation with a `ScaleBySoapState` or a
        `ScaleByShampooState` inside. With several of one kind, as under `optax.partition`, the keys
        begin with ``soap_0/``, ``soap_1/`` and so on, in the order of the tree.
      sample: number of blocks of each shape to measure, from the first on; None means all.

    Returns:
      Scalars by name, float32 or int32.

    Raises:
      ValueError: if `state` has no such state inside, or `sample` is less than 1.
      TypeError: if `sample` is not an integer.
    """
    _check_sample(sample)
    nodes = jax.tree.leaves(state, is_leaf=_has_stacks)
    states = [_arrays_of(node) for node in nodes if _has_stacks(node)]
    if not states:
        raise ValueError(
            "state must have a ScaleBySoapState or a ScaleByShampooState inside, got "
            f"{type(state).__name__}; pass the whole state that the optimizer's init or update "
            "returned"
        )
    return {
        f"{prefix}/{name}": scalar
        for prefix, one in zip(_prefixes(states), states, strict=True)
        for name, scalar in _scalars_of(one, sample).items()
    }


def _prefixes(states: Sequence[PreconditionerState]) -> list[str]:
    """The first part of the keys of each state, with a number if there are several of its kind."""
    kinds = ["shampoo" if isinstance(one, ScaleByShampooState) else "soap" for one in states]
    return [
        kind if kinds.count(kind) == 1 else f"{kind}_{kinds[:number].count(kind)}"
        for number, kind in enumerate(kinds)
    ]


def condition_number(quotients: Array) -> Array:
    """The largest Rayleigh quotient over the smallest, bounded where the ratio is rounding."""
    largest = jnp.max(quotients)
    smallest_over_largest = jnp.min(quotients) / jnp.where(largest > 0, largest, 1)
    ratio = 1 / jnp.maximum(smallest_over_largest, jnp.finfo(quotients.dtype).eps)
    # A comparison ignores NaN, and so does a maximum of many numbers on CPUs.
    return jnp.where(jnp.any(jnp.isnan(quotients)), jnp.nan, jnp.where(largest > 0, ratio, 1))


def direction_rms(mu: Array, root: Array, rounding: ArrayLike) -> Array:
    """The root mean square of `M' / sqrt(V')` over the entries that `_direction` counts."""
    squares, entries = _direction(mu, root, rounding)
    return jnp.sqrt(squares / jnp.maximum(entries, 1).astype(squares.dtype))


def _direction(mu: Array, root: Array, rounding: ArrayLike) -> tuple[Array, Array]:
    """The sum of squares of `M' / sqrt(V')`, and the number of entries in the sum.

    Entries count if their root is above `rounding`, so entries with a second moment of 0 never do.
    In the null directions of a factor both moments are rounding errors. A step sets their direction
    to zero (`soap_optax.algorithm.step.without_rounding`), and they do not count here.
    """
    counts = ~(root <= rounding)  # A NaN counts, so that it shows.
    direction = jnp.where(counts, mu.astype(root.dtype) / jnp.where(counts, root, 1), 0)
    return jnp.sum(jnp.square(direction)), jnp.sum(counts, dtype=jnp.int32)


def _scalars_of(state: PreconditionerState, sample: int | None) -> dict[str, Array]:
    stacks, vectors = list(state.stacks.values()), list(state.adam.values())
    scalars = {
        f"{shape}/{name}": scalar
        for shape, stack in state.stacks.items()
        for name, scalar in _scalars_of_stack(stack, sample).items()
    }
    if vectors:
        scalars["adam/direction_rms"] = _rms_of_vectors(vectors)
    return scalars | {
        "age": functools.reduce(jnp.maximum, [jnp.max(s.age) for s in stacks], jnp.int32(0)),
        "refreshes": _total([stack.refreshes for stack in stacks]),
        "rejected_refreshes": _total([stack.rejected_refreshes for stack in stacks]),
        "rejected_gradients": _total([part.rejected_gradients for part in [*stacks, *vectors]]),
    }


def _scalars_of_stack(stack: AnyStackState, sample: int | None) -> dict[str, Array]:
    roots = stack.roots if isinstance(stack, ShampooStackState) else ()
    measure = _scalars_of_root if roots else _scalars_of_factor
    worst = functools.reduce(
        functools.partial(jax.tree.map, jnp.maximum),
        [
            jax.tree.map(largest_magnitude, jax.vmap(measure)(*_sampled(pair, stack, sample)))
            for pair in zip(stack.factors, roots or stack.bases, strict=True)
        ],
    )
    scalars = worst | _direction_rms_of_stack(stack)
    return {name: scalar.astype(jnp.float32) for name, scalar in scalars.items()}


def _direction_rms_of_stack(stack: AnyStackState) -> dict[str, Array]:
    """The root mean square of the direction of a stack, if it has a second moment."""
    if isinstance(stack, ShampooStackState) and isinstance(stack.nu, tuple):
        return {}
    # A state made under `vmap` has more leading axes than the axis of blocks.
    mu, nu = jax.tree.map(
        lambda array: array.reshape(stack.age.size, *array.shape[stack.age.ndim :]),
        (stack.mu, stack.nu),
    )
    root = jnp.sqrt(jax.vmap(second_moment_estimate)(nu))
    if isinstance(stack, ShampooStackState):  # Not rotated, so that its zeros are exact.
        return {"direction_rms": direction_rms(mu, root, rounding=0)}
    rounding = jax.vmap(rounding_level)(root).reshape([-1] + [1] * (root.ndim - 1))
    return {"direction_rms": direction_rms(mu, root, rounding)}


def _scalars_of_factor(factor: Array, basis: Array) -> dict[str, Array]:
    wide = jnp.float64 if factor.dtype == jnp.float64 else jnp.float32
    factor, basis = unfolded(factor, len(basis)).astype(wide), basis.astype(wide)
    product = matmul(factor, basis)  # L Q
    return {
        "off_diagonal_mass": off_diagonal_mass(product, basis),
        "departure_from_orthonormality": departure_from_orthonormality(basis),
        "condition_number": condition_number(rayleigh_quotients(product, basis)),
    }


def _scalars_of_root(factor: Array, root: Array) -> dict[str, Array]:
    wide = jnp.float64 if factor.dtype == jnp.float64 else jnp.float32
    factor, root = unfolded(factor, len(root)).astype(wide), root.astype(wide)
    factor, root = _unit(factor), _unit(root)
    product = matmul(factor, root)
    return {"commutator": frobenius_norm(product - product.T)}


def _unit(matrix: Array) -> Array:
    """The matrix divided by its Frobenius norm; a matrix of zeros as it is."""
    size = frobenius_norm(matrix)
    return matrix / jnp.where(size == 0, 1, size)


def _sampled(pair: Sequence[Array], stack: AnyStackState, sample: int | None) -> list[Array]:
    """The factors and bases of the first blocks, `(sample, d, d)`."""
    length = stack.age.size
    stacked = [array.reshape(length, *array.shape[-2:]) for array in pair]
    if sample is None or sample >= length:
        return stacked
    gradients = stack.accepted_gradients + stack.rejected_gradients
    # Padding never had a gradient, so it is sorted to the end.
    permutation = jnp.argsort(replicate_explicit(gradients.ravel()) == 0)
    return [_taken(array, permutation[:sample]) for array in stacked]


def _taken(array: Array, positions: Array) -> Array:
    """Some blocks of a stack, replicated."""
    sharding = jax.typeof(array).sharding
    if sharding.spec[0] is None:
        return array[positions]
    # On explicit axes, JAX needs the sharding of the result.
    unsharded = sharding.update(spec=jax.P(None, *sharding.spec[1:]))
    return array.at[positions].get(out_sharding=unsharded)


def _rms_of_vectors(vectors: Sequence[AdamState]) -> Array:
    """The root mean square of the direction over the entries of several vectors with `nu > 0`."""
    sums = [_direction(vector.mu, jnp.sqrt(vector.nu), rounding=0) for vector in vectors]
    squares = sum((part.astype(jnp.float32) for part, _ in sums), jnp.float32(0))
    entries = sum((part for _, part in sums), jnp.int32(0))
    return jnp.sqrt(squares / jnp.maximum(entries, 1).astype(jnp.float32))


def _total(counters: Sequence[Array]) -> Array:
    return sum((jnp.sum(counter, dtype=jnp.int32) for counter in counters), jnp.int32(0))


def _has_stacks(node: Any) -> bool:
    return isinstance(node, PreconditionerState)


def _arrays_of(state: PreconditionerState) -> PreconditionerState:
    """The state with plain arrays: `flax.nnx.Optimizer` wraps each array in a variable."""
    return jax.tree.map(jnp.asarray, state, is_leaf=lambda node: hasattr(node, "__jax_array__"))


def _check_sample(sample: Any) -> None:
    if sample is None:
        return
    if isinstance(sample, bool) or not isinstance(sample, numbers.Integral):
        raise TypeError(f"sample must be None or an integer of at least 1, got {sample!r}")
    if sample < 1:
        raise ValueError(f"sample must be at least 1, got {sample}; None takes all blocks")
