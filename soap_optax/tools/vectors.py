"""Biases, scales and offsets, from paths and from the parameters next to them."""

import re
from collections.abc import Sequence

from soap_optax.tools.paths import Parameter, last_word, words_of

_VECTOR = {"beta", "bias", "biases", "gamma", "offset", "scale"}
_NORM = re.compile(r"ln|bn|\w*norm")
_HEADS_IN = {"k", "key", "kv", "q", "qkv", "query", "v", "value"}


class Siblings:
    """The shapes of the parameters of a tree, by their place in it."""

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        self._shapes = {parameter.parts: parameter.shape for parameter in parameters}
        self._cousins: dict[tuple[tuple[str, ...], str], list[Parameter]] = {}
        for parameter in parameters:
            self._cousins.setdefault(_place(parameter), []).append(parameter)

    def shape(self, parameter: Parameter, name: str) -> tuple[int, ...] | None:
        """The shape of the parameter of this name in the same layer."""
        return self._shapes.get((*parameter.parts[:-1], name))

    def bias(self, parameter: Parameter) -> tuple[int, ...] | None:
        """The shape of the bias in the same layer."""
        return self.shape(parameter, "b" if parameter.name == "w" else "bias")

    def cousins(self, parameter: Parameter) -> Sequence[Parameter]:
        """The parameters of the same name in the layers next to its own one, and itself."""
        return self._cousins[_place(parameter)]


def _place(parameter: Parameter) -> tuple[tuple[str, ...], str]:
    return parameter.parts[:-2], parameter.name


def is_vector(parameter: Parameter, siblings: Siblings) -> bool:
    """Whether a parameter is a vector of each layer, whatever number of axes it has.

    The names *bias*, *scale* and their like mean a vector. So does ``b`` next to a ``w``, and
    ``weight`` in a layer of normalization or next to a ``bias`` of the same shape.
    """
    name = parameter.name
    if last_word(words_of(name)) in _VECTOR:
        return True
    if name == "b":
        return siblings.shape(parameter, "w") is not None
    if name != "weight":
        return False
    is_norm = any(_NORM.fullmatch(word) for word in parameter.module)
    return is_norm or siblings.shape(parameter, "bias") == parameter.shape


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
