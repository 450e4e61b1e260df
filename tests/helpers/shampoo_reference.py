"""Shampoo of one array in NumPy, beside `helpers.reference`, which is SOAP's.

Written from Gupta et al., "Shampoo: Preconditioned Stochastic Tensor Optimization" (arXiv
1802.09568), with averages in place of sums, and grafting as in Anil et al. (arXiv 2002.09018). It
works on one leaf at a time, and computes roots anew in every step from the factors of the last
refresh.
"""

import dataclasses
import math
from typing import Literal

import numpy as np

from helpers import reference
from helpers.reference import Matrices, Shape


@dataclasses.dataclass(frozen=True)
class Options(reference.Options):
    """The arguments of `scale_by_shampoo` that change its result, under the same names."""

    eps: float = 1e-12
    exponent: float | None = None
    grafting: Literal["adam", "rmsprop", "sgd"] | None = "adam"
    grafting_eps: float = 1e-8
    refresh_order: Literal["before_gradient", "after_gradient"] = "after_gradient"


@dataclasses.dataclass
class LeafState:
    """What the optimizer remembers of one leaf. Shapes are those of `reference.shape_of_work`."""

    factors: Matrices
    damped: Matrices  # The factors as of the last refresh, corrected for their bias and damped.
    mu: np.ndarray
    nu: np.ndarray
    calls: int = 0


def init(shape: Shape, options: Options, initial_factors: Matrices | None = None) -> LeafState:
    """The state before the first call; the factors start at zero unless given."""
    lengths = reference.shape_of_work(shape, options)
    axes = [axis for axis in reference.preconditioned_axes(shape, options) if lengths[axis] > 1]
    factors = {axis: np.zeros((lengths[axis],) * 2) for axis in axes}
    if initial_factors is not None:
        factors = {axis: initial_factors[axis] for axis in axes}
    return LeafState(factors, {}, np.zeros(lengths), np.zeros(lengths))


def step(grad: np.ndarray, state: LeafState, options: Options) -> np.ndarray:
    """Moves `state` on by one call and returns the direction, to be subtracted times a rate."""
    shape, grad = grad.shape, grad.reshape(state.mu.shape)
    updates = state.calls  # Applied so far, this one included.
    state.calls += 1
    is_due = updates > 0 and (updates - 1) % options.precondition_frequency == 0
    if is_due and options.refresh_order == "before_gradient":
        refresh(state, updates, options)
    update_factors(grad, state, options)
    if is_due and options.refresh_order == "after_gradient":
        refresh(state, updates + 1, options)
    if updates == 0:
        return np.zeros(shape)

    state.mu = options.b1 * state.mu + (1 - options.b1) * grad
    state.nu = options.b2 * state.nu + (1 - options.b2) * grad**2
    grafted = grafting_direction(grad, state, updates, options)
    if not state.factors:  # Adam, whatever is grafted.
        adam = dataclasses.replace(options, grafting="adam")
        return grafting_direction(grad, state, updates, adam).reshape(shape)
    direction = state.mu
    exponent = 1 / (2 * len(state.factors)) if options.exponent is None else options.exponent
    for axis, damped in state.damped.items():
        values, vectors = np.linalg.eigh(damped)
        root = vectors @ np.diag(values**-exponent) @ vectors.T
        direction = np.moveaxis(np.tensordot(root, direction, axes=(1, axis)), 0, axis)
    if options.grafting is None:
        return (direction / (1 - options.b1**updates) ** options.correct_bias).reshape(shape)
    size = np.linalg.norm(direction)
    scale = np.linalg.norm(grafted) / size if size > 0 else 0.0
    return (direction * scale).reshape(shape)


def grafting_direction(
    grad: np.ndarray, state: LeafState, updates: int, options: Options
) -> np.ndarray:
    if options.grafting == "sgd":
        return grad
    direction = (state.mu if options.grafting == "adam" else grad) / (
        np.sqrt(state.nu) + options.grafting_eps
    )
    if options.correct_bias:
        direction = direction * math.sqrt(1 - options.b2**updates)
        if options.grafting == "adam":
            direction = direction / (1 - options.b1**updates)
    return direction


def beta_of(options: Options) -> float:
    return options.b2 if options.shampoo_beta is None else options.shampoo_beta


def update_factors(grad: np.ndarray, state: LeafState, options: Options) -> None:
    beta = beta_of(options)
    for axis, factor in state.factors.items():
        rows = np.moveaxis(grad, axis, 0).reshape(grad.shape[axis], -1)
        state.factors[axis] = beta * factor + (1 - beta) * rows @ rows.T


def refresh(state: LeafState, gradients: int, options: Options) -> None:
    weight = 1 - beta_of(options) ** gradients if options.correct_bias else 1
    state.damped = {
        axis: factor / weight + options.eps * np.eye(len(factor))
        for axis, factor in state.factors.items()
    }


def run(grads: np.ndarray, options: Options, initial_factors: Matrices | None = None) -> np.ndarray:
    """The direction at every step of one leaf, `(steps, *shape)`."""
    state = init(grads.shape[1:], options, initial_factors)
    return np.stack([step(grad, state, options) for grad in grads])


def run_in_tiles(
    grads: np.ndarray, options: Options, block_size: int | None, full_rank: bool = True
) -> np.ndarray:
    """The direction at every step of one leaf whose tiles are leaves of their own.

    `full_rank` begins from factors without a null space, those of `states.full_rank_factor`.
    """
    shape = grads.shape[1:]
    lengths = reference.shape_of_work(shape, options)
    if block_size is None or (len(shape) <= 1 and not options.precondition_1d):
        cuts = [tuple(slice(None) for _ in lengths)]
    else:
        cuts = reference.tiles(lengths, block_size)
        options = dataclasses.replace(options, merge_dims=False, precondition_1d=True)
        grads = grads.reshape(-1, *lengths)
    directions = np.zeros(grads.shape)
    for cut in cuts:
        tile = grads[:, *cut]
        working = reference.shape_of_work(tile.shape[1:], options)
        priors = {axis: np.diag(np.linspace(1.0, 2.0, d)) for axis, d in enumerate(working)}
        directions[:, *cut] = run(tile, options, priors if full_rank else None)
    return directions.reshape(-1, *shape)
