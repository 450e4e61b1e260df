"""`diagnostics` agrees with NumPy in float64, costs little, and adds no NaN."""

import collections
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers.cases import mostly_long
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

import soap_optax
from soap_optax import diagnostics

Tree = dict[str, jax.Array]
State = soap_optax.ScaleBySoapState

# Three matrices make one stack; the vector and the scalar share the Adam bucket.
SHAPES = {"first": (7, 5), "second": (7, 5), "third": (7, 5), "scalar": (), "vector": (4,)}
KIND = "soap/7x5"
OPTIMIZER = soap_optax.scale_by_soap(precondition_frequency=4)
step = jax.jit(OPTIMIZER.update)
# One program for each state takes less time than a program for each of many small operations.
read = jax.jit(diagnostics, static_argnames="sample")
# Float32 rounds by 6e-8 in each of some ten operations.
ROUNDING = 1e-6


@functools.cache
def trained_state(seed: int = 0) -> State:
    """A state in the middle of training: its bases are a few updates older than its factors."""
    rng = np.random.default_rng(seed)
    state = fresh_state()
    for _ in range(8):
        grads = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
        _, state = step(jax.tree.map(lambda grad: jnp.asarray(grad, jnp.float32), grads), state)
    assert isinstance(state, State)
    return state


def fresh_state() -> State:
    state = OPTIMIZER.init({name: jnp.zeros(shape) for name, shape in SHAPES.items()})
    assert isinstance(state, State)
    return state


def state_with(factor: np.ndarray, basis: np.ndarray) -> State:
    """The state of one block, whose only preconditioned axis has this factor and basis."""
    state = soap_optax.scale_by_soap().init(jnp.zeros((len(factor), 1)))
    assert isinstance(state, State)
    ((kind, stack),) = state.stacks.items()
    stack = stack._replace(
        factors=(jnp.asarray(factor[None], jnp.float32),),
        bases=(jnp.asarray(basis[None], jnp.float32),),
    )
    return state._replace(stacks={kind: stack})


def scalars_of(factor: np.ndarray, basis: np.ndarray) -> dict[str, float]:
    scalars = read(state_with(factor, basis))
    kind = f"soap/{len(factor)}x1/"
    return {key.removeprefix(kind): float(s) for key, s in scalars.items() if kind in key}


def random_rotation(length: int, size: float = np.inf) -> np.ndarray:
    """A random orthogonal matrix; a finite `size` limits its distance from the identity."""
    square = np.random.default_rng(1).normal(size=(length, length))
    near = square if np.isinf(size) else np.eye(length) + size * (square - square.T)
    q, r = np.linalg.qr(near)
    return q * np.sign(np.diag(r))


