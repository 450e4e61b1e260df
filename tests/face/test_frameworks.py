"""Flax, Equinox and plain trees: the container of the parameters changes no bit of SOAP's updates.

Every run takes the same gradients, through another tree type or its training loop. It must equal
the run of a plain dict after each step, in every bit.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import equinox as eqx
import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState
from helpers.cases import named
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers

from soap_optax import (
    default_dimension_numbers,
    default_labels,
    hyperball,
    scale_by_soap,
    soap,
    soap_adamw,
)

Tree = Any

# The first call fills the factors, and the second computes the first bases. With a frequency of 2,
# the fourth and the sixth call refresh them.
STEPS = 6
SOAP = soap(1e-2, precondition_frequency=2)
SOAP_AND_ADAMW = optax.partition({"soap": SOAP, "adamw": optax.adamw(1e-2)}, default_labels)

# Two kernels share a stack, and the biases share the Adam bucket. All factors of the first gradient
# have full rank, so that rounding does not decide the first basis.
WIDTH, HEADS, HEAD_DIM, OUT = 8, 2, 4, 8
SHAPES = {
    "attention": {"kernel": (WIDTH, HEADS, HEAD_DIM)},
    "gate": {"kernel": (WIDTH, OUT), "bias": (OUT,)},
    "mlp": {"kernel": (WIDTH, OUT), "bias": (OUT,)},
}


def draw(shapes: Tree, seed: int) -> Tree:
    """Numbers in arrays of these shapes and of JAX's default precision."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: rng.normal(size=shape).astype(jnp.result_type(float)),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def draw_run(shapes: Tree) -> tuple[Tree, list[Tree]]:
    """Parameters, and a gradient for each step."""
    return draw(shapes, 0), [draw(shapes, seed) for seed in range(1, STEPS + 1)]


@functools.cache
def draw_run_in(_precision: Any) -> tuple[Tree, list[Tree]]:
    return draw_run(SHAPES)


def given() -> tuple[Tree, list[Tree]]:
    """The parameters and gradients of every training loop, in JAX's default precision."""
    return draw_run_in(jnp.result_type(float))


class Step(NamedTuple):
    """The results of one step."""

    updates: Tree
    params: Tree


@functools.cache
def jitted_step(optimizer: optax.GradientTransformation) -> Callable[..., tuple[Step, Tree]]:
    @jax.jit
    def step(params: Tree, state: Tree, grads: Tree) -> tuple[Step, Tree]:
        updates, state = optimizer.update(grads, state, params)
        return Step(updates, optax.apply_updates(params, updates)), state

    return step


def run(
    params: Tree, grads: list[Tree], optimizer: optax.GradientTransformation = SOAP
) -> list[Step]:
    """All steps of a tree of arrays."""
    state = optimizer.init(params)
    steps = []
    for grad in grads:
        step, state = jitted_step(optimizer)(params, state, grad)
        steps.append(step)
        params = step.params
    for stack in optax.tree.get(state, "stacks").values():
        np.testing.assert_array_equal(stack.refreshes, 3)
    return steps


@functools.cache
def plain_run_in(_precision: Any, optimizer: optax.GradientTransformation) -> list[Step]:
    return run(*given(), optimizer)


def plain_run(optimizer: optax.GradientTransformation = SOAP) -> list[Step]:
    return plain_run_in(jnp.result_type(float), optimizer)


