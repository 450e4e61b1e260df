"""Checks that need eight devices, whose number is fixed when JAX starts: in a process of their own.

A script of checks imports this before JAX starts, and is run by `results_of`:

    python script.py results.json
"""

import json
import os
import pathlib
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping

# They take a minute or two, most of it to compile; the limit leaves room for a busy machine, on
# which they have taken nine.
LIMIT_IN_SECONDS = 1500

# For each check, None where it passed, or the traceback of its failure.
Results = dict[str, str | None]


def simulate_devices() -> None:
    """Has JAX, imported later, show eight CPU devices and calculate in float64."""
    # A device that waits in a collective holds a thread of XLA's pool, which has as many threads as
    # devices. With JAX 0.8, work that needs one more has been seen to stop them all for good.
    os.environ["NPROC"] = "32"
    # Devices that wait for each other give up after 40 seconds, which a busy machine can take.
    os.environ["XLA_FLAGS"] = (
        "--xla_force_host_platform_device_count=8 "
        "--xla_cpu_collective_call_terminate_timeout_seconds=500"
    )
    os.environ["JAX_ENABLE_X64"] = "1"


def run_checks(checks: Mapping[str, Callable[[], None]]) -> None:
    """Runs the checks and writes their results to the file of the command line."""
    import jax

    # One program at a time: where two are in flight, devices that wait for each other in the first
    # may hold all threads that the second needs, and the other way round.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    assert jax.device_count() == 8
    results: Results = {}
    path = pathlib.Path(sys.argv[1])
    for name, check in checks.items():
        try:
            check()
            results[name] = None
        except Exception:
            results[name] = traceback.format_exc()
        path.write_text(json.dumps(results))


def results_of(script: str | None, folder: pathlib.Path) -> Results:
    """Runs a script of checks in a process of its own."""
    assert script is not None
    path = folder / "results.json"
    process = subprocess.run(
        [sys.executable, script, path],
        env=dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path))),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_IN_SECONDS,
    )
    assert process.returncode == 0, process.stdout
    return json.loads(path.read_text())
