"""KL-SOAP of one array in NumPy. `helpers.reference` has plain SOAP.

It shares few choices with the library. The first moment and the factors stay in the parameters'
coordinates. There, the explicit matrix `Q diag(1 / l) Q^T` of each other axis whitens a factor.
"""

import dataclasses
import math

import numpy as np

from helpers import reference
from helpers.reference import Matrices, Options, Shape

SMALLEST = 1 / 4000**2  # As an inverse root: 4000.


@dataclasses.dataclass
class KlState:
    """A leaf's state in `reference`, and the eigenvalue estimates of each axis, `(d,)`."""

    leaf: reference.LeafState
    eigenvalues: Matrices


def init(shape: Shape, options: Options) -> KlState:
    leaf = reference.init(shape, options)
    lengths = {axis: len(factor) for axis, factor in leaf.factors.items()}
    return KlState(leaf, {axis: np.full(d, 0.1) for axis, d in lengths.items() if d > 1})


def step(grad: np.ndarray, state: KlState, options: Options) -> np.ndarray:
    """Advances `state` by one call, and returns the direction to descend."""
    leaf = state.leaf
    grad = grad.reshape(leaf.mu.shape)
    after = options.refresh_order == "after_gradient"
    moves_at_first = options.first_update == "apply"
    is_first, updates = leaf.calls == 0, leaf.calls + moves_at_first
    leaf.calls += 1
    is_due = updates % options.precondition_frequency == 0
    if after or (is_first and moves_at_first):
        update_factors(grad, state, options)
        if updates > 0 and (is_first or reference.is_due_after(updates, options)):
            refresh(state, options)
    direction = np.zeros_like(grad)
    if updates > 0:
        direction = adam(grad, state, options, updates)
    if not after and not (is_first and moves_at_first):
        update_factors(grad, state, options)
    if updates > 0:
        update_eigenvalues(grad, state, options)
    if not after and is_due:
        refresh(state, options)
    return direction


def adam(grad: np.ndarray, state: KlState, options: Options, updates: int) -> np.ndarray:
    leaf = state.leaf
    assert leaf.bases is not None
    leaf.mu = options.b1 * leaf.mu + (1 - options.b1) * grad
    rotated = reference.rotate(grad, leaf.bases)
    rotated_mu = reference.rotate(leaf.mu, leaf.bases)
    if leaf.calls == 1 and len(leaf.bases) > 1:  # Errors of the bases.
        is_error = np.abs(rotated) < 1e-7 * np.max(np.abs(rotated))
        rotated, rotated_mu = (np.where(is_error, 0, x) for x in (rotated, rotated_mu))
    leaf.nu = options.b2 * leaf.nu + (1 - options.b2) * rotated**2
    root = np.sqrt(reference.second_moment(leaf, options))
    direction = reference.rotate_back(rotated_mu / (root + options.eps), leaf.bases)
    if options.normalize_grads:
        direction = direction / math.sqrt(np.mean(direction**2))
    if options.correct_bias:
        direction *= math.sqrt(1 - options.b2**updates) / (1 - options.b1**updates)
    return direction


def beta_of(options: Options) -> float:
    return options.b2 if options.shampoo_beta is None else options.shampoo_beta


def update_factors(grad: np.ndarray, state: KlState, options: Options) -> None:
    """L = b L + (1 - b) / n G (Q_R diag(l_R) Q_R^T)^-1 G^T; the first gradient G G^T / n alone."""
    leaf, factors = state.leaf, {}
    is_first = leaf.calls == 1
    inverses = {}
    for axis, estimates in state.eigenvalues.items():
        basis = np.eye(len(estimates)) if leaf.bases is None else leaf.bases[axis]
        inverses[axis] = basis / np.maximum(estimates, SMALLEST) @ basis.T
    for axis, factor in leaf.factors.items():
        whitened = grad
        for other, inverse in inverses.items():
            if other != axis and not is_first:
                whitened = np.moveaxis(np.tensordot(inverse, whitened, axes=(1, other)), 0, other)
        rows = np.moveaxis(grad, axis, 0).reshape(grad.shape[axis], -1)
        whitened_rows = np.moveaxis(whitened, axis, 0).reshape(grad.shape[axis], -1)
        new = rows @ whitened_rows.T / rows.shape[1]
        beta = 0 if is_first else beta_of(options)
        factors[axis] = beta * factor + (1 - beta) * new
    leaf.factors = factors


def update_eigenvalues(grad: np.ndarray, state: KlState, options: Options) -> None:
    """l_L,i = b l_L,i + (1 - b) mean_j(P_ij^2 / l_R,j), all from the old estimates."""
    leaf, estimates, beta = state.leaf, {}, beta_of(options)
    assert leaf.bases is not None
    square = reference.rotate(grad, leaf.bases) ** 2
    for axis, old in state.eigenvalues.items():
        whitened = np.moveaxis(square, axis, 0)
        remaining = [other for other in range(square.ndim) if other != axis]
        for place, other in enumerate(remaining, start=1):
            if other in state.eigenvalues:
                shape = [-1 if p == place else 1 for p in range(square.ndim)]
                whitened = whitened / np.maximum(state.eigenvalues[other], SMALLEST).reshape(shape)
        mean = whitened.reshape(len(old), -1).mean(axis=1)
        estimates[axis] = beta * old + (1 - beta) * mean
    state.eigenvalues = estimates


def refresh(state: KlState, options: Options) -> None:
    """The refresh of `reference`, which also permutes the estimates with the columns."""
    leaf = state.leaf
    if leaf.bases is not None:
        for axis, estimates in state.eigenvalues.items():
            basis = leaf.bases[axis]
            quotients = np.diag(basis.T @ leaf.factors[axis] @ basis)
            state.eigenvalues[axis] = estimates[np.argsort(-quotients, kind="stable")]
    reference.refresh(leaf, options)


def run(
    grads: np.ndarray, options: Options, first_factors: Matrices | None = None
) -> tuple[np.ndarray, KlState]:
    """The direction at every step of one leaf, `(steps, *shape)`, and the state after the last.

    After the first gradient, `first_factors` are added to the factors, by axis. The factors then
    have no null space.
    """
    state = init(grads.shape[1:], options)
    directions = []
    for grad in grads:
        directions.append(step(grad, state, options))
        if len(directions) == 1 and first_factors is not None:
            for axis, factor in state.leaf.factors.items():
                state.leaf.factors[axis] = factor + first_factors[axis]
            if state.leaf.bases is not None:
                state.leaf.bases = None
                reference.refresh(state.leaf, options)
    return np.stack(directions), state
