"""The profile of a step assigns every operation to its part; nothing here asserts a time."""

import os
import re
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


def program_of(model: str) -> str:
    """The text of the compiled update of one layer."""
    (contender,) = contenders_of(MODELS[model], [], {"soap": {}}).values()
    operands = operands_of(contender, MODELS[model], 1)
    return contender.update.lower(*operands).compile().as_text()


@pytest.mark.parametrize(
    ("path", "target", "is_product", "part"),
    [
        ("jit(update)/soap/4x3/refresh/cond/select_n", "", False, "refresh: all else"),
        ("jit(f)/refresh/geqrf", "lapack_sgeqrf_ffi", False, "refresh: decompositions"),
        ("jit(f)/refresh/while/body/dot_general", "", True, "refresh: products"),
        ("jit(f)/soap/4x3/step/dot_general", "", True, "step: products"),
        ("jit(f)/reshape", "", True, "step: products"),
        ("", "", True, "step: products"),
        ("jit(f)/soap/4x3/step/mul", "", False, "step: all else"),
    ],
)
def test_an_operation_belongs_where_it_was_written(
    path: str, target: str, is_product: bool, part: str
) -> None:
    assert where_time_goes.part_of(path, target, is_product) == part


@pytest.mark.long
def test_no_product_of_a_large_layer_is_missed() -> None:
    """At this size newer versions of XLA fuse products with later operations."""
    text = program_of("width_512")
    fusions = where_time_goes.computations_with_products(text)
    products = re.findall(r"%([\w.-]+) = [^\n]* dot\(", text)
    calls = re.findall(r"%([\w.-]+) = [^\n]*calls=%?([\w.-]+)", text)
    products += [name for name, called in calls if called in fusions]
    parts = where_time_goes.parts_by_name(text)
    assert {parts[name] for name in products} == {"step: products", "refresh: products"}


@pytest.mark.long
def test_every_part_of_a_step_is_found_in_the_compiled_program() -> None:
    text = program_of("tiny")
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


@pytest.mark.long
def test_the_program_prints_a_table_of_plain_and_refresh_steps() -> None:
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
    # A plain step refreshes nothing. It only checks whether a refresh is due.
    plain, refresh = milliseconds["refresh: products"]
    assert plain == 0
    assert refresh > 0
    assert f"JAX {jax.__version__}" in done.stdout