def factors_and_bases(state: State, blocks: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    (stack,) = state.stacks.values()
    for factor, basis in zip(stack.factors, stack.bases, strict=True):
        for block in range(blocks):
            yield np.asarray(factor[block], np.float64), np.asarray(basis[block], np.float64)


def numpy_off_diagonal_mass(factor: np.ndarray, basis: np.ndarray) -> float:
    rotated = basis.T @ factor @ basis
    return float(np.linalg.norm(rotated - np.diag(np.diag(rotated))) / np.linalg.norm(rotated))


def numpy_departure(basis: np.ndarray) -> float:
    return float(np.max(np.abs(basis.T @ basis - np.eye(len(basis)))))


def numpy_condition_number(factor: np.ndarray, basis: np.ndarray) -> float:
    quotients = np.diag(basis.T @ factor @ basis)
    return float(quotients.max() / quotients.min())


@pytest.mark.parametrize("sample", [1, 2, None])
def test_every_scalar_equals_numpys(sample: int | None) -> None:
    state = trained_state()
    pairs = list(factors_and_bases(state, blocks=sample or 3))
    scalars = {key: float(scalar) for key, scalar in read(state, sample=sample).items()}
    expected = {
        "off_diagonal_mass": max(numpy_off_diagonal_mass(*pair) for pair in pairs),
        "departure_from_orthonormality": max(numpy_departure(basis) for _, basis in pairs),
        "condition_number": max(numpy_condition_number(*pair) for pair in pairs),
        "direction_rms": numpy_rms(state.stacks["7x5"]),
    }
    # The departure is only rounding, which differs in NumPy's float64.
    absolute = {"departure_from_orthonormality": 1e-6}
    for name, value in expected.items():
        # Rounding of the largest quotient affects all of them, and the smallest is 1/30 of it.
        approximate = pytest.approx(value, rel=100 * ROUNDING, abs=absolute.get(name, 0))
        assert scalars[f"{KIND}/{name}"] == approximate
    assert scalars["soap/adam/direction_rms"] == pytest.approx(
        numpy_rms(state.adam["float32"]), rel=ROUNDING
    )
    assert 0.05 < scalars[f"{KIND}/off_diagonal_mass"] < 1  # There is something to measure.


def numpy_rms(part: Any) -> float:
    mu, nu = np.asarray(part.mu, np.float64), np.asarray(part.nu, np.float64)
    return float(np.sqrt(np.mean(mu**2 / nu)))


def test_null_directions_are_rounding_and_count_for_nothing_in_the_direction() -> None:
    """Rows without gradients, as for embeddings of unused tokens, would give 0/0 plus rounding."""
    mu = np.full((2, 3, 2), 0.5, np.float32)
    nu = np.ones((2, 3, 2), np.float32)
    mu[0, 2], nu[0, 2] = 1e-12, 1e-38  # As in a language model. Each entry would count 1e7.
    state: Any = soap_optax.scale_by_soap().init([jnp.ones((3, 2))] * 2)
    stack = state.stacks["3x2"]._replace(mu=jnp.asarray(mu), nu=jnp.asarray(nu))
    scalars = read(state._replace(stacks={"3x2": stack}))
    assert float(scalars["soap/3x2/direction_rms"]) == 0.5


def test_counters_are_summed_over_blocks_and_adam_leaves() -> None:
    """Calls 0 to 7 with a refresh every 4 updates: first bases at call 1, a refresh at call 5."""
    state = trained_state()
    scalars = {key: int(scalar) for key, scalar in read(state).items()}
    assert scalars["soap/refreshes"] == 3 * 2
    assert scalars["soap/age"] == 3
    assert scalars["soap/rejected_gradients"] == scalars["soap/rejected_refreshes"] == 0

    grads = {name: jnp.ones(shape) for name, shape in SHAPES.items()}
    grads |= {name: jnp.full(SHAPES[name], jnp.nan) for name in ("second", "vector")}
    _, state = step(grads, state)
    assert isinstance(state, State)
    scalars = {key: int(scalar) for key, scalar in read(state).items()}
    assert scalars["soap/rejected_gradients"] == 2
    assert scalars["soap/age"] == 4  # The largest age; the second block's is still 3.

    stack = state.stacks["7x5"]
    stack = stack._replace(rejected_refreshes=jnp.asarray([1, 0, 2]))
    scalars = read(state._replace(stacks={"7x5": stack}))
    assert int(scalars["soap/rejected_refreshes"]) == 3


@pytest.mark.parametrize("sample", [1, None])
def test_a_fresh_state_has_no_nan(sample: int | None) -> None:
    scalars = {key: float(s) for key, s in read(fresh_state(), sample=sample).items()}
    assert scalars.pop(f"{KIND}/condition_number") == 1
    assert set(scalars.values()) == {0.0}


def test_every_value_is_a_scalar_of_float32_or_int32(x64: None) -> None:
    params = {
        "wide": jnp.zeros((3, 2)),
        "narrow": jnp.zeros((3, 2), jnp.bfloat16),
        "b": jnp.zeros(2),
    }
    state = soap_optax.scale_by_soap(mu_dtype=jnp.bfloat16).init(params)
    scalars = jax.eval_shape(diagnostics, state)
    assert {"soap/3x2_float64/condition_number", "soap/3x2/condition_number"} <= set(scalars)
    whole = {"soap/age", "soap/refreshes", "soap/rejected_gradients", "soap/rejected_refreshes"}
    for key, scalar in scalars.items():
        assert scalar.shape == ()
        assert scalar.dtype == (jnp.int32 if key in whole else jnp.float32), key


@pytest.mark.parametrize("size", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("decades", [1, 6])
def test_a_small_off_diagonal_mass_does_not_cancel(decades: int, size: float) -> None:
    """A difference of two float32 norms would lose masses below 3e-4."""
    length = 24
    eigenvectors = random_rotation(length)
    factor = eigenvectors * np.logspace(0, -decades, length) @ eigenvectors.T
    basis = eigenvectors @ random_rotation(length, size)
    expected = numpy_off_diagonal_mass(factor, basis)
    assert size / 10 < expected < 10 * size
    measured = scalars_of(factor, basis)["off_diagonal_mass"]
    # The factor, the basis and the product are rounded by 6e-8 each, which adds to the mass.
    assert measured == pytest.approx(expected, rel=1e-3, abs=3e-7)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e36])
