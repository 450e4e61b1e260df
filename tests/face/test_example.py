"""The pretraining example as a user runs it, with tiny models and a generated text."""

import csv
import importlib
import math
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
import warnings
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
STEPS = 12
TINY = ["--layers", "1", "--width", "16", "--heads", "2", "--context", "16", "--batch-size", "4"]

# Each test starts interpreters that import JAX and compile; together they take about a minute.
pytestmark = pytest.mark.timeout(300)


def start(*arguments: object, **options) -> subprocess.Popen[str]:
    """Starts the example with tiny models."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "examples" / "pretrain_lm.py"), *TINY, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=options.pop("stderr", subprocess.PIPE),
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUMPY_DTYPE_PROMOTION": "standard",  # AdamW and Flax promote implicitly.
            "JAX_NUMPY_RANK_PROMOTION": "allow",
        },
    )


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def losses_of(rows: list[dict[str, str]], optimizer: str) -> list[tuple[str, str, str]]:
    """The columns that must not depend on the machine's speed, as written."""
    return [
        (row["step"], row["train_loss"], row["held_out_loss"])
        for row in rows
        if row["optimizer"] == optimizer
    ]


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of text, with a folder inside and a hidden file that must not be read."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "inner").mkdir()
    (folder / "b.txt").write_text("the quick brown fox jumps over the lazy dog; " * 30)
    (folder / "inner" / "a.txt").write_text("pack my box with five dozen liquor jugs. " * 30)
    (folder / ".hidden").write_bytes(bytes(range(128, 256)))
    return folder


