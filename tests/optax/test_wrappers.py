"""SOAP inside Optax's wrappers behaves like any other transformation."""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from helpers.cases import mostly_long

import soap_optax

RATE = 1e-2
STEPS = 7
FREQUENCY = 3  # The run has a first basis, refreshes, and plain steps between them.

# Two programs that round differently agree only if the first basis is unique. The gradient must
# have full rank along every preconditioned axis, as a square matrix has. All matrices have one
# shape, because XLA compiles a program for each block shape.
OPTIONS: dict[str, Any] = {"precondition_frequency": FREQUENCY}

PARAMS: Any = {
    "embed": {"embedding": np.linspace(-1.0, 0.5, 16, dtype=np.float32).reshape(4, 4)},
    "mlp": {
        "kernel": np.linspace(-1.0, 1.0, 16, dtype=np.float32).reshape(4, 4),
        "bias": np.linspace(-0.5, 0.5, 4, dtype=np.float32),
    },
    "head": [np.linspace(1.0, -1.0, 16, dtype=np.float32).reshape(4, 4)],
}
_TARGETS = {
    "x": np.random.default_rng(0).standard_normal((16, 4)).astype(np.float32),
    "y": np.random.default_rng(1).standard_normal((16, 4)).astype(np.float32),
}


def loss(params: Any, wrap: Callable[[Callable], Callable] = lambda layer: layer) -> jax.Array:
    """A small network's mean squared error; `wrap` is applied to its hidden layer."""

    @wrap
    def hidden(x: jax.Array, mlp: Any) -> jax.Array:
        return jnp.tanh(x @ mlp["kernel"] + mlp["bias"][None, :])

    x = hidden(_TARGETS["x"] @ params["embed"]["embedding"], params["mlp"])
    return jnp.mean((x @ params["head"][0] - _TARGETS["y"]) ** 2)


@functools.cache
def soap(learning_rate: Any = RATE, **options: Any) -> optax.GradientTransformationExtraArgs:
    """One object for each set of options, so that all tests share its compiled update."""
    return soap_optax.soap(learning_rate, **(OPTIONS | options))


def gradients(steps: int = STEPS, params: Any = PARAMS) -> list[Any]:
    """Random gradients in the shapes of the parameters, different in every step."""
    rng = np.random.default_rng(2)
    return [
        jax.tree.map(lambda p: rng.standard_normal(p.shape).astype(np.float32), params)
        for _ in range(steps)
    ]


@functools.cache
def jitted_update(optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    return jax.jit(optax.with_extra_args_support(optimizer).update)


def run(
    optimizer: optax.GradientTransformation, grads: list[Any], params: Any = PARAMS, **extra: Any
) -> tuple[list[Any], Any]:
    """The updates of every step, which are applied to the parameters, and the last state."""
    update = jitted_update(optimizer)
    params = jax.tree.map(jnp.asarray, params)
    state, history = optimizer.init(params), []
    for grad in grads:
        updates, state = update(grad, state, params, **extra)
        params = optax.apply_updates(params, updates)
        history.append(updates)
    return history, state


def assert_close(actual: Any, expected: Any) -> None:
    """Compares two programs, which may round differently in float32.

    An update is a sum of tens of products of numbers of size one, with an error of 1e-6. The
    division by the root of the second moment may amplify it for small entries of a gradient.
    """
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-6)


def soap_state(state: Any) -> soap_optax.ScaleBySoapState:
    """The one `ScaleBySoapState` inside a state."""

    def is_soap(node: Any) -> bool:
        return isinstance(node, soap_optax.ScaleBySoapState)

    [found] = [node for node in jax.tree.leaves(state, is_leaf=is_soap) if is_soap(node)]
    return found


# chain --------------------------------------------------------------------------------------------


@pytest.mark.long
def test_clipping_before_it_is_soap_of_clipped_gradients() -> None:
    grads = gradients()
    clip = optax.clip_by_global_norm(1.0)
    clipped = [clip.update(grad, clip.init(PARAMS))[0] for grad in grads]
    chained, _ = run(optax.chain(clip, soap()), grads)
    assert_close(chained, run(soap(), clipped)[0])
    # Clipping changes SOAP's updates, because the gradients have different norms.
    with pytest.raises(AssertionError):
        assert_close(chained, run(soap(), grads)[0])


