"""Physics-informed networks: reference solutions, losses, and short runs with tiny networks."""

import csv
import importlib
import math
import re
import warnings
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cases import mostly_long

from soap_optax.algorithm import RefreshMethod

ROOT = Path(__file__).parents[2]
with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
    warnings.simplefilter("ignore")  # warnings of other packages at import are not under test
    patch.setenv("OPENBLAS_NUM_THREADS", "1")  # the example sets it; the patch restores it
    patch.syspath_prepend(str(ROOT / "examples"))
    program = importlib.import_module("physics_informed")
    equations, losses, network, optimizers, problems, programs = (
        importlib.import_module(f"physics.{name}")
        for name in ("equations", "losses", "network", "optimizers", "problems", "programs")
    )
    references, spectral, specs, training = (
        importlib.import_module(f"physics.{name}")
        for name in ("references", "spectral", "specs", "training")
    )

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("implicit_promotion")]

EQUATIONS = equations.EQUATIONS
TINY = network.Size(layers=1, width=4, fourier_scale=1.0, factorized=True)


def spec_of(equation: str, optimizer: str, **changes: Any) -> Any:
    """The settings of two steps with a tiny network."""
    refresh = "qr" if optimizers.OPTIMIZERS[optimizer].refreshes else ""
    tolerance = EQUATIONS[equation].causal_tolerance
    setup = specs.Setup(equation, optimizer, refresh, TINY, 32, tolerance, "float32")
    return specs.Spec(setup, 1e-2, 0.9, 0.9, 1, steps=2, seed=0).but(**changes)


# Reference solutions ------------------------------------------------------------------------------

# Smooth parts of the solutions, as points of the first and second axis. Burgers' shock at x = 0 is
# narrower than the distance of two positions, and the last solitons of KdV nearly are.
SMOOTH = {
    "burgers": ((0.1, 0.9), (0.3, 0.8)),
    "allen-cahn": ((0.1, 0.9), (-0.3, 0.3)),
    "kdv": ((0.1, 0.5), (-0.9, 0.9)),
    "helmholtz": ((-0.8, 0.8), (-0.8, 0.8)),
}
STENCIL = 13  # grid points on each axis from which a polynomial interpolates


def interpolated(reference: Any, points: np.ndarray) -> Any:
    """Returns a field that interpolates the grid around each of the points by polynomials."""
    nodes, rows = [], []
    for axis, grid in enumerate((reference.first, reference.second)):
        start = np.searchsorted(grid, points[:, axis]) - STENCIL // 2
        rows.append(start[:, None] + np.arange(STENCIL))
        nodes.append(grid[rows[axis]])
    values = reference.values[rows[0][:, :, None], rows[1][:, None, :]]

    def basis(x: jax.Array, nodes: np.ndarray) -> jax.Array:  # (N,), (N, S) -> (N, S)
        others = np.stack([np.delete(nodes, i, axis=1) for i in range(STENCIL)], 1)
        return ((x[:, None, None] - others) / (nodes[:, :, None] - others)).prod(2)

    def field(points: jax.Array) -> jax.Array:
        first, second = (basis(points[:, axis], nodes[axis]) for axis in (0, 1))
        return jnp.einsum("ni,nij,nj->n", first, values, second)

    return field


