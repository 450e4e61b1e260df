"""What must hold whatever the numbers are: changes of coordinates, degenerate cases, schedules."""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike
from optax.contrib import MuonDimensionNumbers

import soap_optax
from soap_optax import alias, stacks
from soap_optax.algorithm import step
from soap_optax.blocks import plan, views

State = Any  # A `ScaleBySoapState`, but Optax's signatures say any tree.
Step = Callable[..., tuple[jax.Array, State]]

SHAPE = (6, 4)
NAME = "6x4"
B1, B2, EPS = 0.95, 0.95, 1e-8  # The defaults.

# Updates are of size 1 and come from some ten products and sums, each rounded by 6e-8 (half of
# float32's epsilon), in some ten steps. A wrong coordinate moves an update by a tenth or more.
UPDATE_TOLERANCE = 1e-4


@functools.cache
def step_of(**options: Any) -> Step:
    """One jitted step for each set of static options, the frequency traced."""

    @jax.jit
    def step(grad: jax.Array, state: State, frequency: int) -> Any:
        optimizer = soap_optax.scale_by_soap(precondition_frequency=frequency, **options)
        return optimizer.update(grad, state)

    return step


def gradients(count: int, shape: Sequence[int] = SHAPE) -> np.ndarray:
    """Gradients with some directions larger than others, so that no two eigenvalues are close."""
    rng = np.random.default_rng(0)
    grads = rng.normal(size=(count, *shape))
    for axis, length in enumerate(shape):
        scale = 2.0 ** -np.arange(length).reshape([-1] + [1] * (len(shape) - axis - 1))
        mixing, _ = np.linalg.qr(rng.normal(size=(length, length)))
        grads = np.moveaxis(np.tensordot(grads * scale, mixing, (axis + 1, 0)), -1, axis + 1)
    return grads.astype(np.float32)


def run(grads: np.ndarray, state: State, frequency: int) -> tuple[np.ndarray, State]:
    updates = []
    for grad in grads:
        update, state = step_of()(grad, state, frequency)
        updates.append(np.asarray(update))
    return np.stack(updates), state


def init(shape: Sequence[int] = SHAPE, **options: Any) -> State:
    return soap_optax.scale_by_soap(**options).init(jnp.zeros(shape))


def replace_in_stack(state: State, **fields: Any) -> State:
    return state._replace(stacks={NAME: state.stacks[NAME]._replace(**fields)})


# Bases.


@jax.jit
def bases_of_run(grads: jax.Array, frequency: int) -> tuple[State, list[jax.Array]]:
    """The final state, and the bases of every step, `(steps, d, d)` for each axis."""
    optimizer = soap_optax.scale_by_soap(precondition_frequency=frequency)

    def step(state: State, grad: jax.Array) -> tuple[State, list[jax.Array]]:
        _, state = optimizer.update(grad, state)
        return state, [q[0] for q in state.stacks[NAME].bases]

    return jax.lax.scan(step, optimizer.init(grads[0]), grads)


@pytest.mark.parametrize("frequency", [1, 7])
def test_bases_are_orthonormal_after_any_number_of_refreshes(frequency: int) -> None:
    state, bases = bases_of_run(jnp.asarray(gradients(200)), frequency)
    refreshes = state.stacks[NAME].refreshes
    departures = [
        np.abs(q.astype(np.float64).mT @ q - np.eye(q.shape[-1])).max()
        for q in map(np.asarray, bases)
    ]
    assert refreshes.tolist() == [math.ceil(199 / frequency)]
    # A Householder QR or eigh is orthonormal to a few roundings per column, 6 columns times the
    # epsilon of 1.2e-7, and a refresh starts afresh: nothing adds up over the steps.
    assert max(departures) <= 2 * 6 * 1.2e-7


