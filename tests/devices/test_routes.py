"""The route of each group between leaves and stacks, and the steps of its resharding.

These tests compile nothing. Stacks are sharded over all axes of the mesh. It is `(4, 2)`, unless a
case has another one.
"""

from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from soap_optax.blocks import plan, views
from soap_optax.devices import constraints
from soap_optax.devices.param_shardings import LeafShardings
from soap_optax.devices.routes import Route, Routes, WholeLeaves
from soap_optax.devices.slices import Slices

Spec = tuple[tuple[str, ...], ...] | None
NONE, DATA, MODEL = (), ("data",), ("model",)
BOTH = ("data", "model")
SLICES = "slices"
MATRICES = views.AxesMark.DEFAULT
BATCH = views.MatrixAxes(rows=(1,), columns=(2,))


def routes_of(
    shapes: list[tuple[int, ...]],
    specs: list[Spec],
    axes: views.Axes = MATRICES,
    block_size: int | None = None,
    mesh: tuple[int, ...] = (4, 2),
    multiple: int = 8,
) -> Routes:
    """The routes of leaves of these shapes and shardings."""
    names = ("data", "model", "pod")[: len(mesh)]
    devices = jax.make_mesh(
        mesh,
        names,
        axis_types=(AxisType.Auto,) * len(mesh),
        devices=jax.devices()[: int(np.prod(mesh))],
    )
    options = views.BlockOptions(
        None, precondition_1d=False, merge_dims=False, block_size=block_size, one_sided=False
    )
    return Routes(
        plan.make_plan(shapes, [np.float32] * len(shapes), options, [axes] * len(shapes), multiple),
        NamedSharding(devices, PartitionSpec(names)),
        LeafShardings((None,) * len(shapes), tuple(specs)),
    )


def kind_of(route: Route | None) -> Any:
    """The number of mesh axes that shard whole leaves already, `SLICES`, or None."""
    if isinstance(route, WholeLeaves):
        return route.presharded
    return SLICES if isinstance(route, Slices) else route


STACKS: dict[str, tuple[Any, dict[str, Any]]] = {
    "unsharded leaves": (0, {"shapes": [(16, 8)] * 8, "specs": [(NONE, NONE)] * 8}),
    "leaves sharded the same way": (0, {"shapes": [(16, 8)] * 8, "specs": [(DATA, MODEL)] * 8}),
    "leaves sharded in two ways": (
        SLICES,
        {"shapes": [(16, 8)] * 8, "specs": [*[(DATA, MODEL)] * 7, (MODEL, DATA)]},
    ),
    "leaves sharded in unknown ways": (0, {"shapes": [(16, 8)] * 8, "specs": [None] * 8}),
    "one unknown leaf": (0, {"shapes": [(16, 8)] * 8, "specs": [*[(DATA, MODEL)] * 7, None]}),
    "more padding than blocks": (SLICES, {"shapes": [(16, 8)], "specs": [(NONE, NONE)]}),
    "no equal slices": (0, {"shapes": [(3, 5)] * 8, "specs": [(NONE, NONE)] * 8}),
    "one device": (
        0,
        {"shapes": [(16, 8)], "specs": [(NONE, NONE)], "mesh": (1, 1), "multiple": 1},
    ),
    "tiles of unknown leaves": (
        SLICES,
        {"shapes": [(64, 8)], "specs": [None], "block_size": 8},
    ),
    "tiles of unsharded leaves": (
        0,
        {"shapes": [(64, 8)], "specs": [(NONE, NONE)], "block_size": 8},
    ),
    "sharded across tiles": (0, {"shapes": [(64, 8)], "specs": [(NONE, BOTH)], "block_size": 8}),
    "each device has whole tiles": (
        2,
        {"shapes": [(64, 8)], "specs": [(BOTH, NONE)], "block_size": 8},
    ),
    "each row of devices has whole tiles": (
        1,
        {"shapes": [(64, 8)], "specs": [(DATA, NONE)], "block_size": 8},
    ),
    "tiles over the last mesh axis": (
        SLICES,
        {"shapes": [(64, 8)], "specs": [(MODEL, NONE)], "block_size": 8},
    ),
    "tiles of two leaves": (
        SLICES,
        {"shapes": [(64, 8)] * 2, "specs": [(BOTH, NONE)] * 2, "block_size": 8},
    ),
    "tiles along the second axis": (
        SLICES,
        {"shapes": [(8, 64)], "specs": [(NONE, BOTH)], "block_size": 8},
    ),
    "batch over both mesh axes": (
        2,
        {"shapes": [(8, 16, 4)], "specs": [(BOTH, NONE, NONE)], "axes": BATCH},
    ),
    "batch over the first mesh axis": (
        1,
        {"shapes": [(8, 16, 4)], "specs": [(DATA, NONE, NONE)], "axes": BATCH},
    ),
    "batch over the last mesh axis": (
        SLICES,
        {"shapes": [(8, 16, 4)], "specs": [(MODEL, NONE, NONE)], "axes": BATCH},
    ),
    "batch of unsharded matrices": (
        0,
        {"shapes": [(8, 16, 4)], "specs": [(NONE, NONE, NONE)], "axes": BATCH},
    ),
    "batch whose blocks do not fill the shards": (
        SLICES,
        {"shapes": [(12, 16, 4)], "specs": [(DATA, NONE, NONE)], "axes": BATCH},
    ),
}


