"""Invalid gradients and refreshes are rejected block by block, and counted."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cases import mostly_long

import soap_optax
from soap_optax.algorithm import eigenbasis, refresh_methods
from soap_optax.linalg import decompositions
from soap_optax.stacks import refresh_gating, update

Tree = dict[str, Any]  # Arrays by name, or trees of them.
State = Any  # A `ScaleBySoapState`, but Optax's signatures say any tree.
Step = Callable[..., tuple[Tree, State]]  # (grads, state, frequency) -> (updates, state)

FREQUENCY = 3
# Two matrices make one stack; the vector and the scalar share the Adam bucket.
SHAPES = {"first": (6, 4), "second": (6, 4), "scalar": (), "vector": (5,)}
# Call 0 fills the factors, call 1 computes the first basis, call 4 refreshes it, call 6 is plain.
CALLS = {"first call": 0, "first basis": 1, "refresh": 1 + FREQUENCY, "plain step": 6}

NOT_FINITE = {"nan": np.nan, "infinity": np.inf, "minus infinity": -np.inf}


@functools.cache
def step_of(**options: Any) -> Step:
    """One jitted step for each set of static options, the frequency traced."""

    @jax.jit
    def step(grads: Tree, state: State, frequency: int) -> Any:
        optimizer = soap_optax.scale_by_soap(precondition_frequency=frequency, **options)
        return optimizer.update(grads, state)

    return step


def init(params: Tree, **options: Any) -> State:
    return soap_optax.scale_by_soap(**options).init(params)


@functools.cache
def good_gradients(count: int = 12) -> list[Tree]:
    rng = np.random.default_rng(0)
    return [
        {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()}
        for _ in range(count)
    ]


@functools.cache
def good_run() -> list[tuple[Tree, State]]:
    """The results of every call of a run with good gradients."""
    state = init(good_gradients()[0])
    returned = []
    for grads in good_gradients():
        returned.append(step_of()(grads, state, FREQUENCY))
        state = returned[-1][1]
    return returned


def state_before(call: int) -> State:
    return good_run()[call - 1][1] if call else init(good_gradients()[0])


def poison(grad: jax.Array, value: float, entry: int) -> jax.Array:
    return grad.ravel().at[entry].set(value).reshape(grad.shape)


def block_of(state: State, leaf: str) -> dict[str, np.ndarray]:
    """All arrays in the state for one leaf of `SHAPES`."""
    if leaf in ("first", "second"):
        return arrays_of_block(state.stacks["6x4"], ["first", "second"].index(leaf))
    adam = state.adam["float32"]
    position = ["scalar", "vector"].index(leaf)
    entries = slice(0, 1) if leaf == "scalar" else slice(1, 6)
    return {
        "accepted_gradients": np.asarray(adam.accepted_gradients[position]),
        "rejected_gradients": np.asarray(adam.rejected_gradients[position]),
        "mu": np.asarray(adam.mu[entries]),
        "nu": np.asarray(adam.nu[entries]),
    }


def arrays_of_block(stack: soap_optax.StackState, position: int) -> dict[str, np.ndarray]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(stack)
    return {jax.tree_util.keystr(path): np.asarray(leaf[position]) for path, leaf in leaves}


def assert_same_bits(found: Any, wanted: Any) -> None:
    """Equality without tolerance; a NaN equals itself."""
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def without(block: dict[str, np.ndarray], *names: str) -> dict[str, np.ndarray]:
    return {path: array for path, array in block.items() if path.lstrip(".") not in names}


def assert_all_finite(tree: Any) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        assert np.isfinite(np.asarray(leaf, np.float64)).all(), jax.tree_util.keystr(path)


# Gradients that are not finite.


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("value", NOT_FINITE.values(), ids=NOT_FINITE)
@pytest.mark.parametrize("entry", [0, -1], ids=["first entry", "last entry"])
@pytest.mark.parametrize("leaf", SHAPES)
def test_a_non_finite_gradient_changes_nothing_of_its_block_but_a_counter(
    leaf: str, entry: int, value: float, call: int
) -> None:
    before = state_before(call)
    grads = good_gradients()[call]
    updates, state = step_of()(
        {**grads, leaf: poison(grads[leaf], value, entry)}, before, FREQUENCY
    )

    assert_same_bits(updates[leaf], jnp.zeros(SHAPES[leaf]))
    held = without(block_of(state, leaf), "rejected_gradients")
    assert_same_bits(held, without(block_of(before, leaf), "rejected_gradients"))
    counted = {path: block for path, block in block_of(state, leaf).items() if "rejected_g" in path}
    assert list(counted.values()) == [1]

    good_updates, good_state = good_run()[call]
    for other in SHAPES.keys() - {leaf}:
        assert_same_bits(updates[other], good_updates[other])
        assert_same_bits(block_of(state, other), block_of(good_state, other))
    assert int(state.count) == call + 1


@pytest.mark.parametrize(
    "bad_calls",
    [[0], [1], [0, 1, 2], [4], [5, 6], [0, 2, 6, 10, 11, 14]],
    ids=lambda calls: "-".join(map(str, calls)),
)
def test_run_with_bad_gradients_ends_bitwise_where_the_run_without_them_ends(
    bad_calls: list[int],
) -> None:
    bad = {
        "first": poison(good_gradients()[0]["first"], np.nan, 7),
        "second": jnp.full(SHAPES["second"], np.inf),
        "scalar": jnp.asarray(-np.inf),
        "vector": poison(good_gradients()[0]["vector"], np.nan, 2),
    }
    state = init(bad)
    good = iter(good_run())
    for call in range(len(good_gradients()) + len(bad_calls)):
        if call in bad_calls:
            _, state = step_of()(bad, state, FREQUENCY)
            continue
        grads = good_gradients()[call - sum(bad_call < call for bad_call in bad_calls)]
        updates, state = step_of()(grads, state, FREQUENCY)
        wanted_updates, wanted_state = next(good)
        assert_same_bits(updates, wanted_updates)
        for leaf in SHAPES:
            found = without(block_of(state, leaf), "rejected_gradients")
            assert_same_bits(found, without(block_of(wanted_state, leaf), "rejected_gradients"))
    assert next(good, None) is None  # Every good gradient was seen.
    for leaf in SHAPES:
        assert [n for path, n in block_of(state, leaf).items() if "rejected_g" in path] == [
            len(bad_calls)
        ]


def test_blocks_that_miss_different_gradients_refresh_each_in_its_own_time() -> None:
    bad_calls = {"first": [0, 5, 6], "second": [1, 4, 9], "scalar": [2], "vector": [0, 1]}
    taken_in = dict.fromkeys(SHAPES, 0)
    state = init(good_gradients()[0])
    for call in range(len(good_gradients())):
        grads = {leaf: good_gradients()[taken_in[leaf]][leaf] for leaf in SHAPES}
        for leaf in SHAPES:
            if call in bad_calls[leaf]:
                grads[leaf] = poison(grads[leaf], np.nan, 0)
        updates, state = step_of()(grads, state, FREQUENCY)
        for leaf in SHAPES:
            if call in bad_calls[leaf]:
                assert_same_bits(updates[leaf], jnp.zeros(SHAPES[leaf]))
                continue
            wanted_updates, wanted_state = good_run()[taken_in[leaf]]
            taken_in[leaf] += 1
            assert_same_bits(updates[leaf], wanted_updates[leaf])
            assert_same_bits(
                without(block_of(state, leaf), "rejected_gradients"),
                without(block_of(wanted_state, leaf), "rejected_gradients"),
            )
    assert taken_in == {"first": 9, "second": 9, "scalar": 11, "vector": 10}


def test_only_the_tile_that_holds_the_nan_is_rejected() -> None:
    options = {"block_size": 4}
    step = step_of(**options)
    grads = [
        {"tiled": jnp.concatenate([g["first"][:4], g["second"][:4]])} for g in good_gradients()
    ]
    state = good_state = init(grads[0], **options)
    missed = [0, 1, 5, 6]
    for call, grad in enumerate(grads):
        good_updates, good_state = step(grad, good_state, FREQUENCY)
        bad = {"tiled": grad["tiled"].at[6, 3].set(np.nan)} if call in missed else grad
        before = state
        updates, state = step(bad, state, FREQUENCY)
        assert_same_bits(updates["tiled"][:4], good_updates["tiled"][:4])
        if call in missed:
            assert_same_bits(updates["tiled"][4:], jnp.zeros((4, 4)))
            assert_same_bits(
                without(arrays_of_block(state.stacks["4x4"], 1), "rejected_gradients"),
                without(arrays_of_block(before.stacks["4x4"], 1), "rejected_gradients"),
            )
    stack = state.stacks["4x4"]
    assert stack.rejected_gradients.tolist() == [0, len(missed)]
    assert stack.accepted_gradients.tolist() == [len(grads), len(grads) - len(missed)]
    assert_same_bits(arrays_of_block(stack, 0), arrays_of_block(good_state.stacks["4x4"], 0))

    # The second tile has the state of a run with only its accepted gradients.
    for call in missed:
        grads[call] = {"tiled": grads[call]["tiled"].at[4:].set(np.nan)}
    clean_state = init(grads[0], **options)
    for call, grad in enumerate(grads):
        if call not in missed:
            _, clean_state = step(grad, clean_state, FREQUENCY)
    assert_same_bits(
        without(arrays_of_block(stack, 1), "rejected_gradients"),
        without(arrays_of_block(clean_state.stacks["4x4"], 1), "rejected_gradients"),
    )


# Refreshes that fail.

SOUND, NAN, NOTHING_ELSE, INFINITY, NOT_UNIT, NOT_ORTHOGONAL, ZERO, IDENTITY = range(8)
FAILURES = {
    "nan": NAN,
    "nothing but nan": NOTHING_ELSE,
    "infinity": INFINITY,
    "not unit": NOT_UNIT,
    "not orthogonal": NOT_ORTHOGONAL,
    "zero": ZERO,
}


@functools.cache
def step_with_failing_refresh() -> Step:
    """A step in which every decomposition returns the given failure, for one matrix."""
    sound_qr, sound_eigh = decompositions.orthonormalize, decompositions.descending_eigenvectors

    @jax.jit
    def step(grads: Tree, state: State, frequency: int, failure: int) -> Any:
        def spoil(result: jax.Array) -> jax.Array:
            return jnp.stack(
                [
                    result,
                    result.at[0, 0].set(jnp.nan),
                    jnp.full_like(result, jnp.nan),
                    result.at[-1, 0].set(jnp.inf),
                    result * 1.001,
                    result.at[:, 0].set(result[:, 1]),
                    jnp.zeros_like(result),
                    jnp.eye(len(result)),
                ]
            )[failure]

        with pytest.MonkeyPatch.context() as patch:
            # `refresh_if_due` has a jit, whose cache would keep the replaced functions.
            unjitted = inspect.unwrap(refresh_gating.refresh_if_due)
            patch.setattr(update, "refresh_if_due", unjitted)
            patch.setattr(refresh_methods, "orthonormalize", lambda matrix: spoil(sound_qr(matrix)))
            patch.setattr(
                eigenbasis, "descending_eigenvectors", lambda *inputs: spoil(sound_eigh(*inputs))
            )
            optimizer = soap_optax.scale_by_soap(precondition_frequency=frequency)
            return optimizer.update(grads, state)

    return step


def gradients_of_a_matrix(count: int = 12) -> list[Tree]:
    return [{"matrix": grads["first"]} for grads in good_gradients(count)]


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_an_untrustworthy_first_basis_is_rejected_counted_and_tried_again(
    failure: int,
) -> None:
    step = step_with_failing_refresh()
    grads = gradients_of_a_matrix()
    _, state = step(grads[0], init(grads[0]), FREQUENCY, failure)
    for call in (1, 2):
        updates, state = step(grads[call], state, FREQUENCY, failure)
        stack = state.stacks["6x4"]
        assert stack.rejected_refreshes.tolist() == [call]
        assert stack.refreshes.tolist() == [0]
        # The identity stays the basis, so that the block continues as Adam.
        assert_same_bits(stack.bases, (jnp.eye(6)[None], jnp.eye(4)[None]))
        assert stack.accepted_gradients.tolist() == [call + 1]
        assert np.abs(updates["matrix"]).max() > 0.1
    updates, state = step(grads[3], state, FREQUENCY, SOUND)
    stack = state.stacks["6x4"]
    assert (stack.refreshes.tolist(), stack.rejected_refreshes.tolist()) == ([1], [2])
    assert np.abs(stack.bases[0][0] - np.eye(6)).max() > 0.1
    assert_all_finite((updates, state))


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_an_untrustworthy_refresh_is_rejected_counted_and_tried_again(failure: int) -> None:
    step = step_with_failing_refresh()
    grads = gradients_of_a_matrix()
    before = init(grads[0])
    for grad in grads[:4]:
        _, before = step(grad, before, FREQUENCY, SOUND)

    never = 1000
    plain_updates, plain = step(grads[4], before, never, SOUND)
    updates, rejected = step(grads[4], before, FREQUENCY, failure)
    # Bases and moments equal the ones of a step without a due refresh.
    assert_same_bits(updates, plain_updates)
    found, wanted = (arrays_of_block(state.stacks["6x4"], 0) for state in (rejected, plain))
    assert_same_bits(
        without(found, "age", "rejected_refreshes"), without(wanted, "age", "rejected_refreshes")
    )
    assert (found[".rejected_refreshes"], found[".refreshes"], found[".age"]) == (1, 1, 1)

    # The next due refresh succeeds.
    state = rejected
    for grad in grads[5:7]:
        _, state = step(grad, state, FREQUENCY, failure)
    waiting = state.stacks["6x4"]
    assert waiting.rejected_refreshes.tolist() == [1]
    updates, state = step(grads[7], state, FREQUENCY, SOUND)
    stack = state.stacks["6x4"]
    assert (stack.refreshes.tolist(), stack.rejected_refreshes.tolist()) == ([2], [1])
    assert np.abs(stack.bases[0] - waiting.bases[0]).max() > 1e-3
    assert_all_finite((updates, state))


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_a_large_block_rejects_the_same_refreshes_as_a_small_one(failure: int) -> None:
    """Large bases are probed instead of multiplied out, and the check reduces many numbers."""
    step = step_with_failing_refresh()
    grads = [
        {"matrix": grad}
        for grad in jnp.asarray(np.random.default_rng(1).normal(size=(6, 256, 4)), jnp.float32)
    ]
    _, state = step(grads[0], init(grads[0]), 1, SOUND)
    _, state = step(grads[1], state, 1, failure)
    assert state.stacks["256x4"].rejected_refreshes.tolist() == [1]
    _, sound = step(grads[2], state, 1, SOUND)
    updates, state = step(grads[3], sound, 1, failure)
    stack = state.stacks["256x4"]
    assert (stack.refreshes.tolist(), stack.rejected_refreshes.tolist()) == ([1], [2])
    assert_same_bits(stack.bases, sound.stacks["256x4"].bases)
    assert_all_finite((updates, state))


@pytest.mark.parametrize("value", NOT_FINITE.values(), ids=NOT_FINITE)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("call", [CALLS["first basis"], CALLS["refresh"]], ids=["first", "later"])
def test_a_refresh_from_a_non_finite_factor_is_rejected_and_a_sound_factor_heals_it(
    call: int, axis: int, value: float
) -> None:
    sound = state_before(call)
    stack = sound.stacks["6x4"]
    factors = list(stack.factors)
    factors[axis] = factors[axis].at[0, 1, 2].set(value).at[0, 2, 1].set(value)
    planted = sound._replace(stacks={"6x4": stack._replace(factors=tuple(factors))})

    grads = good_gradients()
    updates, state = step_of()(grads[call], planted, FREQUENCY)
    found = state.stacks["6x4"]
    assert found.rejected_refreshes.tolist() == [1, 0]
    assert found.refreshes.tolist() == [int(stack.refreshes[0]), int(stack.refreshes[1]) + 1]
    for new, old in zip(found.bases, stack.bases, strict=True):
        assert_same_bits(new[0], old[0])
    never = 1000
    if call > 1:
        plain_updates, plain_state = step_of()(grads[call], sound, never)
        assert_same_bits(updates["first"], plain_updates["first"])
        assert_same_bits(found.mu[0], plain_state.stacks["6x4"].mu[0])
        assert_same_bits(found.nu[0], plain_state.stacks["6x4"].nu[0])
    assert_all_finite((updates, found.mu, found.nu, found.bases))

    # The other block of the stack is unchanged by this.
    good_updates, good_state = good_run()[call]
    assert_same_bits(updates["second"], good_updates["second"])
    assert_same_bits(block_of(state, "second"), block_of(good_state, "second"))

    state = state._replace(stacks={"6x4": found._replace(factors=good_state.stacks["6x4"].factors)})
    for grad in grads[call + 1 : call + 1 + FREQUENCY]:
        updates, state = step_of()(grad, state, FREQUENCY)
    healed = state.stacks["6x4"]
    assert healed.rejected_refreshes.tolist() == [1, 0]
    assert healed.refreshes[0] == stack.refreshes[0] + 1
    assert_all_finite((updates, state))


@pytest.mark.parametrize("call", [CALLS["first basis"], CALLS["refresh"]], ids=["first", "later"])
@pytest.mark.parametrize("value", NOT_FINITE.values(), ids=NOT_FINITE)
def test_a_sound_basis_of_a_non_finite_factor_is_rejected(value: float, call: int) -> None:
    """LAPACK returns a sound basis of some matrices with a NaN, so the factor must be checked."""
    step, grads = step_with_failing_refresh(), gradients_of_a_matrix()
    state = init(grads[0])
    for grad in grads[:call]:
        _, state = step(grad, state, FREQUENCY, SOUND)
    stack = state.stacks["6x4"]
    factors = (stack.factors[0].at[0, 1, 2].set(value), stack.factors[1])
    planted = state._replace(stacks={"6x4": stack._replace(factors=factors)})
    for factors_of, rejected in ((state, 0), (planted, 1)):
        _, after = step(grads[call], factors_of, FREQUENCY, IDENTITY)
        assert after.stacks["6x4"].rejected_refreshes.tolist() == [rejected]
        assert after.stacks["6x4"].refreshes.tolist() == [int(stack.refreshes[0]) + 1 - rejected]


# Gradients at the edges of the number format.

EXTREME_SHAPES = {"small": (8, 6), "large": (64, 48), "three": (3, 4, 2), "v": (5,), "s": ()}


def _zero(rng: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
    return np.zeros(shape)


def _constant(rng: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
    return np.full(shape, 0.5)


def _rank_one(rng: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
    return functools.reduce(
        np.multiply.outer, [rng.normal(size=length) for length in shape], np.ones(())
    )


def _one_entry(rng: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
    grad = np.zeros(shape)
    grad.flat[-1] = 1
    return grad


def _of_size(size: float) -> Callable[[np.random.Generator, Sequence[int]], np.ndarray]:
    return lambda rng, shape: size * rng.normal(size=shape)


def _wild(rng: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
    return rng.normal(size=shape) * 10.0 ** rng.uniform(-30, 18)


EXTREMES = {
    "zero": _zero,
    "constant": _constant,
    "rank one": _rank_one,
    "one entry": _one_entry,
    "tiny": _of_size(1e-30),
    "square is subnormal": _of_size(1e-20),
    "huge": _of_size(1e18),
    "every step another size": _wild,
}


@jax.jit
def thirty_steps(grads: Tree, frequency: int) -> Any:
    """Runs over stacked gradients and returns all updates and states; one program for all tests."""
    optimizer = soap_optax.scale_by_soap(precondition_frequency=frequency)

    def step(state: State, grad: Tree) -> Any:
        updates, state = optimizer.update(grad, state)
        return state, (updates, state)

    first = jax.tree.map(lambda grad: grad[0], grads)
    return jax.lax.scan(step, optimizer.init(first), grads)[1]


@pytest.mark.parametrize("frequency", mostly_long([1, 10], [10]))
@pytest.mark.parametrize("kind", EXTREMES)
def test_extreme_gradients_leave_everything_finite(kind: str, frequency: int) -> None:
    rng = np.random.default_rng(0)
    grads = {
        name: np.stack([EXTREMES[kind](rng, shape) for _ in range(30)]).astype(np.float32)
        for name, shape in EXTREME_SHAPES.items()
    }
    updates, states = thirty_steps(grads, frequency)
    assert_all_finite((updates, states))

    # A gradient whose squares would overflow is rejected like an infinity: see `is_acceptable`.
    limit = np.finfo(np.float32).max / 4
    rejected = {
        name: sum(np.sum(np.square(grad, dtype=np.float64)) > limit for grad in grads[name])
        for name in grads
    }
    final = jax.tree.map(lambda leaf: leaf[-1], states)
    stacks = {"small": "8x6", "large": "64x48", "three": "3x4x2"}
    for name, stack in stacks.items():
        assert final.stacks[stack].rejected_gradients.tolist() == [rejected[name]]
        assert final.stacks[stack].accepted_gradients.tolist() == [30 - rejected[name]]
        # No decomposition fails, for factors of any rank.
        assert final.stacks[stack].rejected_refreshes.tolist() == [0]
    wanted = [rejected["s"], rejected["v"]]
    assert final.adam["float32"].rejected_gradients.tolist() == wanted
    if kind == "huge":
        assert rejected["large"] == 30  # 3072 entries of 1e18: their squares pass 3.4e38.
        assert rejected["small"] == 0

    # Adam leaves have no basis that changes. Because b1 = b2, Cauchy-Schwarz bounds their updates
    # by 1; 1e-5 is rounding.
    assert np.abs(updates["v"]).max() <= 1 + 1e-5
    assert np.abs(updates["s"]).max() <= 1 + 1e-5


@pytest.mark.parametrize("share", [0.2, 0.3, 0.9])
def test_a_gradient_is_rejected_from_a_quarter_of_the_largest_sum_of_squares_on(
    share: float,
) -> None:
    """The margin is for the rounding of Gram matrices and of the rotated gradient's squares."""
    largest = float(np.finfo(np.float32).max)
    grads = jax.tree.map(
        lambda grad: jnp.full(grad.shape, np.sqrt(share * largest / grad.size), jnp.float32),
        good_gradients()[0],
    )
    _, state = step_of()(grads, init(grads), FREQUENCY)
    rejected = int(share > 0.25)
    assert state.stacks["6x4"].rejected_gradients.tolist() == [rejected] * 2
    assert state.adam["float32"].rejected_gradients.tolist() == [rejected] * 2


