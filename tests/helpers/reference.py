"""SOAP in float64 NumPy, one leaf at a time: code to read, and to test the library against.

It follows Algorithm 3 of Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam" (arXiv
2409.11321), and the semantics listed in ``golden/README.md``. It shares no code and few choices
with the library. A mistake stays unseen only if both make it.

|                        | here                              | in the library                      |
| ---------------------- | --------------------------------- | ----------------------------------- |
| unit of work           | one leaf                          | a stack of equal blocks             |
| time of a refresh      | the end of the step that made it  | the start of the next step, from    |
|                        | due                               | the stored factors                  |
| factored second moment | every entry stored, and reduced   | only its marginals stored           |
|                        | to its marginals when used        |                                     |
| first moment ``mu``    | parameters' coordinates, rotated  | eigenbasis' coordinates, rotated at |
|                        | into the eigenbasis in every step | a refresh                           |
| axes of length 1       | a 1x1 factor, as other axes have  | no factor                           |
| precision              | float64                           | float32; float64 for float64 leaves |

The paper's symbols: ``L`` and ``R`` are `LeafState.factors`, ``Q_L`` and ``Q_R`` are
`LeafState.bases`, ``M`` is `LeafState.mu`, ``V`` is `LeafState.nu`.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np

Shape = tuple[int, ...]
Matrices = dict[int, np.ndarray]  # One square matrix for each preconditioned axis.


@dataclasses.dataclass(frozen=True)
class Options:
    """The arguments of ``scale_by_soap`` that change its result, under the same names."""

    b1: float = 0.95
    b2: float = 0.95
    eps: float = 1e-8
    shampoo_beta: float | None = None
    precondition_frequency: int = 10
    max_precond_dim: int = 10000
    precondition_1d: bool = False
    merge_dims: bool = False
    normalize_grads: bool = False
    correct_bias: bool = True
    first_update: Literal["zero", "apply"] = "zero"
    refresh: Literal["qr", "eigh"] = "qr"
    refresh_order: Literal["before_gradient", "after_gradient"] = "before_gradient"
    one_sided: bool = False
    factored: bool = False


@dataclasses.dataclass
class LeafState:
    """The optimizer's state of one leaf, in the shape from `shape_of_work`."""

    factors: Matrices  # Moving averages of the Gram matrices.
    bases: Matrices | None  # Columns are eigenvectors, by descending eigenvalue; None before any.
    mu: np.ndarray  # First moment, in the parameters' coordinates.
    nu: np.ndarray  # Second moment, in the eigenbasis' coordinates.
    calls: int = 0  # The number of calls so far, including the first.


def merged(shape: Shape, limit: int) -> Shape:
    """Merges neighbouring axes, from the first on, while their product is within `limit`."""
    groups: list[int] = []
    for length in shape:
        if groups and groups[-1] * length <= limit:
            groups[-1] *= length
        else:
            groups.append(length)
    return tuple(length for length in groups if length > 1) or (1,)


def shape_of_work(shape: Shape, options: Options) -> Shape:
    """The shape in which a leaf is preconditioned."""
    if options.merge_dims and len(shape) > 1:
        return merged(shape, options.max_precond_dim)
    return shape


def preconditioned_axes(shape: Shape, options: Options) -> list[int]:
    """The axes of `shape_of_work` that have a factor; `shape` is the leaf's own."""
    if len(shape) <= 1 and not options.precondition_1d:
        return []
    lengths = shape_of_work(shape, options)
    axes = [axis for axis, length in enumerate(lengths) if length <= options.max_precond_dim]
    if options.one_sided:
        # An axis of length 1 has nothing to precondition, so it is never the chosen axis.
        shortest = min((lengths[axis] for axis in axes if lengths[axis] > 1), default=1)
        axes = [axis for axis in axes if lengths[axis] == shortest][:1]
    return axes


def init(shape: Shape, options: Options, initial_factors: Matrices | None = None) -> LeafState:
    """The state before the first call; the factors start at zero unless given."""
    lengths = shape_of_work(shape, options)
    axes = preconditioned_axes(shape, options)
    zeros = {axis: np.zeros((lengths[axis], lengths[axis])) for axis in axes}
    return LeafState(
        factors=zeros
        if initial_factors is None
        else {axis: initial_factors[axis] for axis in axes},
        bases=None,
        mu=np.zeros(lengths),
        nu=np.zeros(lengths),
    )