def test_clipping_after_it_bounds_what_soap_gives() -> None:
    grads, bound = gradients(), 0.5 * RATE
    plain, _ = run(soap(weight_decay=0.0), grads)
    clipped, _ = run(optax.chain(soap(weight_decay=0.0), optax.clip(bound)), grads)
    assert_close(clipped, jax.tree.map(lambda update: jnp.clip(update, -bound, bound), plain))
    assert max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(plain)) > bound


# inject_hyperparams -------------------------------------------------------------------------------


def test_injected_schedule_is_logged_and_changes_no_update() -> None:
    schedule = optax.linear_schedule(RATE, 0.0, STEPS)
    inject = optax.inject_hyperparams(soap_optax.soap, static_args=soap_optax.STATIC_ARGS)
    injected = inject(learning_rate=schedule, **OPTIONS)
    history, state = run(injected, gradients())
    plain, plain_state = run(soap(schedule), gradients())
    assert_close(history, plain)
    assert_close(soap_state(state), soap_state(plain_state))
    assert float(state.hyperparams["learning_rate"]) == pytest.approx(
        float(jnp.asarray(schedule(STEPS - 1))), rel=1e-6
    )


def test_injected_learning_rate_may_be_changed_between_steps_without_a_new_program() -> None:
    inject = optax.inject_hyperparams(soap_optax.soap, static_args=soap_optax.STATIC_ARGS)
    optimizer = inject(learning_rate=RATE, weight_decay=0.0, **OPTIONS)
    traces = []

    @jax.jit
    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        traces.append(None)
        return optimizer.update(grads, state, params)

    state: Any = optimizer.init(PARAMS)
    factors = [1.0, 0.5, 2.0, 0.0, 1.0, 1.0, 3.0]
    plain, _ = run(soap(weight_decay=0.0), gradients())
    for grad, factor, expected in zip(gradients(), factors, plain, strict=True):
        rate = state.hyperparams["learning_rate"]
        state.hyperparams["learning_rate"] = jnp.full_like(rate, factor * RATE)
        updates, state = update(grad, state, PARAMS)
        assert_close(updates, jax.tree.map(lambda leaf, by=factor: by * leaf, expected))
    assert len(traces) == 1


# masked and partition -----------------------------------------------------------------------------


def test_masked_soap_leaves_the_other_gradients_alone_and_has_no_state_of_them() -> None:
    mask = jax.tree.map(lambda leaf: leaf.ndim == 2, PARAMS)
    optimizer = optax.masked(soap_optax.scale_by_soap(**OPTIONS), mask)
    grads = gradients()
    history, state = run(optimizer, grads)
    matrices = [jax.tree.map(lambda g: g if g.ndim == 2 else None, grad) for grad in grads]
    alone, _ = run(
        soap_optax.scale_by_soap(**OPTIONS),
        matrices,
        jax.tree.map(lambda p: p if p.ndim == 2 else None, PARAMS),
    )
    for updates, expected, grad in zip(history, alone, grads, strict=True):
        np.testing.assert_array_equal(updates["mlp"]["bias"], grad["mlp"]["bias"])
        expected["mlp"]["bias"] = updates["mlp"]["bias"]
        assert_close(updates, expected)
    assert list(soap_state(state).stacks) == ["4x4"]
    assert not soap_state(state).adam


@pytest.mark.usefixtures("implicit_promotion")
@pytest.mark.parametrize("wrapper", ["partition", "multi_transform"])
def test_partition_by_default_labels_is_each_optimizer_on_its_own_leaves(wrapper: str) -> None:
    parts = {"soap": soap(), "adamw": optax.adamw(3 * RATE)}
    # AdamW gets the head, a list under the name *head*, and also the embedding and the bias.
    optimizer = getattr(optax, wrapper)(parts, soap_optax.default_labels)
    labels = soap_optax.default_labels(PARAMS)
    assert jax.tree.leaves(labels) == ["adamw", "adamw", "adamw", "soap"]
    history, state = run(optimizer, gradients())
    for label, part in parts.items():

        def own(tree: Any, label: str = label) -> Any:
            return jax.tree.map(lambda leaf, said: leaf if said == label else None, tree, labels)

        alone, _ = run(part, [own(grad) for grad in gradients()], own(PARAMS))
        assert_close([own(updates) for updates in history], alone)
    assert list(soap_state(state).stacks) == ["4x4"]


