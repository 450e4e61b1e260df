"""KL-Shampoo of one array in NumPy: the factors of `helpers.kl_reference`, Shampoo's update.

The preconditioner of an axis is an explicit matrix, `Q diag((l + eps)^-p) Q^T`.
"""

import dataclasses

import numpy as np

from helpers import kl_reference, reference, shampoo_reference
from helpers.kl_reference import KlState
from helpers.reference import Matrices
from helpers.shampoo_reference import Options


@dataclasses.dataclass
class State:
    """The factors, bases and estimates; and the moments, whatever is refreshed."""

    kl: KlState
    moments: shampoo_reference.LeafState


def step(grad: np.ndarray, state: State, options: Options) -> np.ndarray:
    """Moves `state` on by one call and returns the direction, to be subtracted times a rate."""
    kl, moments = state.kl, state.moments
    updates = kl.leaf.calls
    kl.leaf.calls += 1
    is_due = updates > 0 and (updates - 1) % options.precondition_frequency == 0
    if is_due and options.refresh_order == "before_gradient":
        kl_reference.refresh(kl, options)
    kl_reference.update_factors(grad, kl, options)
    if is_due and options.refresh_order == "after_gradient":
        kl_reference.refresh(kl, options)
    if updates == 0:
        return np.zeros_like(grad)
    kl_reference.update_eigenvalues(grad, kl, options)

    moments.mu = options.b1 * moments.mu + (1 - options.b1) * grad
    moments.nu = options.b2 * moments.nu + (1 - options.b2) * grad**2
    direction = moments.mu
    count = len(kl.eigenvalues)
    exponent = 1 / (2 * count) if options.exponent is None else options.exponent
    for axis, estimates in kl.eigenvalues.items():
        assert kl.leaf.bases is not None
        basis = kl.leaf.bases[axis]
        powers = (np.maximum(estimates, kl_reference.SMALLEST) + options.eps) ** -exponent
        root = basis @ np.diag(powers) @ basis.T
        direction = np.moveaxis(np.tensordot(root, direction, axes=(1, axis)), 0, axis)
    if options.grafting is None:
        return direction / (1 - options.b1**updates) ** options.correct_bias
    grafted = shampoo_reference.grafting_direction(grad, moments, updates, options)
    return direction * (np.linalg.norm(grafted) / np.linalg.norm(direction))


def run(grads: np.ndarray, options: Options, first_factors: Matrices) -> tuple[np.ndarray, KlState]:
    """The direction at every step of one leaf, `(steps, *shape)`, and the state after the last.

    `first_factors`, by axis, are added to the factors after the first gradient, so that they have
    no null space.
    """
    shape = grads.shape[1:]
    moments = shampoo_reference.LeafState({}, {}, np.zeros(shape), np.zeros(shape))
    state = State(kl_reference.init(shape, options), moments)
    directions = []
    for grad in grads:
        directions.append(step(grad, state, options))
        if len(directions) == 1:
            factors = state.kl.leaf.factors
            state.kl.leaf.factors = {a: f + first_factors[a] for a, f in factors.items()}
    return np.stack(directions), state.kl


def run_in_tiles(
    grads: np.ndarray, options: Options, block_size: int | None
) -> tuple[np.ndarray, KlState]:
    """The direction at every step, and the state of the last tile after the last step."""
    directions, state = np.zeros(grads.shape), None
    for tile in reference.tiles(grads.shape[1:], block_size or max(grads.shape[1:])):
        part = grads[:, *tile]
        priors = {axis: np.diag(np.linspace(1.0, 2.0, d)) for axis, d in enumerate(part.shape[1:])}
        directions[:, *tile], state = run(part, options, priors)
    assert state is not None
    return directions, state