def step(grad: np.ndarray, state: LeafState, options: Options) -> np.ndarray:
    """Advances `state` by one call, and returns the direction to descend."""
    shape = grad.shape
    grad = grad.reshape(state.mu.shape)
    bases_see_gradient = options.refresh_order == "after_gradient"
    is_first, moves_at_first = state.calls == 0, options.first_update == "apply"
    updates = state.calls + moves_at_first  # The number of updates so far, including this one.
    state.calls += 1

    if is_first or bases_see_gradient:
        update_factors(grad, state, options)
    if is_first and (moves_at_first or not bases_see_gradient):
        refresh(state, options)
    if updates == 0:  # The first call returns zeros.
        return np.zeros(shape)
    if bases_see_gradient and state.calls > 1 and is_due_after(updates, options):
        refresh(state, options)
    assert state.bases is not None

    # G' = Q_L^T G Q_R and M' = Q_L^T M Q_R
    state.mu = options.b1 * state.mu + (1 - options.b1) * grad
    rotated_grad = rotate(grad, state.bases)
    rotated_mu = rotate(state.mu, state.bases)
    if is_first and len([basis for basis in state.bases.values() if len(basis) > 1]) > 1:
        # Errors of the bases, in which one gradient alone would have zeros.
        is_error = np.abs(rotated_grad) < 1e-7 * np.max(np.abs(rotated_grad))
        rotated_grad, rotated_mu = (np.where(is_error, 0, x) for x in (rotated_grad, rotated_mu))

    # N = Q_L (M' / sqrt(V)) Q_R^T
    state.nu = options.b2 * state.nu + (1 - options.b2) * rotated_grad**2
    # The marginals of one gradient are too few for an estimate.
    root = np.sqrt(state.nu if is_first else second_moment(state, options))
    direction = rotate_back(rotated_mu / (root + options.eps), state.bases)

    if options.normalize_grads:
        root_mean_square = math.sqrt(np.mean(direction**2))
        direction = direction / root_mean_square if root_mean_square > 0 else direction
    if options.correct_bias:
        direction *= math.sqrt(1 - options.b2**updates) / (1 - options.b1**updates)

    if not bases_see_gradient:
        if not is_first:
            update_factors(grad, state, options)
        if updates % options.precondition_frequency == 0:
            refresh(state, options)
    return direction.reshape(shape)


def is_due_after(updates: int, options: Options) -> bool:
    """Whether a refresh is due that uses the gradient of this update."""
    return (updates - 1) % options.precondition_frequency == 0


def update_factors(grad: np.ndarray, state: LeafState, options: Options) -> None:
    """L = beta L + (1 - beta) G G^T, and the same for the other axes."""
    beta = options.b2 if options.shampoo_beta is None else options.shampoo_beta
    factors = {}
    for axis, factor in state.factors.items():
        rows = np.moveaxis(grad, axis, 0).reshape(grad.shape[axis], -1)
        factors[axis] = beta * factor + (1 - beta) * rows @ rows.T
    state.factors = factors


def eigenvectors(factor: np.ndarray) -> np.ndarray:
    """The eigenvectors of a factor, by descending eigenvalue."""
    _, vectors = np.linalg.eigh(factor)
    return vectors[:, ::-1]


def refresh(state: LeafState, options: Options) -> None:
    """The first bases, or one step of orthogonal iteration from the old bases (Algorithm 4).

    Instead of that step, the paper also tries the exact eigenvectors. Their columns are matched
    with the old ones by rank.
    """
    if state.bases is None:
        state.bases = {axis: eigenvectors(factor) for axis, factor in state.factors.items()}
        return
    bases = {}
    for axis, factor in state.factors.items():
        basis = state.bases[axis]
        estimated_eigenvalues = np.diag(basis.T @ factor @ basis)
        descending = np.argsort(-estimated_eigenvalues, kind="stable")
        state.nu = np.take(state.nu, descending, axis)
        if options.refresh == "eigh":
            bases[axis] = eigenvectors(factor)
        else:
            bases[axis], _ = np.linalg.qr(factor @ basis[:, descending])
    state.bases = bases


