"""A state that is sharded over eight simulated devices."""

import functools
import math
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from helpers.cases import mostly_long
from helpers.meshes import (
    AUTO,
    EXPLICIT,
    OPTIONS,
    STEPS,
    TOLERANCE,
    Tree,
    all_axes,
    assert_close,
    draw,
    make_step,
    mesh_of,
    positions_of_blocks,
    shard,
    single_device_run,
    train,
)
from jax import export
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import soap_optax

pytestmark = pytest.mark.usefixtures("x64")

every_type_of_axes = pytest.mark.parametrize(
    "kind", [AUTO, pytest.param(EXPLICIT, marks=pytest.mark.long)], ids=["auto", "explicit"]
)
long = pytest.mark.long


@pytest.mark.parametrize(
    ("mesh_name", "kind", "most_programs", "options"),
    mostly_long(
        [
            pytest.param("8", AUTO, 1, {}, id="8-auto"),
            pytest.param("4x2", AUTO, 1, {}, id="4x2-auto"),
            pytest.param("4x2", EXPLICIT, 1, {}, id="4x2-explicit"),
            pytest.param("2x2x2", EXPLICIT, 1, {}, id="2x2x2-explicit"),
            # Programs return parameters that are sharded over an axis of length 1 as replicated.
            pytest.param("1x8", AUTO, 2, {}, id="1x8-auto"),
            pytest.param("4x1x2", AUTO, 1, {}, id="4x1x2-auto"),
            # On automatic axes JAX 0.8 chooses new shardings for tiled parameters. One program
            # takes the first parameters, and another program takes the returned ones.
            pytest.param("4x2", AUTO, 2, {"block_size": 4}, id="4x2-auto-tiles"),
            pytest.param("4x2", EXPLICIT, 1, {"block_size": 4}, id="4x2-explicit-tiles"),
        ],
        short=["4x2-explicit-tiles"],
    ),
)
def test_a_run_on_a_mesh_equals_that_on_a_single_device(
    mesh_name: str, kind: AxisType, most_programs: int, options: dict[str, Any]
) -> None:
    mesh = mesh_of(mesh_name, kind)
    optimizer = soap_optax.soap(0.1, stack_sharding=all_axes(mesh), **OPTIONS, **options)
    params, state, programs = train(optimizer, shard(draw(), mesh))
    wanted, wanted_state = single_device_run(**options)
    assert_close(params, wanted)
    assert programs <= most_programs
    # Padding has not changed, and everything else is the state of a single device.
    found_state = jax.device_get(state)
    for name, stack in wanted_state[0].stacks.items():
        for leaf in jax.tree.leaves(state[0].stacks[name]):
            assert len(leaf.addressable_shards) == 8
            assert {shard.data.shape[0] for shard in leaf.addressable_shards} == {len(leaf) // 8}
        for found, alone in zip(
            jax.tree.leaves(found_state[0].stacks[name]), jax.tree.leaves(stack), strict=True
        ):
            assert len(found) == -(-len(alone) // 8) * 8
            positions = positions_of_blocks(len(alone), len(found))
            np.testing.assert_allclose(found[positions], alone, rtol=0, atol=TOLERANCE)
    first: Any = optimizer.init(shard(draw(), mesh))
    shardings = (
        jax.tree.map(lambda leaf: leaf.sharding, (one[0].stacks, one[0].adam))
        for one in (state, first)
    )
    assert next(shardings) == next(shardings)
    for name, stack in found_state[0].stacks.items():
        positions = positions_of_blocks(len(wanted_state[0].stacks[name].age), len(stack.age))
        jax.tree.map(
            lambda found, start, positions=positions: np.testing.assert_array_equal(
                np.delete(found, positions, axis=0), np.delete(start, positions, axis=0)
            ),
            stack,
            jax.device_get(first[0].stacks[name]),
        )


# Padding ------------------------------------------------------------------------------------------


@long
def test_padding_never_counts() -> None:
    mesh = mesh_of("8", AUTO)
    sharded = soap_optax.soap(0.1, stack_sharding=all_axes(mesh), **OPTIONS)
    alone = soap_optax.soap(0.1, **OPTIONS)
    read = jax.jit(soap_optax.diagnostics, static_argnames="sample")
    bad = draw()
    bad["replicated"][0][0, 0] = np.nan
    scalars = []
    for optimizer, params, first in (
        (sharded, shard(draw(), mesh), shard(bad, mesh)),
        (alone, jax.tree.map(jnp.asarray, draw()), bad),
    ):
        _, state = jax.jit(optimizer.update)(first, optimizer.init(params), params)
        step = jax.jit(make_step(optimizer))
        for _ in range(5):
            params, state = step(params, state)
        for sample in (1, 2, 4, None):
            scalars.append(read(state, sample=sample))
    for found, wanted in zip(scalars[:4], scalars[4:], strict=True):
        assert int(wanted["soap/rejected_gradients"]) == 1
        for name in wanted:
            # The departure from orthonormality is only rounding, of 1e-16.
            np.testing.assert_allclose(
                found[name], wanted[name], rtol=1e-5, atol=1e-14, err_msg=name
            )


@long
def test_a_multiple_of_its_own_moves_between_numbers_of_devices() -> None:
    """The same arrays of state on eight devices, on two, and on one."""
    params, wanted = jax.tree.map(jnp.asarray, draw()), single_device_run()[0]
    mesh = mesh_of("8", AUTO)
    pair = Mesh(mesh.devices[:2], ("x",))
    steps = [3, 2, 2]
    shardings = [all_axes(mesh), all_axes(pair), None]
    state = soap_optax.soap(0.1, stack_multiple=16, **OPTIONS).init(params)
    for sharding, count in zip(shardings, steps, strict=True):
        optimizer = soap_optax.soap(0.1, stack_sharding=sharding, stack_multiple=16, **OPTIONS)
        if sharding is None:
            params, state = jax.device_put((jax.device_get(params), jax.device_get(state)))
        else:
            params = jax.device_put(params, NamedSharding(sharding.mesh, PartitionSpec()))
            state = jax.device_put(state, soap_optax.state_shardings(state, sharding))
        step = jax.jit(make_step(optimizer))
        for _ in range(count):
            params, state = step(params, state)
    assert_close(params, wanted)


@long
@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_one_program_serves_twenty_five_steps_with_specified_shardings(kind: AxisType) -> None:
    mesh = mesh_of("4x2", kind)
    params = shard(draw(), mesh)
    optimizer = soap_optax.soap(
        0.1,
        stack_sharding=all_axes(mesh),
        param_shardings=jax.tree.map(lambda leaf: leaf.sharding, params),
        **OPTIONS,
    )
    _, state, programs = train(optimizer, params, steps=25)
    assert int(state[0].count) == 25
    assert programs == 1


def test_param_shardings_must_shard_evenly_on_the_same_devices() -> None:
    mesh = mesh_of("8", AUTO)
    params = {"kernel": jnp.ones((12, 8))}
    backwards = Mesh(mesh.devices[::-1], mesh.axis_names)
    for hint, rule in (
        (
            NamedSharding(mesh, PartitionSpec("x")),
            "shard the axes of a parameter evenly, .*kernel",
        ),
        (
            NamedSharding(backwards, PartitionSpec(None, "x")),
            "its devices in the same sequence, .*kernel",
        ),
    ):
        optimizer = soap_optax.soap(0.1, stack_sharding=all_axes(mesh), param_shardings=hint)
        with pytest.raises(ValueError, match=rule):
            optimizer.init(params)


# In a training job --------------------------------------------------------------------------------


@long
def test_replicas_are_bitwise_equal_after_a_thousand_steps() -> None:
    mesh = mesh_of("4x2", AUTO)
    sharding = NamedSharding(mesh, PartitionSpec("x"))  # Two devices hold the same blocks.
    optimizer = soap_optax.soap(1e-3, stack_sharding=sharding, precondition_frequency=10)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), shard(draw(), mesh))
    step = make_step(optimizer)

    @functools.partial(jax.jit, static_argnums=2)
    def steps(params: Tree, state: Tree, count: int) -> tuple[Tree, Tree]:
        return jax.lax.scan(lambda carry, _: (step(*carry), None), (params, state), length=count)[0]

    _, state = steps(params, optimizer.init(params), 1000)
    compared = 0
    for leaf in jax.tree.leaves(state):
        by_index: dict[str, np.ndarray] = {}
        for piece in leaf.addressable_shards:
            data = np.asarray(piece.data)
            other = by_index.setdefault(str(piece.index), data)
            compared += other is not data
            assert data.tobytes() == other.tobytes()
    assert compared >= 4 * len(jax.tree.leaves(state[0].stacks))


