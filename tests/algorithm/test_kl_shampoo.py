"""KL-Shampoo against an independent reference in NumPy, and by identities.

The first factors of the runs are made full rank on both sides, as in `test_kl_factors`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import kl_shampoo_reference, reference, states
from helpers.cases import mostly_long, named
from helpers.shampoo_reference import Options
from test_kl_factors import SHAPES, gradients

import soap_optax

STEPS = 60
# Relative to the largest entry of an update. See `test_kl_factors.TOLERANCE`.
TOLERANCE = 1e-12
PAPERS: dict[str, Any] = {"exponent": 0.5, "grafting": None, "refresh": "qr"}


def library_run(grads: np.ndarray, **options: Any) -> tuple[np.ndarray, Any]:
    """The directions of all steps, and the stack's state after the last."""
    optimizer: Any = soap_optax.scale_by_shampoo(factor_estimator="kl", **options)
    update = jax.jit(optimizer.update)
    direction, state = update(jnp.asarray(grads[0]), optimizer.init(jnp.asarray(grads[0])))
    full = states.put_full_rank_factors(state)
    stacks = {
        name: stack._replace(
            factors=jax.tree.map(jnp.add, stack.factors, full.stacks[name].factors)
        )
        for name, stack in state.stacks.items()
    }
    state, directions = state._replace(stacks=stacks), [direction]
    for grad in grads[1:]:
        direction, state = update(jnp.asarray(grad), state)
        directions.append(direction)
    return np.stack(directions), next(iter(state.stacks.values()))


def assert_close(found: np.ndarray, wanted: np.ndarray, tolerance: float = TOLERANCE) -> None:
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * max(1, np.abs(other).max()))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("frequency", mostly_long([1, 7], [7]))
@pytest.mark.parametrize("shape", mostly_long(named(SHAPES), ["tall"]))
def test_kl_shampoo_equals_the_reference_for_sixty_steps(
    shape: reference.Shape, frequency: int
) -> None:
    grads = gradients(shape, STEPS)
    options: dict[str, Any] = PAPERS | {"precondition_frequency": frequency}
    directions, stack = library_run(grads, **options)
    expected, state = kl_shampoo_reference.run_in_tiles(grads, Options(**options), None)
    assert_close(directions, expected)
    for axis, factor in state.leaf.factors.items():
        np.testing.assert_allclose(stack.factors[axis][0], factor, rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(
            stack.eigenvalues[axis][0], state.eigenvalues[axis], rtol=TOLERANCE
        )


OPTIONS: dict[str, tuple[reference.Shape, dict[str, Any]]] = {
    "defaults": ((5, 7), {}),
    "eigh": ((7, 5), {"exponent": 0.5, "grafting": None}),
    "before_gradient": ((5, 7), {"refresh": "qr", "refresh_order": "before_gradient"}),
    "one_sided": ((5, 7), {"refresh": "qr", "one_sided": True}),
    "rmsprop": ((5, 5), {"refresh": "qr", "grafting": "rmsprop", "shampoo_beta": 0.9, "b1": 0.8}),
    "sgd": ((5, 5), {"refresh": "qr", "grafting": "sgd", "correct_bias": False, "exponent": 0.3}),
    "damped": ((5, 5), PAPERS | {"eps": 0.1, "correct_bias": False}),
    "an axis without a factor": ((5, 12), {"refresh": "qr", "max_precond_dim": 8}),
    "an axis of length one": ((1, 6), {"refresh": "qr"}),
    "three axes, all options": (
        (4, 3, 5),
        {"refresh": "qr", "refresh_order": "before_gradient", "grafting": None, "exponent": 0.5},
    ),
    "tiles": ((8, 6), {"refresh": "qr", "block_size": 4}),
}


@pytest.mark.long
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", OPTIONS)
def test_kl_shampoo_equals_the_reference_with_every_option(name: str) -> None:
    shape, options = OPTIONS[name]
    options = {"precondition_frequency": 3, "refresh": "eigh"} | options
    grads = gradients(shape, steps=20)
    directions, _ = library_run(grads, **options)
    block_size = options.pop("block_size", None)
    expected, _ = kl_shampoo_reference.run_in_tiles(grads, Options(**options), block_size)
    # `eigh` gives the columns of nearly equal eigenvalues by their order, so they are no closer.
    assert_close(directions, expected, 10 * TOLERANCE)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "options",
    mostly_long(
        named(
            {
                "folded": {"fold_factors": True},
                "folded before": {"fold_factors": True, "refresh_order": "before_gradient"},
                "cholesky_qr": {"refresh": "cholesky_qr"},
                "staggered": {"stagger": True, "precondition_frequency": 1},
            }
        ),
        short=[],
    ),
)
def test_options_that_change_no_equation_change_no_result(options: dict[str, Any]) -> None:
    grads = gradients((6, 5), steps=20)
    plain = {name: options[name] for name in options if name not in ("fold_factors", "stagger")}
    plain |= {"refresh": "qr"}
    directions, _ = library_run(grads, **{"refresh": "qr", "precondition_frequency": 3, **options})
    expected, _ = library_run(grads, **{"precondition_frequency": 3, **plain})
    assert_close(directions, expected, 10 * TOLERANCE)