@pytest.mark.parametrize("size", [1.0, 1e-20, 1e-26, 1e-30])
def test_normalized_updates_have_their_size_however_small_the_gradients_are(size: float) -> None:
    """The root mean square equals the bias correction, for blocks and for Adam leaves."""
    options = {"normalize_grads": True}
    state = init(good_gradients()[0], **options)
    for call, grads in enumerate(good_gradients()[:6]):
        small = jax.tree.map(lambda grad: size * grad, grads)
        updates, state = step_of(**options)(small, state, FREQUENCY)
        for direction in updates.values():
            rms = float(jnp.sqrt(jnp.mean(jnp.square(direction))))
            correction = np.sqrt(1 - 0.95**call) / (1 - 0.95**call) if call else 0.0
            # Float32 square roots and powers have errors of some 1e-6. Gradients below 1e-26 have
            # directions below 1e-18, which float32 nearly loses: updates may only be smaller.
            if size >= 1e-20:
                assert rms == pytest.approx(correction, rel=1e-4)
            assert rms <= correction * (1 + 1e-4)


def test_zero_gradients_divide_nothing_by_zero_under_normalize_grads() -> None:
    options = {"normalize_grads": True}
    grads = jax.tree.map(jnp.zeros_like, good_gradients()[0])
    state = init(grads, **options)
    for _ in range(4):
        updates, state = step_of(**options)(grads, state, 1)
        assert_same_bits(updates, grads)
    assert_all_finite(state)