# Wrappers that accumulate or drop gradients -------------------------------------------------------


@pytest.mark.usefixtures("implicit_promotion")
def test_multi_steps_is_soap_of_the_mean_gradient_in_every_kth_step() -> None:
    every, grads = 2, gradients(2 * STEPS)
    accumulated, state = run(optax.MultiSteps(soap(), every).gradient_transformation(), grads)
    means = [
        jax.tree.map(lambda a, b: (a + b) / 2, *pair)
        for pair in zip(grads[::2], grads[1::2], strict=True)
    ]
    plain, _ = run(soap(), means)
    assert_close(accumulated[1::2], plain)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(accumulated[::2]))
    assert int(soap_state(state).count) == STEPS


@pytest.mark.long
def test_apply_if_finite_drops_a_bad_step_as_if_it_had_not_been() -> None:
    grads = gradients()
    bad = jax.tree.map(np.copy, grads[0])
    bad["mlp"]["kernel"][1, 2] = np.nan
    optimizer = optax.apply_if_finite(soap(), max_consecutive_errors=3)
    with_bad = [*grads[:4], bad, bad, *grads[4:]]
    history, state = run(optimizer, with_bad)
    plain, plain_state = run(optimizer, grads)
    chex.assert_trees_all_equal([*history[:4], *history[6:]], plain)
    chex.assert_trees_all_equal(state.inner_state, plain_state.inner_state)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(history[4:6]))
    assert int(state.total_notfinite) == 2
    assert int(soap_optax.diagnostics(state)["soap/rejected_gradients"]) == 0


# Averages of parameters ---------------------------------------------------------------------------


@pytest.mark.long
def test_schedule_free_soap_without_a_first_moment_learns() -> None:
    """`b1=0`: schedule-free averaging replaces the first moment."""
    optimizer = optax.contrib.schedule_free(
        soap(0.1, b1=0.0, weight_decay=0.0), learning_rate=0.1, b1=0.9
    )

    @jax.jit
    def step(params: Any, state: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.asarray, PARAMS)
    state = optimizer.init(params)
    for _ in range(60):
        params, state = step(params, state)
    averaged = optax.contrib.schedule_free_eval_params(state, params)
    # With JAX 0.10 the loss falls from 2.65 to 0.30. It could fall to nearly zero: the network can
    # fit 16 random targets.
    assert float(loss(averaged)) < 0.25 * float(loss(PARAMS))
    # Each of three blocks refreshes after the first gradient, and then at every third update.
    assert int(soap_optax.diagnostics(state)["soap/refreshes"]) == 3 * 20


def test_moving_average_of_parameters_is_carried_through_a_scan_beside_the_state() -> None:
    optimizer, decay = soap(), 0.9

    def step(carry: tuple, grad: Any) -> tuple[tuple, Any]:
        params, state, average = carry
        updates, state = optimizer.update(grad, state, params)
        params = optax.apply_updates(params, updates)
        average = optax.incremental_update(params, average, 1 - decay)
        return (params, state, average), params

    params = jax.tree.map(jnp.asarray, PARAMS)
    grads = jax.tree.map(lambda *leaves: jnp.stack(leaves), *gradients())
    (_, state, average), path = jax.lax.scan(step, (params, optimizer.init(params), params), grads)
    expected = jax.tree.map(np.asarray, PARAMS)
    for number in range(STEPS):
        now = jax.tree.map(lambda leaf, number=number: leaf[number], path)
        expected = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, expected, now)
    assert_close(average, expected)
    one_by_one, last = run(optimizer, gradients())
    assert_close(soap_state(state), soap_state(last))
    assert one_by_one


# Learning rates that follow the loss --------------------------------------------------------------


