"""A small training run with checkpoints, in a process that a test can watch and kill.

Each process is forked from a server that has imported all modules and started nothing. That saves
most of the time to start. `train` starts JAX with a given number of devices.
"""

import dataclasses
import hashlib
import multiprocessing
import pathlib
import signal
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import soap_optax

BATCH, WIDTH = 16, 6

LIMIT_IN_SECONDS = 300  # From one event to the next. Only a process that hangs reaches it.

OPTIMIZER = optax.chain(
    optax.clip_by_global_norm(1.0),
    soap_optax.soap(optax.cosine_decay_schedule(1e-2, 1000), precondition_frequency=4),
)


class Event(NamedTuple):
    """A report of a process while it trains.

    Attributes:
      kind: "resumed", "stepped", "saving" (the save has begun) or "saved" (it is on the disk).
      step: the number of steps of the state.
      digest: of every bit of the resumed or the new state.
    """

    kind: str
    step: int
    digest: str = ""


@dataclasses.dataclass(frozen=True)
class Run:
    """A process that trains, and the end of the pipe at which its events arrive."""

    process: ForkServerProcess
    events: Connection

    def __iter__(self) -> Iterator[Event]:
        """The events until the process ends."""
        while self.events.poll(LIMIT_IN_SECONDS):
            try:
                yield self.events.recv()
            except EOFError:
                return
        self.process.kill()
        raise TimeoutError(f"no event in {LIMIT_IN_SECONDS} seconds")

    def until(self, kind: str, times: int) -> list[Event]:
        """The events up to the given number of events of one kind."""
        events = []
        for event in self:
            events.append(event)
            times -= event.kind == kind
            if times == 0:
                break
        return events

    def kill(self) -> list[Event]:
        """Kills the process, which must still run, and returns the remaining events."""
        self.process.kill()
        events = list(self)
        self.process.join()
        assert self.process.exitcode == -signal.SIGKILL
        return events

    def finish(self) -> list[Event]:
        """Waits for the end of the process, and returns the remaining events."""
        events = list(self)
        self.process.join()
        assert self.process.exitcode == 0
        return events


def start(
    directory: pathlib.Path,
    compiled: pathlib.Path,
    steps: int,
    steps_per_checkpoint: int,
    devices: int = 1,
) -> Run:
    """Starts a process that runs `train` with these arguments."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jax", "optax", "orbax.checkpoint", "soap_optax"])
    receiving, sending = context.Pipe(duplex=False)
    arguments = (directory, compiled, sending, steps, steps_per_checkpoint, devices)
    process = context.Process(target=train, args=arguments, daemon=True)
    process.start()
    sending.close()  # Otherwise the end of the process would not close the pipe.
    return Run(process, receiving)


def train(
    directory: pathlib.Path,
    compiled: pathlib.Path,
    events: Connection,
    steps: int,
    steps_per_checkpoint: int,
    devices: int,
) -> None:
    """Trains from the newest checkpoint on, and writes a last one at the end.

    Args:
      directory: where the checkpoints are.
      compiled: the cache of compiled programs that all processes share.
      events: the end of the pipe to which each `Event` is sent.
      steps: the number of steps of the state at the end.
      steps_per_checkpoint: the number of steps from one checkpoint to the next.
      devices: the number of simulated CPU devices. The batch is sharded over them, and the state is
        replicated.
    """
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_numpy_dtype_promotion", "standard")  # Schedules of Optax need it.
    jax.config.update("jax_compilation_cache_dir", str(compiled))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    replicated = NamedSharding(mesh, PartitionSpec())
    sharded = NamedSharding(mesh, PartitionSpec("data"))
    jitted_step = jax.jit(_step, out_shardings=replicated)

    options = ocp.CheckpointManagerOptions(max_to_keep=2, cleanup_tmp_directories=True)
    with ocp.CheckpointManager(directory, options=options) as manager:
        first = manager.latest_step() or 0
        state = (
            manager.restore(first, args=ocp.args.StandardRestore(target(initial_state, replicated)))
            if first
            else jax.device_put(initial_state(), replicated)
        )
        events.send(Event("resumed", first, _digest(state)))
        saving = first
        for step in range(first + 1, steps + 1):
            state = jitted_step(state, jax.device_put(_batch(step), sharded))
            events.send(Event("stepped", step, _digest(state)))
            if step % steps_per_checkpoint == 0 or step == steps:
                manager.wait_until_finished()
                if saving > first:
                    events.send(Event("saved", saving))
                events.send(Event("saving", step))
                manager.save(step, args=ocp.args.StandardSave(state))  # Writes while we train on.
                saving = step
        manager.wait_until_finished()
        events.send(Event("saved", saving))


def initial_state() -> dict[str, Any]:
    """A network of three square layers, which have one block shape, and the optimizer's state."""
    rng = np.random.default_rng(0)
    layers = [
        {"kernel": rng.normal(size=(WIDTH, WIDTH)) / WIDTH**0.5, "bias": np.zeros(WIDTH)}
        for _ in range(3)
    ]
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), layers)
    return {"params": params, "opt_state": OPTIMIZER.init(params)}


def target(initial_state: Callable[[], Any], sharding: jax.sharding.Sharding) -> Any:
    """The shapes and shardings of the state that a function makes, for Orbax."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(initial_state),
    )


def _step(state: dict[str, Any], inputs: jax.Array) -> dict[str, Any]:
    grads = jax.grad(_loss)(state["params"], inputs)
    updates, opt_state = OPTIMIZER.update(grads, state["opt_state"], state["params"])
    return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}


def _loss(params: Any, inputs: jax.Array) -> jax.Array:
    outputs = inputs
    for layer in params:
        outputs = jnp.tanh(outputs @ layer["kernel"] + layer["bias"][None, :])
    return jnp.mean((outputs - jnp.sin(3 * inputs)) ** 2)


def _batch(step: int) -> np.ndarray:
    """The inputs of a step, `(BATCH, WIDTH)`. They depend on nothing but its number."""
    return np.random.default_rng([1, step]).normal(size=(BATCH, WIDTH)).astype(np.float32)


def _digest(state: Any) -> str:
    hashed = hashlib.sha256()
    for leaf in jax.tree.leaves(jax.device_get(state)):
        hashed.update(np.ascontiguousarray(leaf).tobytes())
    return hashed.hexdigest()