# Narrow parameters.

DTYPES = {"bfloat16": jnp.bfloat16, "float16": jnp.float16, "float32": jnp.float32}


def in_every_dtype(grads: Tree) -> dict[str, Tree]:
    """The same numbers, exactly, as leaves of every dtype."""
    # A float16 also holds every bfloat16 of this size, with its 8 digits. All from 2e-3 on are
    # normal numbers.
    exact = {
        name: jnp.where(jnp.abs(grads[name]) < 2e-3, 0, grads[name]).astype(jnp.bfloat16)
        for name in ("first", "vector")
    }
    return {
        name: jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), exact)
        for name, dtype in DTYPES.items()
    }


def test_narrow_leaves_keep_float32_statistics_and_get_updates_in_their_own_dtype() -> None:
    trees = [in_every_dtype(grads) for grads in good_gradients(6)]
    state = init(trees[0])
    for grads in trees:
        updates, state = step_of()(grads, state, FREQUENCY)
        for name, dtype in DTYPES.items():
            assert {leaf.dtype for leaf in updates[name].values()} == {jnp.dtype(dtype)}
            # Equal gradients get equal updates, rounded to the leaf's dtype.
            wanted = jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), updates["float32"])
            assert_same_bits(updates[name], wanted)

    # All three dtypes share one stack and one vector: statistics do not depend on the dtype.
    ((_, stack),) = state.stacks.items()
    ((_, adam),) = state.adam.items()
    assert (len(stack.accepted_gradients), len(adam.accepted_gradients)) == (3, 3)
    statistics = (stack.factors, stack.bases, stack.mu, stack.nu, adam.mu, adam.nu)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(statistics)} == {"float32"}


