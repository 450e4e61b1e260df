"""KL factors against an independent reference in NumPy, and by identities.

Both sides start from factors of full rank, because rounding decides the basis of a null space (see
`test_reference_agreement`).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import kl_reference, one_matrix, reference, states
from helpers.cases import mostly_long, named

import soap_optax
from soap_optax import algorithm

STEPS = 60
SHAPES: dict[str, reference.Shape] = {"square": (6, 6), "tall": (9, 4), "wide": (4, 9)}
# Updates are of size 1. Their error is rounding, 1e-16, times the condition number of the factors,
# over the gaps between eigenvalues. The scales of `gradients` keep eigenvalues apart. The largest
# difference seen is 2e-14.
TOLERANCE = 1e-12


def gradients(shape: reference.Shape, steps: int = STEPS) -> np.ndarray:
    """Gradients, `(steps, *shape)`, whose factors have closer eigenvalues than by default."""
    return one_matrix.gradients(steps, shape, ratio=1.6, dtype=float)


def library_run(grads: np.ndarray, **options: Any) -> tuple[np.ndarray, soap_optax.StackState]:
    """The directions of all steps, and the stack's state after the last."""
    optimizer: Any = soap_optax.scale_by_soap(factor_estimator="kl", **options)
    update = jax.jit(optimizer.update)
    direction, state = update(jnp.asarray(grads[0]), optimizer.init(jnp.asarray(grads[0])))
    state = add_full_rank_factors(state)
    directions = [direction]
    for grad in grads[1:]:
        direction, state = update(jnp.asarray(grad), state)
        directions.append(direction)
    return np.stack(directions), next(iter(state.stacks.values()))


def add_full_rank_factors(state: Any) -> Any:
    """Adds `states.full_rank_factor` to every factor."""
    full = states.put_full_rank_factors(state)
    stacks = {
        name: stack._replace(factors=tuple(map(jnp.add, stack.factors, full.stacks[name].factors)))
        for name, stack in state.stacks.items()
    }
    return state._replace(stacks=stacks)


def reference_run(
    grads: np.ndarray, block_size: int | None = None, **options: Any
) -> tuple[np.ndarray, kl_reference.KlState]:
    """The directions of all steps, and the state of the last tile after the last step."""
    directions, settings = np.zeros(grads.shape), reference.Options(**options)
    state = kl_reference.init(grads.shape[1:], settings)
    for tile in reference.tiles(grads.shape[1:], block_size or max(grads.shape[1:])):
        part = grads[:, *tile]
        priors = {axis: states.full_rank_factor(d) for axis, d in enumerate(part.shape[1:])}
        directions[:, *tile], state = kl_reference.run(part, settings, priors)
    return directions, state


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("frequency", mostly_long([1, 7], [7]))
@pytest.mark.parametrize("shape", mostly_long(named(SHAPES), ["wide"]))
def test_kl_soap_equals_the_reference_for_sixty_steps(
    shape: reference.Shape, frequency: int
) -> None:
    grads = gradients(shape)
    directions, stack = library_run(grads, precondition_frequency=frequency)
    expected, state = reference_run(grads, precondition_frequency=frequency)
    np.testing.assert_allclose(directions, expected, rtol=0, atol=TOLERANCE)
    for axis, factor in state.leaf.factors.items():
        np.testing.assert_allclose(stack.factors[axis][0], factor, rtol=0, atol=TOLERANCE)
        # The reference refreshes at the end of a step. A refresh may permute the columns.
        found, wanted = np.sort(stack.eigenvalues[axis][0]), np.sort(state.eigenvalues[axis])
        np.testing.assert_allclose(found, wanted, rtol=TOLERANCE)