@pytest.fixture(scope="module")
def both(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """The folder of results, standard output and standard error of a run of both optimizers."""
    out = tmp_path_factory.mktemp("out") / "made" / "here"
    arguments = ("--steps", STEPS, "--data", folder, "--out", out, "--checkpoint-every", "5")
    process = start(*arguments)
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    return out, stdout, stderr


@pytest.mark.long
def test_metrics_have_a_finite_row_for_every_evaluation(both: tuple[Path, str, str]):
    rows = rows_of(both[0])
    assert list(rows[0]) == (
        ["optimizer", "step", "train_loss", "held_out_loss", "tokens_per_second", "seconds"]
    )
    for optimizer in ("soap", "adamw"):
        own = [row for row in rows if row["optimizer"] == optimizer]
        assert [int(row["step"]) for row in own] == list(range(STEPS + 1))
        assert all(math.isfinite(float(row["held_out_loss"])) for row in own)
        assert all(math.isfinite(float(row["train_loss"])) for row in own[1:])
        assert all(float(row["tokens_per_second"]) > 0 for row in own[1:])
        seconds = [float(row["seconds"]) for row in own]
        assert seconds == sorted(seconds)
    assert len(rows) == 2 * (STEPS + 1)


@pytest.mark.long
def test_both_optimizers_start_from_the_same_weights_and_see_the_same_batches(
    both: tuple[Path, str, str],
):
    rows = rows_of(both[0])
    soap, adamw = losses_of(rows, "soap"), losses_of(rows, "adamw")
    assert soap[0] == adamw[0]
    # Warmup starts at zero, so that the first two batches see the initial weights. Their losses
    # differ only by the float32 rounding of two programs.
    for step in (1, 2):
        assert float(soap[step][1]) == pytest.approx(float(adamw[step][1]), rel=1e-5)
    assert soap[-1] != adamw[-1]


@pytest.mark.long
def test_both_optimizers_learn(both: tuple[Path, str, str]):
    rows = rows_of(both[0])
    for optimizer in ("soap", "adamw"):
        losses = [float(loss) for _, _, loss in losses_of(rows, optimizer)]
        # Initial logits are nearly zero, so that the loss starts near log(256) = 5.55.
        assert losses[0] == pytest.approx(math.log(256), abs=0.1)
        assert losses[-1] < losses[0] - 0.1


@pytest.mark.long
def test_the_curves_are_a_png(both: tuple[Path, str, str]):
    assert is_png(both[0] / "loss.png")


@pytest.mark.long
def test_soaps_diagnostics_are_written_at_every_evaluation_and_drawn(both: tuple[Path, str, str]):
    out, stdout, _ = both
    with (out / "diagnostics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["optimizer"] for row in rows} == {"soap"}
    names = {row["name"] for row in rows}
    # The block shapes of a GPT of width 16, with its 256 bytes and its context of 16.
    kinds = {"16x16", "16x64", "64x16", "256x16"}
    assert {name.split("/")[1] for name in names} >= kinds
    by_step = {step: {} for step in range(STEPS + 1)}
    for row in rows:
        by_step[int(row["step"])][row["name"]] = float(row["value"])
    assert all(set(scalars) == names for scalars in by_step.values())
    assert all(math.isfinite(value) for scalars in by_step.values() for value in scalars.values())
    # The first basis comes with the second gradient, the first refresh ten updates later.
    assert by_step[1]["soap/refreshes"] == 0
    assert 0 < by_step[2]["soap/refreshes"] == by_step[11]["soap/refreshes"]
    assert by_step[12]["soap/refreshes"] == 2 * by_step[11]["soap/refreshes"]
    assert by_step[12]["soap/16x16/off_diagonal_mass"] > 0
    assert is_png(out / "diagnostics.png")
    adopted = by_step[STEPS]["soap/refreshes"]
    assert f"SOAP adopted {adopted:.0f} bases and rejected 0; it rejected 0 gradients." in stdout


@pytest.mark.long
def test_the_closing_table_and_the_verdict_agree_with_the_metrics(both: tuple[Path, str, str]):
    out, stdout, _ = both
    lines = stdout.splitlines()
    header = next(number for number, line in enumerate(lines) if "learning rate" in line)
    rows = rows_of(out)
    finals = {}
    for line, optimizer in zip(lines[header + 1 :], ("soap", "adamw"), strict=False):
        label, *cells = line.split()
        assert label.lower() == optimizer
        own = losses_of(rows, optimizer)
        finals[optimizer] = float(own[-1][2])
        best = min(float(loss) for _, _, loss in own)
        assert cells[1:4] == [f"{float(x):.3f}" for x in (own[-1][1], own[-1][2], best)]
    reached = [step for step, _, loss in losses_of(rows, "soap") if float(loss) <= finals["adamw"]]
    verdict = (
        f"SOAP reached AdamW's final held-out loss ({finals['adamw']:.3f}) at step {reached[0]} of"
        if reached
        else f"SOAP did not reach AdamW's final held-out loss ({finals['adamw']:.3f})"
    )
    assert sum(line.startswith(verdict) for line in lines) == 1


@pytest.mark.long
def test_a_log_gets_a_line_for_each_evaluation_and_no_bar(both: tuple[Path, str, str]):
    _, stdout, stderr = both
    pattern = rf"^(SOAP|AdamW) +step +\d+ of {STEPS}  held-out loss \d\.\d{{3}}"
    assert len(re.findall(pattern, stdout, re.MULTILINE)) == 2 * (STEPS + 1)
    assert "\r" not in stdout + stderr
    assert "Traceback" not in stderr


@pytest.mark.long
def test_a_terminal_gets_a_bar_and_the_same_seed_gives_the_same_losses(
    both: tuple[Path, str, str], folder: Path, tmp_path: Path
):
    controller, terminal = pty.openpty()
    termios.tcsetwinsize(controller, (24, 80))
    arguments = ("--optimizer", "soap", "--steps", STEPS, "--data", folder, "--out", tmp_path)
    process = start(*arguments, stderr=terminal)
    os.close(terminal)
    shown = b""
    try:
        while chunk := os.read(controller, 4096):
            shown += chunk
    except OSError:
        pass  # Linux raises this once the other end of a pseudo-terminal is closed
    finally:
        os.close(controller)
    stdout, _ = process.communicate()
    assert process.returncode == 0
    numbers = rb"loss=\d\.\d{3}, held-out=\d\.\d{3}, tok/s=[\d,]+"
    assert re.search(rb"SOAP 12/12 \|.*\| \d\d:\d\d<00:00, " + numbers, shown)
    assert " step " not in stdout
    assert losses_of(rows_of(tmp_path), "soap") == losses_of(rows_of(both[0]), "soap")


@pytest.mark.long
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_files(folder: Path, tmp_path: Path):
    arguments = ("--optimizer", "adamw", "--learning-rate", "1e38", "--steps", "30")
    process = start(*arguments, "--data", folder, "--out", tmp_path)
    _, stderr = process.communicate()
    assert process.returncode == 1
    assert re.fullmatch(r"pretrain_lm\.py: error: AdamW: the loss of step \d+ is .*\n", stderr)
    assert rows_of(tmp_path)
    assert is_png(tmp_path / "loss.png")


@pytest.mark.long
def test_a_picture_that_cannot_be_drawn_costs_the_picture_only(folder: Path, tmp_path: Path):
    (tmp_path / "loss.png").mkdir()
    arguments = ("--optimizer", "soap", "--steps", "1", "--data", folder, "--out", tmp_path)
    process = start(*arguments)
    stdout, stderr = process.communicate()
    assert process.returncode == 1
    assert re.search(r"^ +SOAP +0\.03 +\d\.\d{3}", stdout, re.MULTILINE)
    assert len(rows_of(tmp_path)) == 2
    assert re.fullmatch(r"pretrain_lm\.py: error: cannot draw .*loss\.png: Is a dir.*\n", stderr)


@pytest.mark.long
def test_an_interrupt_leaves_what_was_measured(folder: Path, tmp_path: Path):
    arguments = ("--optimizer", "adamw", "--steps", "1000000", "--batch-size", "64")
    # The process that runs the tests may ignore the signal, as under `nohup`, and the child would
    # inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = start(*arguments, "--data", folder, "--out", tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if " step " in line:
                break
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 130
    assert re.fullmatch(r"pretrain_lm\.py: interrupted \(results so far: .*\)\n", stderr)
    assert rows_of(tmp_path)[0]["step"] == "0"
    assert is_png(tmp_path / "loss.png")


@pytest.fixture(scope="module")
def example() -> ModuleType:
    """The example as a module, so that tests of mistakes do not import JAX again."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of other packages at import are not under test
        patch.setenv("OPENBLAS_NUM_THREADS", "1")  # the example sets it; the patch restores it
        patch.syspath_prepend(str(ROOT / "examples"))
        return importlib.import_module("pretrain_lm")


@pytest.mark.long
def test_a_run_goes_on_from_its_checkpoint_and_writes_what_it_would_have_written(
    both: tuple[Path, str, str],
    folder: Path,
    tmp_path: Path,
    example: ModuleType,
    capsys: pytest.CaptureFixture[str],
):
    losses = losses_of(rows_of(both[0]), "soap")
    out = shutil.copytree(both[0], tmp_path / "out")
    shutil.rmtree(out / "checkpoints" / "soap" / str(STEPS))
    for name in ("metrics.csv", "diagnostics.csv"):  # As if the run had ended before its last step.
        lines = (out / name).read_text().splitlines(keepends=True)
        kept = [line for line in lines if not line.startswith(f"soap,{STEPS},")]
        assert len(kept) < len(lines)
        (out / name).write_text("".join(kept))
    arguments = ("--optimizer", "soap", "--steps", STEPS, "--data", folder, "--out", out)
    arguments += ("--checkpoint-every", "5")
    process = start(*arguments, "--resume")
    stdout, _ = process.communicate()
    assert process.returncode == 0
    assert "SOAP: going on from the checkpoint of step 10" in stdout
    assert losses_of(rows_of(out), "soap") == losses
    assert (out / "diagnostics.csv").read_text() == (both[0] / "diagnostics.csv").read_text()

    for flags, message in {
        (): r"checkpoints/soap holds a checkpoint of step 12; go on from it with --resume",
        ("--resume", "--seed", "1"): r"the checkpoint of SOAP was written with --seed 0, not 1",
        ("--resume", "--data", folder / "b.txt"): r"written with another text: .* --data",
    }.items():
        with pytest.raises(SystemExit) as stop:
            example.main([*TINY, *map(str, arguments), *map(str, flags)])
        assert stop.value.code == 2
        assert re.search(rf"^\S+: error: .*{message}.*\n", capsys.readouterr().err)
    assert losses_of(rows_of(out), "soap") == losses


JOB = ["--coordinator", "localhost:1", "--processes", "2"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--stepz", "3"], ["unrecognized arguments", "--stepz"]),
        (["--optimizer", "soup"], ["--optimizer", "'soup'", "adamw"]),
        (["--optimizer", "soap", "soap"], ["--optimizer", "once"]),
        (["--steps", "0"], ["--steps", "from 1", "'0'"]),
        (["--steps", "many"], ["--steps", "whole number", "'many'"]),
        (["--seed", "-1"], ["--seed", "from 0", "'-1'"]),
        (["--learning-rate", "nan"], ["--learning-rate", "positive", "'nan'"]),
        (["--learning-rate", "1", "2", "3"], ["--learning-rate", "3 for 2 optimizers"]),
        (["--heads", "3"], ["--heads", "divide the width, 16"]),
        (["--data", "{tmp}/absent.txt"], ["--data", "absent.txt", "No such file"]),
        (["--data", "x" * 300], ["--data", "xxx", "File name too long"]),
        (["--data", "{tmp}/empty"], ["--data", "0 files"]),
        (["--steps", "1" * 5000], ["--steps", "from 1"]),
        (["--data", "{tmp}/short.txt"], ["--data", "short.txt has 160 bytes", "context, 16"]),
        (["--out", "{tmp}/short.txt"], ["--out", "cannot write to", "short.txt"]),
        (["--out", "{tmp}/short.txt/below"], ["--out", "cannot write to", "below"]),
        (["--mesh", "tensor=2"], ["--mesh", "data, fsdp", "'tensor=2'"]),
        (["--mesh", "data=2,data=4"], ["--mesh", "each once", "'data=2,data=4'"]),
        (["--mesh", "data=0"], ["--mesh", "from 1", "'0'"]),
        (["--mesh", "data=3"], ["--batch-size", "multiple of the 3 devices", "got 4"]),
        (["--mesh", "fsdp=2", "--stack-multiple", "3"], ["--stack-multiple", "2 devices", "got 3"]),
        (["--processes", "2"], ["--processes", "--coordinator", "go together"]),
        (["--distributed", *JOB, "--process", "0"], ["--coordinator", "--distributed"]),
        ([*JOB, "--process", "2"], ["--process", "below --processes, 2, got 2"]),
        ([*JOB, "--process", "1"], ["--mesh", "1 devices", "--processes, 2"]),
    ],
)
def test_a_mistake_gets_one_line(
    example: ModuleType,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: list[str],
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "short.txt").write_text("0123456789abcdef" * 10)
    given = ["--data", str(folder), "--out", str(tmp_path / "out")]
    given += [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    with pytest.raises(SystemExit) as stop:
        example.main([*TINY, *given])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert message.endswith("\n")
    assert ": error: " in message
    for word in words:
        assert word in message
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_a_mistake_in_the_shell_ends_with_code_2_and_no_traceback(tmp_path: Path):
    process = start("--width", "0", "--out", tmp_path / "out")
    stdout, stderr = process.communicate()
    assert (process.returncode, stdout) == (2, "")
    assert re.fullmatch(r"pretrain_lm\.py: error: argument --width: .*\n", stderr)


@pytest.mark.long
def test_processes_that_cannot_be_joined_get_one_line(folder: Path, tmp_path: Path):
    process = start("--distributed", "--data", folder, "--out", tmp_path / "out")
    _, stderr = process.communicate()
    assert process.returncode == 2
    message = (
        r"pretrain_lm\.py: error: argument --distributed: cannot join the other processes: .+\n"
    )
    assert re.fullmatch(message, stderr)


def test_the_standard_library_is_read_in_a_fixed_order_without_installed_packages(
    example: ModuleType,
):
    files = sys.modules[example.load_text.__module__].standard_library()
    names = [path.as_posix() for path in files]
    assert names == sorted(names)
    assert {"argparse.py", "dataclasses.py"} <= {path.name for path in files}
    assert not any("/site-packages/" in name or "/test/" in name for name in names)
