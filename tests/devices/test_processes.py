"""The pretraining example as one job of several processes, also killed and restarted.

The processes run on one machine, and communicate over its loopback address.
"""

import csv
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
LIMIT_IN_SECONDS = 500
STEPS = 16

# Only axes of length 16 are preconditioned. Every first gradient has full rank along them, so that
# rounding does not decide the first basis.
TINY = ["--layers", "1", "--width", "16", "--heads", "2", "--context", "16"]
TINY += ["--batch-size", "16", "--max-precond-dim", "16"]
JOB = ["--optimizer", "soap", *TINY, "--steps", str(STEPS), "--mesh", "data=2,fsdp=4"]

# The same text wherever and whenever the tests run.
WORDS = ("factor", "basis", "block", "stack", "moment", "gradient", "refresh", "mesh", "of", "the")
TEXT = " ".join(random.Random(0).choices(WORDS, k=40_000))

# The runs use float64. Another number of processes adds in another order, and training amplifies
# the difference: with this text to 2e-9. A batch on the wrong device moves the losses by 1e-2.
TOLERANCE = 1e-7

pytestmark = [pytest.mark.timeout(LIMIT_IN_SECONDS + 60), pytest.mark.long]


def start(count: int, out: Path, compiled: Path, *flags: str) -> list[subprocess.Popen[str]]:
    """Starts all processes of a job, each with its share of the eight devices."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{listener.getsockname()[1]}"
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_X64": "1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # All processes compile the same programs.
        "NPROC": "16",  # As in tests/conftest.py.
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, str(ROOT / "examples" / "pretrain_lm.py"), *JOB]
    text = out.parent / "words.txt"
    text.write_text(TEXT)
    command += ["--data", str(text), "--out", str(out), *flags]
    together = ["--coordinator", coordinator, "--processes", str(count), "--process"]
    processes = []
    for number in range(count):
        flags_of_one = [*together, str(number)] if count > 1 else []
        with (out.parent / f"{out.name}_{number}.txt").open("w") as said:
            processes.append(
                subprocess.Popen(
                    [*command, *flags_of_one],
                    env=environment,
                    stdout=said,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
    return processes


def said_by(out: Path, number: int = 0) -> str:
    """The output of one process of the newest job in a folder."""
    return (out.parent / f"{out.name}_{number}.txt").read_text()


def finish(processes: list[subprocess.Popen[str]], out: Path) -> str:
    """Waits for a job, and returns what its first process printed."""
    try:
        for number, process in enumerate(processes):
            assert process.wait(LIMIT_IN_SECONDS) == 0, said_by(out, number)
    finally:
        for process in processes:
            process.kill()
    return said_by(out)


def losses_in(out: Path) -> np.ndarray:
    """Step, training loss and held-out loss of every evaluation."""
    with (out / "metrics.csv").open(newline="") as file:
        rows = [
            (int(row["step"]), float(row["train_loss"]), float(row["held_out_loss"]))
            for row in csv.DictReader(file)
        ]
    return np.asarray(rows)


@pytest.fixture(scope="module")
def losses_of_one_process(tmp_path_factory: pytest.TempPathFactory, compiled: Path) -> np.ndarray:
    out = tmp_path_factory.mktemp("one") / "out"
    said = finish(start(1, out, compiled), out)
    assert "8 x cpu (data=2, fsdp=4; processes: 1)" in said
    losses = losses_in(out)
    assert losses[:, 0].tolist() == list(range(STEPS + 1))
    assert losses[-1, 2] < losses[0, 2] - 0.5
    return losses


def test_two_processes_give_the_losses_of_one(
    losses_of_one_process: np.ndarray, tmp_path: Path, compiled: Path
) -> None:
    out = tmp_path / "out"
    said = finish(start(2, out, compiled), out)
    assert "8 x cpu (data=2, fsdp=4; processes: 2)" in said
    assert "SOAP  step" not in said_by(out, 1)  # Only the first process reports.
    np.testing.assert_allclose(losses_in(out), losses_of_one_process, rtol=0, atol=TOLERANCE)


def test_a_job_that_lost_a_process_goes_on_from_its_checkpoint(
    losses_of_one_process: np.ndarray, tmp_path: Path, compiled: Path
) -> None:
    out = tmp_path / "out"
    flags = ("--checkpoint-every", "4", "--resume")
    processes = start(2, out, compiled, *flags)
    try:
        second = out / "checkpoints" / "soap" / "8"  # A complete checkpoint gets this name.
        deadline = time.monotonic() + LIMIT_IN_SECONDS
        while not second.exists():
            assert time.monotonic() < deadline, said_by(out)
            assert all(process.poll() is None for process in processes), said_by(out)
            time.sleep(0.02)
        processes[1].kill()
        processes[1].wait()
    finally:  # A scheduler kills the other processes too.
        for process in processes:
            process.kill()
            process.wait()
    before = losses_in(out)
    assert len(before) <= STEPS  # The job was killed before its end.

    said = finish(start(2, out, compiled, *flags), out)
    assert "SOAP: going on from the checkpoint of step " in said
    first = int(said.partition("checkpoint of step ")[2].partition("\n")[0])
    assert first >= 8
    after = losses_in(out)
    np.testing.assert_array_equal(after[: first + 1], before[: first + 1])
    np.testing.assert_allclose(after, losses_of_one_process, rtol=0, atol=TOLERANCE)