OPTIONS: dict[str, tuple[reference.Shape, dict[str, Any]]] = {
    "eigh": ((5, 7), {"refresh": "eigh"}),
    "after_gradient": ((5, 7), {"refresh_order": "after_gradient"}),
    "one_sided": ((5, 7), {"one_sided": True}),
    "factored": ((7, 5), {"factored": True}),
    "normalize_grads": ((5, 5), {"normalize_grads": True, "correct_bias": False}),
    "shampoo_beta": ((5, 5), {"b2": 0.99, "shampoo_beta": 0.9, "b1": 0.8}),
    "an axis without a factor": ((5, 12), {"max_precond_dim": 8}),
    "an axis of length one": ((1, 6), {}),
    "a vector": ((6,), {"precondition_1d": True}),
    "three axes": ((4, 3, 5), {}),
    "three axes, one without a factor": ((4, 9, 3), {"max_precond_dim": 8}),
    "three axes, all options": (
        (4, 3, 5),
        {"refresh": "eigh", "refresh_order": "after_gradient", "factored": True},
    ),
    "four axes": ((3, 2, 4, 2), {"refresh_order": "after_gradient"}),
    "tiles": ((8, 6), {"block_size": 4}),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("frequency", mostly_long([1, 3], [3]))
@pytest.mark.parametrize("name", mostly_long(OPTIONS, ["three axes, all options"]))
def test_kl_soap_equals_the_reference_with_every_option(name: str, frequency: int) -> None:
    shape, options = OPTIONS[name]
    grads = gradients(shape, steps=20)
    options = {"precondition_frequency": frequency, **options}
    directions, _ = library_run(grads, **options)
    expected, _ = reference_run(grads, **options)
    # `eigh` separates the columns of nearly equal eigenvalues less precisely than other columns.
    np.testing.assert_allclose(directions, expected, rtol=0, atol=10 * TOLERANCE)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "options",
    mostly_long(
        named(
            {
                "folded": {"fold_factors": True},
                "folded after": {"fold_factors": True, "refresh_order": "after_gradient"},
                "cholesky_qr": {"refresh": "cholesky_qr"},
                "never skipped": {"refresh_tolerance": 0.0},
                "staggered": {"stagger": True, "precondition_frequency": 1},
            }
        ),
        short=[],
    ),
)
def test_options_that_change_no_equation_change_no_result(options: dict[str, Any]) -> None:
    grads = gradients((6, 5), steps=20)
    plain = {"precondition_frequency": options.get("precondition_frequency", 3)}
    plain |= {name: options[name] for name in options if name == "refresh_order"}
    directions, _ = library_run(grads, **{"precondition_frequency": 3, **options})
    expected, _ = library_run(grads, **plain)
    np.testing.assert_allclose(directions, expected, rtol=0, atol=10 * TOLERANCE)


@pytest.mark.parametrize("estimator", ["gram", "kl"])
def test_eigenvalue_estimates_are_in_the_state_only_for_kl_factors(estimator: Any) -> None:
    params = {"matrix": jnp.ones((4, 3)), "tensor": jnp.ones((2, 3, 4)), "long": jnp.ones((20, 3))}
    options = {"max_precond_dim": 10, "factor_estimator": estimator}
    stacks = soap_optax.scale_by_soap(**options).init(params).stacks  # pyright: ignore
    lengths = {"4x3": [4, 3], "2x3x4": [2, 3, 4], "20x3": [3]}
    for name, stack in stacks.items():
        found = [leaf.shape for leaf in stack.eigenvalues]
        assert found == ([(1, d) for d in lengths[name]] if estimator == "kl" else [])
        for leaf in stack.eigenvalues:
            np.testing.assert_array_equal(leaf, np.float32(0.1))


def test_describe_counts_the_estimates() -> None:
    params = {"kernel": jax.ShapeDtypeStruct((512, 2048), jnp.float32), "bias": jnp.zeros(5)}
    plain, kl = (soap_optax.describe(params, factor_estimator=name).rows for name in ("gram", "kl"))
    assert [b.state_bytes - a.state_bytes for a, b in zip(plain, kl, strict=True)] == [
        0,
        4 * (512 + 2048),
    ]


def test_the_first_gradient_fills_the_factors_with_weight_one_and_moves_nothing_else() -> None:
    grad = gradients((4, 3), steps=1)[0].astype(np.float32)
    optimizer: Any = soap_optax.scale_by_soap(factor_estimator="kl")
    before = optimizer.init(grad)
    update, after = jax.jit(optimizer.update)(grad, before)
    assert not np.any(update)
    old, new = before.stacks["4x3"], after.stacks["4x3"]
    np.testing.assert_allclose(new.factors[0][0], grad @ grad.T / 3, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(new.factors[1][0], grad.T @ grad / 4, rtol=1e-5, atol=1e-7)
    for name in ("eigenvalues", "mu", "nu", "bases"):
        jax.tree.map(np.testing.assert_array_equal, getattr(new, name), getattr(old, name))


# Functions of one block ---------------------------------------------------------------------------


def block(shape: reference.Shape, axes: list[int]) -> tuple[Any, Any, Any]:
    """A gradient, bases and eigenvalue estimates."""
    rng = np.random.default_rng(1)
    bases = [np.linalg.qr(rng.normal(size=(shape[axis],) * 2))[0] for axis in axes]
    eigenvalues = [rng.uniform(0.1, 2, size=shape[axis]) for axis in axes]
    return jax.tree.map(jnp.asarray, (rng.normal(size=shape), bases, eigenvalues))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("shape", "axes"),
    mostly_long(
        [
            pytest.param((5, 3), [0, 1], id="matrix"),
            pytest.param((3, 4, 2), [0, 1, 2], id="three axes"),
            pytest.param((3, 4, 2), [0, 2], id="two of three axes"),
            pytest.param((4, 6), [0], id="one side"),
        ],
        ["two of three axes"],
    ),
)
def test_estimates_average_the_diagonal_of_what_the_factors_average_in_their_bases(
    shape: reference.Shape, axes: list[int]
) -> None:
    grad, bases, eigenvalues = block(shape, axes)
    rotated = algorithm.rotations(grad, bases, axes)
    grams = algorithm.kl_gram_matrices(rotated.by_others, eigenvalues, axes)
    averages = algorithm.average_eigenvalues(eigenvalues, rotated.whole, axes, jnp.asarray(0.0))
    for gram, basis, average in zip(grams, bases, averages, strict=True):
        np.testing.assert_allclose(np.diag(basis.T @ gram @ basis), average, rtol=1e-13)


