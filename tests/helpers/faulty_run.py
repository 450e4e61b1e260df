"""A training run full of faults, in processes that a driver kills.

Every fault inside the program depends only on the seed and the step, so a resumed run must repeat
an uninterrupted one bit by bit:

- gradients of one layer that are not a number, infinite, 1000 times too large, or so large that
  their squares overflow;
- refreshes that fail, for every method and for Shampoo's roots, by what the bits of the factor say.

Learning rate and refresh frequency change every thousand steps, or in the second half of a shorter
run. They change in runs without faults as well.

`drive` adds faults from outside: it kills the process in a step or while a checkpoint is written,
truncates a file of the newest checkpoint, lets writes fail as on a full disk, and starts again with
another number of devices.
"""

import dataclasses
import hashlib
import multiprocessing
import pathlib
import random
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import soap_optax
from soap_optax.algorithm import (
    RefreshMethod,
    eigenbasis,
    partial_refresh,
    refresh_methods,
    roots,
)

BATCH, WIDTH = 16, 8
LIMIT_IN_SECONDS = 500  # From one event to the next. Only a process that hangs reaches it.

METHODS: tuple[RefreshMethod, ...] = ("qr", "cholesky_qr", "eigh", "jacobi", "partial", "auto")


def soap(refresh: RefreshMethod) -> Callable[..., optax.GradientTransformation]:
    return lambda rate, frequency: soap_optax.soap(
        rate, precondition_frequency=frequency, refresh=refresh, weight_decay=0.0
    )


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    **{method: soap(method) for method in METHODS},
    "kl": lambda rate, frequency: soap_optax.soap(
        rate, precondition_frequency=frequency, factor_estimator="kl", weight_decay=0.0
    ),
    "shampoo": lambda rate, frequency: soap_optax.shampoo(
        rate, precondition_frequency=frequency, weight_decay=0.0
    ),
}

# Faults inside the program ------------------------------------------------------------------------


class Plan(NamedTuple):
    """What happens in one step: scalars, and one factor of the gradient for each layer."""

    learning_rate: np.float32
    frequency: np.int32
    factors: np.ndarray  # (layers,), 1 where nothing happens


# The factor of a gradient, and how often it comes, for each layer and step.
FAULTS = {np.nan: 1e-3, np.inf: 1e-3, 1e3: 3e-4, 1e30: 3e-4}
QUIET_END = 0.1  # The last part of a run has no spike, so that its loss can be compared.


def plan_of(step: int, settings: "Settings") -> Plan:
    """What happens in a step, which depends only on its number and the seed."""
    layers = len(OPTIMIZERS)
    decay = 0.5 * (1 + np.cos(np.pi * step / settings.steps))
    factors = np.ones(layers, np.float32)
    part = step // min(1000, -(-settings.steps // 2))
    changes = np.random.default_rng([settings.seed, 1, part])
    rate, frequency = 3e-3 * changes.uniform(0.5, 2), changes.integers(1, 12)
    if settings.faults and step < (1 - QUIET_END) * settings.steps:
        rng = np.random.default_rng([settings.seed, 2, step])
        for factor, probability in FAULTS.items():
            factors[rng.random(layers) < probability] = factor
    return Plan(np.float32(rate * decay), np.int32(frequency), factors)


def fails(matrix: jax.Array) -> jax.Array:
    """Whether a decomposition of this matrix is to fail: for one in 32, by the bits of its sum."""
    return jax.lax.bitcast_convert_type(jnp.sum(matrix), jnp.int32) % 32 == 0


def failing(decomposition: Callable[..., Any]) -> Callable[..., Any]:
    """A decomposition with a basis in its first field, which is not a number now and then."""

    def decomposition_that_fails(*inputs: Any) -> Any:
        basis, *others = result = decomposition(*inputs)
        bad = jnp.where(fails(jax.tree.leaves(inputs)[0]), jnp.nan, basis)
        return type(result)(bad, *others)

    return decomposition_that_fails


