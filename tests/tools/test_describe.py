"""`describe` reports blocks, axes and bytes before training, as `init` makes them."""

import inspect
import itertools
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers.cases import mostly_long, named

import soap_optax
from soap_optax import Description, describe


class MatrixOfEachLayer(NamedTuple):
    reduction_axis: int = 1
    output_axis: int = 2


TREES = {
    "transformer": {
        "embedding": ((96, 8), jnp.bfloat16),
        "layers": {"attention": ((3, 8, 8), jnp.float32), "mlp": ((8, 32), jnp.float32)},
        "scale": ((8,), jnp.float32),
        "temperature": ((), jnp.float32),
    },
    "convolutions": {"first": ((3, 3, 1, 8), jnp.float32), "second": ((3, 3, 8, 16), jnp.float16)},
    # 13 has no divisor for a block size of 6: tiles of 5, 4 and 4. An axis of 1 has no factor.
    "odd": {"prime": ((13, 7), jnp.float32), "row": ((1, 9), jnp.float32), "one": ((1, 1), "f4")},
    "without entries": {"none": ((0, 4), jnp.float32), "some": ((5, 4), jnp.float32)},
    "one leaf": ((6, 4), jnp.float32),
    "no leaves": {},
}
OPTIONS = {
    "defaults": {},
    "tiles": {"block_size": 6},
    "smallest tiles": {"block_size": 2},
    "long axes left out": {"max_precond_dim": 8},
    "merged": {"merge_dims": True, "max_precond_dim": 72},
    "merged tiles": {"merge_dims": True, "block_size": 6},
    "vectors too": {"precondition_1d": True, "block_size": 6},
    "KL factors": {"factor_estimator": "kl", "max_precond_dim": 8},
    "narrow mu": {"mu_dtype": jnp.bfloat16, "block_size": 4},
    "least state": {
        "mu_dtype": jnp.bfloat16,
        "preconditioner_dtype": jnp.bfloat16,
        "fold_factors": True,
        "factored": True,
        "one_sided": True,
    },
}