@pytest.mark.usefixtures("x64")
def test_kl_factors_of_kronecker_gradients_have_the_true_eigenvectors_and_products() -> None:
    # The gradients A E B of all unit matrices E have the covariance A A^T (x) B^T B exactly.
    rng = np.random.default_rng(2)
    left, right = rng.normal(size=(4, 4)), rng.normal(size=(3, 3))
    grads = [np.outer(left[:, i], right[j]) * np.sqrt(12) for i in range(4) for j in range(3)]
    true = [np.linalg.eigh(matrix) for matrix in (left @ left.T, right.T @ right)]
    bases = [jnp.asarray(vectors) for _, vectors in true]
    estimates = tuple(jnp.full(d, algorithm.INITIAL_EIGENVALUE) for d in (4, 3))
    zero = jnp.asarray(0.0)
    for _ in range(3):  # Each round averages over all gradients. One round finds the fixed point.
        rounds = [
            algorithm.average_eigenvalues(
                estimates, algorithm.rotations(jnp.asarray(g), bases, (0, 1)).whole, (0, 1), zero
            )
            for g in grads
        ]
        new_left = jnp.mean(jnp.stack([r[0] for r in rounds]), axis=0)
        estimates = (new_left, estimates[1])
        rounds = [
            algorithm.average_eigenvalues(
                estimates, algorithm.rotations(jnp.asarray(g), bases, (0, 1)).whole, (0, 1), zero
            )
            for g in grads
        ]
        estimates = (new_left, jnp.mean(jnp.stack([r[1] for r in rounds]), axis=0))
    products = np.outer(true[0][0], true[1][0])
    np.testing.assert_allclose(np.outer(estimates[0], estimates[1]), products, rtol=1e-10)
    grams = [
        algorithm.kl_gram_matrices(
            algorithm.rotations(jnp.asarray(g), bases, (0, 1)).by_others, estimates, (0, 1)
        )
        for g in grads
    ]
    for factor, matrix in zip(
        zip(*grams, strict=True), (left @ left.T, right.T @ right), strict=True
    ):
        mean = np.mean(np.stack(factor), axis=0)
        np.testing.assert_allclose(mean / np.trace(mean), matrix / np.trace(matrix), atol=1e-10)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (2, 3, 4)])
def test_the_whole_rotation_is_that_of_a_step(shape: reference.Shape) -> None:
    axes = list(range(len(shape)))
    grad, bases, _ = block(shape, axes)
    rotated = algorithm.rotations(grad, bases, axes)
    expected = reference.rotate(
        np.asarray(grad), dict(zip(axes, map(np.asarray, bases), strict=True))
    )
    np.testing.assert_allclose(rotated.whole, expected, atol=1e-6)


def test_inverse_roots_are_bounded_and_differentiable_at_zero() -> None:
    values = jnp.asarray([4.0, 1e-7, 1e-8, 1e-30, 0.0])
    roots, slopes = jax.jvp(
        lambda v: algorithm.inverse_roots([v])[0], (values,), (jnp.ones_like(values),)
    )
    np.testing.assert_allclose(roots, [0.5, 1e-7**-0.5, 4000, 4000, 4000], rtol=1e-5)
    assert np.isfinite(slopes).all()