def let_refreshes_fail() -> None:
    """Lets every method of refreshing a basis, and the root of a factor, fail now and then.

    It changes the library for the rest of the process.
    """
    exact, root = eigenbasis.descending_eigenvectors, roots.inverse_root

    def exact_that_fails(factor: jax.Array, rows: jax.Array) -> jax.Array:
        return jnp.where(fails(factor), jnp.nan, exact(factor, rows))

    def root_that_fails(factor: jax.Array, *others: Any, **named: Any) -> Any:
        return root(jnp.where(fails(factor), jnp.nan, factor), *others, **named)

    for name, method in refresh_methods.METHODS.items():
        refresh_methods.METHODS[name] = failing(method)
    partial_refresh.rotate_chunks = failing(partial_refresh.rotate_chunks)
    eigenbasis.descending_eigenvectors = exact_that_fails
    roots.inverse_root = root_that_fails


# Training -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run does, in every process of it.

    Attributes:
      steps: the number of steps of the state at the end.
      steps_per_checkpoint: the number of steps from one checkpoint to the next.
      seed: of the batches and the faults.
      faults: whether there are faults inside the program.
      compiled: the cache of compiled programs that all processes share.
    """

    steps: int
    steps_per_checkpoint: int
    seed: int
    faults: bool
    compiled: pathlib.Path


class Event(NamedTuple):
    """A report of a process while it trains.

    Attributes:
      kind: "resumed", "stepped" (every 50 steps), "saving" (the save has begun) or "ended".
      step: the number of steps of the state.
      digest: of every bit of the state; empty for "stepped".
      memory: resident memory of the process in MB.
      programs: the number of compiled programs of the training step.
      unreadable: the number of newer checkpoints that could not be restored.
      loss: the mean over fixed batches without noise; only for "ended".
      counters: sums over blocks of the optimizer's counters; only for "ended".
    """

    kind: str
    step: int
    digest: str = ""
    memory: float = 0.0
    programs: int = 0
    unreadable: int = 0
    loss: float = 0.0
    counters: tuple[tuple[str, int], ...] = ()


@optax.inject_hyperparams
def make_optimizer(
    learning_rate: Any, precondition_frequency: Any
) -> optax.GradientTransformationExtraArgs:
    """One optimizer for each layer: all refresh methods, KL factors and Shampoo."""
    return optax.partition(
        {name: make(learning_rate, precondition_frequency) for name, make in OPTIMIZERS.items()},
        lambda params: {name: {"kernel": name, "bias": name} for name in params},
    )


OPTIMIZER = make_optimizer(learning_rate=3e-3, precondition_frequency=4)


def initial_state() -> dict[str, Any]:
    """A network with a layer for each optimizer, and the optimizer's state."""
    rng = np.random.default_rng(0)
    params = {
        name: {
            "kernel": jnp.asarray(rng.normal(size=(WIDTH, WIDTH)) / WIDTH**0.5, jnp.float32),
            "bias": jnp.zeros(WIDTH),
        }
        for name in OPTIMIZERS
    }
    return {"params": params, "opt_state": OPTIMIZER.init(params)}


def batch(step: int, settings: Settings) -> np.ndarray:
    """The inputs of a step, `(BATCH, WIDTH)`."""
    return np.random.default_rng([settings.seed, 0, step]).normal(size=(BATCH, WIDTH)).astype("f4")


def loss_of(params: Any, inputs: jax.Array) -> jax.Array:
    """Each layer adds to its input, so that a layer that is far off does not stop the others."""
    outputs = inputs
    for layer in params.values():
        outputs = outputs + 0.3 * jnp.tanh(outputs @ layer["kernel"] + layer["bias"][None, :])
    return jnp.mean((outputs - jnp.sin(2 * inputs)) ** 2)


def step_of(state: dict[str, Any], inputs: jax.Array, plan: Plan) -> dict[str, Any]:
    grads = jax.grad(loss_of)(state["params"], inputs)
    grads = {
        name: jax.tree.map(lambda grad, i=i: grad * plan.factors[i], grads[name])
        for i, name in enumerate(grads)
    }
    opt_state = state["opt_state"]
    opt_state = opt_state._replace(
        hyperparams={
            "learning_rate": plan.learning_rate,
            "precondition_frequency": plan.frequency,
        }
    )
    updates, opt_state = OPTIMIZER.update(grads, opt_state, state["params"])
    return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}


