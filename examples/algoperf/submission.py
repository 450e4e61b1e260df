# ruff: noqa: ARG001  # The benchmark sets the arguments of the functions.
"""SOAP as a self-tuning JAX submission to the AlgoPerf benchmark.

SOAP for matrices and AdamW for all other parameters, with one setting for all workloads. The batch
and SOAP's state are sharded over all devices, and parameters are replicated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import optax
from algoperf import spec  # pyright: ignore[reportAttributeAccessIssue]  # Of the benchmark.
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import soap_optax

# One setting for all workloads: the ruleset allows no hyperparameters. None of these values was
# tuned on the benchmark.

# The default of SOAP's authors, from language models.
LEARNING_RATE = 3e-3
# Rounded from the benchmark's self-tuning NadamW, as the weight decay is.
ADAMW_LEARNING_RATE = 1.75e-3
WEIGHT_DECAY = 0.08
# AdamW's default. The 0.95 of `soap_adamw` is a choice for language models.
ADAMW_B2 = 0.999
# Share of the step hint. The benchmark's baselines use 0.02 to 0.1.
WARMUP = 0.05
# Share of the peak learning rate after the step hint. Self-tuning submissions may run for 1.5 times
# as long, and at zero they would stand still.
FINAL = 0.01
# The usual limit. It bounds the first gradients, which fill empty factors and moments.
GRADIENT_NORM = 1.0
# The usual value for ImageNet and translation. Speech, MRI and click prediction ignore it.
LABEL_SMOOTHING = 0.1
# The time of a refresh grows with the cube of this length. Without tiles, the longest windows of a
# ResNet-50 would have factors of 4,608 by 4,608.
BLOCK_SIZE = 1024

# Global batch sizes: those of the benchmark's baselines, which fit eight GPUs of 16 GB.
BATCH_SIZES = {
    "cifar": 128,
    "criteo1tb": 262_144,
    "fastmri": 32,
    "imagenet_resnet": 1024,
    "imagenet_vit": 1024,
    "librispeech_conformer": 256,
    "librispeech_deepspeech": 256,
    "mnist": 16,
    "ogbg": 512,
    "wmt": 128,
}

Tree = Any
TrainStep = Callable[..., tuple[Tree, Tree, Tree, dict[str, jax.Array]]]


class Shardings(NamedTuple):
    """How arrays are placed on the devices."""

    batch: NamedSharding  # Also for SOAP's stacks.
    replicated: NamedSharding


def make_shardings() -> Shardings:
    """One mesh axis over all devices."""
    mesh = Mesh(jax.devices(), ("batch",))
    return Shardings(
        NamedSharding(mesh, PartitionSpec("batch")), NamedSharding(mesh, PartitionSpec())
    )


def make_schedule(peak: float, step_hint: int) -> optax.Schedule:
    """Linear warmup, and a cosine that ends at the step hint."""
    warmup = max(1, round(WARMUP * step_hint))
    return optax.warmup_cosine_decay_schedule(
        0.0, peak, warmup, max(step_hint, warmup + 1), FINAL * peak
    )


def make_optimizer(
    step_hint: int, stack_sharding: NamedSharding | None
) -> optax.GradientTransformationExtraArgs:
    """Clipping, then SOAP and AdamW."""
    return optax.chain(
        optax.clip_by_global_norm(GRADIENT_NORM),
        soap_optax.soap_adamw(
            make_schedule(LEARNING_RATE, step_hint),
            adamw_learning_rate=make_schedule(ADAMW_LEARNING_RATE, step_hint),
            adamw_b2=ADAMW_B2,
            weight_decay=WEIGHT_DECAY,
            mask=is_decayed,
            block_size=BLOCK_SIZE,
            stack_sharding=stack_sharding,
        ),
    )


def is_decayed(params: Tree) -> Tree:
    """Weight decay is for matrices, not for biases and scales. Attention's biases have two axes."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.ndim > 1 and "bias" not in jax.tree_util.keystr(path[-1:]), params
    )


def make_loss_fn(workload: spec.Workload) -> Callable[..., tuple[jax.Array, Tree]]:
    """The mean loss of a batch, and the new model state."""

    def loss_fn(params: Tree, model_state: Tree, batch: Tree, rng: jax.Array) -> Any:
        # Dropout has the default rate of each workload.
        logits, model_state = workload.model_fn(
            params, batch, model_state, spec.ForwardPassMode.TRAIN, rng, update_batch_norm=True
        )
        loss = workload.loss_fn(
            label_batch=batch["targets"],
            logits_batch=logits,
            mask_batch=batch.get("weights"),
            label_smoothing=LABEL_SMOOTHING,
        )
        return loss["summed"] / loss["n_valid_examples"], model_state

    return loss_fn