# Refreshes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    mostly_long(["qr", "cholesky_qr", "eigh", "jacobi", "partial", "auto"], ["qr", "partial"]),
)
def test_a_refresh_permutes_the_estimates_as_the_second_moment(method: Any) -> None:
    rng = np.random.default_rng(3)
    d = 40  # A partial refresh rotates some columns and leaves others.
    basis = np.linalg.qr(rng.normal(size=(d, d)))[0]
    vectors = basis @ np.linalg.qr(np.eye(d) + 0.05 * rng.normal(size=(d, d)))[0]
    # The columns are not in order, so that every method that sorts permutes some.
    factor = jnp.asarray(vectors * rng.permutation(1.3 ** -np.arange(d)) @ vectors.T, jnp.float32)
    labels = jnp.arange(1.0, d + 1)
    state = algorithm.EigenbasisState(
        bases=(jnp.asarray(basis, jnp.float32),),
        mu=jnp.zeros((d, 2)),
        nu=jnp.stack([labels, labels], axis=1),
        age=jnp.int32(5),
        refreshes=jnp.int32(1),
        rejected_refreshes=jnp.int32(0),
        eigenvalues=(labels,),
    )
    new = jax.jit(
        lambda state: algorithm.refresh(state, (factor,), (0,), algorithm.RefreshRule(None, method))
    )(state)
    assert new.refreshes == 2
    np.testing.assert_array_equal(new.eigenvalues[0], np.asarray(new.nu)[:, 0])
    np.testing.assert_array_equal(np.sort(new.eigenvalues[0]), labels)
    is_sorting = method != "jacobi"
    assert is_sorting == bool(np.any(np.asarray(new.eigenvalues[0]) != np.asarray(labels)))


@pytest.mark.long
def test_a_skipped_or_rejected_refresh_leaves_the_estimates() -> None:
    grads = gradients((6, 4), steps=8).astype(np.float32)
    optimizer: Any = soap_optax.scale_by_soap(
        factor_estimator="kl", precondition_frequency=1, refresh_tolerance=1.0
    )
    update = jax.jit(optimizer.update)
    state = optimizer.init(grads[0])
    for grad in grads:
        _, state = update(grad, state)
    assert state.stacks["6x4"].refreshes == 1
    stack = state.stacks["6x4"]
    state = state._replace(
        stacks={"6x4": stack._replace(factors=(stack.factors[0] * jnp.nan, stack.factors[1]))}
    )
    old = algorithm.EigenbasisState(
        **{
            name: jax.tree.map(lambda leaf: leaf[0], getattr(state.stacks["6x4"], name))
            for name in algorithm.EigenbasisState._fields
        }
    )
    factors = tuple(factor[0] for factor in state.stacks["6x4"].factors)
    new = algorithm.refresh(old, factors, (0, 1), algorithm.RefreshRule(None, "qr"))
    assert new.rejected_refreshes == 1
    jax.tree.map(np.testing.assert_array_equal, new.eigenvalues, old.eigenvalues)


# Guards -------------------------------------------------------------------------------------------


@functools.cache
def guarded_update(order: str) -> Any:
    optimizer = soap_optax.scale_by_soap(
        factor_estimator="kl",
        precondition_frequency=2,
        refresh_order=order,  # pyright: ignore
    )
    return jax.jit(optimizer.update)


@pytest.mark.parametrize(
    "order", mostly_long(["before_gradient", "after_gradient"], ["before_gradient"])
)
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e19], ids=["nan", "inf", "overflow"])
@pytest.mark.parametrize("call", [0, 1, 3, 4])
def test_a_rejected_gradient_changes_nothing_but_its_count(
    call: int, bad: float, order: str
) -> None:
    grads = gradients((6, 4), steps=call + 1).astype(np.float32)
    state: Any = soap_optax.scale_by_soap(factor_estimator="kl").init(grads[0])
    update = guarded_update(order)
    for grad in grads[:call]:
        _, state = update(grad, state)
    grads[call][2, 1] = bad
    updates, after = update(grads[call], state)
    assert not np.any(updates)
    old, new = state.stacks["6x4"], after.stacks["6x4"]
    assert new.rejected_gradients == 1
    jax.tree.map(
        np.testing.assert_array_equal, new._replace(rejected_gradients=old.rejected_gradients), old
    )