@pytest.mark.usefixtures("implicit_promotion")
def test_reduce_on_plateau_scales_soaps_updates_once_the_loss_stays() -> None:
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=2)
    optimizer = optax.chain(soap(weight_decay=0.0), plateau)
    history, state = run(optimizer, gradients(), value=jnp.float32(1.0))
    plain, _ = run(soap(weight_decay=0.0), gradients())
    scales = [float(updates["mlp"]["kernel"][0, 0]) for updates in history[1:]]
    scales = [
        scale / float(updates["mlp"]["kernel"][0, 0])
        for scale, updates in zip(scales, plain[1:], strict=True)
    ]
    np.testing.assert_allclose(scales, [1.0, 0.5, 0.5, 0.25, 0.25, 0.125], rtol=1e-3)
    assert float(state[1].scale) < 0.2


# Looking into the state ---------------------------------------------------------------------------


def test_look_ups_by_name_find_and_change_what_soap_holds() -> None:
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), soap_optax.scale_by_soap(**OPTIONS))
    _, state = run(optimizer, gradients(3))
    assert int(optax.tree_utils.tree_get(state, "count")) == 3
    assert int(optax.tree_utils.tree_get(state, "layout_version")) == int(
        soap_state(optimizer.init(PARAMS)).layout_version
    )
    stacks = optax.tree_utils.tree_get(state, "stacks")
    assert list(stacks) == ["4x4"]
    for name in ("mu", "nu"):
        found = optax.tree_utils.tree_get_all_with_path(state, name)
        assert len(found) == len(stacks) + 1
    kernel = optax.tree_utils.tree_get(state, "4x4")
    assert kernel.bases[0].shape == (3, 4, 4)
    changed = optax.tree_utils.tree_set(state, count=jnp.int32(7))
    assert int(soap_state(changed).count) == 7
    chex.assert_trees_all_equal(soap_state(changed).stacks, stacks)


def test_tree_map_params_with_the_identity_changes_nothing() -> None:
    optimizer = optax.chain(optax.trace(0.9), soap())
    _, state = run(optimizer, gradients(3))
    chex.assert_trees_all_equal(optax.tree_map_params(optimizer, lambda leaf: leaf, state), state)


def test_tree_map_params_casts_what_mirrors_parameters_and_leaves_soaps_blocks_alone() -> None:
    """No array of SOAP's state belongs to one parameter: it has blocks of several parameters."""
    optimizer = optax.chain(optax.trace(0.9), soap())
    _, state = run(optimizer, gradients(3))
    cast: Any = optax.tree_map_params(optimizer, lambda leaf: leaf.astype(jnp.bfloat16), state)
    assert {leaf.dtype for leaf in jax.tree.leaves(cast[0])} == {jnp.dtype(jnp.bfloat16)}
    chex.assert_trees_all_equal(cast[1], state[1])


def test_tree_map_params_hands_the_whole_blocks_to_transform_non_params() -> None:
    _, state = run(soap(), gradients(3))

    def cast(part: Any) -> Any:
        return jax.tree.map(
            lambda leaf: leaf.astype(jnp.bfloat16) if leaf.dtype == jnp.float32 else leaf, part
        )

    narrow = optax.tree_map_params(soap(), lambda leaf: leaf, state, transform_non_params=cast)
    chex.assert_trees_all_equal_structs(narrow, state)
    chex.assert_trees_all_equal(narrow, cast(state))


# Transformations of the training step -------------------------------------------------------------


def train(optimizer: optax.GradientTransformation, loss: Callable, params: Any) -> tuple[Any, Any]:
    """A whole training run as one scan."""

    def step(carry: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], None]:
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    params = jax.tree.map(jnp.asarray, params)
    return jax.lax.scan(step, (params, optimizer.init(params)), length=STEPS)[0]


@pytest.mark.long
# The test uses float64: a run amplifies the different rounding of a batch twenty times.
@pytest.mark.usefixtures("x64")
def test_training_runs_may_be_mapped_over_seeds() -> None:
    def from_seed(seed: jax.Array) -> Any:
        keys = jax.random.split(jax.random.key(seed), len(jax.tree.leaves(PARAMS)))
        keys = jax.tree.unflatten(jax.tree.structure(PARAMS), list(keys))
        start = jax.tree.map(lambda p, key: 0.5 * jax.random.normal(key, p.shape), PARAMS, keys)
        return train(soap(), loss, start)[0]

    together = jax.jit(jax.vmap(from_seed))(jnp.arange(3))
    for seed in range(3):
        alone = jax.jit(from_seed)(jnp.int32(seed))
        assert_close(jax.tree.map(lambda leaf, seed=seed: leaf[seed], together), alone)


