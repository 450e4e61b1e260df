"""The finer meshes over which tiles are sharded."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from soap_optax.devices import mesh


@dataclass(frozen=True)
class Device:
    """A device with only the attributes that a mesh needs."""

    id: int
    process_index: int = 0
    platform: str = "cpu"
    device_kind: str = ""
    client: None = None


@pytest.mark.parametrize(
    ("lengths", "counts", "finer"),
    [
        # Axes are as long as the numbers of tiles allow, because each axis costs a collective.
        ((256,), {4, 16}, [4, 4, 4, 4]),
        ((16, 16), {4, 16}, [4, 4, 4, 4]),
        ((512,), {4, 16}, [2] * 9),
        ((64, 8), {3}, [8, 8, 8]),
        ((8,), {8}, [8]),
        ((8,), {2}, [2, 2, 2]),
        # 2 and 3 are not powers of one number.
        ((6, 4), {3, 2}, [2, 3, 2, 2]),
        ((36,), {2, 6, 12}, [2, 2, 3, 3]),
    ],
)
def test_the_axes_of_a_finer_mesh_are_equally_long_where_they_can_be(
    lengths: tuple[int, ...], counts: set[int], finer: list[int]
) -> None:
    names = tuple("xy"[: len(lengths)])
    devices = np.array([Device(number) for number in range(math.prod(lengths))], object)
    sharding = NamedSharding(Mesh(devices.reshape(lengths), names), PartitionSpec(names))
    finer_mesh, parts = mesh.refine_mesh(sharding, counts)
    assert list(finer_mesh.shape.values()) == finer
    assert [name for axis in names for name in parts[axis]] == list(finer_mesh.axis_names)
    assert [device.id for device in finer_mesh.devices.ravel()] == list(range(devices.size))
