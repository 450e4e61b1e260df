"""Trains something tiny in other people's programs, and prints the matrix of results.

    python tests/programs/run.py                  # all programs, or those named
    python tests/programs/run.py numpyro --write  # also puts the rows into the page
    python tests/programs/run.py numpyro --pin    # new environment, and new pinned versions

Each program gets a virtual environment with the versions in `pins/`, on the Python that
`programs.toml` names, found on PATH or under ${PYENV_ROOT:-~/.pyenv}. The script `train_NAME.py`
runs in it with the library of this checkout.
"""

import argparse
import datetime
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import tomllib
from typing import Any

from program_result import MARK

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PAGE = ROOT / "docs" / "explanation" / "programs.md"
PROGRAMS: dict[str, dict[str, Any]] = tomllib.loads((HERE / "programs.toml").read_text())
HEADS = {
    "matrix": "| program | version | JAX | Python | usual optimizer | SOAP | tolerance | date |",
    "notes": "| program | what a user has to know | checkpoint | all runs |",
}
TIMEOUT = 1800  # Seconds for one script.


def find_python(version: str) -> str:
    """An interpreter of that version, from PATH or pyenv."""
    found = shutil.which(f"python{version}")
    if found and not subprocess.run([found, "-c", ""], capture_output=True).returncode:
        return found
    pyenv = pathlib.Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    for python in sorted(pyenv.glob(f"versions/{version}.*/bin/python")):
        return str(python)
    raise FileNotFoundError(f"no python{version} on PATH or under {pyenv}")


def make_environment(name: str, folder: pathlib.Path, pin: bool) -> str:
    """The Python of the program's environment, with the pinned versions or with new ones."""
    python = folder / name / "bin" / "python"
    pins, stamp = HERE / "pins" / f"{name}.txt", folder / name / "pins.txt"
    if not pin and stamp.exists() and stamp.read_text() == pins.read_text():
        return str(python)
    if not python.exists():
        base = find_python(PROGRAMS[name]["python"])
        subprocess.run([base, "-m", "venv", str(folder / name)], check=True)
    wanted = PROGRAMS[name]["requirements"] if pin else ["-r", str(pins)]
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "-q", *wanted], check=True)
    if pin:
        frozen = subprocess.run([*pip, "freeze"], check=True, capture_output=True, text=True)
        pins.write_text(frozen.stdout)
    stamp.write_text(pins.read_text())
    return str(python)


def run_script(name: str, python: str) -> dict[str, Any]:
    """What the script printed; with an `error` if it failed."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": os.environ.get("HOME", ""),
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "OPENBLAS_NUM_THREADS": "1",
        # Simulated devices wait for each other. On few cores, they need more threads than cores.
        "NPROC": "32",
        "TQDM_DISABLE": "1",
        **PROGRAMS[name].get("environment", {}),
    }
    script = [python, str(HERE / f"train_{name}.py")]
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                script, capture_output=True, text=True, cwd=folder, env=environment, timeout=TIMEOUT
            )
        except subprocess.TimeoutExpired:
            return {"error": f"no result after {TIMEOUT} seconds"}
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    result = json.loads(lines[-1].removeprefix(MARK)) if lines else {}
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        errors = done.stderr.strip().splitlines() or ["failed without a message"]
        killed = done.returncode < 0
        result["error"] = f"ended by signal {-done.returncode}" if killed else errors[-1]
    return result


def rows_of(name: str, result: dict[str, Any]) -> dict[str, str]:
    """The program's row of each table."""
    program, date = PROGRAMS[name], datetime.date.today().isoformat()
    if "losses" not in result:
        error = result.get("error")
        why = f"does not run: {error}" if error else program["unserved"]
        return {
            "matrix": f"| {name} | - | - | {program['python']} | - | - | - | {date} |",
            "notes": f"| {name} | {why} | - | - |",
        }
    losses, versions = result["losses"], result["versions"]
    usual, soap = (f"{result[kind]}: {losses[result[kind]]:.4g}" for kind in ("usual", "soap"))
    failed = "**failed**, " if "error" in result else ""
    version, python = versions[result["package"]], result["python"]
    runs = "; ".join(f"{run}: {loss:.4g}" for run, loss in losses.items())
    return {
        "matrix": f"| {name} | {version} | {versions['jax']} | {python} | {usual} | "
        f"{failed}{soap} | {result['tolerance']:g} | {date} |",
        "notes": f"| {name} | {program['note']} | {result['checkpoint']} | {runs} |",
    }


def write_rows(table: str, rows: dict[str, str]) -> None:
    """Replaces rows of the page's table, and sorts all rows as in `programs.toml`."""
    before, head, rest = PAGE.read_text().partition(HEADS[table] + "\n")
    line, *lines = rest.split("\n")
    end = next(number for number, text in enumerate(lines) if not text.startswith("|"))
    old = {text.split("|")[1].strip(): text for text in lines[:end]}
    new = [{**old, **rows}[name] for name in PROGRAMS if name in old or name in rows]
    PAGE.write_text(before + head + "\n".join([line, *new, *lines[end:]]))


def main() -> int:
    parser = argparse.ArgumentParser(description="Trains in other people's programs.")
    parser.add_argument("names", nargs="*", help="programs; all if none is named")
    parser.add_argument("--environments", type=pathlib.Path, default=ROOT / "build" / "programs")
    parser.add_argument("--list", action="store_true", help="print the programs that have a script")
    parser.add_argument("--pin", action="store_true", help="pin the versions of today")
    parser.add_argument("--write", action="store_true", help=f"write the rows into {PAGE.name}")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(PROGRAMS):
        parser.error(f"no such program: {', '.join(sorted(unknown))}; one of {', '.join(PROGRAMS)}")
    if arguments.list:
        print(json.dumps([name for name in PROGRAMS if "unserved" not in PROGRAMS[name]]))
        return 0
    failed = []
    for table in HEADS.values():
        print(table)
    for name in arguments.names or PROGRAMS:
        result: dict[str, Any] = {}
        if "unserved" not in PROGRAMS[name]:
            python = make_environment(name, arguments.environments.resolve(), arguments.pin)
            result = run_script(name, python)
            failed += [name] * ("error" in result)
        rows = rows_of(name, result)
        print("\n".join(rows.values()), flush=True)
        if arguments.write:
            for table, row in rows.items():
                write_rows(table, {name: row})
    if failed:
        print(f"failed: {', '.join(failed)}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
