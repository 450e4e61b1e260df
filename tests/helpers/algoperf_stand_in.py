"""A small stand-in for the AlgoPerf benchmark: `algoperf.spec`, a workload, and the runner's loop.

It has the names, the arguments and the calls of the benchmark at commit 2c90454 of September 2025,
as far as a JAX submission meets them.
"""

import enum
import inspect
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, serialization
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Tree = Any


class ForwardPassMode(enum.Enum):
    TRAIN = 0
    EVAL = 1


class LossType(enum.Enum):
    SOFTMAX_CROSS_ENTROPY = 0


class ParameterType(enum.Enum):
    WEIGHT = 0
    BIAS = 1
    CONV_WEIGHT = 2
    BATCH_NORM_SCALE = 3
    BATCH_NORM_BIAS = 4


class ShapeTuple:
    """A shape that is a leaf of a tree."""

    def __init__(self, shape_tuple: tuple[int, ...]) -> None:
        self.shape_tuple = shape_tuple


_CURRENT = ("current_param_container", "current_params_types", "model_state", "hyperparameters")
_TRAINING = ("loss_type", "optimizer_state", "eval_results", "global_step", "rng")
INTERFACE = {
    "init_optimizer_state": ("workload", "model_params", "model_state", "hyperparameters", "rng"),
    "update_params": ("workload", *_CURRENT, "batch", *_TRAINING, "train_state"),
    "prepare_for_eval": ("workload", *_CURRENT, *_TRAINING),
    "get_batch_size": ("workload_name",),
    "data_selection": (
        *("workload", "input_queue", "optimizer_state", "current_param_container", "model_state"),
        *("hyperparameters", "global_step", "rng"),
    ),
}


def modules() -> dict[str, types.ModuleType]:
    """The modules that a submission imports, by their names in `sys.modules`."""
    package, spec = types.ModuleType("algoperf"), types.ModuleType("algoperf.spec")
    for kind in (ForwardPassMode, LossType, ParameterType, ShapeTuple, Workload):
        setattr(spec, kind.__name__, kind)
    package.__dict__["spec"] = spec
    return {"algoperf": package, "algoperf.spec": spec}


CLASSES, SIDE, CHANNELS = 8, 2, 2


class Net(linen.Module):
    """A convolution, batch normalization, dropout and a classifier.

    SOAP has blocks of one shape only, 8x8, which compiles fast.
    """

    @linen.compact
    def __call__(self, x: jax.Array, train: bool, update_batch_norm: bool, rate: Any) -> jax.Array:
        x = linen.Conv(8, (2, 2), padding="VALID", use_bias=False)(x)
        x = linen.BatchNorm(use_running_average=not update_batch_norm, momentum=0.9)(x)
        x = linen.relu(x).reshape(-1, 8)
        x = linen.Dropout(rate, deterministic=not train)(x)
        return linen.Dense(CLASSES)(x)


class MetricsLogger:
    """Keeps what a submission logs."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def append_scalar_metrics(self, metrics: dict[str, float], global_step: int) -> None:
        assert all(isinstance(value, float) for value in metrics.values())
        self.rows.append((global_step, metrics))


class Workload:
    """Images of eight classes. Each class has a pattern, under noise."""

    loss_type = LossType.SOFTMAX_CROSS_ENTROPY

    def __init__(self, step_hint: int, dropout_rate: float = 0.1) -> None:
        self.step_hint = step_hint
        self.metrics_logger = MetricsLogger()
        self.dropout_rate = dropout_rate
        self._model = Net()
        self._param_shapes: Tree = None

    @property
    def param_shapes(self) -> Tree:
        assert self._param_shapes is not None, "init_model_fn comes first"
        return self._param_shapes

    @property
    def model_params_types(self) -> Tree:
        """The benchmark's keys are in lower case, unlike those of the parameters."""
        return {
            "conv_0": {"kernel": ParameterType.CONV_WEIGHT},
            "batchnorm_0": {
                "bias": ParameterType.BATCH_NORM_BIAS,
                "scale": ParameterType.BATCH_NORM_SCALE,
            },
            "dense_0": {"bias": ParameterType.BIAS, "kernel": ParameterType.WEIGHT},
        }

    def is_output_params(self, param_key: str) -> bool:
        return param_key == "Dense_0"

    def init_model_fn(self, rng: jax.Array) -> tuple[Tree, Tree]:
        """On one device, as in the benchmark's `mnist`."""
        images = jnp.ones((1, SIDE, SIDE, CHANNELS))
        variables = jax.jit(lambda rng: self._model.init(rng, images, False, False, 0.0))(rng)
        self._param_shapes = jax.tree.map(lambda x: ShapeTuple(x.shape), variables["params"])
        return variables["params"], {"batch_stats": variables["batch_stats"]}

    def model_fn(
        self,
        params: Tree,
        augmented_and_preprocessed_input_batch: Tree,
        model_state: Tree,
        mode: ForwardPassMode,
        rng: jax.Array,
        update_batch_norm: bool,
        dropout_rate: float | None = None,
    ) -> tuple[jax.Array, Tree]:
        logits, updated = self._model.apply(
            {"params": params, **model_state},
            augmented_and_preprocessed_input_batch["inputs"],
            mode == ForwardPassMode.TRAIN,
            update_batch_norm,
            self.dropout_rate if dropout_rate is None else dropout_rate,
            rngs={"dropout": rng},
            mutable=["batch_stats"],
        )
        return logits, updated if update_batch_norm else model_state

    def loss_fn(
        self,
        label_batch: jax.Array,
        logits_batch: jax.Array,
        mask_batch: jax.Array | None = None,
        label_smoothing: float = 0.0,
    ) -> dict[str, jax.Array]:
        targets = optax.smooth_labels(jax.nn.one_hot(label_batch, CLASSES), label_smoothing)
        losses = -jnp.sum(targets * jax.nn.log_softmax(logits_batch), axis=-1)
        mask = jnp.ones_like(losses) if mask_batch is None else mask_batch
        losses *= mask
        return {"summed": losses.sum(), "n_valid_examples": mask.sum(), "per_example": losses}

    def build_input_queue(self, rng: jax.Array, batch_size: int) -> Iterator[dict[str, jax.Array]]:
        """Batches, sharded over all devices. The last example of each has weight 0."""
        draw = np.random.default_rng(np.asarray(rng))
        patterns = np.random.default_rng(0).normal(size=(CLASSES, SIDE, SIDE, CHANNELS))
        sharding = NamedSharding(Mesh(jax.devices(), ("batch",)), PartitionSpec("batch"))
        weights = np.ones(batch_size, np.float32)
        weights[-1] = 0
        while True:
            targets = draw.integers(CLASSES, size=batch_size, dtype=np.int32)
            noise = draw.normal(scale=0.3, size=(batch_size, SIDE, SIDE, CHANNELS))
            inputs = np.float32(patterns[targets] + noise)
            batch = {"inputs": inputs, "targets": targets, "weights": weights}
            yield jax.device_put(batch, sharding)

    def eval_model(self, params: Tree, model_state: Tree, rng: jax.Array) -> dict[str, float]:
        @jax.jit
        def metrics(params: Tree, model_state: Tree, batch: Tree) -> dict[str, jax.Array]:
            logits, _ = self.model_fn(
                params, batch, model_state, ForwardPassMode.EVAL, rng, update_batch_norm=False
            )
            loss = self.loss_fn(batch["targets"], logits)
            right = logits.argmax(-1) == batch["targets"]
            return {"accuracy": right.mean(), "loss": loss["per_example"].mean()}

        batch = next(self.build_input_queue(rng, 256))
        return jax.tree.map(float, metrics(params, model_state, batch))