def test_ratios_do_not_depend_on_the_size_of_the_gradients(scale: float) -> None:
    """The squares of these entries are 0 or infinite in float32."""
    eigenvectors = random_rotation(8)
    factor = eigenvectors * np.linspace(1, 2, 8) @ eigenvectors.T
    basis = eigenvectors @ random_rotation(8, 0.1)
    assert scalars_of(scale * factor, basis) == pytest.approx(
        scalars_of(factor, basis), rel=10 * ROUNDING
    )


def test_an_eigenbasis_has_no_mass_off_the_diagonal_and_the_true_condition_number() -> None:
    eigenvectors = random_rotation(16)
    factor = eigenvectors * np.logspace(2, -1, 16) @ eigenvectors.T
    scalars = scalars_of(factor, eigenvectors)
    # The factor, the basis and the product are rounded. The smallest eigenvalue is 1/1,000 of the
    # largest, so its relative error is 1,000 times as large.
    assert scalars["off_diagonal_mass"] < ROUNDING
    assert scalars["condition_number"] == pytest.approx(1000, rel=1000 * ROUNDING)


def test_the_condition_number_is_never_above_the_true_one() -> None:
    eigenvectors = random_rotation(16)
    factor = eigenvectors * np.logspace(2, -1, 16) @ eigenvectors.T
    assert 1 < scalars_of(factor, eigenvectors @ random_rotation(16, 0.2))["condition_number"] < 900


def test_a_singular_factor_has_the_largest_condition_number_that_float32_shows() -> None:
    vector = random_rotation(6)[:, :1]
    _, eigenvectors = np.linalg.eigh(vector @ vector.T)
    bound = 1 / np.finfo(np.float32).eps
    assert scalars_of(vector @ vector.T, eigenvectors)["condition_number"] == pytest.approx(bound)


def test_a_basis_that_is_not_orthonormal_shows() -> None:
    basis = random_rotation(6)
    assert scalars_of(np.eye(6), basis)["departure_from_orthonormality"] < ROUNDING
    basis[:, 2] = basis[:, 3]
    assert scalars_of(np.eye(6), basis)["departure_from_orthonormality"] == pytest.approx(1)


# On CPUs, the maxima of optimized programs ignore NaN.
@pytest.mark.usefixtures("optimized_programs")
@pytest.mark.parametrize("sample", mostly_long([1, None], [1]))
def test_a_nan_shows_in_large_bases_too(sample: int | None) -> None:
    state: Any = soap_optax.scale_by_soap().init({"w": jnp.zeros((100, 80))})
    stack = state.stacks["100x80"]
    for spoiled in (
        [stack.bases[0].at[0, 99, 3].set(jnp.nan), stack.bases[1]],
        [stack.bases[0], jnp.full_like(stack.bases[1], jnp.nan)],
    ):
        planted = stack._replace(bases=tuple(spoiled))
        scalars = read(state._replace(stacks={"100x80": planted}), sample=sample)
        assert np.isnan(scalars["soap/100x80/departure_from_orthonormality"])
        assert np.isnan(scalars["soap/100x80/off_diagonal_mass"])
        assert np.isnan(scalars["soap/100x80/condition_number"])


def test_a_nan_shows_wherever_it_is() -> None:
    stack = trained_state().stacks["7x5"]
    spoiled = {
        "off_diagonal_mass": {
            "factors": (stack.factors[0].at[0, 1, 2].set(jnp.nan), stack.factors[1])
        },
        "condition_number": {"factors": (stack.factors[0], stack.factors[1] * jnp.nan)},
        "direction_rms": {"nu": jnp.asarray(stack.nu).at[0, 0, 0].set(jnp.nan)},
    }
    for name, fields in spoiled.items():
        state = trained_state()._replace(stacks={"7x5": stack._replace(**fields)})
        assert np.isnan(read(state)[f"{KIND}/{name}"])
        assert np.isfinite(read(trained_state())[f"{KIND}/{name}"])


