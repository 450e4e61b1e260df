"""The rows and columns of a kernel's matrix, from its path and shape.

These functions get the kernel's axes without those of layers and experts. They return None for
kernels that they do not handle.
"""

import re
from collections.abc import Sequence

from soap_optax.tools.paths import Parameter, words_of
from soap_optax.tools.vectors import Siblings

Axes = tuple[int, ...]
Matrix = tuple[Axes, Axes]

_INPUTS = {"k", "key", "q", "query", "v", "value", "wk", "wq", "wv"}
_FUSED = {"kv": 2, "qkv": 3}
_OUTPUTS = {"o", "out", "output", "wo"}
_BESIDE_THE_NAME = {"dense", "kernel", "linear", "proj", "projection", "to"}
_NAMES_IN_A_LAYER = {"kernel", "w", "weight"}
_ATTENTION = re.compile(r"attend|\w*attention|\w*attn|gqa|mha|mqa|multihead|sa")
_CONVOLUTION = re.compile(r"conv|convs|convolution|convolutions|deconv")
_EXPERTS = {"expert", "experts", "moe"}
# The longest side of the window of a convolution in a layer whose name does not say that it is one.
_LONGEST_WINDOW = 16


def named_heads(parameter: Parameter, axes: Axes) -> Matrix | None:
    """The matrix of an attention kernel whose axes have such names: *heads*, *kv*, *head_dim*."""
    named = [words_of(parameter.axis_names[axis] or "") for axis in axes if parameter.axis_names]
    is_heads = [not {"head", "heads"}.isdisjoint(name) for name in named]
    heads = tuple(
        axis
        for axis, name, is_head in zip(axes, named, is_heads, strict=False)
        if is_head or name == ["kv"]
    )
    others = tuple(axis for axis in axes if axis not in heads)
    if len(heads) < 2 or not any(is_heads) or not others:
        return None
    return (heads, others) if heads[0] < others[0] else (others, heads)


def attention(parameter: Parameter, axes: Axes, siblings: Siblings) -> Matrix | None:
    """The matrix of a projection to heads, ``(d, heads, head_dim)``, or back from them."""
    role = _role(parameter)
    if role in _FUSED and len(axes) > 2:
        axes = _without_axis_of_length(_FUSED[role], axes, parameter.shape)
    if len(axes) < 3 or role not in (*_INPUTS, *_FUSED, *_OUTPUTS):
        return (axes[:1], axes[1:]) if len(axes) == 2 else None
    if role in _OUTPUTS and not _is_in_attention(parameter, siblings):
        return None
    if parameter.shape == tuple(parameter.shape[axis] for axis in axes[-3:]) and _is_stack(
        parameter, siblings
    ):
        return axes[-2:-1], axes[-1:]
    return (axes[-3:-1], axes[-1:]) if role in _OUTPUTS else (axes[-3:-2], axes[-2:])


def convolution(parameter: Parameter, axes: Axes, siblings: Siblings) -> Matrix | None:
    """The matrix of a convolution, with its window and its inputs on one side.

    Kernels called ``weight`` have their outputs first, as in Equinox. All others have them last.
    """
    if len(axes) < 3:
        return None
    outputs_first = parameter.name == "weight"
    if not _is_convolution(parameter, axes, siblings, outputs_first):
        return None
    return (axes[:1], axes[1:]) if outputs_first else (axes[:-1], axes[-1:])


def last_two(parameter: Parameter, axes: Axes) -> Matrix:
    """The last two axes whose length is not 1; all others are batch axes."""
    *_, rows, columns = (axis for axis in axes if parameter.shape[axis] != 1)
    return (rows,), (columns,)


def _role(parameter: Parameter) -> str:
    """The word that a projection is called by, such as *query*, or nothing."""
    found = words_of(parameter.name)
    if parameter.name in _NAMES_IN_A_LAYER:
        found = [word for word in parameter.module if word not in _BESIDE_THE_NAME]
    return found[0] if len(found) == 1 else ""


def _is_in_attention(parameter: Parameter, siblings: Siblings) -> bool:
    named = (word for part in parameter.parts for word in words_of(part))
    has_inputs = any(_role(other) in _INPUTS for other in _projections(parameter, siblings))
    return has_inputs or any(_ATTENTION.fullmatch(word) for word in named)


def _is_stack(parameter: Parameter, siblings: Siblings) -> bool:
    """Whether a projection of three axes is a stack of matrices, not a kernel with heads.

    A projection to heads has the model's axis in front, and one back from heads at the end.
    """
    first, middle, end = parameter.shape
    is_output = _role(parameter) in _OUTPUTS
    bias = siblings.bias(parameter)
    if bias is not None:
        return bias != ((end,) if is_output else (middle, end))
    for other in _projections(parameter, siblings):
        if len(other.shape) != 3 or (_role(other) in _OUTPUTS) == is_output:
            continue
        if is_output and _role(other) in _INPUTS:
            return other.shape[0] != end
        if not is_output:
            return other.shape[-1] != first
    return False


def _projections(parameter: Parameter, siblings: Siblings) -> Sequence[Parameter]:
    """The projections next to one: in layers of their own, or in the same layer as ``wq``."""
    has_layer = parameter.name in _NAMES_IN_A_LAYER
    return siblings.cousins(parameter) if has_layer else siblings.neighbours(parameter)


def _is_convolution(
    parameter: Parameter, axes: Axes, siblings: Siblings, outputs_first: bool
) -> bool:
    if any(_CONVOLUTION.fullmatch(word) for word in parameter.module):
        return True
    lengths = [parameter.shape[axis] for axis in axes]
    bias = siblings.bias(parameter)
    if bias is not None and outputs_first:
        return bias[1 - len(lengths) :] == (lengths[0], *[1] * len(lengths[2:]))
    if bias is not None and len(bias) == len(parameter.shape) - len(axes) + 1:
        return lengths[-1] in bias  # One axis of outputs: all others are summed over.
    is_expert = any(not _EXPERTS.isdisjoint(words_of(part)) for part in parameter.parts)
    window = lengths[2:] if outputs_first else lengths[:-2]
    is_square = len(window) > 1 and len(set(window)) == 1 and window[0] <= _LONGEST_WINDOW
    return is_square and not is_expert


def _without_axis_of_length(length: int, axes: Axes, shape: tuple[int, ...]) -> Axes:
    """The axes without the first one of this length, such as that of queries, keys and values."""
    position = next((axis for axis in axes if shape[axis] == length), None)
    return tuple(axis for axis in axes if axis != position)
