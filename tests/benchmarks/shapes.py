"""The hidden parameters of real models, as shapes.

Embeddings and output heads are left out. SOAP's users give them to AdamW (`default_labels`). That
costs every contender the same and would only move all ratios toward one. Norms and biases stay in:
an optimizer of hidden layers has to update them, and the floor does not pay for them.

A model is as deep as asked. Two cores and 24 GiB can time the default depth in minutes. The costs
of a step and of its floor are both proportional to the depth, so that their ratio does not depend
on it.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from optax.contrib import MuonDimensionNumbers

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Model:
    """A family of parameter trees, and the matrices in their leaves.

    Attributes:
      tree: the tree of shapes, from a number of layers.
      layers: the number of layers to time by default.
      blocks: the shape of a leaf's blocks, with their number in front, as in `(8, 512, 256)`; None
        for a leaf without a preconditioner.
      numbers: the axes of a leaf that form a matrix, for Muon; None as for `blocks`.
      soap_options: arguments that make `soap_optax.soap` cut the leaves into `blocks`.
    """

    tree: Callable[[int], Any]
    layers: int
    blocks: Callable[[Shape], Shape | None]
    numbers: Callable[[Shape], MuonDimensionNumbers | None]
    soap_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def params_of(model: Model, layers: int | None = None) -> Any:
    """The parameters of a model, as `jax.ShapeDtypeStruct`."""
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        model.tree(layers or model.layers),
        is_leaf=lambda node: isinstance(node, tuple),
    )


# Transformers -------------------------------------------------------------------------------------


def transformer(width: int, hidden: int, fused: bool = False) -> Callable[[int], Any]:
    """Attention with four matrices, or two if query, key and value are fused; and a plain MLP."""
    attention = {"qkv": (width, 3 * width)} if fused else dict.fromkeys("qkv", (width, width))
    layer = {
        "attention": {**attention, "out": (width, width)},
        "mlp": {"up": (width, hidden), "down": (hidden, width)},
        "norms": {"attention": (width,), "mlp": (width,)},
    }
    if fused:  # GPT-2 has biases everywhere.
        layer["attention_biases"] = {"qkv": (3 * width,), "out": (width,)}
        layer["mlp_biases"] = {"up": (hidden,), "down": (width,)}
        layer["norm_biases"] = {"attention": (width,), "mlp": (width,)}
    return lambda layers: {f"layer_{number}": layer for number in range(layers)}


def mixture_of_experts(width: int, hidden: int, experts: int) -> Callable[[int], Any]:
    """A transformer with gated experts; a layer stacks its experts along a leading axis."""
    layer = {
        "attention": dict.fromkeys(("query", "key", "value", "out"), (width, width)),
        "router": (width, experts),
        "experts": {
            "gate": (experts, width, hidden),
            "up": (experts, width, hidden),
            "down": (experts, hidden, width),
        },
        "norms": {"attention": (width,), "mlp": (width,)},
    }
    return lambda layers: {f"layer_{number}": layer for number in range(layers)}


def whole_matrix(shape: Shape) -> Shape | None:
    return (1, *shape) if len(shape) == 2 else None


def matrix_numbers(shape: Shape) -> MuonDimensionNumbers | None:
    return MuonDimensionNumbers(-2, -1) if len(shape) > 1 else None


def matrices_of(shape: Shape) -> Shape | None:
    """A matrix, or a batch of them along the first axis."""
    return (1, *shape)[-3:] if len(shape) > 1 else None


def matrices_of_leaves(params: Any) -> Any:
    return jax.tree.map(lambda leaf: matrix_numbers(np.shape(leaf)), params)


# Others -------------------------------------------------------------------------------------------

STAGES = ((3, 64), (4, 128), (6, 256), (3, 512))  # ResNet-50: residual blocks and their width
LONGEST_MERGED = 2304  # 9 * 256


def resnet50(deepest: int) -> dict[str, Any]:
    """ResNet-50 with at most `deepest` residual blocks in a stage; kernels are HWIO."""
    tree: dict[str, Any] = {"stem": with_norm((7, 7, 3, 64))}
    channels = 64
    for stage, (blocks, width) in enumerate(STAGES):
        for number in range(min(blocks, deepest)):
            block = {
                "reduce": with_norm((1, 1, channels, width)),
                "spatial": with_norm((3, 3, width, width)),
                "expand": with_norm((1, 1, width, 4 * width)),
            }
            if number == 0:
                block["shortcut"] = with_norm((1, 1, channels, 4 * width))
            tree[f"stage_{stage}_block_{number}"] = block
            channels = 4 * width
    return tree


def with_norm(kernel: Shape) -> dict[str, Shape]:
    return {"kernel": kernel, "scale": kernel[-1:], "bias": kernel[-1:]}


def merged_kernel(shape: Shape) -> Shape | None:
    """A kernel's shape after `merge_dims`: `(9 * 64, 64)` for `(3, 3, 64, 64)`.

    The longest kernels, `(3, 3, 512, 512)`, become `(9, 512, 512)`. The default bound of 10,000
    would give them factors of 4608. It would also make vectors of the small kernels: the stem would
    be one of 9408.
    """
    if len(shape) != 4:
        return None
    height, width, inputs, outputs = shape
    if height * width * inputs <= LONGEST_MERGED:
        return (1, height * width * inputs, outputs)
    return (1, height * width, inputs, outputs)


def kernel_numbers(shape: Shape) -> MuonDimensionNumbers | None:
    return MuonDimensionNumbers((0, 1, 2), 3) if len(shape) == 4 else None


def mlp(inputs: int, width: int) -> Callable[[int], Any]:
    """A physics-informed neural network, without its output layer."""
    return lambda layers: {
        f"layer_{number}": {"kernel": (width if number else inputs, width), "bias": (width,)}
        for number in range(layers)
    }


# All of them --------------------------------------------------------------------------------------


def of_matrices(tree: Callable[[int], Any], layers: int) -> Model:
    return Model(tree, layers, whole_matrix, matrix_numbers)


def of_experts(tree: Callable[[int], Any], layers: int) -> Model:
    numbers = {"dimension_numbers": matrices_of_leaves}
    return Model(tree, layers, matrices_of, matrix_numbers, numbers)


MODELS = {
    "width_512": of_matrices(transformer(512, 2048), 4),
    "gpt2": of_matrices(transformer(768, 3072, fused=True), 2),  # 12 layers; GPT-2 small
    "gpt_256": of_matrices(transformer(256, 1024, fused=True), 12),
    "gpt_64": of_matrices(transformer(64, 256), 48),  # for compile times over depth
    # The paper's models (Vyas et al., 2024, section 5), both with 24 layers.
    "360m": of_matrices(transformer(1024, 4096), 1),
    "660m": of_matrices(transformer(1408, 5632), 1),
    "resnet50": Model(
        resnet50,
        1,  # 6 is the whole model
        merged_kernel,
        kernel_numbers,
        {"merge_dims": True, "max_precond_dim": LONGEST_MERGED},
    ),
    "physics": of_matrices(mlp(2, 256), 8),
    # The proportions of OLMoE (64 experts of 2048 by 1024) at a quarter of its lengths.
    "moe": of_experts(mixture_of_experts(512, 256, 16), 2),
    # For the tests of these programs. Their times are not meaningful.
    "tiny": of_matrices(transformer(8, 16, fused=True), 2),
    "tiny_moe": of_experts(mixture_of_experts(8, 4, 3), 1),
}


def count_entries(tree: Any) -> int:
    """The number of entries of a tree of arrays or of their shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def count_bytes(tree: Any) -> int:
    """The number of bytes of a tree of arrays or of their shapes."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
