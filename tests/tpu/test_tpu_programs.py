"""Training steps for pods, compiled by the TPU compiler in a separate environment.

    pip install ".[tpu]"
    python -m pytest tests/tpu

All tests take half an hour on two cores; `-k "360m and v5e"` takes minutes.
"""

import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_for_pods.py")
LIMIT_IN_SECONDS = 3600
# The short suite disables most optimizations, but these tests check optimized programs.
ENVIRONMENT = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}

# libtpu prints warnings without a TPU and slows JAX down, so only the extra `tpu` installs it.
pytestmark = [
    pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs the extra tpu"),
    pytest.mark.timeout(LIMIT_IN_SECONDS + 60),
]


def test_every_decomposition_compiles_for_a_tpu() -> None:
    process = subprocess.run(
        [sys.executable, SCRIPT.with_name("compile_decompositions.py"), "--lengths", "128"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=LIMIT_IN_SECONDS,
    )
    assert process.returncode == 0, process.stderr[-5000:]
    rows = [line for line in process.stdout.splitlines() if "128x128" in line]
    assert len(rows) == 6


def cells_of_one_row(output: str) -> dict[str, dict[str, str]]:
    """The cells of tables with one row, by title and column."""
    tables = {}
    for title, table in itertools.pairwise(part.strip() for part in output.split("\n\n")):
        if table.startswith("|"):
            header, _, row = (line.strip("| ").split(" | ") for line in table.splitlines())
            tables[title] = dict(zip(header, row, strict=True))
    return tables


@pytest.mark.parametrize("pod", ["v5e:16x16", "v5p:8x8x8"])
@pytest.mark.parametrize("model", ["360m", "660m", "7b"])
@pytest.mark.parametrize("split", ["all", "groups"])
def test_a_training_step_compiles_for_a_pod_with_its_state_sharded_evenly(
    split: str, model: str, pod: str
) -> None:
    flags = ("--splits", split, "--models", model, "--pods", pod, "--optimizers", "SOAP")
    process = subprocess.run(
        [sys.executable, SCRIPT, *flags],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=LIMIT_IN_SECONDS,
    )
    assert process.returncode == 0, process.stderr[-5000:]
    cells = cells_of_one_row(process.stdout)

    def number(table: str, column: str) -> float:
        return float(cells[f"{split}: {table}"][column].replace(",", ""))

    parameters = number("parameters and state", "parameters MB")
    state = number("parameters and state", "state MB")
    assert state <= 1.1 * number("parameters and state", "even share MB")
    temporaries = number("temporaries", "update alone MB")
    largest = number("temporaries", "largest stack MB")
    if split == "all":
        assert temporaries <= 2 * largest
    else:  # A chip also receives gradients and sends updates of its shard of the parameters.
        assert temporaries <= 2 * (largest + parameters)
    # No collective in the refresh or in the step of blocks.
    assert number("collectives of the update alone", "inside") == 0