@pytest.mark.parametrize("shape", mostly_long([(6, 4), (3, 4, 5)], [(6, 4)]))
def test_no_size_of_a_gradient_makes_the_state_infinite(shape: reference.Shape) -> None:
    # Many zero gradients leave estimates of zero. Whitening then multiplies by its limit, 4000.
    state: Any = soap_optax.scale_by_soap(factor_estimator="kl").init(jnp.ones(shape))
    update = guarded_update("before_gradient")
    name = "x".join(map(str, shape))
    grads = gradients(shape, steps=40).astype(np.float32)
    for grad in grads[:5]:
        _, state = update(grad, state)
    stack = state.stacks[name]
    dead = tuple(jnp.zeros_like(each) for each in stack.eigenvalues)
    accepted = []
    for power in range(-30, 20):
        start = state._replace(stacks={name: stack._replace(eigenvalues=dead)})
        updates, after = update(grads[6] * np.float32(10.0**power), start)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((updates, after)))
        accepted.append(int(after.stacks[name].rejected_gradients[0]) == 0)
    assert accepted == sorted(accepted, reverse=True)
    # A matrix may be as large as the root of the largest number, divided by 4 times 4000. For a
    # tensor the divisor is 4 times 4000 squared.
    assert accepted.count(True) == pytest.approx({2: 45, 3: 41}[len(shape)], abs=1)


def test_estimates_recover_after_a_long_time_without_gradients() -> None:
    grads = gradients((6, 4), steps=60).astype(np.float32)
    state: Any = soap_optax.scale_by_soap(factor_estimator="kl").init(grads[0])
    update = guarded_update("before_gradient")
    for grad in grads[:5]:
        _, state = update(grad, state)
    stack = state.stacks["6x4"]
    dead = tuple(jnp.zeros_like(each) for each in stack.eigenvalues)
    state = state._replace(stacks={"6x4": stack._replace(eigenvalues=dead)})
    updates = np.zeros(())
    for grad in grads[5:]:
        updates, state = update(grad, state)
    estimates = state.stacks["6x4"].eigenvalues
    assert all(np.all(each > 1e-7) for each in estimates)
    assert np.abs(updates).max() < 3


@pytest.mark.long
@pytest.mark.parametrize("axes", [2, 5, 6, 8])
@pytest.mark.parametrize("make", ["soap", "shampoo"])
def test_blocks_of_many_axes_accept_gradients_after_a_long_time_without(
    axes: int, make: str
) -> None:
    factory: Any = getattr(soap_optax, f"scale_by_{make}")
    optimizer = factory(factor_estimator="kl", precondition_frequency=1000)
    shape = (2,) * axes
    stack = (state := optimizer.init(jnp.ones(shape))).stacks["x".join("2" * axes)]
    dead = tuple(jnp.zeros_like(each) for each in stack.eigenvalues)
    stacks = {"x".join("2" * axes): stack._replace(eigenvalues=dead)}
    grads = np.random.default_rng(0).normal(size=(3, *shape)).astype(np.float32)
    state, update = state._replace(stacks=stacks), jax.jit(optimizer.update)
    for grad in grads:
        updates, state = update(grad, state)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((updates, state)))
    assert next(iter(state.stacks.values())).rejected_gradients.tolist() == [0]


@pytest.mark.long
def test_narrow_storage_follows_the_wide_one() -> None:
    grads = gradients((6, 4), steps=20)
    wide, _ = library_run(grads.astype(np.float32), precondition_frequency=4)
    narrow, stack = library_run(
        grads.astype(np.float32),
        precondition_frequency=4,
        preconditioner_dtype=jnp.bfloat16,
        fold_factors=True,
    )
    assert {leaf.dtype.name for leaf in stack.eigenvalues} == {"float32"}
    assert {leaf.dtype.name for leaf in stack.factors} == {"bfloat16"}
    # bfloat16 rounds bases by 4e-3. That moves updates of size one by a few hundredths.
    assert np.sqrt(np.mean((wide - narrow) ** 2)) < 0.1


@pytest.mark.long
@pytest.mark.parametrize("order", ["before_gradient", "after_gradient"])
def test_kl_factors_promote_no_rank_and_no_dtype(order: Any) -> None:
    params = {"matrix": jnp.ones((6, 4)), "half": jnp.ones((3, 4), jnp.bfloat16)}
    optimizer: Any = soap_optax.scale_by_soap(
        factor_estimator="kl", refresh_order=order, precondition_frequency=2
    )
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        state = optimizer.init(params)
        updates, state = jax.eval_shape(optimizer.update, params, state)
    assert updates["half"].dtype == jnp.bfloat16


@pytest.mark.long
def test_one_program_serves_every_call() -> None:
    grads = gradients((6, 4), steps=6).astype(np.float32)
    optimizer: Any = soap_optax.scale_by_soap(factor_estimator="kl", precondition_frequency=2)
    update, state = jax.jit(optimizer.update), optimizer.init(grads[0])
    for grad in grads:
        _, state = update(grad, state)
    measured = soap_optax.diagnostics(state)
    assert all(np.isfinite(value) for value in measured.values())
    assert update._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]  # jit has it
