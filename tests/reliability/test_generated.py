"""Whatever the tree, the options and the gradients: the state stays sound and blocks apart.

Steps outside `jax.jit` equal those inside it, and a parameter moves as it would without others.

`generate.py` runs the same checks on more cases.
"""

from collections.abc import Callable
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import generated, states
from helpers.cases import mostly_long
from helpers.generated import Case
from helpers.precision import x64

import soap_optax
from soap_optax.state import AdamState, ShampooStackState, StackState

pytestmark = pytest.mark.usefixtures("implicit_promotion")

STACKS = (StackState, ShampooStackState)
CASES = 2  # In each test, with twice the histories of `CHECKS`.
# A product below float32's smallest normal number may be flushed to zero in one triangle and not in
# the other. This allows for 16 of them in an entry, and matters where all entries are below 1e-32.
UNDERFLOW = 16 * np.finfo(np.float32).tiny


def parts_of(state: Any, *kinds: type) -> list[Any]:
    """All parts of a state that have one of these types."""
    parts = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kinds))
    return [part for part in parts if isinstance(part, kinds)]


def types_of(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


def assert_finite(tree: Any) -> None:
    for path, leaf in jax.tree.leaves_with_path(tree):
        values = np.asarray(leaf)
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            assert np.isfinite(values).all(), (jax.tree_util.keystr(path), values)


def rounding_of(array: jax.Array) -> float:
    """The relative rounding of sums of products that are stored in this dtype."""
    return 1e-5 if array.dtype.itemsize >= 4 else 3e-2


def assert_sound(case: Case, state: Any, steps: int) -> None:
    """Bases are orthonormal, factors symmetric, moments not negative, all gradients counted."""
    for part in parts_of(state, *STACKS, AdamState):
        counted = np.asarray(part.accepted_gradients) + np.asarray(part.rejected_gradients)
        if case.options.get("stack_multiple"):  # The blocks of padding count nothing.
            assert np.isin(counted, (0, steps)).all()
            assert steps in counted
        else:
            np.testing.assert_array_equal(counted, steps)
        for nu in jax.tree.leaves(part.nu):
            assert (np.asarray(nu) >= 0).all()
    # Jacobi's rotations are exponentials of angles to fourth order. A Cholesky basis may depart by
    # an eighth of the square root of the machine epsilon.
    departure = {"jacobi": 1e-4, "cholesky_qr": 5e-5}.get(case.options.get("refresh", ""), 0.0)
    for stack in parts_of(state, *STACKS):
        for basis in stack.bases:
            q = np.asarray(basis, np.float64)
            np.testing.assert_allclose(
                np.swapaxes(q, -1, -2) @ q,
                np.broadcast_to(np.eye(q.shape[-1]), q.shape),
                atol=max(rounding_of(basis), departure),
            )
        for factor in stack.factors:
            if factor.shape[-1] == factor.shape[-2]:  # Folded factors store one triangle.
                values = np.asarray(factor, np.float64)
                np.testing.assert_allclose(
                    values,
                    np.swapaxes(values, -1, -2),
                    rtol=0,
                    atol=rounding_of(factor) * np.abs(values).max() + UNDERFLOW,
                )
        for eigenvalue in stack.eigenvalues:
            assert (np.asarray(eigenvalue) >= 0).all()


def through_bytes(state: Any) -> Any:
    """The state that a checkpoint of it gives back."""
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf).copy()), state)