@pytest.mark.long
def test_checkpointed_loss_trains_as_the_loss_itself() -> None:
    plain = jax.jit(lambda params: train(soap(), loss, params))(PARAMS)
    checkpointed = jax.jit(
        lambda params: train(soap(), lambda p: loss(p, wrap=jax.checkpoint), params)
    )(PARAMS)
    assert_close(checkpointed, plain)
    assert float(loss(plain[0])) < float(loss(PARAMS))


def test_schedule_of_the_frequency_changes_the_rhythm_without_a_new_program() -> None:
    """Refreshes at each of the first four updates, and at every third update after them."""
    optimizer = soap(
        precondition_frequency=optax.join_schedules(
            [optax.constant_schedule(1), optax.constant_schedule(3)], [4]
        )
    )
    traces = []

    @jax.jit
    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        traces.append(None)
        return optimizer.update(grads, state, params)

    state, refreshes = optimizer.init(PARAMS), []
    for grad in gradients(12):
        _, state = update(grad, state, PARAMS)
        refreshes.append(int(soap_state(state).stacks["4x4"].refreshes[0]))
    assert refreshes == [0, 1, 2, 3, 4, 4, 4, 5, 5, 5, 6, 6]
    assert len(traces) == 1


def muon_of_matrices(params: Any) -> Any:
    return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(0, 1), params)


@pytest.mark.parametrize("norm", mostly_long([1, 2, np.inf], [2]))
def test_what_divides_an_update_by_its_norm_is_finite_if_the_first_gradient_makes_an_update(
    norm: Any,
) -> None:
    def unit_norm(updates: Any, _params: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf / jnp.linalg.norm(leaf.ravel(), norm), updates)

    finite = {}
    for choice in ("zero", "apply"):
        soap = soap_optax.scale_by_soap(first_update=choice)
        optimizer = optax.chain(soap, optax.stateless(unit_norm))
        update, params = jax.jit(optimizer.update), PARAMS
        state = optimizer.init(params)
        for grads in gradients(3):
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
        finite[choice] = all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    assert finite == {"zero": False, "apply": True}


SAFE_AFTER_A_ZERO_UPDATE: dict[str, optax.GradientTransformation] = {
    "clip": optax.clip(1.0),
    "clip_by_global_norm": optax.clip_by_global_norm(1.0),
    "clip_by_block_rms": optax.clip_by_block_rms(1.0),
    "adaptive_grad_clip": optax.adaptive_grad_clip(0.1),
    "normalize_by_update_norm": optax.normalize_by_update_norm(),
    "scale_by_trust_ratio": optax.scale_by_trust_ratio(),
    "scale_by_param_block_norm": optax.scale_by_param_block_norm(),
    "scale_by_rms": optax.scale_by_rms(),
    "centralize": optax.centralize(),
    "scale_by_muon": optax.contrib.scale_by_muon(
        beta=0.0, nesterov=False, weight_dimension_numbers=muon_of_matrices
    ),
}


@pytest.mark.usefixtures("implicit_promotion")
@pytest.mark.parametrize(
    "name", mostly_long(SAFE_AFTER_A_ZERO_UPDATE, ["clip", "scale_by_trust_ratio", "scale_by_rms"])
)
def test_a_zero_first_update_leaves_parameters_finite_in_transformations_after_it(
    name: str,
) -> None:
    optimizer = optax.chain(soap_optax.scale_by_soap(), SAFE_AFTER_A_ZERO_UPDATE[name])
    update = jax.jit(optimizer.update)
    params: Any = {"kernel": jnp.ones((6, 4))}
    state = optimizer.init(params)
    for call in range(3):
        grads = {
            "kernel": jnp.asarray(np.random.default_rng(call).normal(size=(6, 4)), jnp.float32)
        }
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        assert np.isfinite(params["kernel"]).all()
    assert not np.array_equal(params["kernel"], np.ones((6, 4)))
