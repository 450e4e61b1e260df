"""`hyperball` in chains, in Optax's wrappers, in Flax NNX and in checkpoints."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from helpers.cases import mostly_long

import soap_optax

Tree = Any
RATE = 0.05
STEPS = 6

PARAMS: Tree = {
    "embed": {"kernel": np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)},
    "head": {
        "kernel": np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32),
        "bias": np.zeros(3, np.float32),
    },
}
_INPUTS = np.random.default_rng(2).normal(size=(32, 6)).astype(np.float32)


def loss(params: Tree) -> jax.Array:
    """The loss of a network with a normalized layer, for which only directions matter."""
    hidden = _INPUTS @ params["embed"]["kernel"]
    hidden = hidden / jnp.sqrt(jnp.mean(hidden**2, axis=-1, keepdims=True))
    outputs = hidden @ params["head"]["kernel"] + params["head"]["bias"][None, :]
    return jnp.mean((outputs - np.tanh(2 * _INPUTS[:, :3])) ** 2)


def gradients(steps: int = STEPS) -> list[Tree]:
    rng = np.random.default_rng(3)
    return [
        jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), PARAMS)
        for _ in range(steps)
    ]


def run(optimizer: Any, grads: list[Tree], params: Tree = PARAMS) -> tuple[list[Tree], Any, int]:
    """The parameters after each step, the state, and the number of compiled programs."""
    update: Any = jax.jit(optimizer.update)
    params = jax.tree.map(jnp.asarray, params)
    state, history = optimizer.init(params), []
    for grad in grads:
        updates, state = update(grad, state, params)
        params = optax.apply_updates(params, updates)
        history.append(params)
    return history, state, update._cache_size()


def norms(params: Tree) -> list[float]:
    return [float(np.linalg.norm(leaf)) for leaf in jax.tree.leaves(params) if leaf.ndim > 1]


def assert_close(found: Tree, wanted: Tree) -> None:
    """Compares two programs, which may round differently in float32."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6), found, wanted)


def assert_norms_stay(history: list[Tree]) -> None:
    for params in history:
        np.testing.assert_allclose(norms(params), norms(PARAMS), rtol=1e-6)


# Directions.


def muon() -> optax.GradientTransformation:
    def numbers(params: Tree) -> Tree:
        return jax.tree.map(
            lambda p: optax.contrib.MuonDimensionNumbers() if p.ndim == 2 else None, params
        )

    return optax.contrib.scale_by_muon(weight_dimension_numbers=numbers)


DIRECTIONS = {
    "soap": soap_optax.scale_by_soap(precondition_frequency=2),
    "muon": optax.masked(muon(), lambda tree: jax.tree.map(lambda p: p.ndim == 2, tree)),
    "adam": optax.scale_by_adam(),
    "gradient": optax.identity(),
}


@pytest.mark.usefixtures("implicit_promotion")
@pytest.mark.parametrize("name", mostly_long(DIRECTIONS, ["soap", "muon"]))
def test_any_direction_trains_at_constant_norm(name: str) -> None:
    schedule = optax.linear_schedule(RATE, 0.0, 80)
    optimizer: Any = optax.chain(DIRECTIONS[name], soap_optax.hyperball(schedule))

    def step(carry: Tree, _: None) -> tuple[Tree, Tree]:
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    params = jax.tree.map(jnp.asarray, PARAMS)
    params, _ = jax.jit(
        lambda params: jax.lax.scan(step, (params, optimizer.init(params)), length=80)[0]
    )(params)
    assert_norms_stay([params])
    assert float(loss(params)) < 0.5 * float(loss(PARAMS))


# Wrappers.


@pytest.mark.usefixtures("implicit_promotion")
def test_multi_steps_moves_by_the_mean_gradient_in_every_second_step() -> None:
    grads = gradients()
    wrapped = optax.MultiSteps(soap_optax.hyperball(RATE), 2).gradient_transformation()
    history, _, _ = run(wrapped, grads)
    means = [
        jax.tree.map(lambda a, b: (a + b) / 2, *pair)
        for pair in zip(grads[::2], grads[1::2], strict=True)
    ]
    plain, _, _ = run(soap_optax.hyperball(RATE), means)
    assert_close(history[1::2], plain)
    assert_close(history[::2], [PARAMS, *plain[:-1]])
    assert_norms_stay(history)


def test_masked_and_partitioned_parameters_move_as_on_their_own() -> None:
    grads = gradients()
    labels = {"embed": "sphere", "head": "plain"}
    numbers = {"embed": optax.contrib.MuonDimensionNumbers(0, 1), "head": None}
    partition = optax.partition(
        {
            "sphere": soap_optax.hyperball(RATE, dimension_numbers=numbers),
            "plain": optax.sgd(RATE),
        },
        labels,
    )
    own_mask = soap_optax.hyperball(RATE, mask={"embed": True, "head": False})
    masked = optax.chain(
        optax.masked(soap_optax.hyperball(RATE), {"embed": True, "head": False}),
        optax.masked(optax.scale(-RATE), {"embed": False, "head": True}),
    )
    wanted, _, _ = run(own_mask, grads)
    for optimizer in (partition, masked):
        assert_close(run(optimizer, grads)[0], wanted)
    assert norms(wanted[-1])[0] == pytest.approx(norms(PARAMS)[0], rel=1e-6)
    assert norms(wanted[-1])[1] != pytest.approx(norms(PARAMS)[1], rel=1e-6)


