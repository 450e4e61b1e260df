"""Checkpoints: Orbax restores every bit, a killed run loses nothing, errors name the leaf.

Runs that are killed, or need a number of devices, are processes: see `checkpointed_run`.
"""

import pathlib
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from helpers import checkpointed_run
from helpers.cases import mostly_long, named
from helpers.checkpointed_run import Event, start

import soap_optax
from soap_optax import check_checkpoint

FREQUENCY = 4

OPTIMIZERS = {
    "chain with a schedule": optax.chain(
        optax.clip_by_global_norm(1.0),
        soap_optax.soap(optax.cosine_decay_schedule(1e-2, 100), precondition_frequency=FREQUENCY),
    ),
    "injected hyperparameters, tiles, narrow first moment": optax.inject_hyperparams(
        soap_optax.soap, static_args=soap_optax.STATIC_ARGS
    )(1e-2, precondition_frequency=FREQUENCY, block_size=4, mu_dtype=jnp.bfloat16),
    "least state": soap_optax.soap(
        1e-2,
        precondition_frequency=FREQUENCY,
        one_sided=True,
        factored=True,
        preconditioner_dtype=jnp.bfloat16,
        fold_factors=True,
    ),
    "soap_adamw": soap_optax.soap_adamw(1e-2, precondition_frequency=FREQUENCY),
    "KL factors": soap_optax.soap(1e-2, precondition_frequency=FREQUENCY, factor_estimator="kl"),
    "Shampoo": soap_optax.shampoo(1e-2, precondition_frequency=FREQUENCY, block_size=4),
    "KL-Shampoo, least state": soap_optax.shampoo(
        1e-2,
        precondition_frequency=FREQUENCY,
        factor_estimator="kl",
        grafting=None,
        mu_dtype=jnp.bfloat16,
        preconditioner_dtype=jnp.bfloat16,
        fold_factors=True,
    ),
}


def kernels_and_bias() -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    shapes = {"first": (6, 4), "second": (6, 4), "bias": (4,)}
    return {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}


def open_manager(directory: pathlib.Path) -> ocp.CheckpointManager:
    # With this handler, `item_metadata` also works in a process that saved nothing.
    return ocp.CheckpointManager(directory, item_handlers=ocp.StandardCheckpointHandler())


def save(manager: ocp.CheckpointManager, step: int, state: Any) -> None:
    manager.save(step, args=ocp.args.StandardSave(state))
    manager.wait_until_finished()


