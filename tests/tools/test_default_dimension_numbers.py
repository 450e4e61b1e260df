"""`default_dimension_numbers`: matrices and batch axes of real models, by paths and shapes."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen, nnx
from helpers.models import EXPERTS, LAYERS, TREES, D
from jax.sharding import AxisType
from optax.contrib import MuonDimensionNumbers

import soap_optax
from soap_optax import default_dimension_numbers, default_labels

Axes = int | tuple[int, ...]


def is_entry(node: Any) -> bool:
    return isinstance(node, MuonDimensionNumbers)


def by_path(tree: Any) -> dict[str, tuple[Axes, Axes]]:
    """The rows and columns of all parameters that have an entry, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(default_dimension_numbers(tree), is_leaf=is_entry)
    assert all(is_entry(entry) for _, entry in leaves)  # JAX takes None for no leaf.
    return {
        jax.tree_util.keystr(path, simple=True, separator="/").replace("/~/", "/"): tuple(entry)
        for path, entry in leaves
    }


def shape(*lengths: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(lengths, jnp.float32)


def numbers_of(path: str, *lengths: int, **others: tuple[int, ...]) -> Any:
    """The rows and columns of one parameter, with others in the same layer by name."""
    *modules, name = path.split("/")
    tree: Any = {name: shape(*lengths)} | {key: shape(*value) for key, value in others.items()}
    for module in reversed(modules):
        tree = {module: tree}
    return by_path(tree).get(path)


# Real models ------------------------------------------------------------------------------------

MATRIX = (0, 1)
STACK = (1, 2)


def layer(attention: str, batch: int = 0, first: int = 0) -> dict[str, tuple[Axes, Axes]]:
    """Attention's four kernels, whose axes are counted from `first`, after `batch` batch axes."""
    d, heads, end = first + batch, first + batch + 1, first + batch + 2
    into = (d, (heads, end))
    return {
        f"{attention}/key/kernel": into,
        f"{attention}/out/kernel": ((d, heads), end),
        f"{attention}/query/kernel": into,
        f"{attention}/value/kernel": into,
    }


def layers_apart(name: str, attention: str, **kernels: tuple[Axes, Axes]) -> dict[str, Any]:
    return {
        f"{name.format(number)}/{path}": axes
        for number in range(LAYERS)
        for path, axes in {
            **layer(attention),
            **{key.replace("_", "/") + "/kernel": value for key, value in kernels.items()},
        }.items()
    }


LINEN_EDGES = {"wte/embedding": MATRIX, "lm_head/kernel": MATRIX}
NNX_EDGES = {"embedding/embedding": MATRIX, "head/kernel": MATRIX}
LINEN_STACK = {
    **LINEN_EDGES,
    **layer("layers/MultiHeadAttention_0", batch=1),
    "layers/mlp/up/kernel": STACK,
    "layers/mlp/down/kernel": STACK,
}
NNX_STACK = {
    **NNX_EDGES,
    **layer("layers/attention", batch=1),
    "layers/mlp/up/kernel": STACK,
    "layers/mlp/down/kernel": STACK,
}
OF_EXPERTS = {
    "layers/router/kernel": STACK,
    "layers/experts/up/kernel": (2, 3),
    "layers/experts/down/kernel": (2, 3),
}
WINDOW = ((0, 1, 2), 3)
HAIKU_STACK = "__layer_stack_no_per_layer"

WANTED: dict[str, dict[str, tuple[Axes, Axes]]] = {
    "Linen transformer": {
        **LINEN_EDGES,
        **layers_apart("h_{}", "MultiHeadAttention_0", mlp_up=MATRIX, mlp_down=MATRIX),
    },
    "Linen transformer, scanned": LINEN_STACK,
    "Linen transformer, scanned, no biases": LINEN_STACK,
    "Linen transformer, scanned along axis 1": {
        **LINEN_EDGES,
        **{
            path: (0, 2) if "mlp" in path else ((0, 2), 3) if "out" in path else (0, (2, 3))
            for path in LINEN_STACK.keys() - LINEN_EDGES.keys()
        },
    },
    "Linen mixture of experts": {
        **LINEN_EDGES,
        **layers_apart(
            "h_{}", "MultiHeadAttention_0", router=MATRIX, experts_up=STACK, experts_down=STACK
        ),
    },
    "Linen mixture of experts, scanned": {
        **LINEN_EDGES,
        **layer("layers/MultiHeadAttention_0", batch=1),
        **OF_EXPERTS,
    },
    "Linen ResNet": {
        "stem/kernel": WINDOW,  # Its name does not say that it convolves.
        "Conv_0/kernel": WINDOW,
        "Conv_1/kernel": WINDOW,
        "conv_proj/kernel": WINDOW,
        "head/kernel": MATRIX,
    },
    "Linen U-Net": {f"{name}/kernel": WINDOW for name in ("enter", "down", "up", "leave")},
    "Linen MLP": {"Dense_0/kernel": MATRIX, "Dense_1/kernel": MATRIX},
    "Linen LSTM": {
        "Dense_0/kernel": MATRIX,
        **{f"OptimizedLSTMCell_0/{side}{gate}/kernel": MATRIX for side in "ih" for gate in "ifgo"},
    },
    "NNX transformer": {
        **NNX_EDGES,
        **layers_apart("layers/{}", "attention", mlp_up=MATRIX, mlp_down=MATRIX),
    },
    "NNX transformer, stacked by vmap": NNX_STACK,
    "NNX transformer, stacked by scan": NNX_STACK,
    "NNX mixture of experts, stacked": {
        **NNX_EDGES,
        **layer("layers/attention", batch=1),
        **OF_EXPERTS,
    },
    "NNX LSTM": {
        "cell/dense_h/kernel": MATRIX,
        "cell/dense_i/kernel": MATRIX,
        "dense/kernel": MATRIX,
    },
    "Equinox": {
        "embedding/weight": MATRIX,
        **{
            f"layers/attention/{name}_proj/weight": STACK
            for name in ("query", "key", "value", "output")
        },
        "layers/mlp/layers/0/weight": STACK,
        "layers/mlp/layers/1/weight": STACK,
        "extra/0/weight": (0, (1, 2, 3)),  # Outputs first.
        "extra/1/weight": (0, (1, 2)),
        "extra/2/weight": (0, (1, 2, 3)),
        "cell/weight_ih": MATRIX,
        "cell/weight_hh": MATRIX,
    },
    "Haiku": {
        "embed/embeddings": MATRIX,
        **{
            f"{HAIKU_STACK}/multi_head_attention/{name}/w": STACK
            for name in ("query", "key", "value", "linear")
        },
        f"{HAIKU_STACK}/mlp/linear_0/w": STACK,
        f"{HAIKU_STACK}/mlp/linear_1/w": STACK,
        "conv1_d/w": ((0, 1), 2),
        "lstm/linear/w": MATRIX,
        "lm_head/w": MATRIX,
    },
}


@pytest.mark.parametrize("name", TREES)
def test_matrices_and_batch_axes_of_a_model(name: str) -> None:
    assert by_path(TREES[name]()) == WANTED[name]


@pytest.mark.parametrize("name", TREES)
def test_labels_give_soap_no_vector_and_adamw_embeddings_and_heads(name: str) -> None:
    labels = jax.tree_util.tree_leaves_with_path(default_labels(TREES[name]()))
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        .replace("/~/", "/")
        .removesuffix("/value")
        for path, _ in labels
    ]
    of_adamw = {"wte/embedding", "lm_head/kernel", "embedding/embedding", "head/kernel"}
    of_adamw |= {"embedding/weight", "embed/embeddings", "lm_head/w"}
    for path, (_, label) in zip(paths, labels, strict=True):
        expected = "soap" if path in WANTED[name].keys() - of_adamw else "adamw"
        assert (path, label) == (path, expected)


