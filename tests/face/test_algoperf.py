"""The AlgoPerf submission, in a small stand-in for the benchmark."""

import functools
import importlib.util
import inspect
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import optax
import pytest

from tests.helpers import algoperf_stand_in as stand_in
from tests.helpers.algoperf_stand_in import Run

PATH = Path(__file__).parents[2] / "examples" / "algoperf" / "submission.py"
STEPS = 102
BATCH_SIZE = 16


@pytest.fixture(scope="module")
def submission() -> Iterator[ModuleType]:
    """The submission, imported beside a stand-in for `algoperf`.

    Models and Optax promote implicitly, as in the benchmark.
    """
    with (
        pytest.MonkeyPatch.context() as patch,
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        for name, module in stand_in.modules().items():
            patch.setitem(sys.modules, name, module)
        spec = importlib.util.spec_from_file_location("submission", PATH)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        # The submission's rates are for thousands of steps.
        patch.setattr(module, "LEARNING_RATE", 0.1)
        patch.setattr(module, "ADAMW_LEARNING_RATE", 0.03)
        yield module


@pytest.fixture(scope="module")
def calls() -> list[dict[str, Any]]:
    """The arguments of the first calls of `update_params`, filled by `trained`."""
    return []


@pytest.fixture(scope="module")
def trained(submission: ModuleType, calls: list[dict[str, Any]]) -> Run:
    """One run on all devices, which several tests look at."""
    update_params = submission.update_params

    @functools.wraps(update_params)
    def recording(**arguments: Any) -> Any:
        if len(calls) < 5:
            names = ("current_param_container", "model_state", "batch", "rng")
            calls.append({name: jax.device_get(arguments[name]) for name in names})
        return update_params(**arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(submission, "update_params", recording)
        return stand_in.train(submission, stand_in.Workload(STEPS), STEPS, eval_every=STEPS // 2)


@pytest.mark.parametrize("name", stand_in.INTERFACE)
def test_functions_have_the_arguments_of_the_interface(submission: ModuleType, name: str) -> None:
    assert (
        tuple(inspect.signature(getattr(submission, name)).parameters) == stand_in.INTERFACE[name]
    )


@pytest.mark.long
def test_the_loss_falls(trained: Run) -> None:
    assert [step for step, _ in trained.eval_results] == [STEPS // 2, STEPS]
    # Eight classes: a guess has the loss log(8) = 2.08, and 1 of 8 guesses is right.
    assert trained.eval_results[-1][1]["loss"] < 1.5
    assert trained.eval_results[-1][1]["accuracy"] > 0.5


@pytest.mark.long
def test_loss_and_gradient_norm_are_logged_in_every_hundredth_step(trained: Run) -> None:
    assert [step for step, _ in trained.logged] == [0, 100]
    assert all(set(row) == {"loss", "grad_norm"} for _, row in trained.logged)


@pytest.mark.long
def test_matrices_get_soap_and_vectors_get_adamw(trained: Run) -> None:
    state, _ = trained.optimizer_state
    # The kernels of the convolution and the classifier, as two blocks, padded to all devices.
    stacks = optax.tree.get(state, "stacks")
    assert {shape: stack.mu.shape for shape, stack in stacks.items()} == {
        "8x8": (jax.device_count(), 8, 8)
    }
    adamw = optax.tree.get(state, "inner_states")["adamw"]
    vectors = [leaf.shape for leaf in jax.tree.leaves(adamw) if leaf.ndim]
    assert vectors == [(8,)] * 6  # Two moments of the norm's scale and bias, and of a bias.


def test_only_matrices_decay(submission: ModuleType) -> None:
    matrix, bias, vector = np.zeros((2, 3)), np.zeros((2, 3)), np.zeros(3)
    params = {"query": {"kernel": matrix, "bias": bias}, "norm": {"scale": vector}}
    decayed = {"query": {"kernel": True, "bias": False}, "norm": {"scale": False}}
    assert submission.is_decayed(params) == decayed


@pytest.mark.long
def test_each_device_has_its_own_blocks_and_a_copy_of_everything_else(trained: Run) -> None:
    state, _ = trained.optimizer_state
    stack = optax.tree.get(state, "stacks")["8x8"]
    for leaf in (stack.mu, *stack.factors, *stack.bases):
        assert [shard.data.shape[0] for shard in leaf.addressable_shards] == [1] * 8
    for leaf in jax.tree.leaves((trained.params, trained.model_state)):
        assert leaf.sharding.num_devices == jax.device_count() == 8
        assert leaf.sharding.is_fully_replicated


@pytest.mark.long
def test_the_step_compiles_once(trained: Run) -> None:
    _, train_step = trained.optimizer_state
    assert train_step._cache_size() == 1


@pytest.mark.long
def test_a_resumed_run_is_the_uninterrupted_one(trained: Run, submission: ModuleType) -> None:
    resumed = stand_in.train(
        submission, stand_in.Workload(STEPS), STEPS, eval_every=STEPS // 2, resumed_at=30
    )
    for name in ("params", "model_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(resumed, name), getattr(trained, name))
    jax.tree.map(
        np.testing.assert_array_equal, resumed.optimizer_state[0], trained.optimizer_state[0]
    )
    stack = optax.tree.get(resumed.optimizer_state[0], "stacks")["8x8"]
    assert [shard.data.shape[0] for shard in stack.mu.addressable_shards] == [1] * 8
    assert resumed.optimizer_state[1] is not trained.optimizer_state[1]  # It was made anew.


@pytest.mark.long
def test_eight_devices_take_the_steps_of_one_device(
    trained: Run, submission: ModuleType, calls: list[dict[str, Any]]
) -> None:
    """Written out without shardings: parameters and batch statistics before each step."""
    workload = stand_in.Workload(STEPS)
    optimizer = submission.make_optimizer(STEPS, stack_sharding=None)

    @jax.jit
    def step(params: Any, model_state: Any, state: Any, batch: Any, rng: Any) -> Any:
        def loss_fn(params: Any) -> Any:
            mode = stand_in.ForwardPassMode.TRAIN
            logits, new = workload.model_fn(params, batch, model_state, mode, rng, True, 0.1)
            loss = workload.loss_fn(batch["targets"], logits, label_smoothing=0.1)["per_example"]
            return loss[:-1].mean(), new  # The last example has weight 0.

        grads, model_state = jax.grad(loss_fn, has_aux=True)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), model_state, state

    params, model_state = calls[0]["current_param_container"], calls[0]["model_state"]
    state = jax.jit(optimizer.init)(params)
    for before, after in itertools.pairwise(calls):
        params, model_state, state = step(
            params, model_state, state, before["batch"], before["rng"]
        )
        # Sums on eight devices round differently in float32, and bases and Adam's division amplify
        # it to 1e-4. A missing shard or a wrong weight moves parameters by a share of 0.1.
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-3),
            (after["current_param_container"], after["model_state"]),
            jax.device_get((params, model_state)),
        )
    first = calls[0]["current_param_container"]
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), jax.device_get(params), first)
    assert min(jax.tree.leaves(moved)) > 0.01


def test_evaluation_gets_what_training_returned(submission: ModuleType) -> None:
    arguments = dict.fromkeys(stand_in.INTERFACE["prepare_for_eval"])
    own = {"optimizer_state": 1, "current_param_container": 2, "model_state": 3}
    assert submission.prepare_for_eval(**{**arguments, **own}) == (1, 2, 3)


def test_a_variant_of_a_workload_is_left_to_its_base(submission: ModuleType) -> None:
    assert submission.get_batch_size("mnist") == BATCH_SIZE
    with pytest.raises(ValueError, match=r"workload_name must be one of .*'imagenet_resnet_silu'"):
        submission.get_batch_size("imagenet_resnet_silu")
