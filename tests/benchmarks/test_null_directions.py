"""The benchmark of the rules for null directions: what it switches off, and what it reports."""

import jax
import jax.numpy as jnp
import null_directions
import numpy as np
import pytest

import soap_optax


def row_without_gradients() -> np.ndarray:
    """The update of a row without gradients, from SOAP as it is traced now."""
    rng = np.random.default_rng(0)
    grad = rng.normal(size=(12, 8)).astype(np.float32)
    grad[::3] = 0
    optimizer = soap_optax.scale_by_soap(precondition_frequency=1)
    state = optimizer.init(jnp.zeros(grad.shape))
    for scale in (1.0, 0.5, 2.0):
        updates, state = jax.jit(optimizer.update)(jnp.asarray(scale * grad), state)
    return np.asarray(updates)[::3]


@pytest.mark.long
def test_without_the_rules_rows_without_gradients_move() -> None:
    with null_directions.without_rules():
        assert np.any(row_without_gradients() != 0)
    np.testing.assert_array_equal(row_without_gradients(), 0)


def test_the_table_has_the_differences_seed_by_seed() -> None:
    table = null_directions.Comparison([1.0, 2.0], [1.5, 2.25]).table()
    assert "| both rules | 1.5000 | 0.7071 |" in table
    assert "| difference | -0.3750 | 0.1768 |" in table


@pytest.mark.long
@pytest.mark.usefixtures("implicit_promotion")
def test_the_benchmark_prints_its_table(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--seeds", "2", "--steps", "20", "--layers", "1", "--width", "16"]
    assert null_directions.main(sizes) == 0
    assert "| neither | " in capsys.readouterr().out


def test_one_seed_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        null_directions.main(["--seeds", "1"])
    assert "at least 2" in capsys.readouterr().err