def assert_same_bits(found: Tree, wanted: Tree) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def assert_equal_but_rounding(found: Tree, wanted: Tree) -> None:
    """Equal up to units in the last place, as in programs that XLA fuses differently."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=1e-8)
    jax.tree.map(close, found, wanted)


# Trees.


class Dense(eqx.Module):
    kernel: Any
    bias: Any


class EquinoxModel(eqx.Module):
    """Its leaves have another order than in a dict, and one leaf is not an array."""

    mlp: Dense
    gate: Dense
    attention: Any
    activation: Callable = jnp.tanh


def equinox_model(tree: Tree) -> EquinoxModel:
    return EquinoxModel(Dense(**tree["mlp"]), Dense(**tree["gate"]), tree["attention"]["kernel"])


class NNXModel(nnx.Module):
    """A model with given parameters. With `split`, its kernels are sharded by rows over a mesh."""

    def __init__(self, tree: Tree, split: bool = False) -> None:
        def arguments(name: str) -> dict[str, Any]:
            def kernel(_key: Any, shape: Any, dtype: Any) -> jax.Array:
                return jnp.asarray(tree[name]["kernel"], dtype).reshape(shape)

            names = ("x", *[None] * (tree[name]["kernel"].ndim - 1))
            bias = tree[name].get("bias")
            return {
                "kernel_init": nnx.with_partitioning(kernel, names) if split else kernel,
                "bias_init": lambda _key, _shape, dtype: jnp.asarray(bias, dtype),
                "param_dtype": tree[name]["kernel"].dtype,
                "rngs": nnx.Rngs(0),
            }

        self.attention = nnx.LinearGeneral(
            WIDTH, (HEADS, HEAD_DIM), use_bias=False, **arguments("attention")
        )
        self.gate = nnx.Linear(WIDTH, OUT, **arguments("gate"))
        self.mlp = nnx.Linear(WIDTH, OUT, **arguments("mlp"))


CONTAINERS: dict[str, Callable[[Tree], Tree]] = {
    "lists in another order": lambda tree: [
        [tree["mlp"]["kernel"], tree["mlp"]["bias"]],
        (tree["gate"]["bias"], tree["gate"]["kernel"]),
        [tree["attention"]["kernel"]],
    ],
    "nnx.State": lambda tree: nnx.state(NNXModel(tree), nnx.Param),
}


@pytest.mark.long
@pytest.mark.parametrize("hold", named(CONTAINERS))
def test_any_container_gets_the_updates_of_the_plain_dict(hold: Callable[[Tree], Tree]) -> None:
    params, grads = given()
    steps = run(hold(params), [hold(grad) for grad in grads])
    for found, wanted in zip(steps, plain_run(), strict=True):
        assert_equal_but_rounding(found.updates, hold(wanted.updates))
        assert_equal_but_rounding(found.params, hold(wanted.params))


# Training loops. Each yields the parameters after every step.


class LinenModel(linen.Module):
    boxed: bool

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def kernel_init(*names: str | None) -> Callable:
            init = linen.initializers.lecun_normal()
            return linen.with_partitioning(init, names) if self.boxed else init

        heads = linen.DenseGeneral(
            (HEADS, HEAD_DIM),
            use_bias=False,
            kernel_init=kernel_init("x", None, None),
            name="attention",
        )(x)
        gate = linen.Dense(OUT, kernel_init=kernel_init("x", None), name="gate")(x)
        mlp = linen.Dense(OUT, kernel_init=kernel_init("x", None), name="mlp")(x)
        return jnp.tanh(gate) * mlp + heads.sum()


def linen_run(mesh: Mesh | None = None) -> Iterator[Tree]:
    """A `TrainState` of a FrozenDict; on a mesh, of boxes, created with the boxes' shardings."""
    params, all_grads = given()
    model, x = LinenModel(boxed=mesh is not None), jnp.ones((4, WIDTH))
    initial = jax.eval_shape(model.init, jax.random.key(0), x)["params"]

    def hold(tree: Tree) -> Tree:
        return linen.meta.replace_boxed(initial, tree) if mesh else flax.core.freeze(tree)

    def create() -> TrainState:
        return TrainState.create(apply_fn=model.apply, params=hold(params), tx=SOAP)

    def apply_gradients(state: TrainState, grads: Tree) -> TrainState:
        return state.apply_gradients(grads=grads)

    shardings = mesh and linen.get_sharding(jax.eval_shape(create), mesh)
    state = jax.jit(create, out_shardings=shardings)()
    model_grads = jax.eval_shape(
        jax.grad(lambda params: jnp.sum(jnp.asarray(model.apply({"params": params}, x)))),
        state.params,
    )
    assert jax.tree.structure(model_grads) == jax.tree.structure(hold(params))
    step = jax.jit(apply_gradients, out_shardings=shardings)
    for grads in all_grads:
        state = step(state, hold(grads))
        yield linen.meta.unbox(state.params) if mesh else flax.core.unfreeze(state.params)


