"""Linear algebra of single matrices: products, decompositions, tests of orthonormality.

May import: JAX only. Must never know: SOAP, stacks, parameter trees, meshes.
"""

from soap_optax.linalg.decompositions import (
    descending_eigenvectors,
    orthonormalize,
    orthonormalize_by_cholesky,
)
from soap_optax.linalg.decoupling import (
    decoupled_columns,
    decoupled_rows,
    with_unit_vectors,
    zero_rows,
)
from soap_optax.linalg.matrix_powers import inverse_power
from soap_optax.linalg.norms import norm_along, norm_of_scaled, scaled_along, widened
from soap_optax.linalg.orthonormality import (
    departure_from_orthonormality,
    frobenius_norm,
    is_finite,
    is_orthonormal,
    largest_magnitude,
    nearest_orthonormal,
    off_diagonal_mass,
    probed_departure,
    rayleigh_quotients,
    target_departure,
)
from soap_optax.linalg.products import gram_matrix, matmul, multiply_along
from soap_optax.linalg.triangle import folded_like, folded_shape, unfolded

__all__ = [
    "decoupled_columns",
    "decoupled_rows",
    "departure_from_orthonormality",
    "descending_eigenvectors",
    "folded_like",
    "folded_shape",
    "frobenius_norm",
    "gram_matrix",
    "inverse_power",
    "is_finite",
    "is_orthonormal",
    "largest_magnitude",
    "matmul",
    "multiply_along",
    "nearest_orthonormal",
    "norm_along",
    "norm_of_scaled",
    "off_diagonal_mass",
    "orthonormalize",
    "orthonormalize_by_cholesky",
    "probed_departure",
    "rayleigh_quotients",
    "scaled_along",
    "target_departure",
    "unfolded",
    "widened",
    "with_unit_vectors",
    "zero_rows",
]