@pytest.mark.parametrize("equation", mostly_long(EQUATIONS, ["burgers"]))
def test_the_reference_solves_the_equation(equation: str, x64: None):
    problem, reference = EQUATIONS[equation], programs.reference_of(equation)
    rng = np.random.default_rng(0)
    points = np.stack([rng.uniform(*span, size=100) for span in SMOOTH[equation]], -1)
    field = interpolated(reference, points)

    @jax.jit
    def sizes(points: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        residual = problem.residual(field, points)
        _, slope = problems.derivatives(field, points, 0, 1)
        wrong = problem.residual(lambda points: 1.1 * field(points), points)
        return abs(residual).max(), abs(slope).max(), abs(wrong).max()

    residual, slope, wrong = sizes(jnp.asarray(points))
    # The error of the interpolation remains.
    assert residual < 1e-3 * slope
    assert wrong > 1e-2 * slope


@pytest.mark.parametrize("equation", EQUATIONS)
def test_the_reference_has_the_given_values_on_the_faces(equation: str):
    problem, reference = EQUATIONS[equation], programs.reference_of(equation)
    for face in problem.faces:
        grids = (reference.first, reference.second)
        row = np.take(reference.values, np.flatnonzero(grids[face.axis] == face.at)[0], face.axis)
        # Cole-Hopf divides sums of 100 terms at the walls.
        np.testing.assert_allclose(row, face.values(grids[1 - face.axis]), atol=1e-12)


def test_burgers_does_not_depend_on_the_number_of_nodes():
    times, positions = references.TIMES[::20], references.POSITIONS[::16]
    coarse, fine = (references.burgers(times, positions, nodes).values for nodes in (100, 150))
    np.testing.assert_allclose(coarse, fine, atol=1e-12)


def soliton(x: np.ndarray, time: float, speed: float = 0.3) -> np.ndarray:
    """A soliton of the KdV equation, which is narrow beside the period of 2."""
    width = 2 * math.sqrt(references.KDV_DISPERSION / speed)
    return 3 * speed / np.cosh((x + 0.2 - speed * time) / width) ** 2


def test_a_soliton_of_kdv_travels_and_the_error_is_of_order_four():
    x, times = np.linspace(-1, 1, 256, endpoint=False), np.array([0.0, 1.0])
    errors = []
    for steps in (200, 400):
        u = references.solve_kdv(soliton(x, 0.0), times, steps, 2.0, references.KDV_DISPERSION)
        errors.append(np.abs(u[-1] - soliton(x, 1.0)).max())
    assert errors[1] < 1e-4
    assert 14 < errors[0] / errors[1] < 18


@pytest.mark.long
def test_kdv_conserves_mass_momentum_and_energy():
    u = references.kdv().values[:, :-1]
    modes = np.fft.rfft(u)
    slopes = np.fft.irfft(1j * spectral.wavenumbers(u.shape[1], 2.0) * modes, u.shape[1])
    energy = u**3 / 3 - references.KDV_DISPERSION * slopes**2
    for density in (u, u**2, energy):
        totals = density.mean(1)
        # 40 steps between two times leave this error.
        np.testing.assert_allclose(totals, totals[0], atol=1e-6)


def test_allen_cahn_converges_in_modes_and_steps():
    solution = programs.reference_of("allen-cahn").values
    coarse = references.allen_cahn(modes=1024, steps=5).values
    error = np.linalg.norm(coarse - solution) / np.linalg.norm(solution)
    # The kink at x = 1 and t = 0 leaves the most.
    assert 1e-7 < error < 1e-5


# Losses and network -------------------------------------------------------------------------------


def test_derivatives_are_those_of_the_field(x64: None):
    points = np.random.default_rng(0).uniform(size=(5, 2))
    t, x = points.T

    def field(points: jax.Array) -> jax.Array:
        return jnp.exp(points[:, 0]) * jnp.sin(2 * points[:, 1])

    @jax.jit
    def both(points: jax.Array) -> list[tuple[jax.Array, ...]]:
        return [
            problems.derivatives(field, points, axis, order) for axis, order in ((0, 2), (1, 3))
        ]

    along_t, along_x = both(jnp.asarray(points))
    sine, cosine = np.exp(t) * np.sin(2 * x), np.exp(t) * np.cos(2 * x)
    for found in along_t:
        np.testing.assert_allclose(found, sine, rtol=1e-13)
    for found, expected in zip(along_x, (sine, 2 * cosine, -4 * sine, -8 * cosine), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-13)


def test_causal_weights_fall_with_the_residuals_before():
    problem = EQUATIONS["burgers"]._replace(residual=lambda field, points: field(points))
    points = jnp.linspace(0, 1, 2 * losses.CHUNKS).repeat(2).reshape(-1, 2)
    squares = np.asarray(points[:, 0], np.float64) ** 2
    plain = losses.residual_loss(problem, lambda points: points[:, 0], points, 0.0)
    np.testing.assert_allclose(plain, squares.mean(), rtol=1e-6)

    chunks = squares.reshape(losses.CHUNKS, 2).mean(1)
    weights = [math.exp(-0.7 * chunks[:i].sum()) for i in range(losses.CHUNKS)]
    causal = losses.residual_loss(problem, lambda points: points[:, 0], points, 0.7)
    np.testing.assert_allclose(causal, (weights * chunks).mean(), rtol=1e-6)


def test_points_of_an_evolution_are_sorted_by_time_and_inside():
    problem = EQUATIONS["kdv"]
    sample = jax.jit(lambda key: losses.sample_points(problem, 64, jnp.dtype("float32"), key))
    points = np.asarray(sample(jax.random.key(0)))
    assert (np.diff(points[:, 0]) >= 0).all()
    assert (points >= problem.lower).all()
    assert (points <= problem.upper).all()
    assert (points[:, 1] < 0).any()


@pytest.mark.long
@pytest.mark.parametrize("size", [TINY, TINY._replace(fourier_scale=0.0, factorized=False)])
def test_a_network_of_a_periodic_equation_is_periodic(size: Any):
    params, fixed, apply = network.make_network(size, EQUATIONS["kdv"], jax.random.key(0))
    walls = jnp.array([[0.3, -1.0], [0.3, 1.0], [0.3, 0.0]])

    @jax.jit
    def along_x(points: jax.Array) -> tuple[jax.Array, ...]:
        return problems.derivatives(lambda points: apply(params, fixed, points), points, 1, 2)

    for left, right, middle in np.stack(along_x(walls)):
        # The cosine and sine of pi are rounded.
        assert left == pytest.approx(right, rel=1e-4)
        assert left != pytest.approx(middle, rel=1e-2)


def test_the_factors_of_weight_factorization_leave_the_initial_kernels_as_they_are():
    rngs = [network.nnx.Rngs(3), network.nnx.Rngs(3)]
    plain, factorized = (network.Dense(5, 7, on, rng) for on, rng in zip((0, 1), rngs, strict=True))
    product = factorized.kernel[...] * factorized.factor[...][None]
    np.testing.assert_allclose(product, plain.kernel[...], rtol=1e-6)
    assert (factorized.factor[...] > 1).all()


# Training -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("equation", mostly_long(EQUATIONS, ["kdv"]))
def test_every_equation_takes_a_step_with_a_finite_loss(equation: str):
    result = training.train(spec_of(equation, "adam"))
    assert [point.step for point in result.points] == [0, 1, 2]
    assert all(math.isfinite(point.loss) for point in result.points[1:])
    assert all(math.isfinite(point.relative_l2) for point in result.points)
    assert result.prediction.shape == result.reference.values.shape
    error = np.linalg.norm(result.prediction - result.reference.values)
    expected = error / np.linalg.norm(result.reference.values)
    assert result.relative_l2 == pytest.approx(expected, rel=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("optimizer", optimizers.OPTIMIZERS)
def test_every_optimizer_starts_from_the_same_weights_and_points(optimizer: str):
    adam = training.train(spec_of("burgers", "adam")).points
    points = training.train(spec_of("burgers", optimizer)).points
    # The first loss is that of the initial weights, in another program.
    assert points[0].relative_l2 == adam[0].relative_l2
    assert points[1].loss == pytest.approx(adam[1].loss, rel=1e-5)
    assert math.isfinite(points[2].loss)
    other = training.train(spec_of("burgers", "adam", seed=1)).points
    assert other[0].relative_l2 != adam[0].relative_l2


@pytest.mark.long
def test_numbers_need_no_compilation():
    spec = spec_of("burgers", "adam")
    training.train(spec)
    seen = []
    other = training.train(spec.but(learning_rate=0.1, b1=0.5, b2=0.6, steps=12), seen.append)
    assert other.compile_seconds == 0
    assert [point.step for point in seen] == list(range(1, 13))
    assert other.points[-1].loss < other.points[1].loss


@pytest.mark.long
def test_float64_computes_in_float64_and_is_switched_off_afterwards():
    before = jax.config.read("jax_enable_x64")
    result = training.train(spec_of("burgers", "adam", dtype="float64"))
    assert result.prediction.dtype == np.float64
    assert jax.config.read("jax_enable_x64") == before


@pytest.mark.long
def test_a_run_ends_where_the_loss_is_not_finite():
    result = training.train(spec_of("burgers", "adam", learning_rate=1e38, steps=40))
    assert result.diverged
    assert result.points[-1].step < 40


@pytest.mark.long
@pytest.mark.usefixtures("optimized_programs")
def test_soap_is_far_below_adam_on_burgers_equation():
    size = network.Size(3, 32, 1.0, True)
    errors = {}
    for name in ("soap", "adam"):
        spec = spec_of("burgers", name, size=size, points=512, steps=1500)
        best = optimizers.OPTIMIZERS[name]
        spec = spec.but(learning_rate=best.learning_rate, b1=best.b1, b2=best.b2, frequency=2)
        errors[name] = training.train(spec).relative_l2
    assert errors["soap"] < errors["adam"] / 3


# Command line -------------------------------------------------------------------------------------

FLAGS = ["--layers", "1", "--width", "4", "--points", "32", "--steps", "2"]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.long
def test_the_files_have_a_row_for_every_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    flags = ["--optimizer", "adam", "soap", "--learning-rate", "1e-2", "2e-2", "--seeds", "1", "2"]
    out = tmp_path / "made" / "here"
    for _ in range(2):  # The second time replaces the files of the first.
        assert program.main([*FLAGS, *flags, "--out", str(out)]) == 0
    rows = rows_of(out / "runs.csv")
    columns = ("optimizer", "learning_rate", "seed")
    assert [tuple(row[name] for name in columns) for row in rows] == [
        ("adam", "0.01", "1"),
        ("adam", "0.01", "2"),
        ("soap", "0.02", "1"),
        ("soap", "0.02", "2"),
    ]
    for row in rows:
        assert row["status"] == "done"
        assert float(row["relative_l2"]) > 0
        assert float(row["seconds"]) >= 0
        assert row["jax"] == jax.__version__
        assert (row["width"], row["dtype"], row["device"] != "") == ("4", "float32", True)
    curves = rows_of(out / "curves.csv")
    assert [row["step"] for row in curves] == ["0", "1", "2"] * 4
    for name in ("solution.png", "error.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    printed = capsys.readouterr().out
    assert re.search(r"Adam's error is \S+ times SOAP's\.", printed)
    assert printed.count("Adam, seed 1: relative L2 error") == 2


def test_a_diverged_run_gets_one_line_and_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    flags = ["--optimizer", "adam", "--learning-rate", "1e38", "--out", str(tmp_path)]
    assert program.main([*FLAGS, *flags, "--steps", "40"]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "Adam: the loss of step" in message
    assert rows_of(tmp_path / "runs.csv")[0]["status"] == "diverged"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--equatoin", "kdv"], ["unrecognized arguments", "--equatoin"]),
        (["--equation", "heat"], ["--equation", "'heat'", "allen-cahn"]),
        (["--optimizer", "soup"], ["--optimizer", "'soup'", "lbfgs"]),
        (["--optimizer", "soap", "soap"], ["--optimizer", "once"]),
        (["--learning-rate", "nan"], ["--learning-rate", "positive", "'nan'"]),
        (["--learning-rate", "1", "2", "3"], ["--learning-rate", "3 for 2 optimizers"]),
        (["--seeds", "-1"], ["--seeds", "from 0", "'-1'"]),
        (["--seeds", "1", "1"], ["--seeds", "once"]),
        (["--dtype", "float16"], ["--dtype", "'float16'", "float64"]),
        (["--refresh", "svd"], ["--refresh", "'svd'", "eigh"]),
        (["--steps", "0"], ["--steps", "from 1", "'0'"]),
        (["--width", "5"], ["--width", "even", "got 5"]),
        (["--equation", "kdv", "--points", "33"], ["--points", "multiple of 32", "got 33"]),
        (["--fourier-scale", "-1"], ["--fourier-scale", "from 0", "'-1'"]),
        (["--equation", "helmholtz", "--causal-tolerance", "1"], ["--causal-tolerance", "no time"]),
        (["--precondition-frequency", "0"], ["--precondition-frequency", "from 1"]),
        (["--out", "{tmp}/file"], ["--out", "cannot write to", "file"]),
    ],
)
def test_a_mistake_gets_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
):
    (tmp_path / "file").write_text("")
    given = ["--out", str(tmp_path / "out")]
    given += [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    with pytest.raises(SystemExit) as stop:
        program.main([*FLAGS, *given])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert ": error: " in message
    for word in words:
        assert word in message
    assert not (tmp_path / "out").exists()


def test_the_flag_has_all_refresh_methods():
    assert get_args(RefreshMethod) == optimizers.REFRESH_METHODS
