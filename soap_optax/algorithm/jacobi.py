"""The refresh method `jacobi`: simultaneous Jacobi rotations, from matrix products alone."""

import jax.numpy as jnp
from jax import Array, lax

from soap_optax.linalg import largest_magnitude, matmul, nearest_orthonormal, off_diagonal_mass

SWEEPS = 3
ENOUGH = 0.1


def jacobi_sweeps(factor: Array, basis: Array, product: Array) -> Array:
    """A basis after simultaneous Jacobi rotations of all pairs of columns, `(d, d)`.

    A sweep computes `B = Q^T L Q`, takes for each entry the angle that would annihilate this entry
    alone, and rotates by all angles at once. A sweep that begins with an off-diagonal mass below
    `ENOUGH` leaves about the square of that mass, so no other sweep follows. Columns stay in place.
    """

    def sweep_unless_done(
        carry: tuple[Array, Array, Array], number: Array
    ) -> tuple[tuple[Array, Array, Array], None]:
        basis, product, mass = carry
        # Not inside the other conditional: JAX 0.10 cannot `vmap` one in another in a `shard_map`.
        product = lax.cond(
            (mass > ENOUGH) & (number > 0),
            lambda basis, _product: matmul(factor, basis),
            lambda _basis, product: product,
            basis,
            product,
        )
        basis, mass = lax.cond(
            mass > ENOUGH,
            lambda basis, product, _mass: sweep(basis, product),
            lambda basis, _product, mass: (basis, mass),
            basis,
            product,
            mass,
        )
        return (basis, product, mass), None

    # Computed from an entry: in a `shard_map` it then varies over devices, as the masses do.
    unmeasured = jnp.full_like(product[0, 0], jnp.inf)
    # A loop of fixed length, unlike `lax.while_loop`, has a reverse mode.
    (basis, _, _), _ = lax.scan(sweep_unless_done, (basis, product, unmeasured), jnp.arange(SWEEPS))
    return basis


def sweep(basis: Array, product: Array) -> tuple[Array, Array]:
    """Rotates once; also returns the off-diagonal mass before. `product` is factor times basis."""
    mass = off_diagonal_mass(product, basis)
    step = rotation(rotation_angles(matmul(basis.T, product)))
    return nearest_orthonormal(matmul(basis, step)), mass


def rotation_angles(rotated: Array) -> Array:
    """The tangents of the angles that annihilate the entries of `B`, antisymmetric, `(d, d)`.

    Entries as small as rounding errors give no angle. Where the angles of a column are too large to
    rotate all pairs at once, they are reduced, together with their partners in the other column.
    """
    rotated = (rotated + rotated.T) / 2
    largest = largest_magnitude(rotated)
    scaled = rotated / jnp.where(largest > 0, largest, 1)
    diagonal = jnp.diagonal(scaled)
    gap = diagonal[None, :] - diagonal[:, None]
    twice = jnp.where(gap >= 0, 2, -2) * scaled
    is_entry = (jnp.abs(scaled) > jnp.finfo(scaled.dtype).eps) & ~jnp.eye(len(scaled), dtype=bool)
    root = jnp.sqrt(jnp.where(is_entry, jnp.square(gap) + jnp.square(twice), 1))
    tangents = jnp.where(is_entry, twice / (jnp.abs(gap) + root), 0)
    # Swapping row and column changes the sign of the gap, except where the gap is zero.
    tangents = jnp.triu(tangents) - jnp.triu(tangents).T
    # The root of 0 has no finite derivative.
    shrink = 0.5 / jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(tangents), axis=0), 0.25))
    return tangents * jnp.minimum(shrink[None, :], shrink[:, None])


def rotation(angles: Array) -> Array:
    """The exponential of an antisymmetric matrix to fourth order, from two products, `(d, d)`.

    Its departure from orthonormality is a 72nd of the sixth power of the angles.
    """
    square = matmul(angles, angles)
    identity = jnp.eye(len(angles), dtype=angles.dtype)
    return identity + angles + square / 2 + matmul(square, angles / 6 + square / 24)