def restore(manager: ocp.CheckpointManager, step: int, initial_state: Callable[[], Any]) -> Any:
    """The saved state, in the form of `initial_state`; only the shapes of that are used."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = checkpointed_run.target(initial_state, sharding)
    return manager.restore(step, args=ocp.args.StandardRestore(target))


def assert_same_bits(found: Any, wanted: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    wanted_leaves = jax.tree.leaves(wanted)
    for (path, leaf), other in zip(
        jax.tree_util.tree_leaves_with_path(found), wanted_leaves, strict=True
    ):
        where = jax.tree_util.keystr(path)
        assert (leaf.dtype, leaf.shape) == (other.dtype, other.shape), where
        assert np.asarray(leaf).tobytes() == np.asarray(other).tobytes(), where


# Saving and restoring.


@pytest.mark.parametrize(
    "optimizer",
    mostly_long(named(OPTIMIZERS), ["injected hyperparameters, tiles, narrow first moment"]),
)
def test_a_run_resumed_anywhere_in_a_refresh_cycle_is_the_uninterrupted_one(
    optimizer: optax.GradientTransformationExtraArgs, tmp_path: pathlib.Path
) -> None:
    def initial_state() -> dict[str, Any]:
        params = kernels_and_bias()
        return {"params": params, "opt_state": optimizer.init(params)}

    @jax.jit
    def step(state: dict[str, Any], grads: Any) -> dict[str, Any]:
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}

    def run(state: dict[str, Any], first: int, last: int) -> Iterator[dict[str, Any]]:
        for call in range(first, last):
            rng = np.random.default_rng(call)
            grads = {
                name: rng.normal(size=leaf.shape).astype(np.float32)
                for name, leaf in state["params"].items()
            }
            if call == 3:
                grads["second"][0] = np.nan  # Rejected, and counted.
            state = step(state, grads)
            yield state

    last_call = 10
    states = list(run(initial_state(), 0, last_call))
    ages = set()
    with open_manager(tmp_path) as manager:
        for call in range(5, 5 + FREQUENCY):
            saved = states[call - 1]
            stacks = optax.tree.get(saved["opt_state"], "stacks")
            ages |= {int(age) for stack in stacks.values() for age in stack.age}
            save(manager, call, saved)
            restored = restore(manager, call, initial_state)
            assert_same_bits(restored, saved)
            *_, resumed = run(restored, call, last_call)
            assert_same_bits(resumed, states[-1])
    assert ages == set(range(1, FREQUENCY + 1))  # From just refreshed to due in the next call.


def test_orbax_keeps_every_bit_of_every_dtype_that_a_state_may_have(
    x64: None, tmp_path: pathlib.Path
) -> None:
    optimizer = soap_optax.soap(1e-2, mu_dtype=jnp.bfloat16)
    params = {
        f"{name} in {dtype}": jnp.zeros(shape, dtype)
        for name, shape in {"kernel": (6, 4), "bias": (4,)}.items()
        for dtype in ("float64", "float32", "bfloat16")
    }
    rng = np.random.default_rng(0)

    def random_bits(leaf: jax.ShapeDtypeStruct) -> jax.Array:  # NaN and subnormals among them.
        bits = rng.bytes(leaf.size * leaf.dtype.itemsize)
        return jnp.asarray(np.frombuffer(bits, leaf.dtype).reshape(leaf.shape))

    def initial_state() -> Any:
        return optimizer.init(params)

    state = jax.tree.map(random_bits, jax.eval_shape(initial_state))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} == {
        *("float64", "float32", "bfloat16", "int32"),
    }
    with open_manager(tmp_path) as manager:
        save(manager, 0, state)
        restored = restore(manager, 0, initial_state)
    assert_same_bits(restored, state)


# Errors for checkpoints that do not fit.


def training_state(params: Any, **options: Any) -> dict[str, Any]:
    return {"params": params, "opt_state": soap_optax.soap(1e-2, **options).init(params)}


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One training state, in all forms of a checkpoint that a user may have."""
    state = training_state(kernels_and_bias())
    directory = tmp_path_factory.mktemp("checkpoints")
    with open_manager(directory) as manager:
        save(manager, 0, state)
    with open_manager(directory) as manager:
        return {
            "arrays": state,
            "metadata": manager.item_metadata(0).tree,
            "restored": restore(manager, 0, lambda: state),
            "restored without a target": manager.restore(0, args=ocp.args.StandardRestore()),
        }


FORMS = ["arrays", "metadata", "restored", "restored without a target"]


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_fits_the_program_that_wrote_it(form: str, forms: dict[str, Any]) -> None:
    state = forms["arrays"]
    check_checkpoint(forms[form], state)
    check_checkpoint(forms[form], jax.eval_shape(lambda: state))
    check_checkpoint(forms[form]["opt_state"], state["opt_state"])