class Run(NamedTuple):
    """What is left after a run."""

    optimizer_state: Tree
    params: Tree
    model_state: Tree
    eval_results: list[tuple[int, dict[str, float]]]
    logged: list[tuple[int, dict[str, float]]]


def through_checkpoint(tree: Tree) -> Tree:
    """The arrays that a checkpoint gives back: in the host's memory, without a sharding."""
    return serialization.from_bytes(tree, serialization.to_bytes(jax.device_get(tree)))


def train(
    submission: Any, workload: Workload, steps: int, eval_every: int, resumed_at: int | None = None
) -> Run:
    """The runner's loop, with its names of arguments and its calls under self-tuning rules.

    At the step `resumed_at`, the optimizer is made anew from first parameters, and all arrays come
    from a checkpoint, as in a new process. Of the optimizer's pair, the benchmark saves the first.
    The batches go on.
    """
    rng = jax.random.PRNGKey(0)  # The benchmark's keys are arrays of integers.
    data_rng, init_rng, model_rng, rng = jax.random.split(rng, 4)
    batch_size = submission.get_batch_size("mnist")
    assert batch_size % jax.local_device_count() == 0
    input_queue = workload.build_input_queue(data_rng, batch_size)
    params, model_state = workload.init_model_fn(model_rng)
    state = submission.init_optimizer_state(workload, params, model_state, None, init_rng)
    wants_train_state = "train_state" in inspect.signature(submission.update_params).parameters
    train_state = {"train_state": types.MappingProxyType({"is_time_remaining": True})}
    eval_results: list[tuple[int, dict[str, float]]] = []
    for step in range(steps):
        if step == resumed_at:
            saved = (state[0], params, model_state)
            first = workload.init_model_fn(model_rng)
            fresh = submission.init_optimizer_state(workload, *first, None, init_rng)
            restored, params, model_state = through_checkpoint(saved)
            state = (restored, fresh[1])
        data_rng, update_rng, prepare_rng, eval_rng = jax.random.split(
            jax.random.fold_in(rng, step), 4
        )
        batch = submission.data_selection(
            workload, input_queue, state, params, model_state, None, step, data_rng
        )
        same = {
            "workload": workload,
            "current_params_types": workload.model_params_types,
            "hyperparameters": None,
            "loss_type": workload.loss_type,
            "eval_results": eval_results,
        }
        state, params, model_state = submission.update_params(
            **same,
            current_param_container=params,
            model_state=model_state,
            batch=batch,
            optimizer_state=state,
            global_step=step,
            rng=update_rng,
            **(train_state if wants_train_state else {}),
        )
        if (step + 1) % eval_every == 0:
            state, params, model_state = submission.prepare_for_eval(
                **same,
                current_param_container=params,
                model_state=model_state,
                optimizer_state=state,
                global_step=step + 1,
                rng=prepare_rng,
            )
            eval_results.append((step + 1, workload.eval_model(params, model_state, eval_rng)))
    return Run(state, params, model_state, eval_results, workload.metrics_logger.rows)
