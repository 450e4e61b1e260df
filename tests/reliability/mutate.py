"""Changes single places of the library, and counts the changes that the tests detect.

    pip install ".[tests]" cosmic-ray
    python tests/reliability/mutate.py --sample 50

Cosmic Ray makes the mutants: a `+` becomes `-`, a `<` becomes `<=`, a condition is negated, a
number is changed by one. Each wing has a random sample of its mutants, always the same for the
same code. Each mutant is tested in a process of its own, with the short tests of its wing and with
those that compare whole trajectories with references.

It writes docs/data/reliability/mutants.csv. Mutants that are in the file are skipped, so that the
command can be interrupted; delete the rows of mutants to test them again.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

# OpenBLAS's threads and XLA's fight over the cores; OpenBLAS reads this when it is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Imported once: the processes of the mutants are forks of this one. Cosmic Ray is in no extra.
import cosmic_ray.plugins  # pyright: ignore[reportMissingImports]
import flax.linen
import flax.nnx  # noqa: F401
import jax  # noqa: F401
import optax.contrib  # noqa: F401
import pytest
from cosmic_ray.ast import ast_nodes, get_ast  # pyright: ignore[reportMissingImports]
from cosmic_ray.mutating import mutate_code  # pyright: ignore[reportMissingImports]
from tqdm import tqdm

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docs/data/reliability/mutants.csv"
FIELDS = ("wing", "module", "line", "operator", "before", "after", "outcome", "seconds")

# Not `*` to `<<` and the like, which raise at the first call.
OPERATORS = (
    "NumberReplacer",
    "AddNot",
    "ReplaceTrueWithFalse",
    "ReplaceFalseWithTrue",
    "ReplaceAndWithOr",
    "ReplaceOrWithAnd",
    "ZeroIterationForLoop",
    "RemoveDecorator",
    *("ReplaceUnaryOperator_Delete_USub", "ReplaceUnaryOperator_Delete_Not"),
    "ReplaceUnaryOperator_Delete_Invert",
    *("ReplaceBinaryOperator_Add_Sub", "ReplaceBinaryOperator_Sub_Add"),
    *("ReplaceBinaryOperator_Mul_Div", "ReplaceBinaryOperator_Div_Mul"),
    *("ReplaceBinaryOperator_FloorDiv_Div", "ReplaceBinaryOperator_Mod_FloorDiv"),
    *("ReplaceBinaryOperator_Pow_Mul", "ReplaceBinaryOperator_BitAnd_BitOr"),
    *("ReplaceComparisonOperator_Eq_NotEq", "ReplaceComparisonOperator_NotEq_Eq"),
    *("ReplaceComparisonOperator_Lt_LtE", "ReplaceComparisonOperator_LtE_Lt"),
    *("ReplaceComparisonOperator_Gt_GtE", "ReplaceComparisonOperator_GtE_Gt"),
    *("ReplaceComparisonOperator_Is_IsNot", "ReplaceComparisonOperator_IsNot_Is"),
)

# The tests of each wing, those that detect most first.
REFERENCES = (
    "tests/algorithm/test_step.py",
    "tests/algorithm/test_reference_agreement.py",
    "tests/algorithm/test_shampoo.py",
    "tests/algorithm/test_kl_factors.py",
)
ON_MESHES = ("tests/devices/test_sharded_state.py", "tests/devices/test_sharded_shampoo.py")
TESTS = {
    "algorithm": (*REFERENCES, "tests/algorithm", *ON_MESHES),
    "stacks": (*REFERENCES, "tests/stacks", "tests/optax/test_wrappers.py", *ON_MESHES),
    "blocks": (*REFERENCES, "tests/blocks", "tests/tools/test_describe.py"),
    "devices": ("tests/devices", "tests/optax/test_sharding.py"),
}
LIMIT_IN_SECONDS = 900  # Only a mutant that hangs reaches it.


class Mutant(NamedTuple):
    """A change of the library.

    Attributes:
      wing: the folder of the module.
      module: the path of the module.
      line: where the change is.
      operator: Cosmic Ray's name of the change.
      occurrence: the number of the place in the module, among those of the operator.
      before: the line without the change.
      after: the line with it.
    """

    wing: str
    module: str
    line: int
    operator: str
    occurrence: int
    before: str
    after: str

    @property
    def key(self) -> tuple[str, ...]:
        """What identifies the mutant, also if lines are added above it."""
        return self.module, self.operator, self.before, self.after


def mutants_of(wing: str) -> list[Mutant]:
    """All mutants of a wing. Equal changes of equal lines of a module count once."""
    found: dict[tuple[str, ...], Mutant] = {}
    for path in sorted((ROOT / "soap_optax" / wing).glob("*.py")):
        code = path.read_text()
        nodes = list(ast_nodes(get_ast(code)))
        for name in OPERATORS:
            operator = cosmic_ray.plugins.get_operator(f"core/{name}")()
            places = [place for node in nodes for place in operator.mutation_positions(node)]
            for occurrence, ((line, _), _) in enumerate(places):
                changed = mutate_code(code, operator, occurrence)
                assert changed is not None, (path, name, occurrence)
                lines = changed.splitlines()
                before, after = code.splitlines()[line - 1].strip(), lines[line - 1].strip()
                module = str(path.relative_to(ROOT))
                mutant = Mutant(wing, module, line, name, occurrence, before, after)
                found.setdefault(mutant.key, mutant)
    return list(found.values())


def sample_of(wing: str, size: int) -> list[Mutant]:
    """A random sample of a wing's mutants, part of every larger one."""
    mutants = mutants_of(wing)
    random.Random(0).shuffle(mutants)
    return mutants[:size]