def test_entries_without_a_second_moment_count_for_nothing() -> None:
    stack = trained_state().stacks["7x5"]
    mu, nu = jnp.zeros((3, 7, 5)), jnp.zeros((3, 7, 5))
    mu, nu = mu.at[0, 0, 0].set(6.0), nu.at[0, 0, 0].set(4.0)
    state = trained_state()._replace(stacks={"7x5": stack._replace(mu=mu, nu=nu)})
    assert float(read(state)[f"{KIND}/direction_rms"]) == 6 / 2


def test_only_the_sampled_blocks_are_multiplied() -> None:
    stack = trained_state().stacks["7x5"]
    spoiled = stack._replace(bases=tuple(basis.at[2].set(jnp.nan) for basis in stack.bases))
    state = trained_state()._replace(stacks={"7x5": spoiled})
    key = f"{KIND}/departure_from_orthonormality"
    assert np.isfinite(read(state, sample=2)[key])
    assert np.isnan(read(state, sample=3)[key])
    assert np.isnan(read(state, sample=None)[key])
    assert np.isnan(read(state, sample=100)[key])


def test_inside_a_jitted_step_it_returns_the_same_and_traces_once() -> None:
    traces = []

    @jax.jit
    def step(grads: Tree, state: State) -> tuple[State, dict[str, jax.Array]]:
        traces.append(None)
        _, state = OPTIMIZER.update(grads, state)  # pyright: ignore[reportAssignmentType]
        return state, diagnostics(state)

    state = fresh_state()
    rng = np.random.default_rng(3)
    for _ in range(7):
        grads = {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in SHAPES.items()}
        state, inside = step(grads, state)
        outside = read(state)
        assert list(inside) == sorted(outside)
        for key, value in outside.items():
            # Two programs round differently. The departure is nothing but rounding.
            assert float(inside[key]) == pytest.approx(float(value), rel=1e-3, abs=ROUNDING)
    assert len(traces) == 1


def test_it_has_two_products_for_each_factor_and_no_decomposition() -> None:
    jaxpr = jax.make_jaxpr(diagnostics)(fresh_state()).jaxpr
    primitives = collections.Counter(primitives_of(jaxpr))
    assert primitives["dot_general"] == 2 * 2  # A stack of matrices has two factors.
    assert not {"eigenvectors", "qr", "svd", "cholesky", "while", "cond", "custom_call"} & set(
        primitives
    )


def primitives_of(jaxpr: Jaxpr) -> Iterator[str]:
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for parameter in equation.params.values():
            for inner in parameter if isinstance(parameter, (tuple, list)) else [parameter]:
                if isinstance(inner, ClosedJaxpr):
                    yield from primitives_of(inner.jaxpr)
                elif isinstance(inner, Jaxpr):
                    yield from primitives_of(inner)


SOAP = soap_optax.soap(1e-2)
WRAPPED = {
    "itself": soap_optax.scale_by_soap(),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), SOAP),
    "named chain": optax.named_chain(("clip", optax.clip(1.0)), ("soap", SOAP)),
    "multi-steps": optax.MultiSteps(SOAP, every_k_schedule=2),
    "apply if finite": optax.apply_if_finite(SOAP, max_consecutive_errors=3),
    "injected": optax.inject_hyperparams(soap_optax.soap, static_args=soap_optax.STATIC_ARGS)(1e-2),
    "masked": optax.masked(SOAP, {"kernel": True, "bias": False}),
    "partition": optax.partition(
        {"soap": SOAP, "adamw": optax.adamw(1e-3)}, {"kernel": "soap", "bias": "adamw"}
    ),
}


