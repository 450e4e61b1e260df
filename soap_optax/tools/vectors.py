"""Biases, scales and offsets, from paths and from the parameters next to them."""

import re
from collections.abc import Sequence

from soap_optax.tools.paths import Parameter, last_word, words_of

_VECTOR = {"beta", "bias", "biases", "gamma", "offset", "scale"}
_NORM = re.compile(r"ln|bn|\w*norm")
_BARE_NORM = re.compile(r"ln|bn|rms|\w*norm")
_BARE_BIAS = re.compile(r"b([kqvo]|\d+)|(\w+_)b")
_HEADS_IN = {"k", "key", "kv", "q", "qkv", "query", "v", "value"}


class Siblings:
    """The shapes of the parameters of a tree, by their place in it."""

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        self._shapes = {parameter.parts: parameter.shape for parameter in parameters}
        self._cousins: dict[tuple[tuple[str, ...], str], list[Parameter]] = {}
        self._neighbours: dict[tuple[str, ...], list[Parameter]] = {}
        for parameter in parameters:
            self._cousins.setdefault(_place(parameter), []).append(parameter)
            self._neighbours.setdefault(parameter.parts[:-1], []).append(parameter)

    def shape(self, parameter: Parameter, name: str) -> tuple[int, ...] | None:
        """The shape of the parameter of this name in the same layer."""
        return self._shapes.get((*parameter.parts[:-1], name))

    def bias(self, parameter: Parameter) -> tuple[int, ...] | None:
        """The shape of the bias in the same layer."""
        return self.shape(parameter, "b" if parameter.name == "w" else "bias")

    def cousins(self, parameter: Parameter) -> Sequence[Parameter]:
        """The parameters of the same name in the layers next to its own one, and itself."""
        return self._cousins[_place(parameter)]

    def neighbours(self, parameter: Parameter) -> Sequence[Parameter]:
        """The parameters in the same layer, and itself."""
        return self._neighbours[parameter.parts[:-1]]


def _place(parameter: Parameter) -> tuple[tuple[str, ...], str]:
    return parameter.parts[:-2], parameter.name


def is_vector(parameter: Parameter, siblings: Siblings) -> bool:
    """Whether a parameter is a vector of each layer, whatever number of axes it has.

    The names *bias*, *scale* and their like mean a vector. So does ``b`` next to a ``w``, and
    ``weight`` in a layer of normalization or next to a ``bias`` of the same shape. Without a layer
    of its own, a vector has a name such as ``ln1`` or ``b1`` and is stacked like its neighbours.
    """
    name = parameter.name
    if last_word(words_of(name)) in _VECTOR:
        return True
    if name == "b":
        return siblings.shape(parameter, "w") is not None
    if name != "weight":
        return _is_bare_vector(parameter, siblings)
    is_norm = any(_NORM.fullmatch(word) for word in parameter.module)
    return is_norm or siblings.shape(parameter, "bias") == parameter.shape


def _is_bare_vector(parameter: Parameter, siblings: Siblings) -> bool:
    """Whether a parameter without a layer of its own is a stack of vectors, `(layers, d)`.

    A scale has the name of a normalization, and as many layers as a stack of matrices next to it. A
    bias such as ``b1`` has the layers and the outputs of ``w1``.
    """
    name, shape = parameter.name, parameter.shape
    if len(shape) != 2:
        return False
    if any(map(_BARE_NORM.fullmatch, words_of(name))):
        stacks = [other.shape for other in siblings.neighbours(parameter) if len(other.shape) > 2]
        return any(stack[0] == shape[0] for stack in stacks)
    found = _BARE_BIAS.fullmatch(name)
    if found is None:
        return False
    weight = siblings.shape(parameter, f"w{found[1]}" if found[1] else f"{found[2]}w")
    return weight is not None and len(weight) == 3 and (weight[0], weight[2]) == shape


def extra_axes(vector: Parameter) -> int:
    """The number of axes of a vector beyond its own.

    A bias of a projection to heads has two axes of its own, ``(heads, head_dim)``. Trailing axes of
    length 1 belong to a convolution's bias in Equinox.
    """
    length = len(vector.shape)
    while length > 1 and vector.shape[length - 1] == 1:
        length -= 1
    own = 2 if not _HEADS_IN.isdisjoint(vector.module) else 1
    return max(0, length - own)
