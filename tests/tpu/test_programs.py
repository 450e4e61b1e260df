"""The TPU compiler's word on training steps for pods; without a TPU, in an environment of its own.

    pip install ".[tpu]"
    python -m pytest tests/tpu

All of it takes half an hour on two cores; `-k "360m and v5e"` takes minutes.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_for_pods.py")
LIMIT_IN_SECONDS = 3600

# libtpu prints warnings where there is no TPU and slows JAX down, so that only the extra has it.
pytestmark = [
    pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs the extra tpu"),
    pytest.mark.timeout(LIMIT_IN_SECONDS + 60),
]


def test_every_decomposition_compiles_for_a_tpu() -> None:
    process = subprocess.run(
        [sys.executable, SCRIPT.with_name("compile_decompositions.py"), "--lengths", "128"],
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        timeout=LIMIT_IN_SECONDS,
    )
    assert process.returncode == 0, process.stderr[-5000:]
    rows = [line for line in process.stdout.splitlines() if "128x128" in line]
    assert len(rows) == 6


@pytest.mark.parametrize("pod", ["v5e:16x16", "v5p:8x8x8"])
@pytest.mark.parametrize("model", ["360m", "660m", "7b"])
@pytest.mark.parametrize("split", ["all", "groups"])
def test_a_training_step_compiles_for_a_pod_with_its_state_sharded_evenly(
    split: str, model: str, pod: str
) -> None:
    flags = ("--splits", split, "--models", model, "--pods", pod, "--optimizers", "SOAP")
    process = subprocess.run(
        [sys.executable, SCRIPT, *flags],
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        timeout=LIMIT_IN_SECONDS,
    )
    assert process.returncode == 0, process.stderr[-5000:]
    rows = [line.strip("| ").split(" | ") for line in process.stdout.splitlines() if "|" in line]
    header, _, cells = rows
    numbers = [cell.replace(",", "") for cell in cells]
    state, even_share, largest, parameters = (
        float(numbers[header.index(name)])
        for name in ("state MB", "even share MB", "largest stack MB", "parameters MB")
    )
    assert state <= 1.1 * even_share
    # Of the update by itself, which comes second.
    temporaries = float(numbers[len(header) - 1 - header[::-1].index("temporaries MB")])
    if split == "all":
        assert temporaries <= 2 * largest
    else:  # A chip brings in gradients and takes out updates of its part of the parameters.
        assert temporaries <= 2 * (largest + parameters)
    # No collective in the refresh or in the step of blocks.
    assert numbers[header.index("inside")] == "0"
