"""The benchmark of small networks prints its table, and its leafwise port is SOAP."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_networks
from leafwise import scale_by_leafwise_soap
from textbook import scale_by_textbook_soap


@pytest.mark.usefixtures("implicit_promotion")
def test_the_leafwise_port_agrees_with_the_textbook() -> None:
    params = {"kernel": jnp.zeros((4, 4)), "bias": jnp.zeros(3)}
    ports = [
        scale_by(precondition_frequency=1)
        for scale_by in (scale_by_leafwise_soap, scale_by_textbook_soap)
    ]
    states, rng = [port.init(params) for port in ports], np.random.default_rng(0)
    steps = [jax.jit(port.update) for port in ports]
    results = []
    for _ in range(5):
        grads = {name: jnp.asarray(rng.normal(size=p.shape), p.dtype) for name, p in params.items()}
        results = [step(grads, state) for step, state in zip(steps, states, strict=True)]
        states = [state for _, state in results]
        for name in params:
            # Both round in float32, in another order.
            np.testing.assert_allclose(results[0][0][name], results[1][0][name], atol=1e-3)
    assert np.any(results[0][0]["kernel"])


@pytest.mark.long
@pytest.mark.usefixtures("implicit_promotion")
def test_the_table_has_a_row_for_every_case(capfd: pytest.CaptureFixture[str]) -> None:
    flags = ["--networks", "1x8", "--points", "16", "--rounds", "2", "--steps", "2"]
    assert small_networks.main([*flags, "--contenders", "adam", "soap", "--frequencies", "1"]) == 0
    lines = capfd.readouterr().out.splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    assert [row[:2] for row in rows[2:]] == [["Adam", "-"], ["SOAP", "1"]]
    assert rows[2][-1] == "1.00"
    assert rows[3][3] == "1.00"
    assert all(float(cell) > 0 for cell in rows[3][2:])
