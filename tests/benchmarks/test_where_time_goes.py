"""The profile of a step puts every operation where it belongs; nothing here asserts a time."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import where_time_goes
from compiling import operands_of
from contenders import contenders_of
from shapes import MODELS

PROGRAM = Path(where_time_goes.__file__)


@pytest.mark.parametrize(
    ("path", "opcode", "target", "part"),
    [
        ("jit(update)/soap/4x3/refresh/cond/qr", "custom-call", "", "all else"),
        ("jit(f)/refresh/geqrf", "custom-call", "lapack_sgeqrf_ffi", "decompositions"),
        ("jit(f)/refresh/while/body/dot_general", "fusion", "", "products"),
    ],
)
def test_a_refresh_has_three_parts(path: str, opcode: str, target: str, part: str) -> None:
    assert where_time_goes.part_of(path, opcode, target) == f"refresh: {part}"


def test_every_part_of_a_step_is_found_in_the_compiled_program() -> None:
    model = MODELS["tiny"]
    (contender,) = contenders_of(model, [], {"soap": {}}).values()
    program = contender.update.lower(*operands_of(contender, model, 1)).compile()
    text = program.as_text()
    parts = where_time_goes.parts_by_name(text)
    assert set(parts.values()) == {
        "refresh: decompositions",
        "refresh: products",
        "refresh: all else",
        "step: products",
        "step: all else",
        "leaves to blocks and back, and what is around SOAP",
    }
    unread = [
        line
        for line in text.splitlines()
        if " = " in line and not where_time_goes.INSTRUCTION.match(line)
    ]
    assert not unread


def test_the_program_prints_a_table_of_both_kinds_of_step() -> None:
    command = [sys.executable, PROGRAM, "--models", "tiny", "--layers", "1", "--steps", "2"]
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": str(PROGRAM.parents[2]), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if "|" in line]
    header, _, *parts = rows
    assert header == ["part", "plain ms", "share", "refresh ms", "share"]
    by_part = {part: cells for part, *cells in parts}
    milliseconds = {
        part: (float(plain), float(refresh)) for part, (plain, _, refresh, _) in by_part.items()
    }
    # A plain step refreshes nothing: what is traced of it there is the question whether to.
    plain, refresh = milliseconds["refresh: products"]
    assert plain == 0
    assert refresh > 0
    assert f"JAX {jax.__version__}" in done.stdout
