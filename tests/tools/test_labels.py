"""`default_labels` chooses SOAP's parameters by path and shape."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import soap_optax
from soap_optax import default_labels

MATRIX = (8, 6)


def nested(path: str, leaf: Any) -> Any:
    for key in reversed(path.split("/")):
        leaf = {key: leaf}
    return leaf


def label_of(path: str, shape: tuple[int, ...] = MATRIX) -> str:
    (label,) = jax.tree.leaves(default_labels(nested(path, jnp.zeros(shape))))
    return label


@pytest.mark.parametrize(
    "path",
    [
        "wte/embedding",
        "wpe/embedding",
        "transformer/WTE/weight",
        "Embed_0/embedding",
        "embed_tokens/weight",
        "token_embedder/table",
        "TokenEmbedding_0/kernel",
        "tok_emb/kernel",
        "pos_embed",
        "PositionalEmbedding_3/kernel",
        "encoder/pos",
        "encoder/position",
        "pos_enc/kernel",
        "positional_encoding",
        "relative_position_bias_table",
        "tok/kernel",
        "tokens",
        "mask_token",
        "register_tokens",
        "unembed/kernel",
        "Unembedding/kernel",
        "vocab/kernel",
        "lm_head/kernel",
        "LMHead_0/kernel",
        "lm-head/kernel",
        "lmhead/kernel",
        "head/kernel",
        "Head_0/kernel",
        "heads/head/weight",
        "MAPHead_0/MlpBlock_0/Dense_0/kernel",
        "classification_head/kernel",
        "attention_model/lm_head/kernel",
        "decoder/logits_dense/kernel",
        "to_logits/kernel",
        "classifier/kernel",
        "gpt/~/lm_head/w",
        "model.embed_tokens.weight",
    ],
)
def test_embeddings_tables_and_output_heads_are_for_adamw(path: str) -> None:
    assert label_of(path) == "adamw"


@pytest.mark.parametrize(
    "path",
    [
        "h/0/attn/c_attn/kernel",
        "h_0/mlp/c_fc/kernel",
        "attention/query/kernel",
        "attention/value/kernel",
        "attention/out/kernel",
        "attention/heads/kernel",
        "attention/head_dim/kernel",
        "attention/head/kernel",
        "MultiHeadAttention_0/Head_3/Dense_0/kernel",
        "sa/heads/0/query/kernel",
        "multi_head/kernel",
        "multi_head/head/kernel",
        "multihead/head/kernel",
        "attn_head/kernel",
        "MultiHeadDotProductAttention_0/query/kernel",
        "multi_head_attention/kernel",
        "header/kernel",
        "overhead/kernel",
        "token_mixing/Dense_0/kernel",
        "MixerBlock_0/token_mixing/Dense_0/kernel",
        "position_wise_ffn/kernel",
        "PositionwiseFeedForward_0/kernel",
        "pos_ffn/w_1/kernel",
        "table_mlp/kernel",
        "bias_mlp/kernel",
        "pre_logits/kernel",
        "pre_classifier/kernel",
        "layers/0/weight",
        "kernel",
    ],
)
def test_hidden_matrices_and_the_heads_of_attention_are_for_soap(path: str) -> None:
    assert label_of(path) == "soap"


@pytest.mark.parametrize(
    ("shape", "label"),
    [
        ((), "adamw"),
        ((8,), "adamw"),
        ((1, 8), "adamw"),
        ((8, 1), "adamw"),
        ((1, 1, 8), "adamw"),
        ((8, 6), "soap"),
        ((1, 8, 6), "soap"),
        ((3, 3, 8, 6), "soap"),
        ((12, 8, 6), "soap"),
    ],
)
def test_scalars_and_vectors_are_for_adamw(shape: tuple[int, ...], label: str) -> None:
    assert label_of("mlp/kernel", shape) == label


@pytest.mark.parametrize(
    "path", ["attention/query/bias", "layers/norm/scale", "layers/q_bias", "layers/norm.bias"]
)
def test_biases_and_scales_are_for_adamw_also_where_they_have_two_axes(path: str) -> None:
    assert label_of(path) == "adamw"


def test_a_leaf_without_a_path_goes_by_its_shape() -> None:
    assert default_labels(jnp.zeros(MATRIX)) == "soap"
    assert default_labels(jnp.zeros(3)) == "adamw"


def test_nodes_without_leaves_stay() -> None:
    params = {
        "none": None,
        "masked": optax.MaskedNode(),
        "empty": {},
        "layers": [{"kernel": jnp.zeros(MATRIX)}, (jnp.zeros(3),)],
    }
    assert default_labels(params) == {
        "none": None,
        "masked": optax.MaskedNode(),
        "empty": {},
        "layers": [{"kernel": "soap"}, ("adamw",)],
    }


def test_shapes_and_tracers_are_labelled_like_arrays() -> None:
    params = {"wte": jnp.zeros(MATRIX), "kernel": jnp.zeros(MATRIX), "bias": jnp.zeros(6)}
    labels = {"wte": "adamw", "kernel": "soap", "bias": "adamw"}
    traced = []
    jax.eval_shape(lambda tree: traced.append(default_labels(tree)), params)
    assert traced == [labels]
    assert default_labels(params) == default_labels(jax.eval_shape(lambda: params)) == labels


class LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + linen.MultiHeadDotProductAttention(num_heads=2)(linen.LayerNorm()(x))
        return x + linen.Dense(8)(linen.gelu(linen.Dense(16)(linen.LayerNorm()(x))))


class LinenGPT(linen.Module):
    @linen.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = linen.Embed(11, 8, name="wte")(tokens)
        x = x + linen.Embed(5, 8, name="wpe")(jnp.arange(5))
        for _ in range(2):
            x = LinenBlock()(x)
        return linen.Dense(11, use_bias=False, name="lm_head")(linen.LayerNorm()(x))


@pytest.mark.usefixtures("implicit_promotion")
def test_a_linen_gpt_has_soap_for_the_kernels_of_its_blocks() -> None:
    params = jax.eval_shape(
        LinenGPT().init, jax.random.key(0), jax.ShapeDtypeStruct((1, 5), jnp.int32)
    )
    soap = paths_for_soap(params)
    assert soap == {
        f"params/LinenBlock_{number}/{name}/kernel"
        for number in range(2)
        for name in [
            *(
                f"MultiHeadDotProductAttention_0/{part}"
                for part in ("query", "key", "value", "out")
            ),
            "Dense_0",
            "Dense_1",
        ]
    }


class NNXBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.expand = nnx.Linear(8, 16, rngs=rngs)
        self.contract = nnx.Linear(16, 8, rngs=rngs)


class NNXGPT(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.token_embedding = nnx.Embed(11, 8, rngs=rngs)
        self.position_embedding = nnx.Embed(5, 8, rngs=rngs)
        self.blocks = nnx.List([NNXBlock(rngs) for _ in range(2)])
        self.head = nnx.Linear(8, 11, rngs=rngs)


def nnx_params() -> Any:
    return nnx.state(nnx.eval_shape(lambda: NNXGPT(nnx.Rngs(0))), nnx.Param)


def test_an_nnx_gpt_has_soap_for_the_kernels_of_its_blocks() -> None:
    assert isinstance(default_labels(nnx_params()), nnx.State)
    soap = {path.removesuffix("/value") for path in paths_for_soap(nnx_params())}
    assert soap == {
        f"blocks/{number}/{name}/kernel"
        for number in range(2)
        for name in [
            *(f"attention/{part}" for part in ("query", "key", "value", "out")),
            "expand",
            "contract",
        ]
    }


def paths_for_soap(params: Any) -> set[str]:
    leaves = jax.tree_util.tree_leaves_with_path(default_labels(params))
    assert {label for _, label in leaves} == {"soap", "adamw"}
    return {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, label in leaves
        if label == "soap"
    }


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Linear:
    """A module that is a pytree of its attributes, as in Equinox."""

    weight: Any
    bias: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Model:
    embedding: Linear
    layers: list[Linear]
    lm_head: Linear


def test_modules_that_are_pytrees_are_labelled_by_their_attributes() -> None:
    linear = Linear(weight=jnp.zeros(MATRIX), bias=None)
    layer = Linear(weight=jnp.zeros(MATRIX), bias=jnp.zeros(8))
    labels = default_labels(Model(embedding=linear, layers=[layer], lm_head=linear))
    assert labels == Model(
        embedding=Linear("adamw", None),
        layers=[Linear("soap", "adamw")],
        lm_head=Linear("adamw", None),
    )


@pytest.mark.usefixtures("implicit_promotion")
def test_each_part_of_a_partition_is_updated_as_if_alone() -> None:
    params = {
        "soap": {"mlp": {"kernel": jnp.ones((4, 5))}},
        "adamw": {
            "wte": jnp.ones((9, 4)),
            "mlp": {"bias": jnp.ones(5)},
            "lm_head": {"kernel": jnp.ones((4, 9))},
        },
    }
    parts: dict[Any, optax.GradientTransformationExtraArgs]
    parts = {"soap": soap_optax.soap(1e-2), "adamw": optax.adamw(3e-3)}
    partitioned = optax.partition(parts, default_labels)
    states = {label: part.init(params[label]) for label, part in parts.items()}

    @jax.jit
    def step(grads: Any, together: Any, states: Any) -> Any:
        updates, together = partitioned.update(grads, together, params)
        alone = {
            label: part.update(grads[label], states[label], params[label])
            for label, part in parts.items()
        }
        differences = jax.tree.map(
            lambda update, expected: jnp.max(jnp.abs(update - expected)),
            updates,
            {label: expected for label, (expected, _) in alone.items()},
        )
        return differences, together, {label: state for label, (_, state) in alone.items()}

    rng = np.random.default_rng(0)
    together = partitioned.init(params)
    for _ in range(3):
        grads = jax.tree.map(
            lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), params
        )
        differences, together, states = step(grads, together, states)
        # Updates are of the learning rate's size, and two programs may round them differently.
        assert max(map(float, jax.tree.leaves(differences))) < 1e-6


class Perceptron(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.expand = nnx.Linear(4, 8, rngs=rngs)
        self.head = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(jnp.tanh(self.expand(x)))


@pytest.mark.long
@pytest.mark.usefixtures("implicit_promotion")
def test_an_nnx_model_trains_under_a_partition() -> None:
    model = Perceptron(nnx.Rngs(0))
    optimizer = nnx.Optimizer(
        model,
        optax.partition(
            {"soap": soap_optax.soap(3e-2), "adamw": optax.adamw(3e-2)}, default_labels
        ),
        wrt=nnx.Param,
    )
    x = jnp.linspace(-1, 1, 24).reshape(6, 4)

    @nnx.jit
    def step(model: Perceptron, optimizer: nnx.Optimizer) -> jax.Array:
        loss, grads = nnx.value_and_grad(lambda model: jnp.mean((model(x) - x[:, :2]) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(20)]
    assert losses[-1] < losses[0] / 2