@pytest.mark.long
@pytest.mark.parametrize("method", ["qr", "cholesky_qr", "eigh", "jacobi", "partial", "auto"])
def test_every_refresh_method_follows_the_factors(method: Any) -> None:
    grads = gradients((40, 12), steps=60).astype(np.float32)
    optimizer: Any = soap_optax.scale_by_shampoo(
        factor_estimator="kl", precondition_frequency=1, refresh=method, shampoo_beta=0.9
    )
    update, state = jax.jit(optimizer.update), optimizer.init(grads[0])
    for grad in grads:
        direction, state = update(grad, state)
        assert np.all(np.isfinite(direction))
    stack = state.stacks["40x12"]
    assert (stack.refreshes.tolist(), stack.rejected_refreshes.tolist()) == ([59], [0])
    scalars = soap_optax.diagnostics(state)
    assert float(scalars["shampoo/40x12/off_diagonal_mass"]) < 0.2
    assert float(scalars["shampoo/40x12/departure_from_orthonormality"]) < 3.5e-4
    # An estimate belongs to its column: it is near the Rayleigh quotient there.
    for factor, basis, estimates in zip(stack.factors, stack.bases, stack.eigenvalues, strict=True):
        quotients = np.einsum("ij,ik,kj->j", basis[0], factor[0], basis[0])
        largest = np.argsort(quotients)[-3:]
        ratios = np.asarray(estimates[0])[largest] / quotients[largest]
        assert np.all((ratios > 0.5) & (ratios < 2))


@pytest.mark.usefixtures("x64")
def test_kronecker_gradients_are_whitened() -> None:
    """Gradients `A E B` with `E` normal: `P_L G P_R` has independent entries of size one."""
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(4, 4)), rng.normal(size=(3, 3))
    optimizer: Any = soap_optax.scale_by_shampoo(
        b1=0.0, factor_estimator="kl", shampoo_beta=0.999, **PAPERS
    )
    grads = jnp.asarray(left @ rng.normal(size=(9000, 4, 3)) @ right)

    def step(state: Any, grad: jax.Array) -> Any:
        update, state = optimizer.update(grad, state)
        return state, update

    _, updates = jax.lax.scan(step, optimizer.init(grads[0]), grads)
    entries = np.asarray(updates)[6000:].reshape(3000, 12)
    covariance = entries.T @ entries / 3000
    # The sample has a relative error of 3000^(-1/2), and so have averages over 1000 gradients.
    np.testing.assert_allclose(covariance, np.eye(12), atol=0.2)


