"""Makes the pictures and tables of docs/explanation/reproduction.md from the committed CSVs.

    python tests/benchmarks/reproduction.py            draw, and update the page
    python tests/benchmarks/reproduction.py --check    write nothing; exit with 1 if it is stale

The page has a block for each study of each preset, between `<!-- begin PRESET STUDY -->` and
`<!-- end -->`. README.md has one with a summary. The folder docs/data/PRESET has the CSVs that
examples/compare_optimizers.py writes with `--out docs/data`. A study without a complete run gets a
sentence that says so.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

sys.path.append(str(Path(__file__).parents[2] / "examples"))

import page_blocks
from comparison.claims import claims, summary
from comparison.plans import STUDIES, plan_of
from comparison.presets import PRESETS, Preset
from comparison.records import Record, read_curves, read_records
from comparison.specs import Spec
from comparison.tables import TABLES, losses
from matplotlib.figure import Figure
from page_blocks import ROOT, Maker, circumstances, image_name
from reproduction_plots import PICTURES

PAGE = ROOT / "docs" / "explanation" / "reproduction.md"
DATA = ROOT / "docs" / "data"
README = ROOT / "README.md"
WITHOUT_PICTURE = {"claims": claims, "summary": summary}
NOT_RUN = "This study has not been run with this preset yet."


def of_study(study: str, preset: Preset, records: dict[Spec, Record]) -> dict[Spec, Record]:
    """The complete runs of a study."""
    needed = plan_of([study], preset, losses(records)).needed
    return {spec: records[spec] for spec in needed if spec in records}


def block_of(preset_name: str, study: str, data: Path) -> str:
    """The text of one block."""
    if preset_name not in PRESETS or study not in (*WITHOUT_PICTURE, *STUDIES):
        raise ValueError(f"no block shows {preset_name} {study}")
    preset = PRESETS[preset_name]
    records = read_records(data / preset_name)
    if study in WITHOUT_PICTURE:
        table = WITHOUT_PICTURE[study](preset, records)
        return table.markdown if table.rows else NOT_RUN
    own = of_study(study, preset, records)
    table = TABLES[study](preset, records)
    if not own or not table.rows:
        return NOT_RUN
    image = image_name("reproduction", preset_name, study)
    runs = list(own.values())
    where = (
        f"{len(runs)} runs, {sum(run.seconds for run in runs) / 3600:.1f} hours of training steps. "
        + circumstances(runs, ("JAX", "Optax"))
    )
    return "\n\n".join((f"![{PICTURES[study].caption}](../images/{image})", table.markdown, where))


def picture_of(preset_name: str, study: str, data: Path) -> Figure | None:
    """The picture of one block."""
    if study in WITHOUT_PICTURE or block_of(preset_name, study, data) == NOT_RUN:
        return None
    folder = data / preset_name
    records, curves = read_records(folder), read_curves(folder)
    return PICTURES[study].draw(PRESETS[preset_name], records, curves)


MAKER = Maker("reproduction.py", "reproduction", [PAGE, README], DATA, block_of, picture_of)


def main(arguments: Sequence[str] | None = None) -> int:
    return page_blocks.main(arguments, __doc__, MAKER)


if __name__ == "__main__":
    sys.exit(main())