@pytest.mark.parametrize(
    ("name", "stacks"),
    [
        # Query, key, value and out of each layer, and the two sides of each expert's MLP.
        (
            "Linen mixture of experts, scanned",
            {"8x8": 4 * LAYERS, "8x5": LAYERS, "8x24": LAYERS * EXPERTS, "24x8": LAYERS * EXPERTS},
        ),
        ("Linen U-Net", {"27x8": 1, "72x16": 1, "64x8": 1, "16x3": 1}),
    ],
)
def test_soap_stacks_the_matrices_of_a_model(name: str, stacks: dict[str, int]) -> None:
    params = TREES[name]()
    of_soap = jax.tree.map(
        lambda leaf, label: leaf if label == "soap" else None, params, default_labels(params)
    )
    optimizer = soap_optax.scale_by_soap(dimension_numbers=default_dimension_numbers)
    state: Any = jax.eval_shape(optimizer.init, of_soap)
    assert {name: stack.mu.shape[0] for name, stack in state.stacks.items()} == stacks
    assert not state.adam


# Single rules -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "lengths", "wanted"),
    [
        # Attention, by the names of layers and of parameters.
        ("attn/q_proj/kernel", (D, 2, 4), (0, (1, 2))),
        ("attn/to_k/kernel", (D, 2, 4), (0, (1, 2))),
        ("attn/wq", (D, 2, 4), (0, (1, 2))),
        ("attn/wo", (2, 4, D), ((0, 1), 2)),
        ("self_attention/out_proj/kernel", (2, 4, D), ((0, 1), 2)),
        ("attn/query/kernel", (3, D, 2, 4), (1, (2, 3))),
        ("attn/query/kernel", (2, 3, D, 2, 4), (2, (3, 4))),
        # Fused projections: queries, keys and values are a matrix each.
        ("attn/qkv/kernel", (D, 3, 2, 4), (0, (2, 3))),
        ("attn/qkv/kernel", (D, 3, 16), (0, 2)),
        ("attn/qkv_proj/kernel", (D, 48), (0, 1)),
        ("attn/kv/kernel", (D, 2, 5, 4), (0, (2, 3))),
        # No attention: an output of something else, and heads with a matrix each (Gemma).
        ("mlp/out/kernel", (3, 16, D), (1, 2)),
        ("moe/wo", (5, 16, D), (1, 2)),
        ("attn/q_einsum/w", (4, 32, 8), (1, 2)),
        ("attn/kv_einsum/w", (2, 1, 32, 8), (2, 3)),
        # Convolutions, by name or by a square window.
        ("Conv_0/kernel", (3, 5, 4, 6), ((0, 1, 2), 3)),
        ("conv1d/kernel", (3, 4, 6), ((0, 1), 2)),
        ("depthwise_conv/kernel", (3, 3, 1, 6), ((0, 1, 2), 3)),
        ("convs/0/weight", (6, 4, 3), (0, (1, 2))),
        ("patches/kernel", (16, 16, 3, 32), ((0, 1, 2), 3)),
        ("voxels/kernel", (3, 3, 3, 2, 6), ((0, 1, 2, 3), 4)),
        ("experts/kernel", (4, 4, 8, 16), (2, 3)),
        ("layers/kernel", (17, 17, 8, 16), (2, 3)),
        # Everything else: the last two axes, but for those of length 1.
        ("up/kernel", (3, 8, 24), (1, 2)),
        ("up/kernel", (8, 1, 24), (0, 2)),
        ("up/kernel", (1, 8, 24), (1, 2)),
        ("pos_embedding", (1, 16, 8), (1, 2)),
        # Vectors.
        ("up/kernel", (8, 1), None),
        ("cls", (1, 1, 8), None),
        ("scale", (), None),
        ("layers/norm/scale", (3, 8), None),
        ("attn/query/bias", (2, 4), None),
        ("layers/layer_norm/offset", (3, 8), None),
        ("layers/norm1/weight", (3, 8), None),
        ("layers/ln_f/weight", (3, 8), None),
        ("layers/linear/weight", (3, 8), (0, 1)),
        ("b", (3, 8), (0, 1)),
    ],
)
def test_a_parameter_by_itself(path: str, lengths: tuple[int, ...], wanted: Any) -> None:
    assert numbers_of(path, *lengths) == wanted