def test_the_state_has_bases_and_estimates_in_place_of_roots() -> None:
    params = {"matrix": jnp.ones((4, 3)), "long": jnp.ones((20, 3))}
    options = {"max_precond_dim": 10, "factor_estimator": "kl", "grafting": None}
    stacks = soap_optax.scale_by_shampoo(**options).init(params).stacks  # pyright: ignore
    for name, lengths in {"4x3": [4, 3], "20x3": [3]}.items():
        stack = stacks[name]
        assert (stack.roots, stack.nu) == ((), ())
        assert [basis.shape for basis in stack.bases] == [(1, d, d) for d in lengths]
        assert [each.shape for each in stack.eigenvalues] == [(1, d) for d in lengths]
        assert all(np.all(each == np.float32(0.1)) for each in stack.eigenvalues)
    described = soap_optax.describe(params, optimizer=soap_optax.shampoo, **options)
    plain = soap_optax.describe(
        params, optimizer=soap_optax.shampoo, **{**options, "factor_estimator": "gram"}
    )
    assert described.state_bytes - plain.state_bytes == 4 * (4 + 3 + 3)


@pytest.mark.long
@pytest.mark.usefixtures("x64")
def test_with_grafting_the_norm_is_that_of_plain_shampoo() -> None:
    grads = gradients((6, 5), steps=8)
    directions, _ = library_run(grads, precondition_frequency=2)
    optimizer: Any = soap_optax.scale_by_shampoo(precondition_frequency=2)
    update, state = jax.jit(optimizer.update), optimizer.init(grads[0])
    for found, grad in zip(directions, grads, strict=True):
        wanted, state = update(grad, state)
        np.testing.assert_allclose(np.linalg.norm(found), np.linalg.norm(wanted), rtol=1e-12)
        assert not np.any(wanted) or np.abs(found - wanted).max() > 1e-3


# Guards and storage -------------------------------------------------------------------------------

NARROW = {"preconditioner_dtype": jnp.bfloat16, "mu_dtype": jnp.bfloat16, "fold_factors": True}


@pytest.mark.long
@pytest.mark.parametrize("name", ["plain", "narrow", "after"])
def test_null_rows_rejected_gradients_and_refreshes(name: str) -> None:
    options: dict[str, Any] = {
        "plain": {"refresh": "qr"},
        "narrow": NARROW,
        "after": {"refresh": "jacobi", "refresh_order": "after_gradient"},
    }[name]
    optimizer: Any = soap_optax.scale_by_shampoo(
        factor_estimator="kl", precondition_frequency=2, **options
    )
    update, state = jax.jit(optimizer.update), optimizer.init(jnp.zeros((24, 16)))
    for call in range(9):
        grad = np.random.default_rng(call).normal(size=(24, 16)).astype(np.float32)
        grad[::3], grad[:, 2] = 0, 0
        if call == 4:
            bad, after = update(np.full_like(grad, np.nan), state)
            assert not np.any(bad)
            stack, old = after.stacks["24x16"], state.stacks["24x16"]
            assert stack.rejected_gradients.tolist() == [1]
            jax.tree.map(
                np.testing.assert_array_equal,
                stack._replace(rejected_gradients=old.rejected_gradients),
                old,
            )
        if call == 7:
            stack = state.stacks["24x16"]
            broken = stack._replace(factors=jax.tree.map(lambda f: f * jnp.nan, stack.factors))
            _, after = update(grad, state._replace(stacks={"24x16": broken}))
            stack = after.stacks["24x16"]
            assert stack.rejected_refreshes.tolist() == [1]
            jax.tree.map(np.testing.assert_array_equal, stack.bases, state.stacks["24x16"].bases)
        found, state = update(grad, state)
        assert not np.any(found[::3])
        assert not np.any(found[:, 2])
        assert call == 0 or np.all(np.abs(np.delete(found, np.s_[::3], 0)).max(axis=1) > 0)
    stack = state.stacks["24x16"]
    assert (stack.refreshes.tolist(), stack.rejected_refreshes.tolist()) == ([4], [0])
    stored = jnp.dtype(options.get("preconditioner_dtype", jnp.float32))
    assert {leaf.dtype for leaf in stack.bases} == {stored}