@pytest.mark.parametrize("optimizer", WRAPPED.values(), ids=WRAPPED)
def test_it_finds_the_state_inside_any_other(optimizer: Any) -> None:
    state = optimizer.init({"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)})
    scalars = jax.eval_shape(diagnostics, state)
    assert {"soap/refreshes", "soap/3x2/condition_number"} <= set(scalars)


def test_several_soap_states_are_numbered_in_the_order_of_the_tree() -> None:
    optimizer = optax.partition({"a": SOAP, "b": SOAP}, {"tall": "a", "wide": "b"})
    state = optimizer.init({"tall": jnp.ones((3, 2)), "wide": jnp.ones((2, 5))})
    scalars = jax.eval_shape(diagnostics, state)
    assert {key.split("/")[0] for key in scalars} == {"soap_0", "soap_1"}
    assert "soap_0/3x2/condition_number" in scalars
    assert "soap_1/2x5/condition_number" in scalars


def test_a_state_of_stacks_or_of_adam_leaves_alone_will_do() -> None:
    stacks = jax.eval_shape(diagnostics, OPTIMIZER.init(jnp.ones((3, 2))))
    assert "soap/adam/direction_rms" not in stacks
    assert "soap/3x2/direction_rms" in stacks
    adam = jax.eval_shape(diagnostics, OPTIMIZER.init(jnp.ones(3)))
    assert sorted(adam) == [
        "soap/adam/direction_rms",
        "soap/age",
        "soap/refreshes",
        "soap/rejected_gradients",
        "soap/rejected_refreshes",
    ]


@pytest.mark.long
def test_the_state_of_an_nnx_optimizer_will_do() -> None:
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, SOAP, wrt=nnx.Param)

    @nnx.jit
    def step(model: nnx.Linear, optimizer: nnx.Optimizer) -> dict[str, jax.Array]:
        grads = nnx.grad(lambda model: jnp.sum(model(jnp.ones((2, 4))) ** 2))(model)
        optimizer.update(model, grads)
        return diagnostics(optimizer.opt_state)

    step(model, optimizer)
    assert int(step(model, optimizer)["soap/refreshes"]) == 1
    assert int(diagnostics(optimizer.opt_state)["soap/refreshes"]) == 1


def test_a_state_made_under_vmap_is_read_block_by_block() -> None:
    each = [trained_state(seed=1), trained_state(seed=2)]
    mapped = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    params = {name: jnp.zeros((2, *shape)) for name, shape in SHAPES.items()}
    made = jax.eval_shape(jax.vmap(OPTIMIZER.init), params)
    assert jax.tree.map(jnp.shape, mapped) == jax.tree.map(jnp.shape, made)

    together = read(mapped, sample=None)
    separate = [read(state, sample=None) for state in each]
    for key in ("soap/7x5/off_diagonal_mass", "soap/7x5/condition_number", "soap/age"):
        worst = max(float(one[key]) for one in separate)
        assert float(together[key]) == pytest.approx(worst, rel=100 * ROUNDING)
    assert int(together["soap/refreshes"]) == 2 * 6
    for key in ("soap/7x5/direction_rms", "soap/adam/direction_rms"):
        mean_square = np.mean([float(one[key]) ** 2 for one in separate])
        assert float(together[key]) == pytest.approx(np.sqrt(mean_square), rel=100 * ROUNDING)


@pytest.mark.parametrize("sample", [1, 3, None])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_stack_that_is_sharded_over_a_mesh_can_be_sampled(
    kind: AxisType, sample: int | None
) -> None:
    mesh = AbstractMesh((4,), ("data",), axis_types=(kind,))

    def sharded(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = PartitionSpec("data") if leaf.ndim else PartitionSpec()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    params = {str(number): jnp.zeros((3, 2)) for number in range(8)}
    with jax.sharding.use_abstract_mesh(mesh):
        state = jax.tree.map(sharded, jax.eval_shape(OPTIMIZER.init, params))
        scalars = jax.eval_shape(functools.partial(diagnostics, sample=sample), state)
    assert all(scalar.shape == () for scalar in scalars.values())
    assert "soap/3x2/off_diagonal_mass" in scalars


def test_a_state_without_soap_is_an_error() -> None:
    with pytest.raises(ValueError, match="ScaleBySoapState"):
        diagnostics(optax.adam(1e-3).init(jnp.ones(3)))


@pytest.mark.parametrize(
    ("sample", "error"), [(0, ValueError), (-1, ValueError), (1.0, TypeError), (True, TypeError)]
)
def test_a_sample_out_of_range_is_an_error(sample: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="sample"):
        diagnostics(fresh_state(), sample=sample)
