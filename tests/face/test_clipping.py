"""`clip_by_running_norm`: its equation, gradients of any size, and its place before SOAP."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
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
        limit = max_ratio * mean / (1 - decay**step) if step else np.inf
        mean = decay * mean + (1 - decay) * min(norm, limit)
        clipped_at += [norm > limit]
        updates, state = update(grads, state)
        for name, grad in grads.items():
            expected = np.asarray(grad) * min(1, limit / norm)
            np.testing.assert_allclose(updates[name], expected, rtol=1e-12)
            if norm <= limit:
                np.testing.assert_array_equal(updates[name], grad)
        np.testing.assert_allclose(state.mean_norm, mean, rtol=1e-12)
    assert any(clipped_at)
    assert not all(clipped_at)
    assert update._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]  # jit has it


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite_does_not_count(bad: float) -> None:
    clip: Any = soap_optax.clip_by_running_norm(2.0)
    _, state = clip.update(gradient(0, dtype=np.float32), clip.init(gradient(0, dtype=np.float32)))
    grads = gradient(1, 1e3, np.float32)
    others = {name: grad for name, grad in grads.items() if name != "kernel"}
    broken = grads | {"kernel": grads["kernel"].at[0, 0].set(bad)}
    updates, after = clip.update(broken, state)
    expected, after_others = clip.update(others, state)
    for name, update in expected.items():
        np.testing.assert_array_equal(updates[name], update)
    assert not np.all(np.isfinite(updates["kernel"]))  # SOAP rejects it.
    np.testing.assert_array_equal(after.mean_norm, after_others.mean_norm)

    all_broken = jax.tree.map(lambda grad: jnp.full_like(grad, bad), grads)
    _, after = clip.update(all_broken, state)
    jax.tree.map(np.testing.assert_array_equal, after, state)


@pytest.mark.parametrize("sizes", [(1e-38, 1e38), (1e38, 1e-38, 1e38), (0.0, 0.0, 1.0), (3e38,)])
def test_no_size_makes_the_state_or_an_update_infinite(sizes: tuple[float, ...]) -> None:
    clip: Any = soap_optax.clip_by_running_norm()
    params = {"a": jnp.ones((8, 8)), "empty": jnp.zeros((0, 3))}
    state = clip.init(params)
    for size in (*sizes, 1.0):
        grads = {"a": jnp.full((8, 8), size), "empty": params["empty"]}
        updates, state = clip.update(grads, state)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((updates, state)))
        assert np.all(np.asarray(updates["a"]) <= np.float32(size))


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
    assert [leaf.dtype for leaf in jax.tree.leaves(state)] == [jnp.int32, jnp.float32]


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