MISFITS: dict[str, tuple[Callable[[], Any], str]] = {
    "one block more": (
        lambda: training_state({**kernels_and_bias(), "third": jnp.ones((6, 4))}),
        "opt_state/0/stacks/6x4/accepted_gradients as (2,) int32 where (3,) int32 is expected "
        "(and 11 more, the last params/third as nothing where (6, 4) float32 is expected)",
    ),
    "another shape": (
        lambda: training_state({**kernels_and_bias(), "bias": jnp.ones(5)}),
        "opt_state/0/adam/float32/mu as (4,) float32 where (5,) float32 is expected "
        "(and 2 more, the last params/bias as (4,) float32 where (5,) float32 is expected)",
    ),
    "tiles": (
        lambda: training_state(kernels_and_bias(), block_size=3),
        "opt_state/0/stacks/6x4/accepted_gradients as (2,) int32 where nothing is expected "
        "(and 21 more, the last opt_state/0/stacks/3x2/rejected_refreshes as nothing where (8,) "
        "int32 is expected)",
    ),
    "narrow first moment": (
        lambda: training_state(kernels_and_bias(), mu_dtype=jnp.bfloat16),
        "opt_state/0/stacks/6x4/mu as (2, 6, 4) float32 where (2, 6, 4) bfloat16 is expected "
        "(and 1 more, the last opt_state/0/adam/float32/mu as (4,) float32 where (4,) "
        "bfloat16 is expected)",
    ),
    "narrow preconditioner": (
        lambda: training_state(kernels_and_bias(), preconditioner_dtype=jnp.bfloat16),
        "opt_state/0/stacks/6x4/factors/0 as (2, 6, 6) float32 where (2, 6, 6) bfloat16 is "
        "expected (and 3 more, the last opt_state/0/stacks/6x4/bases/1 as (2, 4, 4) float32 where "
        "(2, 4, 4) bfloat16 is expected)",
    ),
    "folded factors": (
        lambda: training_state(kernels_and_bias(), fold_factors=True),
        "opt_state/0/stacks/6x4/factors/0 as (2, 6, 6) float32 where (2, 3, 7) float32 is "
        "expected (and 1 more, the last opt_state/0/stacks/6x4/factors/1 as (2, 4, 4) float32 "
        "where (2, 2, 5) float32 is expected)",
    ),
    "KL factors": (
        lambda: training_state(kernels_and_bias(), factor_estimator="kl"),
        "opt_state/0/stacks/6x4/eigenvalues/0 as nothing where (2, 6) float32 is expected "
        "(and 1 more, the last opt_state/0/stacks/6x4/eigenvalues/1 as nothing where (2, 4) "
        "float32 is expected)",
    ),
    "marginals of the second moment": (
        lambda: training_state(kernels_and_bias(), factored=True),
        "opt_state/0/stacks/6x4/nu as (2, 6, 4) float32 where nothing is expected (and 2 more, the "
        "last opt_state/0/stacks/6x4/nu/1 as nothing where (2, 4) float32 is expected)",
    ),
    "one parameter that should not be there": (
        lambda: (
            (state := training_state(kernels_and_bias()))
            | {"params": {name: state["params"][name] for name in ("first", "bias")}}
        ),
        "params/second as (6, 4) float32 where nothing is expected; likely",
    ),
    "another name, which the optimizer's state cannot show": (
        lambda: (
            (state := training_state(kernels_and_bias()))
            | {
                "params": {
                    {"first": "fourth"}.get(k, k): leaf for k, leaf in state["params"].items()
                }
            }
        ),
        "params/first as (6, 4) float32 where nothing is expected (and 1 more, the last "
        "params/fourth as nothing where (6, 4) float32 is expected)",
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("expected", "message"), MISFITS.values(), ids=MISFITS)
def test_a_checkpoint_of_another_model_raises_with_the_leaf_that_differs(
    expected: Callable[[], Any], message: str, form: str, forms: dict[str, Any]
) -> None:
    beginning = "checkpoint must have the leaves of expected, got "
    with pytest.raises(ValueError, match="^" + re.escape(beginning + message)):
        check_checkpoint(forms[form], jax.eval_shape(expected))


def test_the_error_names_every_option_that_decides_shapes_and_dtypes() -> None:
    decide_numbers = {"mask", "normalize_grads", "correct_bias", "refresh", "refresh_order"}
    decide_numbers |= {"first_update", "stagger", "precision", "param_shardings"}
    with pytest.raises(ValueError, match="use those of the run that wrote it") as caught:
        check_checkpoint({}, {"leaf": jnp.zeros(3)})
    for option in set(soap_optax.STATIC_ARGS) - decide_numbers:
        assert re.search(rf"\b{option}\b", str(caught.value)), option


def test_a_checkpoint_of_another_layout_raises_with_its_version(tmp_path: pathlib.Path) -> None:
    params = kernels_and_bias()
    optimizer = optax.partition(
        {"soap": soap_optax.soap(1e-2), "adamw": optax.adamw(1e-2)},
        {"first": "soap", "second": "adamw", "bias": "adamw"},
    )

    def other_version(path: Any, leaf: jax.Array) -> jax.Array:
        return jnp.full_like(leaf, 7) if "layout_version" in jax.tree_util.keystr(path) else leaf

    initial = optimizer.init(params)
    state = jax.tree_util.tree_map_with_path(other_version, initial)
    with open_manager(tmp_path) as manager:
        save(manager, 0, state)
        check_checkpoint(manager.item_metadata(0).tree, initial)  # Metadata has no values,
        jax.eval_shape(lambda traced: check_checkpoint(traced, initial), state)  # nor has a trace.
        restored = [
            restore(manager, 0, lambda: initial),
            manager.restore(0, args=ocp.args.StandardRestore()),
        ]
    message = "layout version 1.*got 7 at inner_states/soap/.*/layout_version; restore it with"
    for checkpoint in restored:
        with pytest.raises(ValueError, match=message):
            check_checkpoint(checkpoint, initial)
        with pytest.raises(ValueError, match=message):  # The version is the cause.
            check_checkpoint(checkpoint, {"something": "else"})


@pytest.mark.usefixtures("implicit_promotion")
def test_the_state_of_an_nnx_optimizer_is_checked_as_any_other() -> None:
    model = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
    state = nnx.state(nnx.Optimizer(model, soap_optax.soap(1e-2), wrt=nnx.Param))
    check_checkpoint(state, state)
    other = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf + ("layout_version" in jax.tree_util.keystr(path)), state
    )
    with pytest.raises(ValueError, match=r"layout version 1.*got 2 at opt_state/0/layout_version"):
        check_checkpoint(other, state)


