"""SOAP on meshes of eight simulated devices, explicit and automatic, and Optax's tests for them."""

import json
import os
import pathlib
import subprocess
import sys

import eight_devices
import pytest

# The number of devices is fixed when JAX starts, so that all checks run in one other process. It
# takes a minute or two, most of it to compile; the limit leaves room for a busy machine.
LIMIT_IN_SECONDS = 570


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """The traceback of each check, or None where it passed."""
    path = tmp_path_factory.mktemp("eight_devices") / "results.json"
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    script = pathlib.Path(eight_devices.__file__)
    process = subprocess.run(
        [sys.executable, script, path],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_IN_SECONDS,
    )
    assert process.returncode == 0, process.stdout
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", eight_devices.CHECKS)
def test_on_eight_devices(name: str, results: dict[str, str | None]) -> None:
    assert results[name] is None, results[name]