@hypothesis.given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    data=st.data(),
    seed=st.integers(0, 9),
)
def test_rotating_there_and_back_is_the_identity(
    shape: list[int], data: st.DataObject, seed: int
) -> None:
    axes = data.draw(
        st.lists(st.integers(0, len(shape) - 1), unique=True).map(sorted), label="axes"
    )
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=shape), jnp.float32)
    bases = [
        jnp.asarray(np.linalg.qr(rng.normal(size=(shape[axis],) * 2))[0], jnp.float32)
        for axis in axes
    ]
    rotated = step.rotate(x, bases, axes)
    # Eight products of at most five terms of size 1, each rounded by 6e-8.
    np.testing.assert_allclose(step.rotate_back(rotated, bases, axes), x, rtol=0, atol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(rotated), jnp.linalg.norm(x), rtol=1e-5)
    for axis in range(len(shape)):
        if axes == [axis]:
            expected = np.moveaxis(np.tensordot(bases[0].T, x, (1, axis)), 0, axis)
            np.testing.assert_allclose(rotated, expected, rtol=0, atol=1e-5)


def test_columns_may_change_places_if_their_moments_do() -> None:
    grads = gradients(12)
    _, state = run(grads[:5], init(), 3)
    rows, columns = [3, 0, 5, 1, 4, 2], [2, 0, 3, 1]
    stack = state.stacks[NAME]
    permuted = replace_in_stack(
        state,
        bases=(stack.bases[0][..., rows], stack.bases[1][..., columns]),
        mu=stack.mu[:, rows][:, :, columns],
        nu=stack.nu[:, rows][:, :, columns],
    )
    # Two plain steps, then refreshes, which put the columns back in order by their eigenvalues.
    wanted, wanted_state = run(grads[5:], state, 3)
    found, found_state = run(grads[5:], permuted, 3)
    assert wanted_state.stacks[NAME].refreshes.tolist() == [4]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=UPDATE_TOLERANCE)
    np.testing.assert_allclose(
        np.abs(found_state.stacks[NAME].bases[0]),
        np.abs(wanted_state.stacks[NAME].bases[0]),
        rtol=0,
        atol=UPDATE_TOLERANCE,
    )
    # Moments that stay where they were belong to the wrong columns, which is seen.
    wrong, _ = run(grads[5:], replace_in_stack(permuted, nu=stack.nu), 3)
    assert np.abs(wrong - wanted).max() > 0.1


def test_columns_may_change_their_signs_if_the_first_moment_does() -> None:
    grads = gradients(12)
    _, state = run(grads[:5], init(), 3)
    rows, columns = np.array([1, -1, -1, 1, -1, 1.0]), np.array([-1, 1, 1, -1.0])
    stack = state.stacks[NAME]
    flipped = replace_in_stack(
        state,
        bases=(stack.bases[0] * rows, stack.bases[1] * columns),
        mu=stack.mu * rows[:, None] * columns,
    )
    wanted, _ = run(grads[5:], state, 3)
    found, _ = run(grads[5:], flipped, 3)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=UPDATE_TOLERANCE)
    wrong, _ = run(grads[5:], replace_in_stack(flipped, mu=stack.mu), 3)
    assert np.abs(wrong - wanted).max() > 0.1


def test_refresh_moves_the_second_moment_with_its_columns_and_the_first_as_a_vector() -> None:
    # Eigenvectors are the unit vectors already, in ascending order: a refresh reverses them.
    nu = np.arange(1, 25, dtype=np.float32).reshape(1, 6, 4)
    mu = np.sin(nu)
    state = replace_in_stack(
        init(),
        factors=(jnp.diag(jnp.arange(1.0, 7))[None], jnp.diag(jnp.arange(1.0, 5))[None]),
        mu=jnp.asarray(mu),
        nu=jnp.asarray(nu),
        accepted_gradients=jnp.array([5]),
        refreshes=jnp.array([1]),
        age=jnp.array([3]),
    )
    _, refreshed = step_of()(jnp.zeros(SHAPE), state, 3)
    stack = refreshed.stacks[NAME]
    assert stack.refreshes.tolist() == [2]
    # The zero gradient decays both moments once; a product with a signed permutation is exact, a
    # decay rounds once, by 6e-8 of its value.
    np.testing.assert_allclose(stack.nu, B2 * nu[:, ::-1, ::-1], rtol=1e-6)
    bases = [q[0] for q in stack.bases]
    for q in bases:
        np.testing.assert_allclose(np.abs(q), np.eye(len(q))[::-1], rtol=0, atol=1e-6)
    np.testing.assert_allclose(
        step.rotate_back(stack.mu[0], bases, (0, 1)), B1 * mu[0], rtol=0, atol=1e-5
    )