def nnx_run(
    optimizer: optax.GradientTransformation = SOAP, mesh: Mesh | None = None
) -> Iterator[Tree]:
    """An `nnx.Optimizer`; on a mesh, kernels are created with the shardings that they name."""

    @nnx.jit
    def create(tree: Tree) -> NNXModel:
        return NNXModel(tree, split=mesh is not None)

    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        params, all_grads = given()
        model = create(params)
        grads = [nnx.state(create(tree), nnx.Param) for tree in all_grads]
        if mesh:
            by_rows = NamedSharding(mesh, PartitionSpec("x", None))
            kernels: list[Any] = [model.mlp.kernel[...], grads[0]["mlp"]["kernel"][...]]
            for kernel in kernels:
                assert kernel.sharding.is_equivalent_to(by_rows, kernel.ndim)
        yield from nnx_steps(model, optimizer, grads)


def nnx_steps(
    model: nnx.Module, optimizer: optax.GradientTransformation, grads: list[Tree]
) -> Iterator[Tree]:
    """The parameters of a model after each update of an `nnx.Optimizer`, in `nnx.jit`."""
    nnx_optimizer = nnx.Optimizer(model, optimizer, wrt=nnx.Param)

    @nnx.jit
    def step(model: nnx.Module, nnx_optimizer: nnx.Optimizer, grads: Tree) -> None:
        nnx_optimizer.update(model, grads)

    for grad in grads:
        step(model, nnx_optimizer, grad)
        yield nnx.to_pure_dict(nnx.state(model, nnx.Param))


def mesh_of(devices: int) -> Mesh:
    return jax.make_mesh((devices,), ("x",), axis_types=(AxisType.Auto,))


def assert_equals_plain_run(found: Iterator[Tree], optimizer: Any = SOAP) -> None:
    for params, wanted in zip(found, plain_run(optimizer), strict=True):
        assert_same_bits(params, wanted.params)


@pytest.mark.long
def test_a_train_state_of_a_frozen_dict_equals_the_plain_dict() -> None:
    assert_equals_plain_run(linen_run())


@pytest.mark.long
def test_a_train_state_of_boxes_created_on_a_mesh_equals_the_plain_dict() -> None:
    assert_equals_plain_run(linen_run(mesh_of(1)))


@pytest.mark.parametrize(
    ("optimizer", "devices"),
    [
        pytest.param(SOAP, None, id="soap"),
        pytest.param(SOAP, 1, id="soap on a mesh", marks=pytest.mark.long),
        pytest.param(SOAP_AND_ADAMW, None, id="soap in partition", marks=pytest.mark.long),
    ],
)
def test_an_nnx_optimizer_equals_the_plain_dict(
    optimizer: optax.GradientTransformation, devices: int | None
) -> None:
    mesh = mesh_of(devices) if devices else None
    assert_equals_plain_run(nnx_run(optimizer, mesh), optimizer)


def test_an_equinox_model_trained_with_its_own_functions_equals_the_plain_dict() -> None:
    @eqx.filter_jit
    def step(model: EquinoxModel, state: Tree, grads: Tree) -> tuple[Tree, EquinoxModel, Tree]:
        updates, state = SOAP.update(grads, state, eqx.filter(model, eqx.is_array))
        return updates, eqx.apply_updates(model, updates), state

    def arrays(tree: Tree) -> Tree:
        return eqx.filter(equinox_model(tree), eqx.is_array)

    params, all_grads = given()
    model = equinox_model(params)
    state = SOAP.init(eqx.filter(model, eqx.is_array))
    for grads, wanted in zip(all_grads, plain_run(), strict=True):
        updates, model, state = step(model, state, arrays(grads))
        assert_equal_but_rounding(updates, arrays(wanted.updates))
        assert_equal_but_rounding(eqx.filter(model, eqx.is_array), arrays(wanted.params))
        assert model.activation is jnp.tanh


