"""The mesh of `pretrain_lm.py` and the shardings of its arrays.

Parameters are sharded over the mesh axis `fsdp`. Batches and the stacks of SOAP are sharded over
both axes.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from soap_optax import state_shardings

AXES = ("data", "fsdp")


class Sizes(NamedTuple):
    """The sizes of the mesh axes."""

    data: int
    fsdp: int


class Processes(NamedTuple):
    """The number of processes, the index of this one, and the address of process 0."""

    coordinator: str
    total: int
    number: int


def join(processes: Processes | None) -> None:
    """Connects this process with the others.

    Without an argument, JAX reads the addresses from the cluster, such as Slurm or a TPU pod.
    """
    if processes is None:
        jax.distributed.initialize()
    else:
        jax.distributed.initialize(processes.coordinator, processes.total, processes.number)


def simulate_devices(count: int) -> None:
    """Simulates `count` devices on the CPU. Call it before JAX starts."""
    jax.config.update("jax_num_cpu_devices", count)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")


def make_mesh(sizes: Sizes) -> Mesh:
    """Makes a mesh of accelerators, or of simulated devices if there are too few.

    Raises:
      ValueError: there are too few devices. Several processes together must have exactly the
        number of devices in the mesh.
    """
    count, devices = math.prod(sizes), jax.devices()
    alone = jax.process_count() == 1
    if alone and len(devices) < count:
        devices = jax.devices("cpu")
    if len(devices) < count or not (alone or len(devices) == count):
        raise ValueError(
            f"the mesh must have as many devices as all {jax.process_count()} processes together, "
            f"{len(devices)}, got {count}"
        )
    array = np.asarray(devices[:count]).reshape(sizes)
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


class Shardings:
    """The shardings of a run's arrays."""

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        self.replicated = NamedSharding(mesh, P())
        self.stacks = NamedSharding(mesh, P(AXES))

    def of_params(self, params: Any) -> Any:
        """Shards each parameter along its longest axis, if that is a multiple of `fsdp`."""

        def sharding(leaf: Any) -> NamedSharding:
            axis = int(np.argmax(leaf.shape)) if leaf.ndim else 0
            divides = leaf.ndim and leaf.shape[axis] % self.mesh.shape["fsdp"] == 0
            return NamedSharding(self.mesh, P(*[None] * axis, "fsdp") if divides else P())

        return jax.tree.map(sharding, params)

    def of_state(self, state: Any, params: Any) -> Any:
        """Shards SOAP's arrays along axis 0, and moments of other optimizers like parameters."""
        return state_shardings(state, self.stacks, params)

    def of_batches(self, windows: np.ndarray) -> NamedSharding:
        """Shards `(..., B, T)` along B, if that is a multiple of the number of devices."""
        if windows.shape[-2] % self.mesh.size:
            return self.replicated
        return NamedSharding(self.mesh, P(*[None] * (windows.ndim - 2), AXES))

    def put_batches(self, windows: np.ndarray) -> jax.Array:
        """Shards batches. Every process passes all of them."""
        return self.put(windows, self.of_batches(windows))

    def put(self, tree: Any, shardings: Any) -> Any:
        """Shards arrays. Every process passes all of each array."""

        def put(array: Any, sharding: NamedSharding) -> jax.Array:
            whole = np.asarray(array)
            return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

        return jax.tree.map(put, tree, shardings)