# Tests --------------------------------------------------------------------------------------------


def passes(copy: Path, tests: Sequence[str]) -> bool:
    """Whether all tests pass in a copy of the project, in a fork of this process."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            os.setsid()
            with (copy / "output.txt").open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            os.chdir(copy)
            sys.path.insert(0, str(copy))
            code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests]))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)  # Without the cleanup of the parent.
    deadline = time.monotonic() + LIMIT_IN_SECONDS
    while time.monotonic() < deadline:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.05)
    os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return False


@contextlib.contextmanager
def copy_of_the_project() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / "project"
        ignore = shutil.ignore_patterns(".git", "__pycache__", "data", "_build", ".venv*")
        shutil.copytree(ROOT, copy, ignore=ignore)
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(directory) / "programs"))
        yield copy


def outcome_of(mutant: Mutant, copy: Path) -> str:
    """`killed` if a test fails, or `survived`."""
    module = copy / mutant.module
    original = module.read_text()
    operator = cosmic_ray.plugins.get_operator(f"core/{mutant.operator}")()
    module.write_text(mutate_code(original, operator, mutant.occurrence) or "")
    try:
        return "survived" if passes(copy, TESTS[mutant.wing]) else "killed"
    finally:
        module.write_text(original)


# Records ------------------------------------------------------------------------------------------


def read_rows() -> list[dict[str, str]]:
    return list(csv.DictReader(FILE.open(newline=""))) if FILE.exists() else []


def append(row: dict[str, object]) -> None:
    FILE.parent.mkdir(parents=True, exist_ok=True)
    with FILE.open("a", newline="") as file:
        writer: csv.DictWriter[str] = csv.DictWriter(file, FIELDS)
        if not file.tell():
            writer.writeheader()
        writer.writerow(row)


def table(rows: Sequence[dict[str, str]]) -> str:
    """The number of mutants by wing, and how many of them were killed."""
    lines = ["| wing | mutants | killed |", "| --- | --- | --- |"]
    for wing in TESTS:
        outcomes = [row["outcome"] for row in rows if row["wing"] == wing]
        lines.append(f"| {wing} | {len(outcomes)} | {outcomes.count('killed')} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sample", type=int, default=50, help="mutants of each wing")
    parser.add_argument("--wings", nargs="+", choices=TESTS, default=list(TESTS))
    args = parser.parse_args()
    if args.sample < 1:
        parser.error("--sample must be at least 1")

    done = {(row["module"], row["operator"], row["before"], row["after"]) for row in read_rows()}
    with copy_of_the_project() as copy:
        for wing in args.wings:
            todo = [mutant for mutant in sample_of(wing, args.sample) if mutant.key not in done]
            if todo and not passes(copy, TESTS[wing]):
                output = (copy / "output.txt").read_text()
                parser.error(f"the tests of {wing} fail without a mutant:\n{output[-2000:]}")
            for mutant in tqdm(todo, desc=wing, disable=None):
                started = time.monotonic()
                row: dict[str, object] = mutant._asdict()
                del row["occurrence"]
                row["outcome"] = outcome_of(mutant, copy)
                append(row | {"seconds": round(time.monotonic() - started)})
    print(table(read_rows()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