def test_a_bias_says_which_axes_are_outputs() -> None:
    # Three axes: projections to heads, or a stack of matrices.
    assert numbers_of("query/kernel", D, 2, 4, bias=(2, 4)) == (0, (1, 2))
    assert numbers_of("query/kernel", 3, D, 16, bias=(3, 16)) == (1, 2)
    assert numbers_of("attn/out/kernel", 2, 4, D, bias=(D,)) == ((0, 1), 2)
    assert numbers_of("attn/out/kernel", 3, 16, D, bias=(3, D)) == (1, 2)
    # One axis of outputs: all others are the rows, as in a convolution over time.
    assert numbers_of("down/kernel", 3, 4, 6, bias=(6,)) == ((0, 1), 2)
    assert numbers_of("down/kernel", 3, 4, 6, bias=(3, 6)) == (1, 2)
    assert numbers_of("down/weight", 6, 4, 5, bias=(6, 1)) == (0, (1, 2))
    assert numbers_of("down/weight", 3, 6, 4, bias=(3, 6)) == (1, 2)
    # Vectors next to their layer's matrix, and of a layer of normalization without a telling name.
    assert numbers_of("linear/b", 3, 6, w=(3, 4, 6)) is None
    assert numbers_of("first/weight", 3, 6, bias=(3, 6)) is None