def test_basis_comes_nearer_to_the_eigenvectors_of_a_still_factor_with_every_refresh() -> None:
    rng = np.random.default_rng(1)
    factors = []
    for length in SHAPE:
        vectors, _ = np.linalg.qr(rng.normal(size=(length, length)))
        factors.append(vectors * 2.0 ** -np.arange(length) @ vectors.T)
    state = replace_in_stack(
        init(),
        factors=tuple(jnp.asarray(factor, jnp.float32)[None] for factor in factors),
        accepted_gradients=jnp.array([1]),
        refreshes=jnp.array([1]),
    )
    departures, rotated = [], np.zeros(0)
    for _ in range(21):  # The first is not due yet; zero gradients keep the factors' directions.
        _, state = step_of()(jnp.zeros(SHAPE), state, 1)
        basis = np.asarray(state.stacks[NAME].bases[0][0], np.float64)
        rotated = basis.T @ factors[0] @ basis
        departures.append(np.linalg.norm(rotated - np.diag(np.diag(rotated))))
    # Neighbouring eigenvalues differ by a factor of 2, and so do the departures after successive
    # refreshes in the long run; 1e-5 is the rounding of a factor of norm 1.2.
    assert departures[0] > 0.1
    assert departures[10] < departures[5] < departures[0]
    assert departures[20] < 1e-5 + departures[0] * 2.0**-10
    assert np.diff(np.diag(rotated)).max() < 0


# Adam.


def adam_by_the_authors(grads: np.ndarray, b1: float, b2: float, eps: float) -> np.ndarray:
    """Adam with `eps` beside the uncorrected root, and a first gradient that is not looked at."""
    mu = nu = np.zeros(grads.shape[1:])
    updates = [np.zeros(grads.shape[1:])]
    for t, grad in enumerate(grads[1:].astype(np.float64), start=1):
        mu = b1 * mu + (1 - b1) * grad
        nu = b2 * nu + (1 - b2) * grad**2
        updates.append(mu / (np.sqrt(nu) + eps) * np.sqrt(1 - b2**t) / (1 - b1**t))
    return np.stack(updates)


