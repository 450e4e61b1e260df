"""Complex leaves as pairs of real leaves.

A complex leaf is optimized as two real leaves, its real and its imaginary part. Each has its own
blocks, factors, bases and moments. The updates are those of
`optax.contrib.split_real_and_imaginary`. Pairs of equal blocks share a stack, and every option
works as for real leaves.

The alternatives are complex factors with unitary bases, or blocks with an axis of length two for
the parts. Complex factors need complex decompositions and refresh methods. An axis of length two
changes the shapes to which `block_size` and `dimension_numbers` refer.
"""

import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class RealAndImaginary(NamedTuple):
    """The two real leaves that take the place of a complex leaf in a tree."""

    real: Any
    imaginary: Any


def split_complex(tree: Any) -> Any:
    """The tree with a `RealAndImaginary` in place of every complex leaf.

    Leaves may be arrays, numbers, or have a `shape` and a `dtype`. All other leaves stay.
    """
    return jax.tree.map(lambda leaf: _split(leaf) if _is_complex(leaf) else leaf, tree)


def join_complex(tree: Any) -> Any:
    """The tree with complex leaves: undoes `split_complex`."""
    return jax.tree.map(_join, tree, is_leaf=lambda node: isinstance(node, RealAndImaginary))


def _split(leaf: Any) -> RealAndImaginary:
    if isinstance(leaf, (jax.Array, np.ndarray, np.generic, numbers.Number)):
        return RealAndImaginary(jnp.real(leaf), jnp.imag(leaf))  # pyright: ignore[reportArgumentType]  # A number.
    shape = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return RealAndImaginary(jax.eval_shape(jnp.real, shape), jax.eval_shape(jnp.imag, shape))


def _join(node: Any) -> Any:
    return lax.complex(node.real, node.imaginary) if isinstance(node, RealAndImaginary) else node


def _is_complex(leaf: Any) -> bool:
    if isinstance(leaf, numbers.Number):
        return isinstance(leaf, (complex, np.complexfloating))
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.complexfloating)