def second_moment(state: LeafState, options: Options) -> np.ndarray:
    """V; if factored, the product of its marginals, scaled to its mean."""
    axes, total = range(state.nu.ndim), np.mean(state.nu)
    if not options.factored or all(len(factor) == 1 for factor in state.factors.values()):
        return state.nu
    estimate = np.ones(())
    for axis in axes:
        mean = np.mean(state.nu, axis=tuple(other for other in axes if other != axis))
        estimate = np.multiply.outer(estimate, mean)
    return estimate / total ** (len(axes) - 1) if total > 0 else estimate


def rotate(array: np.ndarray, bases: Mapping[int, np.ndarray]) -> np.ndarray:
    """From the parameters' coordinates to the eigenbasis': the product with Q^T on every axis."""
    for axis, basis in bases.items():
        array = np.moveaxis(np.tensordot(basis.T, array, axes=(1, axis)), 0, axis)
    return array


def rotate_back(array: np.ndarray, bases: Mapping[int, np.ndarray]) -> np.ndarray:
    """From the eigenbasis' coordinates to the parameters'."""
    return rotate(array, {axis: basis.T for axis, basis in bases.items()})


def run(
    grads: np.ndarray,  # (steps, *shape)
    options: Options,
    *,
    initial_factors: Matrices | None = None,
    initial_bases: Matrices | None = None,
) -> np.ndarray:
    """The direction at every step of one leaf, shape (steps, *shape).

    Args:
      grads: The gradient of every step.
      options: The optimizer's options.
      initial_factors: The factors before the first call, by axis; zero if None.
      initial_bases: The bases that replace the first computed bases, by axis. They are for factors
        with a null space, which do not determine a basis.
    """
    state = init(grads.shape[1:], options, initial_factors)
    directions = []
    for grad in grads:
        directions.append(step(grad, state, options))
        if len(directions) == 1 and initial_bases is not None:
            state.bases = {axis: initial_bases[axis] for axis in state.factors}
    return np.stack(directions)


def run_in_tiles(
    grads: np.ndarray,  # (steps, *shape)
    options: Options,
    *,
    block_size: int | None,
    initial_factor: Callable[[int], np.ndarray] | None = None,
) -> np.ndarray:
    """The direction at every step of one leaf, whose tiles are separate leaves.

    Args:
      grads: The gradient of every step.
      options: The optimizer's options.
      block_size: The largest length of a tile; None leaves the leaf whole.
      initial_factor: From the length of an axis to its factor before the first call.
    """
    shape = grads.shape[1:]
    lengths = shape_of_work(shape, options)
    if block_size is None or (len(shape) <= 1 and not options.precondition_1d):
        cuts = [tuple(slice(None) for _ in lengths)]
    else:
        cuts = tiles(lengths, block_size)
        # The leaf is already merged. Its shape decides whether to precondition, not its tiles'.
        options = dataclasses.replace(options, merge_dims=False, precondition_1d=True)
        grads = grads.reshape(-1, *lengths)

    directions = np.zeros(grads.shape)
    for cut in cuts:
        tile_grads = grads[:, *cut]
        tile_lengths = shape_of_work(tile_grads.shape[1:], options)
        factors = None
        if initial_factor is not None:
            factors = {axis: initial_factor(length) for axis, length in enumerate(tile_lengths)}
        directions[:, *cut] = run(tile_grads, options, initial_factors=factors)
    return directions.reshape(-1, *shape)


def tiles(shape: Shape, block_size: int) -> list[tuple[slice, ...]]:
    """The index of every tile of an array, in row-major order."""
    slices: list[list[slice]] = []
    for length in shape:
        ends = np.cumsum(lengths_of_tiles(length, block_size)).tolist()
        slices.append([slice(start, end) for start, end in itertools.pairwise([0, *ends])])
    return list(itertools.product(*slices))


def lengths_of_tiles(length: int, block_size: int) -> list[int]:
    """Cuts an axis into tiles of at most `block_size`.

    Their length is the largest divisor of `length` from half of `block_size`, and from 2, up to
    `block_size`. Without such a divisor, there are as few tiles as possible. Their lengths then
    differ by one, and the longer tiles come first.
    """
    if length <= block_size:
        return [length]
    divisors = [d for d in range(2, block_size + 1) if length % d == 0 and 2 * d >= block_size]
    if divisors:
        return [max(divisors)] * (length // max(divisors))
    count = math.ceil(length / block_size)
    return [length // count + (tile < length % count) for tile in range(count)]