def make_train_step(
    workload: spec.Workload,
    optimizer: optax.GradientTransformationExtraArgs,
    state_shardings: Tree,
    shardings: Shardings,
) -> TrainStep:
    """One step, for `jit`. The batch is sharded, so XLA sums gradients over all devices."""
    loss_and_grads = jax.value_and_grad(make_loss_fn(workload), has_aux=True)
    replicated = shardings.replicated

    def train_step(state: Tree, params: Tree, model_state: Tree, batch: Tree, rng: Any) -> Any:
        (loss, model_state), grads = loss_and_grads(params, model_state, batch, rng)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return state, params, model_state, {"loss": loss, "grad_norm": optax.tree.norm(grads)}

    return jax.jit(
        train_step,
        donate_argnums=(0, 1, 2),
        in_shardings=(state_shardings, replicated, replicated, shardings.batch, replicated),
        out_shardings=(state_shardings, replicated, replicated, replicated),
    )


# The functions below are the benchmark's interface.


def init_optimizer_state(
    workload: spec.Workload,
    model_params: spec.ParameterContainer,
    model_state: spec.ModelAuxiliaryState,
    hyperparameters: None,
    rng: spec.RandomState,
) -> tuple[Tree, TrainStep]:
    """Returns the state and the train step.

    The benchmark saves the first of two values in its checkpoints, and keeps the second.
    """
    shardings = make_shardings()
    optimizer = make_optimizer(workload.step_hint, stack_sharding=shardings.batch)
    abstract = jax.eval_shape(optimizer.init, model_params)
    # SOAP's stacks are sharded, and AdamW's moments are replicated as the parameters are.
    state_shardings = soap_optax.state_shardings(abstract, shardings.batch)
    state = jax.jit(optimizer.init, out_shardings=state_shardings)(model_params)
    return state, make_train_step(workload, optimizer, state_shardings, shardings)


def update_params(
    workload: spec.Workload,
    current_param_container: spec.ParameterContainer,
    current_params_types: spec.ParameterTypeTree,
    model_state: spec.ModelAuxiliaryState,
    hyperparameters: None,
    batch: dict[str, spec.Tensor],
    loss_type: spec.LossType,
    optimizer_state: tuple[Tree, TrainStep],
    eval_results: list[tuple[int, float]],
    global_step: int,
    rng: spec.RandomState,
    train_state: dict[str, Any] | None = None,
) -> tuple[tuple[Tree, TrainStep], spec.ParameterContainer, spec.ModelAuxiliaryState]:
    """Takes one step, and logs the loss in every hundredth."""
    if global_step == 0:
        # Some workloads return parameters on one device. The step would then compile twice.
        current_param_container, model_state = jax.device_put(
            (current_param_container, model_state), make_shardings().replicated
        )
    state, train_step = optimizer_state
    state, params, model_state, scalars = train_step(
        state, current_param_container, model_state, batch, rng
    )
    if global_step % 100 == 0 and workload.metrics_logger is not None:
        scalars = {name: value.item() for name, value in scalars.items()}
        workload.metrics_logger.append_scalar_metrics(scalars, global_step)
    return (state, train_step), params, model_state


def prepare_for_eval(
    workload: spec.Workload,
    current_param_container: spec.ParameterContainer,
    current_params_types: spec.ParameterTypeTree,
    model_state: spec.ModelAuxiliaryState,
    hyperparameters: None,
    loss_type: spec.LossType,
    optimizer_state: tuple[Tree, TrainStep],
    eval_results: list[tuple[int, float]],
    global_step: int,
    rng: spec.RandomState,
) -> tuple[tuple[Tree, TrainStep], spec.ParameterContainer, spec.ModelAuxiliaryState]:
    """Evaluates the parameters as they are."""
    return optimizer_state, current_param_container, model_state


def get_batch_size(workload_name: str) -> int:
    """The global batch size of a workload."""
    if workload_name not in BATCH_SIZES:
        # The benchmark then asks again, for the workload that a variant is based on.
        raise ValueError(
            f"workload_name must be one of {', '.join(BATCH_SIZES)}, got {workload_name!r}"
        )
    return BATCH_SIZES[workload_name]


def data_selection(
    workload: spec.Workload,
    input_queue: Iterator[dict[str, spec.Tensor]],
    optimizer_state: tuple[Tree, TrainStep],
    current_param_container: spec.ParameterContainer,
    model_state: spec.ModelAuxiliaryState,
    hyperparameters: None,
    global_step: int,
    rng: spec.RandomState,
) -> dict[str, spec.Tensor]:
    """Takes the next batch of the benchmark's shuffled queue."""
    return next(input_queue)