@pytest.mark.parametrize("key_heads", [2, 1])
def test_projections_are_compared_with_each_other(key_heads: int) -> None:
    def attention(query: tuple[int, ...], key: tuple[int, ...], out: tuple[int, ...]) -> Any:
        layers = {"query": query, "key": key, "o_proj": out}
        return by_path({name: {"kernel": shape(*lengths)} for name, lengths in layers.items()})

    assert attention((D, 2, 4), (D, key_heads, 4), (2, 4, D)) == {
        "query/kernel": (0, (1, 2)),
        "key/kernel": (0, (1, 2)),
        "o_proj/kernel": ((0, 1), 2),
    }
    stack = attention((3, D, 16), (3, D, 8 * key_heads), (3, 16, D))
    assert set(stack.values()) == {(1, 2)}


def test_a_subtree_is_stacked_only_if_all_of_it_is() -> None:
    block = {"norm": {"scale": shape(5, 8)}, "mlp": {"kernel": shape(5, 4, 4, 8)}}
    # The kernel would be a convolution if it were not one of five layers.
    assert by_path({"blocks": block}) == {"blocks/mlp/kernel": (2, 3)}
    apart = {"blocks": block, "other": {"kernel": shape(4, 4, 8, 8)}}
    assert by_path(apart) == {"blocks/mlp/kernel": (2, 3), "other/kernel": WINDOW}
    # No vector has an axis too many: nothing is stacked, and the window is square.
    plain = {"norm": {"scale": shape(8)}, "mlp": {"kernel": shape(4, 4, 8, 8)}}
    assert by_path({"blocks": plain}) == {"blocks/mlp/kernel": WINDOW}


def test_a_second_axis_is_one_of_layers_only_if_it_is_short() -> None:
    mlp = {"up": {"kernel": shape(8, 3, 24)}, "down": {"kernel": shape(24, 3, 8)}}
    stacked = {"norm": {"scale": shape(8, 3)}, "mlp": mlp}
    assert by_path(stacked) == {"mlp/up/kernel": (0, 2), "mlp/down/kernel": (0, 2)}
    # All second axes are equal here too, but the vectors have more entries than there are layers.
    layers = {"norm": {"scale": shape(3, 8)}, "mlp": {"kernel": shape(3, 8, 24)}}
    assert by_path({**layers, "shared": {"kernel": shape(11, 8)}}) == {
        "mlp/kernel": (1, 2),
        "shared/kernel": MATRIX,
    }


def test_heads_of_attention_are_no_stack() -> None:
    # As many heads as entries in each: the kernel and the bias have equally long second axes.
    attention = {"query": {"kernel": shape(64, 8, 8), "bias": shape(8, 8)}}
    assert by_path({"attention": attention}) == {"attention/query/kernel": (0, (1, 2))}


BARE: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("wq", "wk", "wv"), (3, D, 16)),
    "wo": (3, 16, D),
    "w1": (3, D, 32),
    "w2": (3, 32, D),
    "b1": (3, 32),
    "b2": (3, D),
}


