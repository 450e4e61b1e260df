"""The equations of SOAP and Shampoo, for one block: steps, eigenbases, roots, refresh methods.

Computations are in the dtype of the statistics. Each field of a state keeps its stored dtype.

May import: `soap_optax.linalg`, `soap_optax.state`, JAX. Must never know: stacks, parameter trees,
meshes, or when a refresh is due.
"""

from soap_optax.algorithm.eigenbasis import EigenbasisState, RefreshRule, refresh
from soap_optax.algorithm.first_gradient import FirstGradient
from soap_optax.algorithm.kl_factors import (
    INITIAL_EIGENVALUE,
    FactorEstimator,
    Rotations,
    average_eigenvalues,
    inverse_roots,
    is_whitenable,
    kl_decay,
    kl_gram_matrices,
    rotations,
    rotations_by_others,
)
from soap_optax.algorithm.refresh_methods import RefreshMethod
from soap_optax.algorithm.roots import (
    RootRule,
    RootState,
    any_of_zeros,
    inverse_root,
    refresh_roots,
)
from soap_optax.algorithm.second_moment import estimate as second_moment_estimate
from soap_optax.algorithm.shampoo import (
    WITH_SECOND_MOMENT,
    Grafting,
    ShampooHyperparameters,
    multiply_by_roots,
)
from soap_optax.algorithm.shampoo import step_block as shampoo_step_block
from soap_optax.algorithm.step import (
    FirstUpdate,
    Hyperparameters,
    adam_direction,
    average_factor,
    average_moments,
    bias_correction,
    is_acceptable,
    normalization,
    rounding_level,
    step_block,
    update_number,
)

__all__ = [
    "INITIAL_EIGENVALUE",
    "WITH_SECOND_MOMENT",
    "EigenbasisState",
    "FactorEstimator",
    "FirstGradient",
    "FirstUpdate",
    "Grafting",
    "Hyperparameters",
    "RefreshMethod",
    "RefreshRule",
    "RootRule",
    "RootState",
    "Rotations",
    "ShampooHyperparameters",
    "adam_direction",
    "any_of_zeros",
    "average_eigenvalues",
    "average_factor",
    "average_moments",
    "bias_correction",
    "inverse_root",
    "inverse_roots",
    "is_acceptable",
    "is_whitenable",
    "kl_decay",
    "kl_gram_matrices",
    "multiply_by_roots",
    "normalization",
    "refresh",
    "refresh_roots",
    "rotations",
    "rotations_by_others",
    "rounding_level",
    "second_moment_estimate",
    "shampoo_step_block",
    "step_block",
    "update_number",
]