def shapes_of(tree: Any) -> Any:
    """The shapes of one of `TREES`."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(*leaf), tree, is_leaf=lambda node: isinstance(node, tuple)
    )


def arrays_of(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes_of(tree))


def state_bytes(params: Any, **options: Any) -> int:
    """The size of the state that `init` makes, from its shapes."""
    state = jax.eval_shape(soap_optax.scale_by_soap(**options).init, params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def by_path(description: Description) -> dict[str, Any]:
    return {row.path: row for row in description.rows}


@pytest.mark.parametrize("options", mostly_long(named(OPTIONS), ["least state"]))
def test_the_total_is_exactly_what_init_allocates(options: dict[str, Any]) -> None:
    for tree in TREES.values():
        params = arrays_of(tree)
        state = soap_optax.scale_by_soap(**options).init(params)
        allocated = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        assert describe(params, **options).state_bytes == allocated


@pytest.mark.long
def test_the_total_has_the_state_of_the_limit_on_norms() -> None:
    params, labels = arrays_of(TREES["transformer"]), soap_optax.default_labels
    reports: list[Description] = []
    optimizer = soap_optax.soap_adamw(1e-2, max_norm_ratio=3.0, report=reports.append)
    state = optimizer.init(params)
    allocated = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    described = describe(params, labels=labels, max_norm_ratio=3.0)
    assert described.state_bytes == allocated
    assert reports[0].state_bytes == allocated


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_a_row_has_the_bytes_that_its_parameter_would_take_alone(
    tree: Any, options: dict[str, Any]
) -> None:
    params = shapes_of(tree)
    nothing = state_bytes({}, **options)
    alone = [state_bytes(leaf, **options) - nothing for leaf in jax.tree.leaves(params)]
    description = describe(params, **options)
    assert [row.state_bytes for row in description.rows] == alone
    assert description.shared_bytes == nothing


def test_the_bytes_are_those_of_the_formula() -> None:
    m, n = 384, 512
    block = 4 * (2 * m * n + 2 * m**2 + 2 * n**2) + 5 * 4  # Float32 statistics, five counters.
    description = describe(
        {
            "bias": jax.ShapeDtypeStruct((768,), jnp.float32),
            "kernel": jax.ShapeDtypeStruct((768, 512), jnp.bfloat16),
            "other": jax.ShapeDtypeStruct((384, 512), jnp.float32),
        },
        block_size=512,
    )
    vector = 4 * 2 * 768 + 2 * 4  # Two moments, two counters.
    assert [row.state_bytes for row in description.rows] == [vector, 2 * block, block]
    assert description.shared_bytes == 8  # The layout's version and the count of calls.
    assert description.state_bytes == vector + 3 * block + 8


def test_statistics_of_float64_leaves_are_counted_in_float64(x64: None) -> None:
    params = {"kernel": jnp.zeros((6, 4)), "bias": jnp.zeros(4)}
    assert params["kernel"].dtype == jnp.float64
    assert describe(params).state_bytes == state_bytes(params)
    assert by_path(describe(params))["kernel"].state_bytes == 8 * (2 * 24 + 2 * 36 + 2 * 16) + 20


def test_the_state_of_soap_with_a_schedule_is_within_a_percent() -> None:
    params = {"kernel": jnp.zeros((32, 16)), "bias": jnp.zeros(16)}
    state = soap_optax.soap(optax.constant_schedule(1e-3), block_size=16).init(params)
    allocated = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert describe(params, block_size=16).state_bytes == pytest.approx(allocated, rel=0.01)


@pytest.mark.parametrize(
    ("shape", "options", "blocks", "axes"),
    [
        ((512, 2048), {}, "1 x 512x2048", (0, 1)),
        ((512, 2048), {"block_size": 512}, "4 x 512x512", (0, 1)),
        ((50304, 768), {}, "1 x 50304x768", (1,)),
        ((768, 50304), {}, "1 x 768x50304", (0,)),
        ((50304, 768), {"max_precond_dim": 512}, "Adam", ()),
        ((1009, 512), {"block_size": 512}, "1 x 505x512 + 1 x 504x512", (0, 1)),
        ((3, 3, 64, 128), {}, "1 x 3x3x64x128", (0, 1, 2, 3)),
        ((3, 3, 64, 128), {"merge_dims": True, "block_size": 512}, "2 x 288x128", (0, 1)),
        ((512,), {}, "Adam", ()),
        ((512,), {"precondition_1d": True, "block_size": 256}, "2 x 256", (0,)),
        ((512, 1), {}, "1 x 512x1", (0,)),
        ((512, 2048), {"one_sided": True}, "1 x 512x2048", (0,)),
        ((512, 512), {"one_sided": True}, "1 x 512x512", (0,)),
        ((1, 50304, 768), {"one_sided": True}, "1 x 1x50304x768", (2,)),
        # The shortest axis differs from tile to tile.
        (
            (7, 5),
            {"one_sided": True, "block_size": 4},
            "1 x 4x3 + 1 x 4x2 + 1 x 3x3 + 1 x 3x2",
            (0, 1),
        ),
        ((), {}, "Adam", ()),
        ((1, 1), {}, "Adam", ()),
        ((0, 3), {}, "nothing", ()),
        # The tile of one entry has no factor.
        ((3, 3), {"block_size": 2}, "1 x 2x2 + 1 x 2x1 + 1 x 1x2 + Adam", (0, 1)),
    ],
)
def test_a_row_names_the_blocks_and_axes(
    shape: tuple[int, ...], options: dict[str, Any], blocks: str, axes: tuple[int, ...]
) -> None:
    (row,) = describe(jax.ShapeDtypeStruct(shape, jnp.float32), **options).rows
    assert (row.shape, row.blocks, row.axes) == (shape, blocks, axes)


def test_slices_of_batch_axes_are_blocks() -> None:
    description = describe(
        {"layers": jax.ShapeDtypeStruct((12, 512, 2048), jnp.float32)},
        dimension_numbers={"layers": MatrixOfEachLayer()},
    )
    (row,) = description.rows
    assert (row.blocks, row.axes) == ("12 x 512x2048", (0, 1))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_the_blocks_in_the_rows_are_those_in_the_state(tree: Any, options: dict[str, Any]) -> None:
    counted: dict[str, int] = {}
    for row in describe(shapes_of(tree), **options).rows:
        for count, block in re.findall(r"(\d+) x (\S+)", row.blocks):
            counted[block] = counted.get(block, 0) + int(count)
    state = jax.eval_shape(soap_optax.scale_by_soap(**options).init, shapes_of(tree))
    assert counted == {kind: stack.age.size for kind, stack in state.stacks.items()}


def test_arrays_and_their_shapes_are_described_alike() -> None:
    params = arrays_of(TREES["transformer"])
    assert describe(params) == describe(jax.eval_shape(lambda: params))
    assert describe(params) == describe(shapes_of(TREES["transformer"]))
    assert describe(params) == describe(jax.tree.map(np.asarray, params))


def test_parameters_larger_than_any_memory_are_described() -> None:
    params = jax.ShapeDtypeStruct((2**20, 2**20), jnp.float32)
    assert describe(params).state_bytes == 2 * 4 * 2**40 + 2 * 4 + 8  # Two moments, two counters.


def test_paths_are_those_of_the_tree() -> None:
    assert [row.path for row in describe(shapes_of(TREES["transformer"])).rows] == [
        "embedding",
        "layers/attention",
        "layers/mlp",
        "scale",
        "temperature",
    ]
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    paths = [row.path for row in describe(nnx.state(model, nnx.Param)).rows]
    assert [path.split("/")[0] for path in paths] == ["bias", "kernel"]


def test_what_is_masked_has_no_row() -> None:
    params = {"none": None, "masked": optax.MaskedNode(), "kernel": jnp.zeros((4, 3))}
    assert list(by_path(describe(params))) == ["kernel"]


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_the_table_is_aligned(tree: Any) -> None:
    lines = str(describe(shapes_of(tree), block_size=4)).splitlines()
    assert len({len(line) for line in lines}) == 1
    names = ["parameter", "shape", "dtype", "blocks", "axes", "state bytes"]
    starts = [lines[0].index(name) for name in names]
    for line in lines:
        for start, end in itertools.pairwise(starts):
            cell = line[start:end]
            assert cell.isspace() or not cell.startswith(" ")  # It starts with its column.
            assert cell.endswith("  ")
    assert [line.split()[0] for line in lines[-2:]] == ["shared", "total"]


def test_the_table_holds_every_number_of_the_description() -> None:
    description = describe(shapes_of(TREES["transformer"]), block_size=6)
    rows = cells(str(description).splitlines()[1:])
    for row, line in zip(description.rows, rows, strict=False):
        shape = "x".join(map(str, row.shape)) or "scalar"
        axes = [", ".join(map(str, row.axes))] if row.axes else []
        bytes_text = f"{row.state_bytes:,}"
        assert line == [row.path, shape, row.dtype.name, row.blocks, *axes, bytes_text]
    assert rows[-2] == ["shared", f"{description.shared_bytes:,}"]
    assert rows[-1] == ["total", f"{description.entries:,}", f"{description.state_bytes:,}"]
    assert description.entries == sum(math.prod(row.shape) for row in description.rows)


def cells(lines: Sequence[str]) -> list[list[str]]:
    """The non-empty cells of a table, whose columns are at least two spaces apart."""
    return [re.split(r"\s{2,}", line.strip()) for line in lines]


def test_options_that_decide_no_shape_change_nothing() -> None:
    params = shapes_of(TREES["transformer"])
    plain = describe(params, block_size=6)
    others = {
        "learning_rate": 1e-3,
        "b1": 0.9,
        "weight_decay": 0.1,
        "mask": None,
        "precondition_frequency": optax.constant_schedule(5),
        "normalize_grads": True,
    }
    assert describe(params, block_size=6, **others) == plain


@pytest.mark.parametrize("options", [OPTIONS["defaults"], OPTIONS["least state"]])
@pytest.mark.parametrize("labels", [soap_optax.default_labels, lambda _: "adamw"])
@pytest.mark.usefixtures("implicit_promotion")
def test_with_labels_it_describes_soap_adamw(labels: Any, options: dict[str, Any]) -> None:
    for tree in TREES.values():
        params = shapes_of(tree)
        description = describe(params, labels=labels, **options)
        init = soap_optax.soap_adamw(0.1, labels=labels, **options).init
        state = jax.tree.leaves(jax.eval_shape(init, params))
        allocated = sum(leaf.size * leaf.dtype.itemsize for leaf in state)
        assert description.state_bytes == allocated
        if labels is soap_optax.default_labels:
            wanted = jax.tree.leaves(labels(params))
            assert [row.optimizer for row in description.rows] == wanted
        for row in description.rows:
            assert (row.blocks == "AdamW") == (row.optimizer == "adamw")


def test_only_a_table_with_labels_has_a_column_for_them() -> None:
    params = {"kernel": jnp.zeros((4, 3)), "wte": jnp.zeros((5, 4))}
    header, *rows = cells(str(describe(params, labels=soap_optax.default_labels)).splitlines())
    assert header[:3] == ["parameter", "optimizer", "shape"]
    assert [row[:3] for row in rows[:2]] == [["kernel", "soap", "4x3"], ["wte", "adamw", "5x4"]]
    assert "optimizer" not in str(describe(params))
    assert {row.optimizer for row in describe(params).rows} == {None}


def test_every_option_of_soap_adamw_is_taken_with_labels() -> None:
    arguments = inspect.signature(soap_optax.soap_adamw).parameters
    defaults = {name: arguments[name].default for name in arguments if name != "learning_rate"}
    del defaults["labels"]
    params = shapes_of(TREES["transformer"])
    labels = soap_optax.default_labels
    assert describe(params, labels=labels, **defaults) == describe(params, labels=labels)
    with pytest.raises(TypeError, match=r"options of soap_optax.soap_adamw.*'blok_size'.*report"):
        describe(params, labels=labels, blok_size=2)
    with pytest.raises(TypeError, match=r"options of soap_optax.soap, which .*'adamw_b1'"):
        describe(params, adamw_b1=0.9)


def test_every_option_of_soap_is_taken() -> None:
    arguments = inspect.signature(soap_optax.soap).parameters
    defaults = {name: arguments[name].default for name in arguments if name != "learning_rate"}
    params = shapes_of(TREES["transformer"])
    assert describe(params, **defaults) == describe(params)


def test_an_unknown_option_is_an_error_that_names_it() -> None:
    with pytest.raises(TypeError, match=r"'blok_size'.*block_size"):
        describe(jnp.zeros((4, 3)), blok_size=2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"block_size": 1}, ValueError, "block_size"),
        ({"max_precond_dim": 4, "block_size": 8}, ValueError, "max_precond_dim"),
        ({"merge_dims": 1}, TypeError, "merge_dims"),
        ({"mu_dtype": "int8"}, TypeError, "mu_dtype"),
    ],
    ids=str,
)
def test_an_option_out_of_range_raises_what_the_transformation_raises(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        describe(jnp.zeros((4, 3)), **options)


def test_an_integer_parameter_is_an_error() -> None:
    with pytest.raises(TypeError, match="floating"):
        describe({"step": jnp.zeros((), jnp.int32)})
