"""Whatever the tree, the options and the gradients: the state stays sound and blocks apart."""

from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import generated
from helpers.generated import Case

from soap_optax.state import AdamState, ShampooStackState, StackState

pytestmark = pytest.mark.usefixtures("implicit_promotion")

STACKS = (StackState, ShampooStackState)


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


def assert_sound(state: Any, steps: int) -> None:
    """Bases are orthonormal, factors symmetric, moments not negative, all gradients counted."""
    for part in parts_of(state, *STACKS, AdamState):
        counted = np.asarray(part.accepted_gradients) + np.asarray(part.rejected_gradients)
        np.testing.assert_array_equal(counted, steps)
        for nu in jax.tree.leaves(part.nu):
            assert (np.asarray(nu) >= 0).all()
    for stack in parts_of(state, *STACKS):
        for basis in stack.bases:
            q = np.asarray(basis, np.float64)
            np.testing.assert_allclose(
                np.swapaxes(q, -1, -2) @ q,
                np.broadcast_to(np.eye(q.shape[-1]), q.shape),
                atol=rounding_of(basis),
            )
        for factor in stack.factors:
            if factor.shape[-1] == factor.shape[-2]:  # Folded factors store one triangle.
                values = np.asarray(factor, np.float64)
                np.testing.assert_allclose(
                    values,
                    np.swapaxes(values, -1, -2),
                    rtol=0,
                    atol=rounding_of(factor) * np.abs(values).max(),
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


@hypothesis.settings(max_examples=4 * hypothesis.settings.default.max_examples)  # type: ignore[union-attr]
@hypothesis.given(case=generated.cases(), seed=st.integers(0, 2**32 - 1))
def test_any_history_leaves_a_sound_state(case: Case, seed: int) -> None:
    init = case.optimizer().init(case.params)
    run = generated.compile_run(case)
    for number in range(generated.HISTORIES):
        hypothesis.note(f"history {number}")
        grads = generated.histories(case.shapes, seed, number)
        updates, middle = run(init, first_half(grads))
        more_updates, last = run(through_bytes(middle), second_half(grads))

        assert types_of(last) == types_of(init)
        for tree in updates, more_updates, middle, last:
            assert_finite(tree)
        assert_sound(middle, generated.STEPS // 2)
        assert_sound(last, generated.STEPS)
        assert_equal(run(middle, second_half(grads)), (more_updates, last))


@hypothesis.settings(max_examples=2 * hypothesis.settings.default.max_examples)  # type: ignore[union-attr]
@hypothesis.given(case=generated.cases(), seed=st.integers(0, 2**32 - 1))
def test_no_leaf_changes_the_update_of_another(case: Case, seed: int) -> None:
    init = case.optimizer().init(case.params)
    run = generated.compile_run(case)
    leaves, tree = jax.tree.flatten(case.shapes)
    for number in range(generated.HISTORIES):
        grads = tree.flatten_up_to(generated.histories(case.shapes, seed, number))
        other = tree.flatten_up_to(generated.histories(case.shapes, seed, number, 1))
        changed = number % len(leaves)
        mixed = [other[i] if i == changed else grads[i] for i in range(len(leaves))]
        updates = tree.flatten_up_to(run(init, first_half(tree.unflatten(grads)))[0])
        expected = tree.flatten_up_to(run(init, first_half(tree.unflatten(mixed)))[0])
        del updates[changed], expected[changed]
        assert_equal(updates, expected)