@every_type_of_axes
def test_shardings_of_a_chain_serve_jit_on_both_sides(kind: AxisType) -> None:
    mesh = mesh_of("4x2", kind)
    params = shard(draw(), mesh)
    stack_sharding = all_axes(mesh)
    optimizer = optax.chain(
        optax.trace(0.9), soap_optax.soap(0.1, stack_sharding=stack_sharding, **OPTIONS)
    )
    state: Any = optimizer.init(params)
    shardings = soap_optax.state_shardings(state, stack_sharding)
    assert jax.tree.structure(shardings) == jax.tree.structure(state)
    assert shardings[0].trace["by rows"][0] == params["by rows"][0].sharding
    abstract = jax.eval_shape(optimizer.init, params)
    found: Any = soap_optax.state_shardings(abstract, stack_sharding, params)
    assert found[1] == shardings[1]
    assert found[0].trace["by rows"][0] == params["by rows"][0].sharding
    # With JAX 0.8 and 0.10, shapes carry the momentum's sharding if axes are explicit.
    if kind == EXPLICIT and abstract[0].trace["by rows"][0].sharding is not None:
        found = soap_optax.state_shardings(abstract, stack_sharding)
        assert found[0].trace["by rows"][0] == params["by rows"][0].sharding
    of_params = jax.tree.map(lambda leaf: leaf.sharding, params)
    step = jax.jit(
        make_step(optimizer),
        in_shardings=(of_params, shardings),
        out_shardings=(of_params, shardings),
    )
    for _ in range(2):
        params, state = step(params, state)
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == shardings


