"""`clip_by_running_norm`: its equation, gradients of any size, and its place before SOAP."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.cases import mostly_long
from helpers.meshes import AUTO, EXPLICIT, all_axes, mesh_of
from jax.sharding import NamedSharding, PartitionSpec

import soap_optax

SHAPES = {"kernel": (4, 3), "bias": (3,), "scale": ()}


def gradient(seed: int, size: float = 1.0, dtype: Any = np.float64) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(size * rng.normal(size=s), dtype) for name, s in SHAPES.items()}


def norm_of(tree: Any) -> float:
    return float(np.sqrt(sum(np.sum(np.abs(np.asarray(leaf)) ** 2) for leaf in tree.values())))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("max_ratio", "decay"), [(3.0, 0.95), (1.1, 0.5), (2.0, 0.0)])
def test_norms_are_clipped_to_a_multiple_of_the_mean_of_earlier_ones(
    max_ratio: float, decay: float
) -> None:
    clip: Any = soap_optax.clip_by_running_norm(max_ratio, decay)
    update = jax.jit(clip.update)
    state: Any = clip.init(gradient(0))
    sizes = 10.0 ** np.random.default_rng(1).uniform(-3, 3, 30)
    mean, clipped_at = 0.0, []
    for step, size in enumerate(sizes):
        grads = gradient(step, size)
        norm = norm_of(grads)
        limit = max_ratio * mean / (1 - decay**step) if step else np.inf  # As Adam corrects bias.
        mean = decay * mean + (1 - decay) * min(norm, limit)
        clipped_at += [norm > limit]
        updates, state = update(grads, state)
        for name, grad in grads.items():
            expected = np.asarray(grad) * min(1, limit / norm)
            np.testing.assert_allclose(updates[name], expected, rtol=1e-12)
            if norm <= limit:
                np.testing.assert_array_equal(updates[name], grad)
        np.testing.assert_allclose(state.mean_norm, mean / (1 - decay ** (step + 1)), rtol=1e-12)
    assert any(clipped_at)
    assert not all(clipped_at)
    assert update._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]  # jit has it


# SOAP rejects all of them.
@pytest.mark.parametrize("bad", mostly_long([np.nan, np.inf, -np.inf, 1e25], [1e25]))
def test_a_parameter_that_soap_rejects_does_not_count_and_keeps_its_gradient(bad: float) -> None:
    clip: Any = soap_optax.clip_by_running_norm(2.0)
    _, state = clip.update(gradient(0, dtype=np.float32), clip.init(gradient(0, dtype=np.float32)))
    grads = gradient(1, 1e3, np.float32)
    others = {name: grad for name, grad in grads.items() if name != "kernel"}
    broken = grads | {"kernel": grads["kernel"].at[0, 0].set(bad)}
    updates, after = clip.update(broken, state)
    expected, _ = clip.update(others, state)
    for name, update in expected.items():
        np.testing.assert_array_equal(updates[name], update)
        assert np.all(np.abs(update) < np.abs(grads[name]))
    np.testing.assert_array_equal(updates["kernel"], broken["kernel"])
    soap = soap_optax.scale_by_soap()
    _, of_soap = soap.update(updates, soap.init(grads))
    [stack] = optax.tree.get(of_soap, "stacks").values()
    assert stack.rejected_gradients.tolist() == [1]
    jax.tree.map(np.testing.assert_array_equal, after, state)  # Not the mean of the others alone.


@pytest.mark.parametrize("first", [(), (0.0, 0.0), (1e-38,), (2e-38,), (1e-30,), (3e38,), (1e18,)])
@pytest.mark.parametrize("decay", [0.0, 0.95, 0.9999])
def test_no_first_size_stops_later_updates(first: tuple[float, ...], decay: float) -> None:
    clip: Any = soap_optax.clip_by_running_norm(decay=decay)
    params = {"a": jnp.ones((8, 8)), "empty": jnp.zeros((0, 3)), "integer": jnp.arange(2)}
    state, update, updates = clip.init(params), jax.jit(clip.update), params
    for size in (*first, *[1.0] * 80):
        grads = params | {"a": jnp.full((8, 8), size)}
        updates, state = update(grads, state)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((updates, state)))
        assert np.all(np.asarray(updates["a"]) <= np.float32(size))
        np.testing.assert_array_equal(updates["integer"], params["integer"])
    grows_from = first[0] if first in ((2e-38,), (1e-30,)) and decay > 0 else 1.0
    assert np.all(np.asarray(updates["a"]) >= min(1.0, 1e3 * grows_from))


def test_a_decay_that_is_not_a_number_for_one_step_leaves_the_state_as_it_is() -> None:
    optimizer = optax.inject_hyperparams(soap_optax.clip_by_running_norm)(decay=0.95)
    state: Any = optimizer.init(jnp.ones(2))
    update = jax.jit(optimizer.update)
    _, before = update(jnp.ones(2), state)
    broken = before._replace(hyperparams=before.hyperparams | {"decay": jnp.float32(jnp.nan)})
    _, after = update(jnp.ones(2), broken)
    jax.tree.map(np.testing.assert_array_equal, after.inner_state, before.inner_state)


def test_a_scheduled_decay_clips_no_ordinary_gradient() -> None:
    optimizer = optax.inject_hyperparams(soap_optax.clip_by_running_norm)(
        decay=lambda step: jnp.where(step < 10, 0.999, 0.9)
    )
    state = optimizer.init(jnp.ones(2))
    update = jax.jit(optimizer.update)
    for _ in range(20):
        updates, state = update(jnp.ones(2), state)
        np.testing.assert_array_equal(updates, jnp.ones(2))


@pytest.mark.long
def test_derivatives_are_finite_and_no_step_divides_zero_by_zero() -> None:
    clip: Any = soap_optax.clip_by_running_norm()

    def sum_after(size: jax.Array, grads: jax.Array) -> jax.Array:
        updates, state = clip.update(grads, clip.init(grads))
        more, _ = clip.update(size * grads, state)
        return jnp.sum(updates) + jnp.sum(more)

    with jax.debug_nans(True):
        for grads in (jnp.ones(3), jnp.zeros(3)):
            for size in (1.0, 1e3):
                derivatives = jax.grad(sum_after, argnums=(0, 1))(jnp.float32(size), grads)
                assert all(np.all(np.isfinite(leaf)) for leaf in derivatives)
    # Where it is clipped, the size has no effect.
    np.testing.assert_allclose(jax.grad(sum_after)(jnp.float32(1e3), jnp.ones(3)), 0, atol=1e-5)


@pytest.mark.parametrize(
    "values",
    [
        np.array([complex(-0.0, -0.0), complex(0.0, -0.0), complex(1.0, -0.0)], np.complex64),
        np.array([1.0, 1e-39, -0.0], np.float32),
        np.array([1.0, 1e-39, -0.0], jnp.bfloat16),
    ],
    ids=["complex", "float32", "bfloat16"],
)
def test_signs_of_zeros_and_subnormal_numbers_stay(values: np.ndarray) -> None:
    clip: Any = soap_optax.clip_by_running_norm()
    updates, _ = clip.update(jnp.asarray(values), clip.init(jnp.asarray(values)))
    assert np.asarray(updates).tobytes() == values.tobytes()


@pytest.mark.long
def test_it_scans_within_shard_map() -> None:
    clip: Any = soap_optax.clip_by_running_norm()
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AUTO,))

    def train(grads: jax.Array) -> jax.Array:
        def step(state: Any, size: jax.Array) -> Any:
            updates, state = clip.update(grads * size, state)
            return state, updates

        return jax.lax.scan(step, clip.init(grads), jnp.array([1.0, 100.0]))[1]

    grads = jnp.array([1.0, 1.0, 2.0, 2.0])
    mapped = jax.shard_map(
        train, mesh=mesh, in_specs=PartitionSpec("x"), out_specs=PartitionSpec(None, "x")
    )
    np.testing.assert_allclose(mapped(grads), [[1, 1, 2, 2], [3, 3, 6, 6]], rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.complex64])
def test_updates_have_the_dtype_of_the_gradient_and_the_state_is_at_least_float32(
    dtype: Any,
) -> None:
    clip: Any = soap_optax.clip_by_running_norm()
    grads = {"a": jnp.asarray([[3.0, 4.0]], dtype)}
    state = clip.init(grads)
    _, state = clip.update(grads, state)
    updates, state = clip.update(jax.tree.map(lambda leaf: 100 * leaf, grads), state)
    assert updates["a"].dtype == dtype
    np.testing.assert_allclose(np.asarray(updates["a"], complex), [[9, 12]], rtol=1e-2)
    assert [leaf.dtype for leaf in jax.tree.leaves(state)] == [jnp.float32] * 2


def test_the_state_keeps_its_type_on_an_explicit_mesh_and_no_device_clips_alone() -> None:
    mesh = mesh_of("4x2", EXPLICIT)
    sharding = NamedSharding(mesh, PartitionSpec("x", "y"))
    clip: Any = soap_optax.clip_by_running_norm()
    update = jax.jit(clip.update)
    rng = np.random.default_rng(0)
    alone = clip.init(jnp.ones((8, 4)))
    with jax.set_mesh(mesh):
        state = clip.init(jax.device_put(jnp.ones((8, 4)), sharding))
    for size in (1.0, 1e3):
        grads = rng.normal(size=(8, 4)).astype("f4") * size
        expected, alone = clip.update(jnp.asarray(grads), alone)
        with jax.set_mesh(mesh):
            updates, state = update(jax.device_put(grads, sharding), state)
        assert updates.sharding == sharding
        np.testing.assert_allclose(updates, expected, rtol=1e-5)
        np.testing.assert_allclose(state.mean_norm, alone.mean_norm, rtol=1e-5)
    assert update._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]  # jit has it


@pytest.mark.long
@pytest.mark.usefixtures("implicit_promotion")  # Optax promotes.
def test_soap_adamw_clips_first() -> None:
    params = {"kernel": jnp.ones((4, 3)), "embedding": {"embedding": jnp.ones((5, 3))}}
    options: dict[str, Any] = {"weight_decay": 0.0}
    one: Any = soap_optax.soap_adamw(1e-2, max_norm_ratio=2.0, **options)
    chain: Any = optax.chain(
        soap_optax.clip_by_running_norm(2.0), soap_optax.soap_adamw(1e-2, **options)
    )
    injected: Any = optax.inject_hyperparams(soap_optax.soap_adamw)(
        learning_rate=1e-2, max_norm_ratio=2.0, **options
    )
    states = [optimizer.init(params) for optimizer in (one, chain, injected)]
    for step in range(4):
        rng = np.random.default_rng(step)
        grads = jax.tree.map(
            lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 10.0**step, "f4"),  # noqa: B023
            params,
        )
        updates = []
        for i, optimizer in enumerate((one, chain, injected)):
            update, states[i] = optimizer.update(grads, states[i], params)
            updates.append(update)
        jax.tree.map(np.testing.assert_array_equal, updates[0], updates[1])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), *updates[1:])
    mean_norm: Any = optax.tree.get(states[0], "mean_norm")
    assert 0 < mean_norm < 100  # Without the limit, the last norm alone would add more.


def test_state_shardings_take_the_state() -> None:
    mesh = mesh_of("8", AUTO)
    optimizer = optax.chain(
        soap_optax.clip_by_running_norm(),
        soap_optax.scale_by_soap(stack_sharding=all_axes(mesh)),
    )
    params = {"kernel": jnp.ones((8, 8))}
    state = jax.eval_shape(optimizer.init, params)
    shardings: Any = soap_optax.state_shardings(state, all_axes(mesh))
    assert shardings[0].mean_norm.is_fully_replicated


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"max_ratio": 1.0}, ValueError),
        ({"max_ratio": np.inf}, ValueError),
        ({"max_ratio": np.nan}, ValueError),
        ({"max_ratio": "3"}, TypeError),
        ({"decay": 1.0}, ValueError),
        ({"decay": -0.1}, ValueError),
    ],
)
def test_arguments_out_of_range_raise_when_it_is_built(
    arguments: dict[str, Any], error: type[Exception]
) -> None:
    [(name, _)] = arguments.items()
    with pytest.raises(error, match=name):
        soap_optax.clip_by_running_norm(**arguments)