@pytest.mark.usefixtures("implicit_promotion")
def test_injected_learning_rate_is_changed_between_steps_without_a_new_program() -> None:
    factory = optax.inject_hyperparams(soap_optax.hyperball)
    optimizer: Any = factory(learning_rate=RATE)
    update: Any = jax.jit(optimizer.update)
    params: Tree = jax.tree.map(jnp.asarray, PARAMS)
    state = optimizer.init(params)
    for call, grad in enumerate(gradients()):
        old = state.hyperparams["learning_rate"]
        state.hyperparams["learning_rate"] = jnp.full_like(old, RATE / (1 + call))
        updates, state = update(grad, state, params)
        params = optax.apply_updates(params, updates)
    assert update._cache_size() == 1
    wanted, _, _ = run(soap_optax.hyperball(lambda count: RATE / (1 + count)), gradients())
    assert_close(params, wanted[-1])


@pytest.mark.long
def test_injected_functions_are_named_static() -> None:
    factory = optax.inject_hyperparams(
        soap_optax.hyperball, static_args=("dimension_numbers", "mask")
    )
    only_embed = {"embed": True, "head": False}
    optimizer = factory(
        learning_rate=optax.linear_schedule(RATE, 0.0, 10),
        dimension_numbers=lambda _: None,
        mask=lambda _: only_embed,
    )
    history, state, programs = run(optimizer, gradients())
    wanted, _, _ = run(
        soap_optax.hyperball(optax.linear_schedule(RATE, 0.0, 10), mask=only_embed), gradients()
    )
    assert_close(history, wanted)
    assert list(state.hyperparams) == ["learning_rate"]
    assert programs == 1


def test_apply_if_finite_drops_a_bad_step() -> None:
    grads = gradients()
    bad = jax.tree.map(np.copy, grads[0])
    bad["head"]["bias"][1] = np.nan
    optimizer = optax.apply_if_finite(soap_optax.hyperball(RATE), max_consecutive_errors=3)
    history, _, _ = run(optimizer, [bad, *grads])
    wanted, _, _ = run(soap_optax.hyperball(RATE), grads)
    assert_close(history[1:], wanted)


@pytest.mark.long
def test_it_may_be_mapped_over_seeds() -> None:
    optimizer = soap_optax.hyperball(RATE)

    def after(params: Tree, grad: Tree) -> Tree:
        updates, _ = optimizer.update(grad, optimizer.init(params), params)
        return optax.apply_updates(params, updates)

    grads = gradients(3)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *grads)
    together = jax.jit(jax.vmap(after, in_axes=(None, 0)))(PARAMS, stacked)
    for seed, grad in enumerate(grads):
        alone = jax.tree.map(lambda leaf, seed=seed: leaf[seed], together)
        assert_close(alone, after(PARAMS, grad))


# Flax and Orbax.


def test_nnx_optimizer_moves_a_model_at_constant_norm() -> None:
    model = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
    start = np.asarray(model.kernel[...])
    chain = optax.chain(soap_optax.scale_by_soap(), soap_optax.hyperball(RATE))
    optimizer = nnx.Optimizer(model, chain, wrt=nnx.Param)

    @nnx.jit
    def step(model: nnx.Linear, optimizer: nnx.Optimizer) -> None:
        grads = nnx.grad(lambda model: jnp.mean((model(_INPUTS) - 1.0) ** 2))(model)
        optimizer.update(model, grads)

    for _ in range(4):
        step(model, optimizer)
    end = np.asarray(model.kernel[...])
    assert np.linalg.norm(end) == pytest.approx(np.linalg.norm(start), rel=1e-6)
    assert np.linalg.norm(end - start) > 0.05 * np.linalg.norm(start)


def test_boxed_parameters_leave_no_box_in_the_state() -> None:
    """Boxes name axes that the norms do not have."""
    linen = pytest.importorskip("flax.linen")
    boxed = {"kernel": linen.Partitioned(jnp.ones((4, 3)), names=("embed", "mlp"))}
    state: Any = soap_optax.hyperball(RATE).init(boxed)
    assert [norm.shape for norm in state.norms] == [(1, 1)]


def test_orbax_restores_every_bit(tmp_path: pathlib.Path) -> None:
    optimizer = soap_optax.hyperball(RATE)
    _, state, _ = run(optimizer, gradients())
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        shapes = jax.eval_shape(optimizer.init, PARAMS)
        restored = checkpointer.restore(tmp_path / "state", shapes)
    soap_optax.check_checkpoint(restored, shapes)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert len(restored.norms) == 2
