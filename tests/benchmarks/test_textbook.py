"""The textbook SOAP, a baseline for speed, computes the same updates as `soap_optax`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.states import full_rank_factor, put_full_rank_factors
from textbook import TextbookState, scale_by_textbook_soap

import soap_optax

STEPS = 25
SHAPES = {"tall": (6, 4), "cube": (3, 2, 4), "vector": (7,)}


def with_full_rank_factors(state: TextbookState) -> TextbookState:
    """Both begin without a null space, whose basis a few gradients would not determine."""
    leaves = tuple(
        leaf._replace(factors=tuple(jnp.asarray(full_rank_factor(len(f))) for f in leaf.factors))
        for leaf in state.leaves
    )
    return state._replace(leaves=leaves)


@pytest.mark.long
@pytest.mark.usefixtures("implicit_promotion")
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("frequency", [1, 4])
def test_the_textbook_gives_the_updates_of_soap_optax(frequency: int) -> None:
    textbook = scale_by_textbook_soap(precondition_frequency=frequency)
    soap = soap_optax.scale_by_soap(precondition_frequency=frequency)
    params = {name: jnp.zeros(shape, jnp.float64) for name, shape in SHAPES.items()}
    states = [
        with_full_rank_factors(textbook.init(params)),  # pyright: ignore[reportArgumentType]  # Optax's type of a state says nothing.
        put_full_rank_factors(soap.init(params)),
    ]
    steps = [jax.jit(optimizer.update) for optimizer in (textbook, soap)]
    rng = np.random.default_rng(0)
    for number in range(STEPS):
        grads = {name: jnp.asarray(rng.standard_normal(s)) for name, s in SHAPES.items()}
        results = [step(grads, state) for step, state in zip(steps, states, strict=True)]
        states = [state for _, state in results]
        (expected, _), (updates, _) = results
        for name in SHAPES:
            # Only rounding differs. 25 steps of orthogonal iteration amplify it a little.
            np.testing.assert_allclose(
                updates[name], expected[name], rtol=1e-8, atol=1e-10, err_msg=f"{name}, {number}"
            )
    assert optax.tree_utils.tree_get(states[0], "refreshes") == 1 + (STEPS - 1) // frequency
