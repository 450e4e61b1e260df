"""Scripts in other people's programs: those of the `tests` extra, and the table of all."""

import json
import os
import pathlib
import subprocess
import sys
import tomllib

import pytest

HERE = pathlib.Path(__file__).resolve().parent
PROGRAMS = tomllib.loads((HERE / "programs.toml").read_text())
# Installed with the `tests` extra. All others need an environment of their own.
INSTALLED = ("equinox", "haiku")


def run(*command: str) -> str:
    """Runs a script with this Python, without the settings of JAX's promotion."""
    environment = {name: value for name, value in os.environ.items() if "JAX_NUMPY" not in name}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(HERE.parents[1])}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment
    )
    assert not done.returncode, done.stderr
    return done.stdout


@pytest.mark.long
@pytest.mark.parametrize("name", INSTALLED)
def test_soap_is_no_worse_than_the_usual_optimizer(name: str) -> None:
    """The script raises otherwise."""
    assert "PROGRAM" in run(str(HERE / f"train_{name}.py"))


@pytest.mark.long
@pytest.mark.skipif("PROGRAMS" not in os.environ, reason="PROGRAMS has no names to install")
def test_programs_in_their_own_environments(tmp_path: pathlib.Path) -> None:
    """`PROGRAMS="numpyro flowjax" pytest --long tests/programs` installs and runs these."""
    names = os.environ["PROGRAMS"].split()
    run(str(HERE / "run.py"), *names, "--environments", str(tmp_path))


def test_every_program_has_a_script_with_pins_or_a_reason() -> None:
    scripts = {path.stem.removeprefix("train_") for path in HERE.glob("train_*.py")}
    served = {name for name, program in PROGRAMS.items() if "unserved" not in program}
    assert scripts == served
    assert {path.stem for path in (HERE / "pins").glob("*.txt")} == served
    assert set(json.loads(run(str(HERE / "run.py"), "--list"))) == served


def test_every_program_has_a_row_in_both_tables() -> None:
    page = (HERE.parents[1] / "docs" / "explanation" / "programs.md").read_text()
    for name in PROGRAMS:
        assert page.count(f"\n| {name} | ") == 2, name


@pytest.mark.parametrize("script", sorted(HERE.glob("train_*.py")), ids=lambda path: path.stem)
def test_a_script_has_at_most_sixty_lines_of_code(script: pathlib.Path) -> None:
    lines = [line for line in script.read_text().splitlines() if line.strip()]
    assert len(lines) <= 60
