"""How a basis follows its factor: the methods of a refresh, for one axis of one block.

Each method takes the factor `L`, the basis `Q` and the product `L Q`, all `(d, d)`, and gives a new
basis, with the order in which it took the old one's columns: the second moment belongs to columns
and is permuted along with them.

| method | new basis | beside `L Q` |
| --- | --- | --- |
| `qr` | one step of orthogonal iteration, `QR(L Q)`, as the authors take it | a QR |
| `cholesky_qr` | the same from a Cholesky decomposition, or a QR | a product, a Cholesky, a solve |
| `eigh` | the factor's eigenvectors | an `eigh` |
| `jacobi` | up to three sweeps of simultaneous Jacobi rotations | 4 products, then 5 a sweep |

`partial`, the fifth, turns a quarter of the columns and multiplies no others by `L`.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.lax import Precision

from soap_optax import matrices
from soap_optax.block import multiply_along
from soap_optax.products import times

Method = Literal["qr", "cholesky_qr", "eigh", "jacobi", "partial", "auto"]


class Turned(NamedTuple):
    """A new basis, `(d, d)`, and of which old column each of its columns is the successor."""

    basis: Array
    order: Array


def orthogonal_iteration(factor: Array, basis: Array, product: Array) -> Turned:
    """One step of orthogonal iteration (Vyas et al., 2024, Algorithm 4).

    The columns are first sorted by their Rayleigh quotients, in descending order: a QR
    decomposition orthogonalises each column against those before it, so that an ascending order
    would move away from the eigenbasis.
    """
    del factor
    order = descending_order(product, basis)
    ordered = product.T[order].T  # On CPUs, rows are gathered faster than columns.
    return Turned(matrices.orthonormal_factor(ordered), order)


def cholesky_iteration(factor: Array, basis: Array, product: Array) -> Turned:
    """The same step by a Cholesky decomposition, and by a QR where that did not suffice."""
    del factor
    order = descending_order(product, basis)
    ordered = product[:, order]
    fast = matrices.orthonormal_factor_by_cholesky(ordered)
    basis = lax.cond(
        matrices.is_orthonormal(fast),
        lambda fast, _ordered: fast,
        lambda _fast, ordered: matrices.orthonormal_factor(ordered),
        fast,
        ordered,
    )
    return Turned(basis, order)


def eigendecomposition(factor: Array, basis: Array, product: Array) -> Turned:
    """All the way to the eigenvectors, those of the k-th largest eigenvalue for the k-th column."""
    order = descending_order(product, basis)
    return Turned(matrices.descending_eigenvectors(factor), order)


SWEEPS = 3
ENOUGH = 0.1


def jacobi_sweeps(factor: Array, basis: Array, product: Array) -> Turned:
    """Simultaneous Jacobi rotations of all pairs of columns, matrix products only.

    A sweep takes `B = Q^T L Q`, the angle that would annihilate each of its entries by itself, and
    turns by all of them at once. After a sweep that began with an off-diagonal mass of less than
    `ENOUGH`, what is left is about its square, and no other one follows. Columns keep their places.
    """
    factor = lax.stop_gradient(factor)

    def goes_on(carry: tuple[Array, Array, Array, Array]) -> Array:
        sweep, mass, _, _ = carry
        return (sweep < SWEEPS) & (mass > ENOUGH)

    def sweep(carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        number, _, basis, product = carry
        product = lax.cond(
            number > 0,
            lambda basis, _first: times(factor, basis),
            lambda _basis, first: first,
            basis,
            product,
        )
        mass = matrices.off_diagonal_mass(product, basis)
        turn = rotation(rotation_angles(times(basis.T, product)))
        return number + 1, mass, matrices.polished(times(basis, turn)), product

    # Made of an entry, so that in a `shard_map` it differs between devices as the masses do.
    unmeasured = jnp.full_like(product[0, 0], jnp.inf)
    start = (jnp.int32(0), unmeasured, basis, product)
    _, _, basis, _ = lax.while_loop(goes_on, sweep, jax.tree.map(lax.stop_gradient, start))
    return Turned(basis, jnp.arange(len(basis)))


def rotation_angles(rotated: Array) -> Array:
    """The tangents of the angles that annihilate the entries of `B`, antisymmetric, `(d, d)`.

    Entries that are rounding errors turn nothing. Angles of a column that turns too far for a
    rotation of all pairs at once are reduced, with those of its partners in the pair.
    """
    rotated = (rotated + rotated.T) / 2
    largest = matrices.largest_magnitude(rotated)
    scaled = rotated / jnp.where(largest > 0, largest, 1)
    diagonal = jnp.diagonal(scaled)
    gap = diagonal[None, :] - diagonal[:, None]
    twice = jnp.where(gap >= 0, 2, -2) * scaled
    is_entry = (jnp.abs(scaled) > jnp.finfo(scaled.dtype).eps) & ~jnp.eye(len(scaled), dtype=bool)
    root = jnp.sqrt(jnp.where(is_entry, jnp.square(gap) + jnp.square(twice), 1))
    tangents = jnp.where(is_entry, twice / (jnp.abs(gap) + root), 0)
    # An exchange of rows and columns changes the sign of the gap, except where there is none.
    tangents = jnp.triu(tangents) - jnp.triu(tangents).T
    shrink = jnp.minimum(1, 0.5 / jnp.maximum(jnp.linalg.norm(tangents, axis=0), 0.5))
    return tangents * jnp.minimum(shrink[None, :], shrink[:, None])


def rotation(angles: Array) -> Array:
    """The exponential of an antisymmetric matrix to fourth order, from two products, `(d, d)`.

    It departs from orthonormality by a 72nd of the sixth power of the angles.
    """
    square = times(angles, angles)
    identity = jnp.eye(len(angles), dtype=angles.dtype)
    return identity + angles + square / 2 + times(square, angles / 6 + square / 24)


def descending_order(product: Array, basis: Array) -> Array:
    """The columns by their Rayleigh quotients, the largest first."""
    return jnp.argsort(matrices.rayleigh_quotients(product, basis), descending=True)


# Up to this length JAX itself takes the TPU's own operation for eigenvectors.
ONE_OPERATION_ON_TPUS = 256


def by_platform(factor: Array, basis: Array, product: Array) -> Turned:
    """What suits a platform and a length.

    A QR on CPUs: what is faster for some factors there is slower for others, at every length. On
    TPUs, eigenvectors where JAX itself takes the TPU's own operation. Elsewhere, products.
    """
    short = len(basis) <= ONE_OPERATION_ON_TPUS
    return lax.platform_dependent(
        factor,
        basis,
        product,
        cpu=orthogonal_iteration,
        tpu=eigendecomposition if short else jacobi_sweeps,
        default=jacobi_sweeps,
    )


FULL: dict[str, Callable[[Array, Array, Array], Turned]] = {
    "qr": orthogonal_iteration,
    "cholesky_qr": cholesky_iteration,
    "eigh": eigendecomposition,
    "jacobi": jacobi_sweeps,
    "auto": by_platform,
}


# Columns are cut into chunks, and each partial refresh turns two of them; neighbours come first,
# because columns of near eigenvalues turn fastest.
CHUNKS = 8
PAIRS = np.array([(a, a + gap) for gap in range(1, CHUNKS) for a in range(CHUNKS - gap)])


class TurnedInPart(NamedTuple):
    """A basis, `(d, d)`, some of whose columns have been turned.

    Attributes:
      basis: the new basis.
      turn: what the columns were multiplied by, `(s, s)`.
      order: of which old column each column of the basis is the successor, `(d,)`.
    """

    basis: Array
    turn: Array
    order: Array


def chunk_length(length: int) -> int:
    """How many columns of a basis are in a chunk; short bases turn as a whole."""
    return length // CHUNKS if length >= 4 * CHUNKS else length


def chunks_in_turn(length: int, refreshes: Array) -> Array:
    """Where the chunks start that the partial refresh after so many others turns, `(2,)` or `(1,)`.

    28 refreshes meet every pair of chunks. Where eight chunks are too short for all columns, a gap
    is left: after the last chunk in the first round, and one chunk further ahead in each that
    follows, so that every pair of columns meets within five rounds.
    """
    chunk = chunk_length(length)
    if chunk == length:
        return jnp.zeros(1, jnp.int32)
    pair = jnp.asarray(PAIRS, jnp.int32)[refreshes % len(PAIRS)]
    first_after_gap = CHUNKS - refreshes // len(PAIRS) % (CHUNKS + 1)
    return pair * chunk + jnp.where(pair >= first_after_gap, length - CHUNKS * chunk, 0)


def take_chunks(array: Array, axis: int, starts: Array) -> Array:
    """The columns in turn, one chunk after another, where an axis of an array has all of them."""
    chunk = chunk_length(array.shape[axis])
    chunks = [lax.dynamic_slice_in_dim(array, start, chunk, axis) for start in starts]
    return jnp.concatenate(chunks, axis)


def put_chunks(array: Array, axis: int, starts: Array, new: Array) -> Array:
    """The array with others in place of the columns in turn."""
    for start, chunk in zip(starts, jnp.split(new, len(starts), axis), strict=True):
        array = lax.dynamic_update_slice_in_dim(array, chunk, start, axis)
    return array


def turn_columns(factor: Array, basis: Array, starts: Array) -> TurnedInPart:
    """Turns the columns in turn among themselves, to diagonalize their part of `Q^T L Q`."""
    part = take_chunks(basis, 1, starts)
    rotated = times(part.T, times(factor, part))
    order = jnp.argsort(jnp.diagonal(rotated), descending=True)
    turn = matrices.descending_eigenvectors((rotated + rotated.T) / 2)
    new = put_chunks(basis, 1, starts, times(part, turn))
    columns = jnp.arange(len(basis))
    whole_order = put_chunks(columns, 0, starts, take_chunks(columns, 0, starts)[order])
    return TurnedInPart(matrices.polished(new), turn, whole_order)


def turn_moment(mu: Array, axis: int, starts: Array, turn: Array) -> Array:
    """A first moment, `(*block)`, after columns of the basis of an axis have been turned."""
    turned = multiply_along(turn.T, take_chunks(mu, axis, starts), axis, Precision.HIGHEST)
    return put_chunks(mu, axis, starts, turned)