def train(
    directory: pathlib.Path,
    events: Connection,
    settings: Settings,
    devices: int,
    full_from: int | None,
) -> None:
    """Trains from the newest checkpoint that can be read.

    Args:
      directory: where the checkpoints are.
      events: the end of the pipe to which each `Event` is sent.
      settings: what the run does.
      devices: the number of simulated CPU devices that the batch is sharded over.
      full_from: the step from which on no file can be written, as on a full disk; None for never.
    """
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_numpy_dtype_promotion", "standard")  # Schedules of Optax need it.
    jax.config.update("jax_numpy_rank_promotion", "allow")
    jax.config.update("jax_compilation_cache_dir", str(settings.compiled))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if settings.faults:
        let_refreshes_fail()
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    replicated = NamedSharding(mesh, PartitionSpec())
    sharded = NamedSharding(mesh, PartitionSpec("data"))
    jitted_step: Any = jax.jit(step_of, out_shardings=replicated, donate_argnums=0)

    def report(kind: str, step: int, **more: Any) -> None:
        digest = "" if kind == "stepped" else digest_of(state)
        programs = jitted_step._cache_size()
        events.send(Event(kind, step, digest, resident_memory(), programs, **more))

    options = ocp.CheckpointManagerOptions(max_to_keep=3, cleanup_tmp_directories=True)
    with ocp.CheckpointManager(directory, options=options) as manager:
        state, first, unreadable = newest_state(manager, replicated)
        report("resumed", first, unreadable=unreadable)
        for step in range(first + 1, settings.steps + 1):
            if step == full_from:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # A write then raises OSError.
                resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))
            inputs = jax.device_put(batch(step, settings), sharded)
            state = jitted_step(state, inputs, plan_of(step, settings))
            if step % 50 == 0:
                report("stepped", step)
            if step % settings.steps_per_checkpoint == 0 or step == settings.steps:
                report("saving", step)
                manager.save(step, args=ocp.args.StandardSave(state))  # Writes while we train on.
        manager.wait_until_finished()
        report("ended", settings.steps, loss=last_loss(state), counters=counters_of(state))


def newest_state(
    manager: ocp.CheckpointManager, sharding: NamedSharding
) -> tuple[dict[str, Any], int, int]:
    """The state of the newest checkpoint that can be read, or the initial one.

    Returns:
      The state, its step, and the number of newer checkpoints that could not be read. These are
      deleted, as the run will write them again.
    """
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(initial_state),
    )
    unreadable = 0
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            state: Any = manager.restore(step, args=ocp.args.StandardRestore(target))
            return state, step, unreadable
        except Exception:  # A damaged checkpoint raises different errors, by the file.
            manager.delete(step)
            unreadable += 1
    return jax.device_put(initial_state(), sharding), 0, unreadable


def last_loss(state: dict[str, Any]) -> float:
    """The mean loss over batches that no run trains on."""
    batches = np.random.default_rng(7).normal(size=(64, BATCH, WIDTH)).astype("f4")
    return float(np.mean([loss_of(jax.device_get(state["params"]), one) for one in batches]))


def counters_of(state: dict[str, Any]) -> tuple[tuple[str, int], ...]:
    """Sums over all blocks of the counters of gradients and refreshes."""
    names = ("accepted_gradients", "rejected_gradients", "refreshes", "rejected_refreshes")
    sums = Counter()
    for path, leaf in jax.tree.leaves_with_path(state["opt_state"]):
        name = str(getattr(path[-1], "name", ""))
        if name in names:
            sums[name] += int(np.sum(leaf))
    return tuple(sums.items())


def digest_of(state: Any) -> str:
    hashed = hashlib.sha256()
    for leaf in jax.tree.leaves(jax.device_get(state)):
        hashed.update(np.ascontiguousarray(leaf).tobytes())
    return hashed.hexdigest()


def resident_memory() -> float:
    """Resident memory of this process in MB; on systems without procfs the peak so far."""
    try:
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 1e6
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


