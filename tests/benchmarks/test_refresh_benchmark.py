"""The benchmark of refresh methods reports correct numbers; nothing here asserts a time."""

import csv
from pathlib import Path

import pytest
import refresh_methods
from measure import FLOOR

pytestmark = pytest.mark.long


def test_every_method_is_timed_and_takes_bases_nearer_to_their_factors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--lengths", "32", "--blocks", "2", "--rounds", "2", "--out", str(tmp_path)]
    assert refresh_methods.main(arguments) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 32 | 2 |")]
    assert len(table) == len(refresh_methods.METHODS) + 1
    with (tmp_path / "methods.csv").open(newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert list(rows) == [FLOOR, *refresh_methods.METHODS]
    assert all(float(row["seconds"]) > 0 for row in rows.values())
    found = float(rows[FLOOR]["mass"])
    assert 0.01 < found < 1
    assert float(rows["eigh"]["mass"]) < 1e-5
    for method in ("qr", "cholesky_qr", "jacobi", "partial"):
        assert float(rows[method]["mass"]) < found