def test_moments_of_another_optimizer_have_the_shardings_of_their_parameters() -> None:
    mesh = mesh_of("4x2", AUTO)
    params = shard(draw(), mesh)
    stack_sharding = all_axes(mesh)
    optimizer = optax.partition(
        {
            "soap": soap_optax.soap(0.1, stack_sharding=stack_sharding),
            "adamw": optax.chain(optax.add_decayed_weights(0.1), optax.scale_by_adam()),
        },
        lambda params: {name: "adamw" if name.startswith("by") else "soap" for name in params},
    )
    state = jax.eval_shape(optimizer.init, params)
    found: Any = soap_optax.state_shardings(state, stack_sharding, params)
    adam = found.inner_states["adamw"].inner_state[1]
    for moment in (adam.mu, adam.nu):
        for name in ("by rows", "by columns", "by both"):
            assert moment[name] == [leaf.sharding for leaf in params[name]]
    assert adam.count.spec == PartitionSpec()
    soap = found.inner_states["soap"].inner_state[0]
    assert soap.stacks["8x24_float64"].mu.spec == stack_sharding.spec
    # A leaf of another shape, or under another path, gets no sharding of a parameter.
    other = {"by rows": [jax.ShapeDtypeStruct((8,), jnp.float64)], "else": params["vector"][0]}
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), other)
    for sharding in jax.tree.leaves(soap_optax.state_shardings(abstract, stack_sharding, params)):
        assert sharding.spec == PartitionSpec()


@long
def test_an_exported_step_equals_the_jitted_one() -> None:
    mesh = mesh_of("4x2", AUTO)
    optimizer = soap_optax.soap(0.1, stack_sharding=all_axes(mesh), block_size=4, **OPTIONS)
    params = shard(draw(), mesh)
    state = optimizer.init(params)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, (params, state))
    step = jax.jit(make_step(optimizer), in_shardings=shardings, out_shardings=shardings)
    for_all = export.export(step, platforms=["cpu", "cuda", "tpu"])(params, state)
    assert for_all.nr_devices == 8
    # XLA keeps the branches of other platforms inside `shard_map`, so that this program cannot be
    # called. A program for a single platform can be called.
    called = jax.jit(export.export(step, platforms=["cpu"])(params, state).call)
    one = other = (params, state)
    for _ in range(4):
        one, other = called(*one), step(*other)
    assert_close(one[0], other[0])