# A tree with the structure of an Equinox module is callable, but no function.
CALLABLE_TREES: dict[str, Callable[[Tree], optax.GradientTransformation]] = {
    "soap_adamw": lambda _: soap_adamw(1e-2),
    "labels": lambda tree: soap_adamw(1e-2, labels=default_labels(tree)),
    "numbers of soap_adamw": lambda tree: soap_adamw(
        1e-2, dimension_numbers=default_dimension_numbers(tree)
    ),
    "numbers of soap": lambda tree: soap(1e-2, dimension_numbers=default_dimension_numbers(tree)),
    "function of numbers": lambda _: soap(1e-2, dimension_numbers=default_dimension_numbers),
    "decay mask": lambda tree: soap(1e-2, mask=jax.tree.map(lambda leaf: leaf.ndim > 1, tree)),
    "numbers of hyperball": lambda tree: hyperball(
        1e-2, dimension_numbers=default_dimension_numbers(tree)
    ),
    "mask of hyperball": lambda tree: hyperball(
        1e-2, mask=jax.tree.map(lambda leaf: leaf.ndim > 1, tree)
    ),
}


@pytest.mark.usefixtures("implicit_promotion")  # Optax promotes the number of the update.
@pytest.mark.parametrize("make", named(CALLABLE_TREES))
def test_trees_that_are_callable_are_trees(
    make: Callable[[Tree], optax.GradientTransformation],
) -> None:
    mlp = eqx.nn.MLP(4, 3, 5, 2, key=jax.random.key(0))
    params = eqx.filter(mlp, eqx.is_inexact_array)
    optimizer = make(params)
    updates, _ = jax.eval_shape(
        lambda params: optimizer.update(params, optimizer.init(params), params), params
    )
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)


def test_param_shardings_may_be_a_callable_tree() -> None:
    params = eqx.filter(eqx.nn.Linear(8, 8, key=jax.random.key(0)), eqx.is_inexact_array)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    over_devices = NamedSharding(mesh, PartitionSpec("x"))
    optimizer = soap(
        1e-2,
        stack_sharding=over_devices,
        param_shardings=jax.tree.map(lambda _: over_devices, params),
    )
    assert jax.eval_shape(optimizer.init, params)


# Kernels of several axes, and stacks of layers and experts. These tests compare `scale_by_soap`.
# XLA may fuse a later weight decay with the transposition to the leaves' axes, and round it
# differently.


def with_numbers(numbers: Any) -> optax.GradientTransformation:
    return scale_by_soap(precondition_frequency=2, dimension_numbers=numbers)


@pytest.mark.long
def test_kernels_of_several_axes_equal_their_matrices() -> None:
    shapes = {"convolution, HWIO": (2, 2, 3, 5), "heads, head_dim, d": (4, 3, 5)}
    numbers = {
        "convolution, HWIO": MuonDimensionNumbers((0, 1, 2), 3),
        "heads, head_dim, d": MuonDimensionNumbers((-3, -2), -1),
    }

    def as_matrices(tree: Tree) -> Tree:
        return jax.tree.map(lambda leaf: leaf.reshape(12, 5), tree)

    kernels, grads = draw_run(shapes)
    steps = run(kernels, grads, with_numbers(numbers))
    apart = run(as_matrices(kernels), [as_matrices(grad) for grad in grads], with_numbers(None))
    for found, wanted in zip(steps, apart, strict=True):
        assert_same_bits(as_matrices(found.updates), wanted.updates)


LAYERS, EXPERTS, INNER, VOCABULARY = 3, 2, 5, 7


class Numbers(NamedTuple):
    """Dimension numbers with an additional field, as in MaxText."""

    reduction_axis: tuple[int, ...]
    output_axis: tuple[int, ...]
    sharding: Any = None