@pytest.mark.parametrize(
    "norms",
    [
        ("ln1", "ln2"),
        ("ln_1", "ln_2"),
        ("norm1", "norm2"),
        ("attn_norm", "mlp_norm"),
        ("rms1", "rms2"),
        ("rmsnorm_attn", "rmsnorm_mlp"),
        ("LN1", "layerNorm2"),
        ("gamma1", "beta1"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "blocks"])
def test_stacked_parameters_without_layers_of_their_own(
    norms: tuple[str, ...], prefix: str
) -> None:
    tree: Any = {name: shape(*BARE[name]) for name in BARE} | {n: shape(3, D) for n in norms}
    tree = {prefix: tree, "embed": shape(50, D), "ln_f": shape(D)} if prefix else tree
    found = {path.removeprefix("blocks/"): axes for path, axes in by_path(tree).items()}
    wanted = {name: (1, 2) for name in BARE if name.startswith("w")}
    assert found == (wanted | {"embed": (0, 1)} if prefix else wanted)
    assert {"adamw"} == {
        label
        for path, label in jax.tree_util.tree_leaves_with_path(default_labels(tree))
        if not str(path[-1].key).startswith("w")
    }


def test_stacked_projections_show_each_other_without_a_norm() -> None:
    stack = {name: shape(*BARE[name]) for name in ("wq", "wk", "wv", "wo", "w1", "w2")}
    assert set(by_path(stack).values()) == {(1, 2)}
    # In one dictionary with all other parameters, not all have the axis of the layers.
    flat = {**stack, "embed": shape(50, D), "ln1": shape(3, D), "ln_f": shape(D)}
    assert by_path(flat) == {**dict.fromkeys(stack, (1, 2)), "embed": MATRIX}


def test_bare_kernels_of_attention_and_of_convolutions_are_no_stacks() -> None:
    heads = {"wq": shape(D, 2, 4), "wk": shape(D, 1, 4), "wv": shape(D, 1, 4), "wo": shape(2, 4, D)}
    norms = {"ln1": shape(D), "q_norm": shape(2, 4), "w1": shape(D, 32), "b1": shape(32)}
    assert by_path({**heads, **norms}) == {
        **dict.fromkeys(("wq", "wk", "wv"), (0, (1, 2))),
        "wo": ((0, 1), 2),
        "w1": MATRIX,
    }
    layers = {name: shape(3, *leaf.shape) for name, leaf in {**heads, **norms}.items()}
    del layers["q_norm"]
    assert by_path(layers) == {
        **dict.fromkeys(("wq", "wk", "wv"), (1, (2, 3))),
        "wo": ((1, 2), 3),
        "w1": (1, 2),
    }
    window = {"conv1": shape(3, 3, 4, 8), "conv2": shape(3, 3, 8, 8), "norm1": shape(8)}
    assert set(by_path(window).values()) == {WINDOW}
    # A matrix may have the name of a normalization, and a letter may stand for anything.
    assert by_path({"norm": shape(8, 8), "kernel": shape(8, 8)})["norm"] == MATRIX
    assert by_path({"b1": shape(4, 8), "w1": shape(8, 8)})["b1"] == MATRIX


def test_maxtexts_tree_has_the_numbers_that_maxtext_gives() -> None:
    tree = {
        "decoder": {
            "decoder_norm": {"scale": shape(8)},
            "layers": {
                "MoeBlock_0": {
                    "gate": {"kernel": shape(8, 3, 4)},
                    "wi_0": shape(4, 3, 8, 16),
                    "wo": shape(4, 3, 16, 8),
                },
                "mlp": {"wi_0": {"kernel": shape(8, 3, 16)}},
                "pre_self_attention_layer_norm": {"scale": shape(8, 3)},
                "self_attention": {
                    "out": {"kernel": shape(2, 3, 4, 8)},
                    "query": {"kernel": shape(8, 3, 2, 4)},
                },
            },
        },
    }
    prefix = "decoder/layers/"
    assert by_path(tree) == {
        prefix + "MoeBlock_0/gate/kernel": (0, 2),
        prefix + "MoeBlock_0/wi_0": (2, 3),
        prefix + "MoeBlock_0/wo": (2, 3),
        prefix + "mlp/wi_0/kernel": (0, 2),
        prefix + "self_attention/out/kernel": ((0, 2), 3),
        prefix + "self_attention/query/kernel": (0, (2, 3)),
    }


# Metadata ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "lengths", "wanted"),
    [
        (("embed", "layers", "mlp"), (8, 12, 24), (0, 2)),  # More layers than entries.
        (("expert", "layers", "embed", "mlp"), (4, 12, 8, 24), (2, 3)),
        (("embed", "mlp", "stage"), (8, 24, 2), (0, 1)),
        (("embed", "q_heads", "kv"), (8, 2, 4), (0, (1, 2))),
        (("embed", "layers", "kv_heads", "kv_head_dim"), (8, 12, 2, 4), (0, (2, 3))),
        (("heads", "head_dim", "embed"), (2, 4, 8), ((0, 1), 2)),
        (("embed", "qkv", "heads", "kv"), (8, 3, 2, 4), (0, (2, 3))),
        # Names of mesh axes tell nothing.
        ((None, "data", ("fsdp", "tensor")), (3, 8, 24), (1, 2)),
    ],
)
def test_names_of_axes_decide_in_linens_boxes(names: Any, lengths: Any, wanted: Any) -> None:
    for box in (linen.Partitioned, linen.LogicallyPartitioned):
        params = {"weights": {"kernel": box(shape(*lengths), names)}}
        assert by_path(params) == {"weights/kernel": wanted}
        grads = jax.tree.map(lambda leaf: leaf, params)
        assert by_path(grads) == by_path(params)