# Driving ------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Report:
    """What happened in all processes of a run.

    Attributes:
      digests: of the state at every checkpoint; a step that was repeated has all of its digests.
      ends: how often a process ended, by the fault from outside.
      unreadable: the number of checkpoints that could not be read.
      repeated: the number of steps that were trained once more.
      programs: the largest number of compiled training steps in a process.
      memory: resident memory in MB of the longest process, at each of its events.
      last_step: the step of the last event.
      end: the last event of the run.
    """

    digests: dict[int, set[str]] = dataclasses.field(default_factory=dict)
    ends: Counter[str] = dataclasses.field(default_factory=Counter)
    unreadable: int = 0
    repeated: int = 0
    programs: int = 0
    memory: list[float] = dataclasses.field(default_factory=list)
    last_step: int = 0
    end: Event = dataclasses.field(default_factory=lambda: Event("", 0))


# How a process ends: after a number of "stepped" events, or while a checkpoint is written.
KILLS = ("killed in a step", "killed while saving", "checkpoint truncated", "writes failed")


def drive(
    directory: pathlib.Path,
    settings: Settings,
    kills: int,
    devices: tuple[int, ...] = (1,),
    say: Callable[[str], None] = lambda _: None,
) -> Report:
    """Runs the training, and ends its process the given number of times, evenly over the steps.

    Args:
      directory: where the checkpoints are.
      settings: what the run does.
      kills: how often a process is ended from outside, each of `KILLS` in turn.
      devices: the number of devices of each process in turn.
      say: called with a line for each end of a process.
    """
    rng = random.Random(settings.seed)
    report = Report()
    for number in range(kills + 1):
        fault = KILLS[number % len(KILLS)] if number < kills else ""
        # Steps until the fault: on average the kills use up all steps, with room for repeats.
        span = settings.steps // (kills + 2)
        target = (number + 1) * span + rng.randrange(-span // 3, span // 3)
        _one_process(
            directory, settings, devices[number % len(devices)], fault, target, rng, report
        )
        if fault == "checkpoint truncated":
            truncate_newest(directory, rng)
        if fault:
            report.ends[fault] += 1
        say(f"{number + 1} of {kills + 1}: {fault or 'ended'}")
    return report


def _one_process(
    directory: pathlib.Path,
    settings: Settings,
    devices: int,
    fault: str,
    target: int,
    rng: random.Random,
    report: Report,
) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jax", "optax", "orbax.checkpoint", "soap_optax"])
    receiving, sending = context.Pipe(duplex=False)
    full_from = target if fault == "writes failed" else None
    process = context.Process(
        target=train, args=(directory, sending, settings, devices, full_from), daemon=True
    )
    process.start()
    sending.close()  # Otherwise the end of the process would not close the pipe.
    memory = []
    kind = "saving" if fault == "killed while saving" else "stepped"
    while receiving.poll(LIMIT_IN_SECONDS):
        try:
            event: Event = receiving.recv()
        except EOFError:
            break
        memory.append(event.memory)
        if event.kind == "resumed":
            report.repeated += max(0, report.last_step - event.step)
        report.last_step = event.step
        report.programs = max(report.programs, event.programs)
        report.unreadable += event.unreadable
        if event.digest:
            report.digests.setdefault(event.step, set()).add(event.digest)
        if event.kind == "ended":
            report.end = event
        if fault and not full_from and event.kind == kind and event.step >= target:
            time.sleep(rng.uniform(0, 0.1))
            process.kill()
    else:
        process.kill()
        raise TimeoutError(f"no event in {LIMIT_IN_SECONDS} seconds")
    process.join()
    if full_from:
        assert process.exitcode == 1, process.exitcode
    else:
        assert process.exitcode == (-signal.SIGKILL if fault else 0), process.exitcode
    report.memory = max(report.memory, memory, key=len)


def truncate_newest(directory: pathlib.Path, rng: random.Random | None = None) -> None:
    """Cuts a file of the newest checkpoint in half, as a crash of the machine can leave it.

    Without `rng`, and every second time with it, this is the largest file, which has the arrays.
    """
    checkpoints = [path for path in directory.iterdir() if path.name.isdigit()]
    newest = max(checkpoints, key=lambda path: int(path.name))
    files = [path for path in newest.rglob("*") if path.is_file() and path.stat().st_size]
    largest = max(files, key=lambda path: path.stat().st_size)
    chosen = largest if rng is None or rng.random() < 0.5 else rng.choice(sorted(files))
    content = chosen.read_bytes()
    chosen.write_bytes(content[: len(content) // 2])