def plain_leaves(count: int) -> list[dict[str, np.ndarray]]:
    """Gradients of leaves none of whose axes gets a factor when `max_precond_dim` is 3."""
    rng = np.random.default_rng(2)
    shapes = {"both_too_long": SHAPE, "ones": (1, 4, 1), "scalar": (), "vector": (3,)}
    return [
        {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        for _ in range(count)
    ]


@pytest.mark.parametrize("eps", [1e-8, 0.1])
def test_adam_by_the_authors_is_recovered_when_no_axis_is_preconditioned(eps: float) -> None:
    b1, b2 = 0.9, 0.99
    found, grads = _updates_of_plain_leaves(b1, b2, eps), plain_leaves(8)
    for name in grads[0]:
        wanted = adam_by_the_authors(np.stack([grad[name] for grad in grads]), b1, b2, eps)
        # 1 - 0.99 is 0.01 to 6e-6 of itself in float32, and 1 - 0.99^t likewise.
        np.testing.assert_allclose(found[name], wanted, rtol=0, atol=2e-5)


def test_optax_adam_is_recovered_one_call_later_when_eps_is_negligible() -> None:
    b1, b2, eps = 0.9, 0.99, 1e-30
    found, grads = _updates_of_plain_leaves(b1, b2, eps), plain_leaves(8)
    adam = optax.scale_by_adam(b1, b2, eps)
    update, state = jax.jit(adam.update), adam.init(grads[0])
    for name in grads[0]:
        assert not found[name][0].any()
    for call, grad in enumerate(grads[1:], start=1):
        wanted, state = update(grad, state)
        for name in grad:
            np.testing.assert_allclose(found[name][call], wanted[name], rtol=0, atol=2e-5)


def _updates_of_plain_leaves(b1: float, b2: float, eps: float) -> dict[str, np.ndarray]:
    grads = plain_leaves(8)
    state: State = soap_optax.scale_by_soap(max_precond_dim=3).init(grads[0])
    assert not state.stacks
    updates = []
    for grad in grads:
        update, state = _plain_step()(grad, state, b1, b2, eps)
        updates.append(update)
    return jax.tree.map(lambda *leaves: np.stack(leaves), *updates)


@functools.cache
def _plain_step() -> Callable[..., Any]:
    @jax.jit
    def step(grads: Any, state: State, b1: ArrayLike, b2: ArrayLike, eps: ArrayLike) -> Any:
        return soap_optax.scale_by_soap(b1, b2, eps, max_precond_dim=3).update(grads, state)

    return step


# Steps.


def test_large_leaves_without_a_preconditioner_have_vectors_of_their_own_and_are_adam() -> None:
    rng = np.random.default_rng(4)
    shapes = {"a": (300, 300), "b": (300, 300), "c": (3,), "d": (256, 257)}
    grads = [
        {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        for _ in range(3)
    ]
    optimizer = soap_optax.scale_by_soap(max_precond_dim=200)
    updates: Any = None
    state: Any = optimizer.init(grads[0])
    assert sorted(state.adam) == ["256x257", "300x300", "300x300_2", "float32"]
    assert state.adam["300x300_2"].mu.shape == (300 * 300,)
    for grad in grads:
        updates, state = optimizer.update(grad, state)
    for name in shapes:
        # The first gradient is not applied; two are. Float32 rounds each step by some 1e-7.
        first, second = grads[1][name], grads[2][name]
        mu = B1 * (1 - B1) * first + (1 - B1) * second
        nu = B2 * (1 - B2) * first**2 + (1 - B2) * second**2
        wanted = mu / (np.sqrt(nu) + EPS) * math.sqrt(1 - B2**2) / (1 - B1**2)
        np.testing.assert_allclose(updates[name], wanted, rtol=1e-5, atol=1e-6)
    assert float(state.adam["256x257"].nu[5]) == pytest.approx(
        float((B2 * (1 - B2) * grads[1]["d"] ** 2 + (1 - B2) * grads[2]["d"] ** 2).ravel()[5])
    )


def test_first_applied_update_has_full_size() -> None:
    grads = gradients(2)
    (zero, update), state = run(grads, init(), 10)
    assert not zero.any()
    bases = [q[0] for q in state.stacks[NAME].bases]
    # On its first gradient Adam goes one unit along every coordinate, in the eigenbasis here. A
    # coordinate below 1e-4 would show eps; no coordinate of these gradients is.
    assert np.abs(step.rotate(jnp.asarray(grads[1]), bases, (0, 1))).min() > 1e-4
    rotated_update = step.rotate(jnp.asarray(update), bases, (0, 1))
    signs = np.sign(step.rotate(jnp.asarray(grads[1]), bases, (0, 1)))
    # eps is 1e-8 against a root of sqrt(0.05) * 1e-4 at least.
    np.testing.assert_allclose(rotated_update, signs, rtol=0, atol=1e-3)


def test_both_moments_and_the_factors_move_in_every_step_and_bases_only_when_due() -> None:
    state = init()
    for call, grad in enumerate(gradients(14)):
        before = state.stacks[NAME]
        _, state = step_of()(grad, state, 5)
        after = state.stacks[NAME]
        rows, columns = np.asarray(grad @ grad.T), np.asarray(grad.T @ grad)
        for new, old, gram in zip(after.factors, before.factors, (rows, columns), strict=True):
            # Two products and a sum, each rounded by 6e-8 of numbers of size 4.
            np.testing.assert_allclose(new[0], B2 * old[0] + (1 - B2) * gram, rtol=0, atol=2e-6)
        due = call in (1, 6, 11)
        moved = np.abs(after.bases[0] - before.bases[0]).max()
        assert (moved > 1e-4) == due
        if call and not due:
            rotated = step.rotate(jnp.asarray(grad), [q[0] for q in before.bases], (0, 1))
            nu = B2 * before.nu[0] + (1 - B2) * rotated**2
            mu = B1 * before.mu[0] + (1 - B1) * rotated
            np.testing.assert_allclose(after.nu[0], nu, rtol=0, atol=2e-6)
            np.testing.assert_allclose(after.mu[0], mu, rtol=0, atol=2e-6)
        assert (np.asarray(after.nu) != before.nu).any() == (call > 0)


# Tiling and merging.


@st.composite
def trees_and_options(draw: st.DrawFn) -> tuple[list[tuple[int, ...]], dict[str, Any]]:
    shape = st.lists(st.integers(0, 9), max_size=4).map(tuple)
    block_size = draw(st.none() | st.integers(2, 6))
    return draw(st.lists(shape, min_size=1, max_size=3)), {
        "block_size": block_size,
        "max_precond_dim": draw(st.integers(block_size or 1, 40)),
        "precondition_1d": draw(st.booleans()),
        "merge_dims": draw(st.booleans()),
        "one_sided": draw(st.booleans()),
    }


@hypothesis.settings(max_examples=20)
@hypothesis.given(trees_and_options())
@hypothesis.example(([()], {"precondition_1d": True, "block_size": 4}))
@hypothesis.example(([(5, 0)], {"merge_dims": True, "max_precond_dim": 3}))
@hypothesis.example(([(7, 5), (5,), (2, 7)], {"block_size": 3, "precondition_1d": True}))
def test_blocks_hold_every_entry_once_and_nothing_else_and_go_back_in_place(
    tree_and_options: tuple[list[tuple[int, ...]], dict[str, Any]],
) -> None:
    shapes, options = tree_and_options
    total = sum(map(math.prod, shapes))
    entries = np.arange(1, total + 1, dtype=np.float32)  # A zero comes from nowhere.
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    parts = np.split(entries, ends[:-1])
    leaves = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
    seen = [np.zeros(0)]

    def keep_stack(grads: jax.Array, state: soap_optax.StackState, group: Any, *_: Any) -> Any:
        block, longest = grads.shape[1:], options.get("max_precond_dim", 10000)
        assert grads.shape == state.mu.shape
        assert max(block) <= (options.get("block_size") or max(block))
        axes = [axis for axis, d in enumerate(block) if 1 < d <= longest]
        if options.get("one_sided"):
            axes = [min(axes, key=lambda axis: (block[axis], axis))]
        assert group.axes == tuple(axes)
        seen.append(np.ravel(grads))
        return grads, state

    def keep_adam(grads: list[jax.Array], state: soap_optax.AdamState, *_: Any) -> Any:
        assert sum(grad.size for grad in grads) == state.mu.size
        seen.extend(np.ravel(grad) for grad in grads)
        return grads, state

    # With the equations taken out, what comes out of an update is what went in.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stacks, "update_stack", keep_stack)
        patch.setattr(stacks, "update_adam", keep_adam)
        optimizer = soap_optax.scale_by_soap(**options)
        updates: Any = optimizer.update(leaves, optimizer.init(leaves))[0]
    np.testing.assert_array_equal(np.sort(np.concatenate(seen)), entries)
    for update, leaf in zip(updates, leaves, strict=True):
        assert update.shape == leaf.shape
        np.testing.assert_array_equal(update, leaf)


@hypothesis.settings(max_examples=300)
@hypothesis.given(length=st.integers(1, 3000), block_size=st.integers(2, 300))
def test_tiles_are_equal_if_a_divisor_allows_and_differ_by_at_most_one_if_not(
    length: int, block_size: int
) -> None:
    tiles = []
    for start, count, tile in plan.cut_axis(length, block_size):
        assert start == sum(tiles)
        tiles += [tile] * count
    assert sum(tiles) == length
    assert max(tiles) <= block_size
    assert tiles == sorted(tiles, reverse=True)
    if length <= block_size:
        assert tiles == [length]
    elif divisors := [
        d for d in range(2, block_size + 1) if 2 * d >= block_size and length % d == 0
    ]:
        assert tiles == [max(divisors)] * (length // max(divisors))
    else:
        assert max(tiles) - min(tiles) == 1
        assert len(tiles) == math.ceil(length / block_size)
    assert tiles == reference.lengths_of_tiles(length, block_size)


MERGED = [
    # The two examples with which Distributed Shampoo documents the same rule.
    ((1, 2, 512, 1, 2048, 1, 3, 4), 1024, (1024, 2048, 12)),
    ((1, 2, 768, 1, 2048), 1024, (2, 768, 2048)),
    # Kernels of convolutions, small and large.
    ((3, 3, 16, 32), 10000, (4608,)),
    ((3, 3, 64, 128), 10000, (576, 128)),
    ((7, 7, 3, 64), 100, (49, 3, 64)),
    # Exactly at the limit, and one beyond it.
    ((4, 5), 20, (20,)),
    ((4, 5), 19, (4, 5)),
    # An axis that is too long by itself stays by itself.
    ((2, 3, 100, 4, 5), 30, (6, 100, 20)),
    ((100, 100), 30, (100, 100)),
    # Axes of length 1 vanish, but for the last one left.
    ((1, 1, 1), 10, (1,)),
    ((1, 50, 1), 10, (50,)),
    # Vectors and scalars are not merged.
    ((12,), 10, (12,)),
    ((), 10, ()),
]


@pytest.mark.parametrize(("shape", "limit", "wanted"), MERGED, ids=lambda value: str(value))
def test_dimensions_are_merged_by_the_authors_rule(
    shape: tuple[int, ...], limit: int, wanted: tuple[int, ...]
) -> None:
    cut = views.BlockOptions(limit, precondition_1d=False, merge_dims=True, block_size=None, one_sided=False)
    assert views.merged_shape(shape, cut) == wanted


@hypothesis.settings(max_examples=300)
@hypothesis.given(
    shape=st.lists(st.integers(1, 12), min_size=2, max_size=6).map(tuple),
    limit=st.integers(1, 200),
)
def test_merging_agrees_with_the_reference_and_keeps_every_entry(
    shape: tuple[int, ...], limit: int
) -> None:
    cut = views.BlockOptions(limit, precondition_1d=False, merge_dims=True, block_size=None, one_sided=False)
    merged = views.merged_shape(shape, cut)
    assert math.prod(merged) == math.prod(shape)
    assert merged == reference.merged(shape, limit)


# Schedules and composition.


def refreshes_by_rule(frequency_at: Callable[[int], int], calls: int) -> list[int]:
    """The number of bases adopted after every call, by the rule in words."""
    age = refreshes = 0
    counts = []
    for call in range(calls):
        if call == 1:
            refreshes += 1
        elif call > 1 and age >= frequency_at(call - 1):  # Updates applied so far.
            refreshes += 1
            age = 0
        age += call > 0
        counts.append(refreshes)
    return counts


def test_schedule_makes_refreshes_dense_and_then_thin_in_one_program() -> None:
    traces = []
    schedule = optax.join_schedules(
        [optax.constant_schedule(1), optax.constant_schedule(2), optax.constant_schedule(5)],
        [4, 10],
    )
    optimizer = soap_optax.scale_by_soap(precondition_frequency=schedule)

    @jax.jit
    def step(grad: jax.Array, state: State) -> Any:
        traces.append(None)
        return optimizer.update(grad, state)

    state, counts = init(), []
    for grad in gradients(25):
        _, state = step(grad, state)
        counts += state.stacks[NAME].refreshes.tolist()
    assert counts == refreshes_by_rule(lambda done: 1 if done < 4 else 2 if done < 10 else 5, 25)
    assert counts == [0, 1, 2, 3, 4, 4, 5, 5, 6, 6, *[7] * 5, *[8] * 5, *[9] * 5]
    assert len(traces) == 1


@pytest.mark.parametrize("frequency", [1, 3, 10])
def test_constant_schedule_is_the_integer(frequency: int) -> None:
    @jax.jit
    def scheduled(grad: jax.Array, state: State, frequency: jax.Array) -> Any:
        optimizer = soap_optax.scale_by_soap(
            precondition_frequency=lambda count: frequency + 0 * jnp.asarray(count)
        )
        return optimizer.update(grad, state)

    grads = gradients(14)
    wanted, wanted_state = run(grads, init(), frequency)
    state = init()
    for grad, update in zip(grads, wanted, strict=True):
        found, state = scheduled(grad, state, jnp.asarray(frequency))
        # Two programs may round differently.
        np.testing.assert_allclose(found, update, rtol=0, atol=UPDATE_TOLERANCE)
    counts = [refreshes_by_rule(lambda _: frequency, 14)[-1]]
    assert state.stacks[NAME].refreshes.tolist() == counts
    assert wanted_state.stacks[NAME].refreshes.tolist() == counts


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("normalize_grads", [False, True])
def test_forward_and_reverse_derivatives_agree_and_are_finite_from_the_first_call(
    normalize_grads: bool,
) -> None:
    optimizer: Any = soap_optax.soap(
        1e-2, precondition_frequency=1, eps=1e-3, normalize_grads=normalize_grads
    )
    grads = [jax.tree.map(jnp.asarray, {"w": g, "v": g[0]}) for g in gradients(4).astype(float)]

    def path(scale: jax.Array) -> jax.Array:
        params = jax.tree.map(jnp.ones_like, grads[0])
        state, total = optimizer.init(params), jnp.zeros(())
        for number, grad in enumerate(grads):
            bent = jax.tree.map(lambda g, n=number: g * (1 + scale * n * g), grad)
            updates, state = optimizer.update(bent, state, params)
            total += sum(
                jnp.sum(u * g) for u, g in zip(updates.values(), grad.values(), strict=True)
            )
        return total

    forward = jax.jit(jax.jacfwd(path))(0.1)
    reverse = jax.jit(jax.grad(path))(0.1)
    assert np.isfinite(forward)
    assert float(forward) != 0
    # The same sums in another order.
    np.testing.assert_allclose(forward, reverse, rtol=1e-9)


@pytest.mark.usefixtures("x64")
def test_derivative_with_respect_to_the_learning_rate_takes_the_bases_as_constants() -> None:
    rng = np.random.default_rng(3)
    target, start = rng.normal(size=(2, 3, 2))
    weights = np.exp(rng.normal(size=(3, 2)))
    calls, frequency, beta, eps = 7, 2, 0.9, 1.0

    def loss(params: jax.Array) -> jax.Array:
        return jnp.sum(weights * (params - target) ** 4)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def train(learning_rate: float) -> Any:
        # b2=0 makes the second moment the last gradient's square, so that only the first moment
        # remembers the bases of the steps before; the large eps keeps the loss smooth.
        optimizer: Any = soap_optax.soap(
            learning_rate,
            b2=0.0,
            eps=eps,
            shampoo_beta=beta,
            precondition_frequency=frequency,
        )

        def step(carry: Any, _: None) -> tuple[Any, Any]:
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            bases = [q[0] for q in state[0].stacks["3x2_float64"].bases]
            return (optax.apply_updates(params, updates), state), bases

        carry = (jnp.asarray(start), optimizer.init(jnp.asarray(start)))
        (params, _), bases = jax.lax.scan(step, carry, length=calls)
        return loss(params), bases

    (_, bases), found = train(0.05)
    assert np.abs(np.diff(bases[0], axis=0)).max(axis=(1, 2)).astype(bool).tolist() == [
        call in (1, 3, 5) for call in range(1, calls)
    ]

    def train_by_hand(learning_rate: float) -> float:
        mu = np.zeros((3, 2))
        params = start - learning_rate * 0.01 * start  # The first call only decays the weights.
        for call in range(1, calls):
            grad = 4 * weights * (params - target) ** 3
            mu = 0.95 * mu + 0.05 * grad
            left, right = bases[0][call], bases[1][call]
            rotated = left.T @ mu @ right / (np.abs(left.T @ grad @ right) + eps)
            direction = left @ rotated @ right.T / (1 - 0.95**call)
            params = params - learning_rate * (direction + 0.01 * params)
        return float(np.sum(weights * (params - target) ** 4))

    h = 1e-6
    wanted = (train_by_hand(0.05 + h) - train_by_hand(0.05 - h)) / (2 * h)
    # A central difference in float64: h^2 from the third derivative, 1e-16 / h from rounding.
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_soap_hands_every_argument_on_to_scale_by_soap(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments: dict[str, Any] = {
        "b1": 0.9,
        "b2": 0.99,
        "eps": 1e-6,
        "shampoo_beta": 0.8,
        "precondition_frequency": 3,
        "max_precond_dim": 7,
        "precondition_1d": True,
        "merge_dims": True,
        "normalize_grads": True,
        "correct_bias": False,
        "mu_dtype": jnp.bfloat16,
        "block_size": 5,
        "dimension_numbers": MuonDimensionNumbers(),
        "stack_sharding": NamedSharding(jax.make_mesh((1,), ("data",)), PartitionSpec("data")),
        "stack_multiple": 4,
        "param_shardings": NamedSharding(jax.make_mesh((1,), ("data",)), PartitionSpec()),
        "refresh": "eigh",
        "refresh_tolerance": 0.1,
        "refresh_order": "after_gradient",
        "stagger": True,
        "one_sided": True,
        "factored": True,
        "preconditioner_dtype": jnp.bfloat16,
        "fold_factors": True,
        "precision": "highest",
    }
    parameters = inspect.signature(soap_optax.scale_by_soap).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    assert defaults.keys() == arguments.keys()
    assert all(arguments[name] != default for name, default in defaults.items())
    handed_on: dict[str, Any] = {}

    def record(*args: Any, **kwargs: Any) -> optax.GradientTransformation:
        handed_on.update(zip(parameters, args, strict=False), **kwargs)
        return optax.identity()

    monkeypatch.setattr(alias, "scale_by_soap", record)
    soap_optax.soap(0.1, **arguments)
    assert handed_on == arguments
    soap_optax.soap(0.1)
    assert handed_on == defaults


def test_soap_is_the_chain_of_its_three_parts_and_decays_what_the_mask_says() -> None:
    decay = 0.3
    mask = {"kernel": True, "frozen": False, "bias": False}
    rate = optax.linear_schedule(0.1, 0.01, 5)
    soap = soap_optax.soap(rate, weight_decay=decay, mask=mask, precondition_frequency=2)
    parts = (
        soap_optax.scale_by_soap(precondition_frequency=2),
        optax.add_decayed_weights(decay, mask),
        optax.scale_by_learning_rate(rate),
    )

    @jax.jit
    def step(grads: Any, states: Any, params: Any) -> tuple[Any, Any]:
        by_soap, soap_state = soap.update(grads, states[0], params)
        updates, part_states = [grads], []
        for part, state in zip(parts, states[1], strict=True):
            update, state = part.update(updates[-1], state, params)
            updates.append(update)
            part_states.append(state)
        return (by_soap, updates[-1], updates[1]), (soap_state, tuple(part_states))

    rng = np.random.default_rng(4)
    shapes = {"kernel": (4, 3), "frozen": (4, 3), "bias": (3,)}

    def draw() -> Any:
        return {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}

    params: Any = draw()
    states = (soap.init(params), tuple(part.init(params) for part in parts))
    for call in range(4):
        (by_soap, by_parts, direction), states = step(draw(), states, params)
        jax.tree.map(np.testing.assert_array_equal, by_soap, by_parts)
        jax.tree.map(np.testing.assert_array_equal, states[0], states[1])
        learning_rate = float(np.asarray(rate(call)))
        for name, update in by_soap.items():
            # Decoupled: the decay never passes through the preconditioner.
            decayed = direction[name] + decay * params[name] * mask[name]
            # A product and a sum of numbers of size 1, rounded by 6e-8 each.
            np.testing.assert_allclose(update, -learning_rate * decayed, rtol=0, atol=1e-6)
            params[name] += update