def test_boxes_of_a_scanned_linen_model_are_read() -> None:
    class Layer(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
            init = linen.with_logical_partitioning(
                linen.initializers.lecun_normal(), ("embed", "mlp")
            )
            return linen.Dense(D, use_bias=False, kernel_init=init, name="dense")(x), None

    scan = linen.scan(
        Layer,
        variable_axes={"params": 1},
        split_rngs={"params": True},
        length=12,
        metadata_params={linen.meta.PARTITION_NAME: "layers"},
    )
    boxed = jax.eval_shape(scan().init, jax.random.key(0), jnp.ones((4, D)), None)["params"]
    assert by_path(boxed) == {"dense/kernel": (0, 2)}
    # Without the boxes, nothing says that this is no stack of eight.
    assert by_path(linen.meta.unbox(boxed)) == {"dense/kernel": (1, 2)}


def nnx_stack() -> Any:
    """Two layers in variables with metadata, and their order of axes that only metadata tells."""

    class Layer(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("embed", "mlp"))
            self.linear = nnx.Linear(D, 24, use_bias=False, kernel_init=init, rngs=rngs)

    @nnx.split_rngs(splits=12)
    @nnx.vmap(in_axes=0, out_axes=1, transform_metadata={nnx.PARTITION_NAME: "layers"})
    def create(rngs: nnx.Rngs) -> Layer:
        return Layer(rngs)

    kinds = (AxisType.Auto,) * 3
    with jax.set_mesh(jax.make_mesh((1, 1, 1), ("embed", "mlp", "layers"), axis_types=kinds)):
        return nnx.state(create(nnx.Rngs(0)), nnx.Param)


@pytest.mark.usefixtures("implicit_promotion")
def test_metadata_of_nnx_is_read_from_parameters() -> None:
    params = nnx_stack()
    assert params["linear"]["kernel"][...].shape == (D, 12, 24)
    found = default_dimension_numbers(params)
    assert isinstance(found, nnx.State)
    assert found["linear"]["kernel"] == MuonDimensionNumbers(0, 2)
    # Gradients lose it, in the trees that `nnx.Optimizer` passes to `update`.
    pure = nnx.to_pure_dict(params)
    assert by_path(pure) == {"linear/kernel": (1, 2)}
    # The result for the parameters fits both.
    optimizer = soap_optax.scale_by_soap(dimension_numbers=found)
    state = jax.eval_shape(optimizer.init, params)
    assert list(state.stacks) == ["8x24"]
    assert jax.eval_shape(optimizer.update, nnx.State(pure), state)[1] == state


# Trees ------------------------------------------------------------------------------------------


def test_a_tree_of_numbers_has_entries_in_place_of_parameters_and_keeps_other_nodes() -> None:
    params = {
        "none": None,
        "masked": optax.MaskedNode(),
        "empty": {},
        "box": linen.Partitioned(shape(8, 6), ("embed", "mlp")),
        "layers": [{"kernel": shape(8, 6)}, (shape(3),)],
    }
    matrix = MuonDimensionNumbers(0, 1)
    assert default_dimension_numbers(params) == {
        "none": None,
        "masked": optax.MaskedNode(),
        "empty": {},
        "box": matrix,
        "layers": [{"kernel": matrix}, (None,)],
    }
    assert default_dimension_numbers(shape(8, 6)) == matrix
    assert default_dimension_numbers({}) == {}


@pytest.mark.usefixtures("implicit_promotion")
def test_optaxs_muon_takes_the_same_tree() -> None:
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), TREES["Linen transformer, scanned"]())
    optimizer = optax.contrib.muon(1e-2, muon_weight_dimension_numbers=default_dimension_numbers)
    state = jax.eval_shape(optimizer.init, params)
    updates, _ = jax.eval_shape(optimizer.update, params, state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_the_number_of_steps_that_inject_hyperparams_passes_is_an_error() -> None:
    optimizer = optax.inject_hyperparams(soap_optax.soap)(
        learning_rate=0.1, dimension_numbers=default_dimension_numbers
    )
    with pytest.raises(TypeError, match=r"params must be a tree.*static_args=soap_optax"):
        optimizer.init({"kernel": jnp.ones((4, 3))})


def test_every_model_has_its_expected_numbers() -> None:
    assert WANTED.keys() == TREES.keys()