@long
def test_a_checkpoint_is_restored_with_state_shardings() -> None:
    mesh = mesh_of("8", AUTO)
    pair = Mesh(mesh.devices[:2], ("x",))
    wanted = single_device_run()[0]
    params = shard(draw(), mesh)
    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
        optimizer = soap_optax.soap(0.1, stack_sharding=all_axes(mesh), stack_multiple=8, **OPTIONS)
        step, state = jax.jit(make_step(optimizer)), optimizer.init(params)
        for _ in range(3):
            params, state = step(params, state)
        checkpointer.save(f"{folder}/3", (params, state))
        checkpointer.wait_until_finished()

        sharding = all_axes(pair)
        optimizer = soap_optax.soap(0.1, stack_sharding=sharding, stack_multiple=8, **OPTIONS)
        replicated = NamedSharding(pair, PartitionSpec())
        shardings = (
            jax.tree.map(lambda _: replicated, params),
            soap_optax.state_shardings(jax.eval_shape(optimizer.init, draw()), sharding),
        )
        target = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            (params, state),
            shardings,
        )
        params, state = checkpointer.restore(f"{folder}/3", target)
    for leaf in jax.tree.leaves(state[0].stacks):
        assert len(leaf.addressable_shards) == 2
        assert {len(shard.data) for shard in leaf.addressable_shards} == {len(leaf) // 2}
    step = jax.jit(make_step(optimizer), out_shardings=shardings)
    for _ in range(STEPS - 3):
        params, state = step(params, state)
    assert_close(params, wanted)


@every_type_of_axes
def test_a_state_made_inside_jit_has_the_shardings_of_one_made_outside(kind: AxisType) -> None:
    mesh = mesh_of("4x2", kind)
    params = shard(draw(), mesh)
    optimizer = soap_optax.soap(0.1, stack_sharding=all_axes(mesh), **OPTIONS)
    wanted = jax.tree.map(lambda leaf: leaf.sharding, optimizer.init(params))
    with jax.set_mesh(mesh):
        state = jax.jit(lambda params, init=optimizer.init: init(params))(params)
    of_stacks = jax.tree.map(lambda leaf: leaf.sharding, state[0].stacks)
    assert of_stacks == wanted[0].stacks


# Stacks are sharded over one of two axes, or over both in another order than the mesh's. The other
# meshes have three axes, an axis of length 1 (twice), six devices, and one device.
ANY_MESH = [
    ((2, 4), ("tensor", "data"), PartitionSpec("data")),
    ((2, 4), ("data", "fsdp"), PartitionSpec(("fsdp", "data"))),
    ((2, 2, 2), ("data", "tensor", "fsdp"), PartitionSpec(("data", "fsdp"))),
    ((1, 8), ("data", "fsdp"), PartitionSpec("data")),
    ((1, 8), ("data", "fsdp"), PartitionSpec(("data", "fsdp"), None)),
    ((2, 3), ("data", "fsdp"), PartitionSpec(("data", "fsdp"))),
    ((1, 1), ("data", "fsdp"), PartitionSpec(("data", "fsdp"))),
]


@pytest.mark.long
# Some tiles of length 6 have fewer slices than there are devices.
@pytest.mark.parametrize("block_size", [None, 6])
@pytest.mark.parametrize(
    ("shape", "names", "spec"),
    [pytest.param(*case, id=f"{case[0]}-{tuple(case[2])}") for case in ANY_MESH],
)
def test_any_mesh_takes_tiles_and_whole_matrices(
    shape: tuple[int, ...], names: tuple[str, ...], spec: PartitionSpec, block_size: int | None
) -> None:
    rng = np.random.default_rng(4)
    grads = [[rng.normal(size=(12, 24)) for _ in range(3)] for _ in range(3)]
    devices = np.asarray(jax.devices()[: math.prod(shape)]).reshape(shape)
    mesh = Mesh(devices, names, axis_types=(AUTO,) * len(names))
    of_leaves = NamedSharding(mesh, PartitionSpec(names[0], names[-1]))
    options = {"block_size": block_size, **OPTIONS, "max_precond_dim": 24}
    sharded = soap_optax.scale_by_soap(stack_sharding=NamedSharding(mesh, spec), **options)
    alone = soap_optax.scale_by_soap(**options)
    state, wanted_state = sharded.init(grads[0]), alone.init(grads[0])
    update, update_alone = jax.jit(sharded.update), jax.jit(alone.update)
    for grad in grads:
        updates, state = update(jax.device_put(grad, of_leaves), state)
        wanted, wanted_state = update_alone(grad, wanted_state)
        assert_close(updates, wanted)


@long
def test_parameters_on_no_mesh_join_an_explicit_one() -> None:
    mesh = mesh_of("4x2", EXPLICIT)
    optimizer = soap_optax.soap(0.1, stack_sharding=all_axes(mesh), **OPTIONS)
    params, _, _ = train(optimizer, jax.tree.map(jnp.asarray, draw()))
    assert_close(params, single_device_run()[0])


@long
@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_injected_hyperparameters_reach_every_device(kind: AxisType) -> None:
    mesh = mesh_of("4x2", kind)
    inject = optax.inject_hyperparams(soap_optax.soap, static_args=soap_optax.STATIC_ARGS)
    optimizer = inject(learning_rate=0.1, stack_sharding=all_axes(mesh), **OPTIONS)
    params, _, _ = train(optimizer, shard(draw(), mesh))
    assert_close(params, single_device_run()[0])


@long
@pytest.mark.parametrize(
    "option",
    # `test_user_shard_map` has all refresh methods.
    [{"refresh": "partial"}, {"refresh_tolerance": 1e-9}, {"stagger": True}, {"block_size": 6}],
    ids=lambda option: "-".join(map(str, *option.items())),
)
def test_a_users_own_shard_map_may_hold_an_optimizer_on_each_device(option: dict[str, Any]) -> None:
    """Each device trains a different model, and has a different state."""
    mesh = mesh_of("8", AUTO)
    each = PartitionSpec("x")
    grads = jnp.asarray(np.random.default_rng(6).normal(size=(4, 8, 12, 6)))
    optimizer = soap_optax.scale_by_soap(precondition_frequency=2, **option)
    states = wanted_states = jax.vmap(optimizer.init)(grads[0])

    def update(grads: jax.Array, states: Any) -> Any:
        return jax.vmap(optimizer.update)(grads, states)

    mapped = jax.jit(jax.shard_map(update, mesh=mesh, in_specs=each, out_specs=each))
    together = jax.jit(update)
    for grad in grads:
        updates, states = mapped(grad, states)
        wanted, wanted_states = together(grad, wanted_states)
        assert_close(updates, wanted)
    for found, wanted in zip(*map(jax.tree.leaves, (states, wanted_states)), strict=True):
        if found.dtype == jnp.int32:
            np.testing.assert_array_equal(found, wanted)


@long
def test_a_mapped_update_on_a_mesh_equals_separate_ones() -> None:
    mesh = mesh_of("8", AUTO)
    optimizer = soap_optax.scale_by_soap(stack_sharding=all_axes(mesh), **OPTIONS)
    alone = soap_optax.scale_by_soap(**OPTIONS)
    grads = jnp.asarray(np.random.default_rng(3).normal(size=(2, 8, 8)))

    def two_updates(optimizer: optax.GradientTransformation, grad: jax.Array) -> Any:
        _, state = optimizer.update(grad, optimizer.init(grad))
        return optimizer.update(2 * grad + 1, state)[0]

    mapped = jax.jit(jax.vmap(functools.partial(two_updates, optimizer)))(grads)
    assert_close(mapped, np.stack([two_updates(alone, grad) for grad in grads]))