def first_half(grads: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[: generated.STEPS // 2], grads)


def second_half(grads: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[generated.STEPS // 2 :], grads)


def assert_equal(found: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def assert_any_history_leaves_a_sound_state(case: Case, seed: int, histories: int) -> None:
    init = case.optimizer().init(case.params)
    run = generated.compile_run(case)
    for number in range(histories):
        hypothesis.note(f"history {number}")
        grads = generated.histories(case.shapes, seed, number)
        updates, middle = run(init, first_half(grads))
        more_updates, last = run(through_bytes(middle), second_half(grads))

        assert types_of(last) == types_of(init)
        for tree in updates, more_updates, middle, last:
            assert_finite(tree)
        assert_sound(case, middle, generated.STEPS // 2)
        assert_sound(case, last, generated.STEPS)
        assert_equal(run(middle, second_half(grads)), (more_updates, last))


def groups_of(case: Case) -> list[Any]:
    """For each leaf what it shares rejections or a limit with: itself, AdamW's leaves, or all."""
    if case.options.get("max_norm_ratio") is not None:
        return ["all" for _ in jax.tree.leaves(case.shapes)]
    labels = jax.tree.leaves(soap_optax.default_labels(case.params))
    is_soap_adamw = case.make is generated.soap_adamw
    return ["adamw" if is_soap_adamw and label == "adamw" else i for i, label in enumerate(labels)]


def assert_no_leaf_changes_the_update_of_another(case: Case, seed: int, histories: int) -> None:
    init = case.optimizer().init(case.params)
    run = generated.compile_run(case)
    leaves, tree = jax.tree.flatten(case.shapes)
    groups = groups_of(case)
    for number in range(histories):
        hypothesis.note(f"history {number}")
        grads = tree.flatten_up_to(generated.histories(case.shapes, seed, number))
        other = tree.flatten_up_to(generated.histories(case.shapes, seed, number, 1))
        changed = number % len(leaves)
        mixed = [other[i] if i == changed else grads[i] for i in range(len(leaves))]
        updates = tree.flatten_up_to(run(init, first_half(tree.unflatten(grads)))[0])
        expected = tree.flatten_up_to(run(init, first_half(tree.unflatten(mixed)))[0])
        others = [i for i in range(len(leaves)) if groups[i] != groups[changed]]
        assert_equal([updates[i] for i in others], [expected[i] for i in others])


def assert_close(found: Any, expected: Any) -> None:
    """Compares two computations in float64. Updates may be as small as 3e-3."""
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-9),
        found,
        expected,
    )


def without_signs(state: Any) -> Any:
    """A state whose bases and first moments do not depend on the signs of columns."""
    return jax.tree.map(jnp.abs, state)


def assert_eager_steps_equal_jitted_ones(case: Case, seed: int, histories: int) -> None:
    with x64():
        case = generated.in_float64(case)
        optimizer, params = case.optimizer(), case.params
        init = states.put_full_rank_factors(optimizer.init(params))
        run, step = generated.compile_run(case), jax.jit(optimizer.update)
        for number in range(histories):
            hypothesis.note(f"history {number}")
            grads = generated.histories(case.shapes, seed, number, kinds=generated.OF_ONE_SIZE)
            eager = jitted = run(init, first_half(grads))[1]
            for number_of_step in range(2):
                grad = jax.tree.map(lambda leaf, i=number_of_step: leaf[i], second_half(grads))
                updates, eager = optimizer.update(grad, eager, params)
                expected, jitted = step(grad, jitted, params)
                assert_close(updates, expected)
            assert types_of(eager) == types_of(jitted)
            assert_close(without_signs(eager), without_signs(jitted))


def assert_each_leaf_moves_as_it_would_alone(case: Case, seed: int, histories: int) -> None:
    with x64():
        # The phase of a block depends on the stacks before it, a limit on all gradients.
        options = {
            name: value
            for name, value in case.options.items()
            if name not in ("stagger", "max_norm_ratio")
        }
        case = generated.in_float64(case._replace(options=options))
        leaves, tree = jax.tree.flatten(case.shapes)
        groups = groups_of(case)
        # AdamW's leaves reject gradients together.
        apart = [i for i, group in enumerate(groups) if groups.count(group) == 1]
        hypothesis.assume(apart)
        kept = apart[seed % len(apart)]
        alone = case._replace(
            shapes=tree.unflatten([leaf if i == kept else None for i, leaf in enumerate(leaves)])
        )
        run, run_alone = generated.compile_run(case), generated.compile_run(alone)
        first, first_alone = (
            states.put_full_rank_factors(one.optimizer().init(one.params)) for one in (case, alone)
        )
        for number in range(histories):
            hypothesis.note(f"history {number}")
            grads = generated.histories(case.shapes, seed, number, kinds=generated.OF_ONE_SIZE)
            updates = tree.flatten_up_to(run(first, grads)[0])
            grads_alone = [
                leaf if i == kept else None for i, leaf in enumerate(tree.flatten_up_to(grads))
            ]
            [expected] = jax.tree.leaves(run_alone(first_alone, tree.unflatten(grads_alone))[0])
            assert_close(updates[kept], expected)


Check = Callable[[Case, int, int], None]
# With each, the number of histories for a case, and the share of all examples in `generate.py`.
# More cases instead of histories would compile more programs. Outside `jax.jit`, every operation is
# a program of its own, and a case takes half a minute.
CHECKS: dict[Check, tuple[int, float]] = {
    assert_any_history_leaves_a_sound_state: (25, 0.4),
    assert_no_leaf_changes_the_update_of_another: (25, 0.3),
    assert_eager_steps_equal_jitted_ones: (5, 0.01),
    assert_each_leaf_moves_as_it_would_alone: (25, 0.29),
}


SHORT = [check for check in CHECKS if check is not assert_eager_steps_equal_jitted_ones]


@pytest.mark.parametrize(
    "check", mostly_long(CHECKS, SHORT), ids=lambda check: check.__name__.removeprefix("assert_")
)
def test_generated_cases(check: Check) -> None:
    @hypothesis.settings(max_examples=CASES)
    @hypothesis.given(case=generated.cases(), seed=generated.SEEDS)
    def test(case: Case, seed: int) -> None:
        check(case, seed, 2 * CHECKS[check][0])

    test()
