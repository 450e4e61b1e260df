"""The optimizer's state: NamedTuples and dicts of plain arrays, nothing else.

Lengths in the shapes of arrays, in every module:

| length | meaning |
| --- | --- |
| `blocks` | number of blocks in a stack, padding included |
| `d` | length of one preconditioned axis of a block |
| `*block` | shape of a block, `m, n` for a matrix |
| `leaves` | number of leaves, or tiles of leaves, in a bucket |
| `entries` | number of entries of these leaves, padding included |
"""

from typing import NamedTuple

from jax import Array

# Raised whenever the meaning or the arrangement of the state's leaves changes.
LAYOUT_VERSION = 1

# One number for each entry of a block, or its marginals (see `soap_optax.algorithm.second_moment`).
SecondMoment = Array | tuple[Array, ...]


class StackState(NamedTuple):
    """State of one stack: every array has a leading axis of length `blocks`.

    Fields are grouped by how often they change: counters, factors and moments with every accepted
    gradient, bases with every refresh.

    Attributes:
      accepted_gradients: number of gradients accepted so far, `(blocks,)`. The first one only
        fills the factors, unless ``first_update="apply"``.
      rejected_gradients: number of gradients rejected because they were not finite, or because
        their sum of squares would overflow, `(blocks,)`.
      factors: average of each preconditioned axis' Gram matrix, `(blocks, d, d)`, by ascending
        axis; with ``fold_factors`` its folded lower triangle, `(blocks, ceil(d / 2), d + 1)`.
      mu: first moment in the eigenbases' coordinates, `(blocks, *block)`.
      nu: second moment in the eigenbases' coordinates, `(blocks, *block)`; with ``factored`` its
        means over all axes but one, `(blocks, d)` for each axis of the block.
      bases: orthonormal eigenvectors of each factor as of the last refresh, `(blocks, d, d)`, the
        identity before the first. The unit vectors of rows without a gradient come first, then the
        other columns by descending eigenvalue; ``"jacobi"`` and ``"partial"`` do not sort them.
      age: number of updates applied since the last refresh was due, `(blocks,)`.
      refreshes: number of refreshes adopted so far, the first included, `(blocks,)`.
      rejected_refreshes: number of refreshes rejected because the new basis was not finite or not
        orthonormal, `(blocks,)`. The old basis stays.
      eigenvalues: with ``factor_estimator="kl"``, estimates of each factor's eigenvalues, one for
        each column of its basis, `(blocks, d)`; otherwise empty.
    """

    accepted_gradients: Array
    rejected_gradients: Array
    factors: tuple[Array, ...]
    mu: Array
    nu: SecondMoment
    bases: tuple[Array, ...]
    age: Array
    refreshes: Array
    rejected_refreshes: Array
    eigenvalues: tuple[Array, ...] = ()


class ShampooStackState(NamedTuple):
    """State of one stack under Shampoo: every array has a leading axis of length `blocks`.

    Attributes:
      accepted_gradients: number of gradients accepted so far, `(blocks,)`. The first one only
        fills the factors.
      rejected_gradients: number of gradients rejected because they were not finite, or because
        their sum of squares would overflow, `(blocks,)`.
      factors: average of each preconditioned axis' Gram matrix, `(blocks, d, d)`, by ascending
        axis; with ``fold_factors`` its folded lower triangle, `(blocks, ceil(d / 2), d + 1)`.
      mu: first moment in the parameters' coordinates, `(blocks, *block)`.
      nu: with ``grafting="adam"`` or ``"rmsprop"``, the second moment in the parameters'
        coordinates, `(blocks, *block)`; otherwise empty.
      roots: inverse root of each factor as of the last refresh, `(blocks, d, d)`, the identity
        before the first; empty with ``factor_estimator="kl"``.
      age: number of updates applied since the last refresh was due, `(blocks,)`.
      refreshes: number of refreshes adopted so far, the first included, `(blocks,)`.
      rejected_refreshes: number of refreshes rejected because a factor or its root was not finite,
        or a factor was not symmetric positive, `(blocks,)`. The old roots stay.
      bases: with ``factor_estimator="kl"``, orthonormal eigenvectors of each factor as of the last
        refresh, `(blocks, d, d)`, the identity before the first; otherwise empty.
      eigenvalues: with ``factor_estimator="kl"``, estimates of each factor's eigenvalues, one for
        each column of its basis, `(blocks, d)`; otherwise empty.
    """

    accepted_gradients: Array
    rejected_gradients: Array
    factors: tuple[Array, ...]
    mu: Array
    nu: Array | tuple[()]
    roots: tuple[Array, ...]
    age: Array
    refreshes: Array
    rejected_refreshes: Array
    bases: tuple[Array, ...] = ()
    eigenvalues: tuple[Array, ...] = ()


class AdamState(NamedTuple):
    """State of leaves without a preconditioner: the leaves of a bucket, or one large leaf.

    Attributes:
      accepted_gradients: number of gradients accepted so far, `(leaves,)`. The first one makes no
        update, unless ``first_update="apply"``.
      rejected_gradients: number of gradients rejected because they were not finite, or because
        their sum of squares would overflow, `(leaves,)`.
      mu: first moment, `(entries,)`.
      nu: second moment, `(entries,)`.
    """

    accepted_gradients: Array
    rejected_gradients: Array
    mu: Array
    nu: Array


class ScaleBySoapState(NamedTuple):
    """State of `scale_by_soap`.

    Attributes:
      layout_version: version of the arrangement of the state's leaves, a scalar.
      count: number of calls of ``update`` so far, a scalar.
      stacks: preconditioned blocks by block shape, such as ``"512x2048"``. A suffix names a dtype
        of statistics other than float32.
      adam: leaves without a preconditioner. Small ones share a bucket for each dtype of statistics,
        such as ``"float32"``; each large leaf has an entry of its own, such as ``"50304x16384"``.
    """

    layout_version: Array
    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]  # Optax's name; hides tuple.count
    stacks: dict[str, StackState]
    adam: dict[str, AdamState]


class ScaleByShampooState(NamedTuple):
    """State of `scale_by_shampoo`.

    Attributes:
      layout_version: version of the arrangement of the state's leaves, a scalar.
      count: number of calls of ``update`` so far, a scalar.
      stacks: preconditioned blocks by block shape, named as in `ScaleBySoapState`.
      adam: leaves without a preconditioner, named as in `ScaleBySoapState`.
    """

    layout_version: Array
    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]  # Optax's name; hides tuple.count
    stacks: dict[str, ShampooStackState]
    adam: dict[str, AdamState]


# The state of any optimizer with preconditioned blocks, and of one of its stacks.
PreconditionerState = ScaleBySoapState | ScaleByShampooState
AnyStackState = StackState | ShampooStackState


class ClipByRunningNormState(NamedTuple):
    """State of `clip_by_running_norm`.

    Attributes:
      weight: sum of the weights of the gradients in the mean, a scalar that tends to 1.
      mean_norm: mean of their norms after clipping, a scalar. Both have the dtype of the widest
        parameter, at least float32.
    """

    weight: Array
    mean_norm: Array


class HyperballState(NamedTuple):
    """State of `hyperball`.

    Attributes:
      count: number of calls of ``update`` so far, a scalar.
      norms: the norms to preserve, an array for each parameter with matrices, in the order of
        ``jax.tree.leaves``. It has the parameter's shape with length 1 along the axes of a matrix.
        ``init`` measures the norms, and the first ``update`` measures them again.
    """

    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]  # Optax's name; hides tuple.count
    norms: tuple[Array, ...]
