"""`default_dimension_numbers`: which axes of each parameter form a matrix."""

from typing import Any

import jax
import jax.numpy as jnp
from optax.contrib import MuonDimensionNumbers

from soap_optax.tools import kernels
from soap_optax.tools.batch_axes import named_batch_axes, stacked_axes
from soap_optax.tools.paths import Parameter, is_box, is_variable, parameters_of
from soap_optax.tools.vectors import Siblings, is_vector

Axes = tuple[int, ...]


def default_dimension_numbers(params: Any) -> Any:
    """Dimension numbers of each parameter, by paths, shapes and Flax's metadata.

    Pass the function, or its result, as ``dimension_numbers``. Each parameter is a matrix,
    or a batch of matrices with a preconditioner each:

    ==============================  ===================================  ==========  ==============
    parameter                       shape                                rows        columns
    ==============================  ===================================  ==========  ==============
    kernel of a dense layer, LSTM   ``(in, out)``                        ``in``      ``out``
    attention: query, key, value    ``(d, heads, head_dim)``             ``d``       all the others
    attention: out                  ``(heads, head_dim, d)``             the others  ``d``
    convolution                     ``(height, width, in, out)``         the others  ``out``
    convolution in Equinox          ``(out, in, height, width)``         ``out``     the others
    layers or experts of a kernel   with one more axis for each          the same    the same
    anything else                   ``(..., m, n)``                      ``m``       ``n``
    vectors, also stacked ones                                           None        None
    ==============================  ===================================  ==========  ==============

    All axes outside of rows and columns are batch axes. They are found in this sequence:

    - **Metadata.** Linen's boxes and NNX's variables may name axes. Names such as *layers, experts,
      stage* or *scan* mean batch axes. Axes called *heads* and *kv* or *head_dim* belong together.
    - **Stacks.** `flax.linen.scan`, `flax.nnx.vmap` and `equinox.filter_vmap` add an axis of equal
      length to all parameters of a subtree. It counts as a batch axis if it is the first or the
      second one, and if a bias or scale in the subtree has an axis too many. Such a scale may be
      ``ln1`` or ``attn_norm`` of two axes, next to stacked matrices such as ``wq``.
    - **Names.** Layers called *query, key, value, q, k, v, qkv, kv* project to heads, with or
      without *proj, dense, linear* or *to*. Layers called *out, output* or *o* next to them, or
      below a part of the path that names attention, project back. Layers with *conv* in their name
      convolve. Parameters such as ``wq`` and ``wo`` have no layer of their own, and stand for it.
    - **Shapes.** A kernel of four or more axes with a square window of up to 16 convolves, unless
      its path names experts. So does a kernel of three or more axes whose bias has one.

    Pass the result for the parameters, not the function, in two cases. Otherwise the function may
    find other axes than it should, or other ones in ``update`` than in ``init``, which raises:

    - Under `optax.partition` or `optax.masked`, the function gets SOAP's parameters only. Biases
      and scales are missing, and so are the stacks that they show. `soap_adamw` needs no result.
    - `flax.nnx.Optimizer` passes metadata to ``init`` only. `soap_adamw` does not read it either.
      If metadata decides, pass ``default_dimension_numbers(nnx.state(model, nnx.Param))``.

    Example:
      >>> import jax, jax.numpy as jnp, soap_optax
      >>> params = {
      ...     "query": {"kernel": jnp.ones((12, 64, 4, 16)), "bias": jnp.ones((12, 4, 16))},
      ...     "out": {"kernel": jnp.ones((12, 4, 16, 64)), "bias": jnp.ones((12, 64))},
      ... }
      >>> numbers = soap_optax.default_dimension_numbers(params)
      >>> numbers["query"]["kernel"]
      MuonDimensionNumbers(reduction_axis=1, output_axis=(2, 3))
      >>> print(numbers["query"]["bias"])
      None
      >>> optimizer = soap_optax.soap(
      ...     3e-3, dimension_numbers=soap_optax.default_dimension_numbers
      ... )
      >>> optimizer.init(params)[0].stacks["64x64"].mu.shape
      (24, 64, 64)

    Args:
      params: a tree of parameters, of their shapes, or of gradients, such as an `nnx.State`.

    Returns:
      The same tree with an entry in place of every parameter, also where that is in a box. An entry
      is None, or `optax.contrib.MuonDimensionNumbers`, which `optax.contrib.muon` takes as well.
      None and `optax.MaskedNode` are not parameters and stay.

    Raises:
      TypeError: for a single integer, which `optax.inject_hyperparams` passes to functions that are
        not in its ``static_args``.
    """
    leaves = jax.tree.leaves(params)
    if len(leaves) == 1 and jnp.issubdtype(jnp.result_type(leaves[0]), jnp.integer):
        raise TypeError(
            f"params must be a tree of parameters, got {params!r}; under optax.inject_hyperparams "
            "pass static_args=soap_optax.STATIC_ARGS, because it takes functions for schedules"
        )
    entries = iter(entries_of(params, nnx_metadata=True))
    return jax.tree.map(
        lambda node: next(entries) if jax.tree.leaves(node) else node,
        params,
        is_leaf=lambda node: is_box(node) or is_variable(node),
    )


def entries_of(params: Any, nnx_metadata: bool = False) -> list[MuonDimensionNumbers | None]:
    """The entry of each parameter, in the sequence of `jax.tree.leaves`.

    Without the metadata of `flax.nnx`, gradients have the same entries as parameters.
    """
    parameters = parameters_of(params, nnx_metadata)
    siblings = Siblings(parameters)
    stacked = stacked_axes(parameters, siblings)
    return [
        _entry_of(parameter, batch, siblings)
        for parameter, batch in zip(parameters, stacked, strict=True)
    ]


def _entry_of(
    parameter: Parameter, stacked: Axes, siblings: Siblings
) -> MuonDimensionNumbers | None:
    batch = named_batch_axes(parameter) or stacked
    axes = tuple(axis for axis in range(len(parameter.shape)) if axis not in batch)
    lengths = [parameter.shape[axis] for axis in axes]
    if is_vector(parameter, siblings) or sum(length != 1 for length in lengths) < 2:
        return None
    rows, columns = (
        kernels.named_heads(parameter, axes)
        or kernels.attention(parameter, axes, siblings)
        or kernels.convolution(parameter, axes, siblings)
        or kernels.last_two(parameter, axes)
    )
    return MuonDimensionNumbers(_plain(rows), _plain(columns))


def _plain(axes: Axes) -> int | Axes:
    return axes[0] if len(axes) == 1 else axes