# The shapes follow MaxText: the second axis of every leaf in the decoder is the layers' axis.
MAXTEXT_SHAPES = {
    "decoder": {
        "decoder_norm": {"scale": (WIDTH,)},
        "layers": {
            "MoeBlock_0": {
                "wi_0": (EXPERTS, LAYERS, WIDTH, INNER),
                "wi_1": (EXPERTS, LAYERS, WIDTH, INNER),
            },
            "mlp": {"wi_0": {"kernel": (WIDTH, LAYERS, INNER)}},
            "pre_self_attention_layer_norm": {"scale": (WIDTH, LAYERS)},
            "self_attention": {
                "out": {"kernel": (HEADS, LAYERS, HEAD_DIM, WIDTH)},
                "query": {"kernel": (WIDTH, LAYERS, HEADS, HEAD_DIM)},
            },
        },
        "logits_dense": {"kernel": (WIDTH, VOCABULARY)},
    },
    "token_embedder": {"embedding": (VOCABULARY, WIDTH)},
}
MAXTEXT_NUMBERS = {
    "decoder": {
        "decoder_norm": {"scale": None},
        "layers": {
            "MoeBlock_0": {
                "wi_0": MuonDimensionNumbers((-2,), (-1,)),
                "wi_1": Numbers((-2,), (-1,)),
            },
            "mlp": {"wi_0": {"kernel": MuonDimensionNumbers((0,), (-1,))}},
            "pre_self_attention_layer_norm": {"scale": None},
            "self_attention": {
                "out": {"kernel": MuonDimensionNumbers((0, -2), (-1,))},
                "query": {"kernel": MuonDimensionNumbers((0,), (-2, -1))},
            },
        },
        "logits_dense": {"kernel": None},
    },
    "token_embedder": {"embedding": None},
}


def one_by_one(tree: Tree) -> Tree:
    """The separate matrices of all layers and experts of a model like MaxText's, and the rest."""
    layers = tree["decoder"]["layers"]
    heads = HEADS * HEAD_DIM
    return {
        "matrices": [
            {
                "experts": [
                    {name: layers["MoeBlock_0"][name][expert, layer] for name in ("wi_0", "wi_1")}
                    for expert in range(EXPERTS)
                ],
                "mlp": layers["mlp"]["wi_0"]["kernel"][:, layer],
                "out": layers["self_attention"]["out"]["kernel"][:, layer].reshape(heads, WIDTH),
                "query": layers["self_attention"]["query"]["kernel"][:, layer].reshape(
                    WIDTH, heads
                ),
            }
            for layer in range(LAYERS)
        ],
        "rest": [
            tree["decoder"]["decoder_norm"]["scale"],
            layers["pre_self_attention_layer_norm"]["scale"],
            tree["decoder"]["logits_dense"]["kernel"],
            tree["token_embedder"]["embedding"],
        ],
    }


@pytest.mark.long
def test_maxtexts_dimension_numbers_give_the_layers_and_experts_one_by_one() -> None:
    params, grads = draw_run(MAXTEXT_SHAPES)
    steps = run(params, grads, with_numbers(MAXTEXT_NUMBERS))
    apart = run(
        one_by_one(params),
        [one_by_one(grad) for grad in grads],
        with_numbers({"matrices": MuonDimensionNumbers(), "rest": None}),
    )
    for found, wanted in zip(steps, apart, strict=True):
        assert_same_bits(one_by_one(found.updates), wanted.updates)


def test_maxtexts_dimension_numbers_reach_into_boxes_and_nnx_states() -> None:
    params = draw(MAXTEXT_SHAPES, 0)
    state = jax.eval_shape(with_numbers(MAXTEXT_NUMBERS).init, params)
    boxes = jax.tree.map(
        lambda leaf: linen.LogicallyPartitioned(leaf, names=(None,) * leaf.ndim), params
    )
    variables = nnx.State(jax.tree.map(nnx.Param, params))
    for held, numbers in (
        (boxes, MAXTEXT_NUMBERS),
        (nnx.State(params), nnx.State(MAXTEXT_NUMBERS)),
        (variables, nnx.State(MAXTEXT_NUMBERS)),
    ):
        optimizer = with_numbers(numbers)
        found = jax.eval_shape(optimizer.init, held)
        assert found == state
        assert jax.eval_shape(optimizer.update, held, found)[1] == state


class Layer(linen.Module):
    """Attention's projections into its heads and back, in boxes."""

    @linen.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        init = linen.initializers.lecun_normal()
        heads = linen.DenseGeneral(
            (HEADS, HEAD_DIM),
            kernel_init=linen.with_partitioning(init, ("embed", "heads", "kv")),
            name="query",
        )(x)
        out = linen.DenseGeneral(
            WIDTH,
            axis=(-2, -1),
            kernel_init=linen.with_partitioning(init, ("heads", "kv", "embed")),
            name="out",
        )(heads)
        return out, None