def test_numbers_and_random_keys_may_be_stored_in_another_form(tmp_path: pathlib.Path) -> None:
    def initial_state() -> dict[str, Any]:
        return {"step": 3, "loss": 0.5, "key": jax.random.key(0), "ema": jnp.zeros(2)}

    state = initial_state()
    with open_manager(tmp_path) as manager:
        save(manager, 0, state)
        metadata = manager.item_metadata(0).tree
    for expected in (state, jax.eval_shape(initial_state)):
        check_checkpoint(metadata, expected)
        with pytest.raises(ValueError, match=r"got step as nothing where \(\) int"):
            check_checkpoint({"loss": 0.5, "key": state["key"], "ema": state["ema"]}, expected)


# Killing a run, and moving it between devices.


def digests(events: Iterable[Event]) -> dict[int, str]:
    return {event.step: event.digest for event in events if event.digest}


# A run is killed after one of these events: before the first step, while that compiles; between two
# steps; while a checkpoint is written; after that. The number of events varies, too.
KILLED_AFTER = [
    (kind, 1 if kind == "resumed" else times)
    for times in (1, 2, 3, 1, 2)
    for kind in ("resumed", "stepped", "saving", "saved")
]


@pytest.mark.long
@pytest.mark.parametrize("kills", [4, len(KILLED_AFTER)])
def test_a_run_killed_many_times_loses_nothing_that_was_saved(
    kills: int, compiled: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    rng = random.Random(0)
    steps = 300  # Several times as many as the killed run takes, but done in seconds.
    uninterrupted = digests(start(tmp_path / "alone", compiled, steps, steps).finish())
    directory = tmp_path / "killed"
    begun, saved, left_incomplete = 0, 0, 0
    for kind, times in KILLED_AFTER[:kills]:
        run = start(directory, compiled, steps, steps_per_checkpoint=3)
        events = run.until(kind, times)
        if kind != "saving":  # A step takes some milliseconds, a checkpoint some dozens.
            time.sleep(rng.uniform(0, 0.03))
        events += run.kill()
        assert events[0].kind == "resumed"
        assert events[0].step >= saved
        assert digests(events).items() <= uninterrupted.items()
        left_incomplete += events[0].step < begun
        begun = max([0, *(event.step for event in events if event.kind == "saving")])
        saved = max([saved, *(event.step for event in events if event.kind == "saved")])
    assert left_incomplete > 0
    last = start(directory, compiled, saved + 10, steps_per_checkpoint=3).finish()
    assert last[0].step >= saved > 0
    assert last[-1] == Event("saved", saved + 10)
    assert digests(last).items() <= uninterrupted.items()


@pytest.mark.long
def test_a_run_moves_from_eight_devices_to_four_to_one(
    compiled: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    steps = 18
    stayed, moved = tmp_path / "stayed", tmp_path / "moved"
    start(stayed, compiled, steps, steps, devices=8).finish()
    digest = None
    for devices, last in ((8, 6), (4, 11), (1, steps)):
        events = start(moved, compiled, last, steps, devices=devices).finish()
        # Fewer devices restore every bit of the saved state.
        assert digest in (None, events[0].digest)
        digest = digests(events)[last]

    def parameters(directory: pathlib.Path) -> list[np.ndarray]:
        with open_manager(directory) as manager:
            state = restore(manager, steps, checkpointed_run.initial_state)
        return jax.tree.leaves(jax.device_get(state["params"]))

    # Another number of devices adds the gradients of the batch in another order. That moves
    # parameters, which are below 1, by about the spacing of float32, 1.2e-7. Later steps keep the
    # difference: 2e-7 was seen at the end. A run that lost its first moment was off by 2e-2.
    for found, wanted in zip(parameters(moved), parameters(stayed), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