@pytest.mark.parametrize(("wanted", "leaves"), STACKS.values(), ids=STACKS)
def test_route_of_a_stack(wanted: Any, leaves: dict[str, Any]) -> None:
    routes = routes_of(**leaves)
    [group] = routes.plan.stacks.values()
    assert kind_of(routes.of_stack(group)) == wanted


LONG = 2**14
VECTORS: dict[str, tuple[Any, dict[str, Any]]] = {
    "a bucket": (None, {"shapes": [(8, 8)] * 2, "specs": [(NONE, NONE)] * 2}),
    "one device": (
        None,
        {"shapes": [(8, LONG)], "specs": [(NONE, NONE)], "mesh": (1, 1), "multiple": 1},
    ),
    "padding": (None, {"shapes": [(5, LONG + 1)], "specs": [(NONE, NONE)]}),
    "a first axis with unequal shards": (
        SLICES,
        {"shapes": [(6, LONG)], "specs": [(NONE, NONE)]},
    ),
    "a second axis with unequal shards": (2, {"shapes": [(LONG, 6)], "specs": [(NONE, NONE)]}),
    "one axis": (2, {"shapes": [(8 * LONG,)], "specs": [(DATA,)]}),
    "unknown": (2, {"shapes": [(8, LONG)], "specs": [None]}),
    "first axis sharded": (2, {"shapes": [(8, LONG)], "specs": [(MODEL, NONE)]}),
    "second axis sharded": (0, {"shapes": [(8, LONG)], "specs": [(NONE, MODEL)]}),
    "both sharded": (1, {"shapes": [(8, LONG)], "specs": [(DATA, MODEL)]}),
    "both sharded in another sequence": (2, {"shapes": [(8, LONG)], "specs": [(MODEL, DATA)]}),
    "an unused mesh axis": (
        SLICES,
        {"shapes": [(8, LONG)], "specs": [(MODEL, DATA)], "mesh": (2, 2, 2)},
    ),
}


@pytest.mark.parametrize(("wanted", "leaves"), VECTORS.values(), ids=VECTORS)
def test_route_of_a_leaf_without_a_preconditioner(wanted: Any, leaves: dict[str, Any]) -> None:
    routes = routes_of(**leaves, axes=views.AxesMark.NOT_PRECONDITIONED)
    [group] = routes.plan.adam.values()
    assert kind_of(routes.of_vector(group)) == wanted


def sharding(*names: str) -> NamedSharding:
    mesh = jax.make_mesh((4, 2), BOTH, axis_types=(AxisType.Auto,) * 2)
    return NamedSharding(mesh, PartitionSpec(names))


def test_each_step_moves_one_mesh_axis_between_two_array_axes() -> None:
    steps = constraints._moving_steps(sharding("data", "model"), sharding("model", "data"))
    assert steps == [
        (("data", "model", None), (None, None, None)),
        ((None, "model", None), (None, "data", None)),
        ((None, None, None), ("model", "data", None)),
    ]


def test_each_step_unshards_one_more_mesh_axis() -> None:
    free = PartitionSpec.UNCONSTRAINED
    both = sharding("data", "model")
    assert constraints._unsharding_steps(both, presharded=0, unknown=False) == [
        (("data", "model", None),),
        ((None, "model", None),),
        ((None, None, None),),
    ]
    assert constraints._unsharding_steps(both, presharded=1, unknown=False) == [
        (("data", "model", None),),
        (("data", None, None),),
    ]
    # Only the mesh axis that this step unshards must be replicated.
    assert constraints._unsharding_steps(both, presharded=0, unknown=True) == [
        (("data", "model", free),),
        ((None, "model", free),),
        ((free, None, free),),
    ]