@pytest.mark.long
def test_layers_stacked_by_linen_scan_equal_the_layers_one_by_one() -> None:
    axis = 1
    scan = linen.scan(
        Layer,
        variable_axes={"params": axis},
        split_rngs={"params": True},
        length=LAYERS,
        metadata_params={linen.meta.PARTITION_NAME: "layers"},
    )
    empty = jax.eval_shape(scan().init, jax.random.key(0), jnp.ones((4, WIDTH)), None)["params"]
    assert empty["query"]["kernel"].names == ("embed", "layers", "heads", "kv")

    def layer(tree: Tree, number: int) -> Tree:
        return jax.tree.map(lambda leaf: jnp.take(leaf, number, axis), linen.meta.unbox(tree))

    def layers(tree: Tree) -> list[Tree]:
        return [layer(tree, number) for number in range(LAYERS)]

    # These numbers are the same for a stack and for a layer, because they count from the ends.
    numbers = {
        "query": {"kernel": MuonDimensionNumbers(0, (-2, -1)), "bias": None},
        "out": {"kernel": MuonDimensionNumbers((0, -2), -1), "bias": None},
    }
    shapes = jax.tree.map(lambda leaf: leaf.shape, linen.meta.unbox(empty))
    params, *grads = [
        linen.meta.replace_boxed(empty, draw(shapes, seed)) for seed in range(STEPS + 1)
    ]
    steps = run(params, grads, with_numbers(numbers))
    apart = run(layers(params), [layers(grad) for grad in grads], with_numbers([numbers] * LAYERS))
    for found, wanted in zip(steps, apart, strict=True):
        assert_same_bits(layers(found.updates), wanted.updates)


@pytest.mark.long
def test_layers_stacked_by_nnx_vmap_equal_the_layers_one_by_one() -> None:
    @nnx.split_rngs(splits=LAYERS)
    @nnx.vmap
    def create(rngs: nnx.Rngs) -> nnx.Linear:
        return nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def numbers(params: Tree) -> Tree:
        return jax.tree.map(
            lambda leaf: MuonDimensionNumbers(-2, -1) if leaf.ndim > 2 else None, params
        )

    def layer(tree: Tree, number: int) -> Tree:
        return jax.tree.map(lambda leaf: leaf[number], tree)

    def layers(tree: Tree) -> list[Tree]:
        return [layer(tree, number) for number in range(LAYERS)]

    model = create(nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    grads = draw_run(jax.tree.map(jnp.shape, params))[1]
    optimizer = soap(1e-2, precondition_frequency=2, dimension_numbers=numbers)
    held = [jax.tree.map(nnx.Param, nnx.State(grad)) for grad in grads]
    found_steps = [layers(found) for found in nnx_steps(model, optimizer, held)]
    together = run(layers(params), [layers(grad) for grad in grads])
    for found, wanted in zip(found_steps, together, strict=True):
        assert_same_bits(found, wanted.params)
    # One matrix compiles to another program than a stack of several, with another kind of product.
    # Separate runs of layers therefore round differently. Parameters of size 1 move by 1e-2 a step.
    # The largest difference seen is 2e-7.
    assert_close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5)
    for number in range(LAYERS):
        alone = run(layer(params, number), [layer(grad, number) for grad in grads])
        for found, wanted in zip(found_steps, alone, strict=True):
            jax.tree.map(assert_close, found[number], wanted.params)


# Meshes of eight devices.

# A program for eight devices may add in another order than one for a single device. In float64 that
# costs 1e-16 of numbers of size 1. Two cases amplify it some thousand times: Adam divides a small
# entry by its size, or two eigenvalues are close. A wrong or missing shard of a gradient moves a
# parameter by a share of the learning rate, 1e-2.
TOLERANCE = 1e-10


@pytest.mark.usefixtures("x64")
@pytest.mark.long
@pytest.mark.parametrize("run_on", [nnx_run, linen_run], ids=["nnx.Optimizer", "TrainState"])
def test_a_model_sharded_over_eight_devices_equals_the_plain_dict_on_one(
    run_on: Callable[..., Iterator[Tree]],
) -> None:
    assert_close = functools.partial(np.testing.assert_allclose, rtol=0, atol=TOLERANCE)
    for found, wanted in zip(run_on(mesh=mesh_of(8)), plain_run(), strict=True):
        jax.tree.map(assert_close, jax.device_get(found), wanted.params)