def test_narrow_first_moment_costs_its_own_rounding_and_no_more() -> None:
    state = init(good_gradients()[0], mu_dtype=jnp.bfloat16)
    for grads, (wide_updates, wide) in zip(good_gradients(), good_run(), strict=True):
        updates, state = step_of(mu_dtype=jnp.bfloat16)(grads, state, FREQUENCY)
        # A bfloat16 rounds by 2^-9 of itself. The moment keeps the roundings of all earlier steps,
        # with weights 0.95^k that add up to 20. Moments are mostly of the updates' size, 1.
        for leaf in SHAPES:
            np.testing.assert_allclose(updates[leaf], wide_updates[leaf], rtol=0, atol=20 * 2**-9)
        # Nothing else depends on the first moment. Two programs may round the same sums
        # differently, by one or two units in the last place, 1.2e-7.
        found, wanted = state.stacks["6x4"], wide.stacks["6x4"]
        assert found.mu.dtype == state.adam["float32"].mu.dtype == jnp.bfloat16
        assert found.nu.dtype == state.adam["float32"].nu.dtype == jnp.float32
        np.testing.assert_allclose(found.nu, wanted.nu, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(found.bases[0], wanted.bases[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_rejected_gradient_leaves_a_narrow_first_moment_bitwise_as_it_was(call: int) -> None:
    step = step_of(mu_dtype=jnp.bfloat16)
    state = init(good_gradients()[0], mu_dtype=jnp.bfloat16)
    for grads in good_gradients()[:call]:
        _, state = step(grads, state, FREQUENCY)
    bad = jax.tree.map(lambda grad: jnp.full_like(grad, jnp.nan), good_gradients()[0])
    updates, held = step(bad, state, FREQUENCY)
    assert_same_bits(updates, jax.tree.map(jnp.zeros_like, bad))
    for leaf in SHAPES:
        found = without(block_of(held, leaf), "rejected_gradients")
        assert_same_bits(found, without(block_of(state, leaf), "rejected_gradients"))


def test_half_precision_overflow_is_rejected_as_an_infinity() -> None:
    trees = [in_every_dtype(grads) for grads in good_gradients(3)]
    _, state = step_of()(trees[0], init(trees[0]), FREQUENCY)
    scaled = jax.tree.map(lambda grad: grad * 1e5, trees[1])  # The largest float16 is 65504.
    updates, state = step_of()(scaled, state, FREQUENCY)
    ((_, stack),) = state.stacks.items()
    order = sorted(DTYPES)  # JAX flattens dictionaries in the order of their keys.
    rejected = dict(zip(order, stack.rejected_gradients.tolist(), strict=True))
    assert rejected == {"bfloat16": 0, "float16": 1, "float32": 0}
    assert_same_bits(updates["float16"], jax.tree.map(jnp.zeros_like, trees[0]["float16"]))
    assert_all_finite((updates, state))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("narrow", mostly_long([jnp.float32, jnp.bfloat16], [jnp.float32]))
def test_a_gradient_that_overflows_only_in_narrow_storage_is_rejected(narrow: Any) -> None:
    """A float64 holds the Gram matrix, which would be infinite in the dtype of the factors."""
    grads = [np.asarray(grad["first"], np.float64) for grad in good_gradients(3)]
    optimizer = soap_optax.scale_by_soap(preconditioner_dtype=narrow, mu_dtype=narrow)
    state: Any = optimizer.init({"matrix": grads[0], "vector": grads[0][0]})
    update = jax.jit(optimizer.update)
    for size in (1.0, 1e25, 1.0):
        grad = {"matrix": size * grads[1], "vector": size * grads[1][0]}
        updates, state = update(grad, state)
        assert_all_finite((updates, state))
    (stack,), (vector,) = state.stacks.values(), state.adam.values()
    assert stack.rejected_gradients.tolist() == vector.rejected_gradients.tolist() == [1]
