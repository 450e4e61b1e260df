"""`soap` is a chain of `scale_by_soap`, weight decay and learning rate."""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.cases import mostly_long
from jax.sharding import NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers

import soap_optax
from soap_optax import alias


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
        "first_update": "apply",
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
        "factor_estimator": "kl",
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


@pytest.mark.usefixtures("implicit_promotion")
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
        # XLA may fuse the two differently, which rounds the last bit.
        same = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7)
        jax.tree.map(same, (by_soap, states[0]), (by_parts, states[1]))
        learning_rate = float(np.asarray(rate(call)))
        for name, update in by_soap.items():
            # Decoupled: the decay never passes through the preconditioner.
            decayed = direction[name] + decay * params[name] * mask[name]
            # A product and a sum of numbers of size 1, rounded by 6e-8 each.
            np.testing.assert_allclose(update, -learning_rate * decayed, rtol=0, atol=1e-6)
            params[name] += update


# Programs such as Brax call `update` without parameters, which `optax.adam` does not need.
WITHOUT_DECAY: dict[str, Any] = {
    "soap": functools.partial(soap_optax.soap, 0.1, weight_decay=0.0),
    "soap with a mask": functools.partial(
        soap_optax.soap, 0.1, weight_decay=0, mask={"kernel": True, "bias": False}
    ),
    "soap_adamw": functools.partial(soap_optax.soap_adamw, 0.1, weight_decay=0.0),
    "shampoo": functools.partial(soap_optax.shampoo, 0.1, weight_decay=0.0),
}


@pytest.mark.usefixtures("implicit_promotion")  # Optax promotes the number of the update.
@pytest.mark.parametrize("name", mostly_long(WITHOUT_DECAY, ["shampoo"]))
def test_update_needs_no_parameters_if_nothing_decays(name: str) -> None:
    optimizer = WITHOUT_DECAY[name]()
    params = {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}
    _, state = optimizer.update(params, optimizer.init(params))  # The first update is zero.
    with_params, state_with = optimizer.update(params, state, params)
    without, state_without = optimizer.update(params, state)
    jax.tree.map(np.testing.assert_array_equal, (without, state_without), (with_params, state_with))


@pytest.mark.parametrize("build", [soap_optax.soap, soap_optax.soap_adamw, soap_optax.shampoo])
def test_an_update_without_parameters_notes_the_way_out(build: Any) -> None:
    optimizer = build(0.1)
    params = {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}
    with pytest.raises(ValueError, match="parameters") as error:
        optimizer.update(params, optimizer.init(params))
    assert "pass weight_decay=0.0" in error.value.__notes__[0]
