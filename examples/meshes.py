"""On which devices `pretrain_lm.py` trains, and where its arrays lie.

Parameters are split over the axis `fsdp`, batches over both axes, and what SOAP keeps is divided
among all devices.
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
    """How long the axes of the mesh are."""

    data: int
    fsdp: int


class Processes(NamedTuple):
    """Which of how many processes this is, and where the first of them listens."""

    coordinator: str
    total: int
    number: int


def join(processes: Processes | None) -> None:
    """Connects this process with the others; None asks the cluster, such as Slurm or a TPU pod."""
    if processes is None:
        jax.distributed.initialize()
    else:
        jax.distributed.initialize(processes.coordinator, processes.total, processes.number)


def simulate_devices(count: int) -> None:
    """Has the CPU pose as so many devices; JAX must not have started."""
    jax.config.update("jax_num_cpu_devices", count)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")


def make_mesh(sizes: Sizes) -> Mesh:
    """Makes a mesh of accelerators or, where there are too few, of simulated devices.

    Raises:
      ValueError: there are too few, or in several processes another number of devices.
    """
    count, devices = math.prod(sizes), jax.devices()
    alone = jax.process_count() == 1
    if alone and len(devices) < count:
        devices = jax.devices("cpu")
    if len(devices) < count or not (alone or len(devices) == count):
        raise ValueError(
            f"the mesh must have as many devices as {jax.process_count()} processes have together, "
            f"{len(devices)}, got {count}"
        )
    array = np.asarray(devices[:count]).reshape(sizes)
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


class Placement:
    """Where the arrays of a run lie."""

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        self.replicated = NamedSharding(mesh, P())
        self.stacks = NamedSharding(mesh, P(AXES))

    def of_params(self, params: Any) -> Any:
        """Splits each parameter along its longest axis, where that is a multiple of `fsdp`."""

        def sharding(leaf: Any) -> NamedSharding:
            axis = int(np.argmax(leaf.shape)) if leaf.ndim else 0
            divides = leaf.ndim and leaf.shape[axis] % self.mesh.shape["fsdp"] == 0
            return NamedSharding(self.mesh, P(*[None] * axis, "fsdp") if divides else P())

        return jax.tree.map(sharding, params)

    def of_state(self, state: Any, params: Any) -> Any:
        """Divides SOAP's state evenly; another optimizer's moments lie as their parameters."""
        return state_shardings(state, self.stacks, params)

    def of_batches(self, windows: np.ndarray) -> NamedSharding:
        """Splits `(..., B, T)` among all devices, where B is a multiple of their number."""
        if windows.shape[-2] % self.mesh.size:
            return self.replicated
        return NamedSharding(self.mesh, P(*[None] * (windows.ndim - 2), AXES))

    def put_batches(self, windows: np.ndarray) -> jax.Array:
        """Brings batches, which every process has whole, to the devices."""
        return self.put(windows, self.of_batches(windows))

    def put(self, tree: Any, shardings: Any) -> Any:
        """Brings arrays, which every process has whole, to where they lie."""

        def put(array: Any, sharding: NamedSharding) -> jax.Array:
            whole = np.asarray(array)
            return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

        return jax.tree.map(put, tree, shardings)
