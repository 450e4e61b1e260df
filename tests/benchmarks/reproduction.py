"""Makes the pictures and tables of docs/explanation/reproduction.md from the committed CSVs.

    python tests/benchmarks/reproduction.py            draw, and update the page
    python tests/benchmarks/reproduction.py --check    write nothing; exit with 1 if it is stale

The page has a block for each study of each preset, between `<!-- begin PRESET STUDY -->` and
`<!-- end -->`. README.md has one with a summary. The folder docs/data/PRESET has the CSVs that
examples/compare_optimizers.py writes with `--out docs/data`. A study without a complete run gets a
sentence that says so.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

sys.path.append(str(Path(__file__).parents[2] / "examples"))

from comparison.claims import claims, summary
from comparison.plans import STUDIES, plan_of
from comparison.presets import PRESETS, Preset
from comparison.records import Record, read_curves, read_records
from comparison.specs import Spec
from comparison.tables import TABLES, losses
from reproduction_plots import PICTURES

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "explanation" / "reproduction.md"
DATA = ROOT / "docs" / "data"
IMAGES = ROOT / "docs" / "images"
README = ROOT / "README.md"
WITHOUT_PICTURE = {"claims": claims, "summary": summary}
BLOCK = re.compile(r"(<!-- begin (\S+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
NOT_RUN = "This study has not been run with this preset yet."


def of_study(study: str, preset: Preset, records: dict[Spec, Record]) -> dict[Spec, Record]:
    """The complete runs of a study."""
    needed = plan_of([study], preset, losses(records)).needed
    return {spec: records[spec] for spec in needed if spec in records}


def circumstances(records: Sequence[Record]) -> str:
    """The number of runs, and where, when and with which versions they took place."""

    def values(name: str) -> str:
        return ", ".join(sorted({record.values[name] for record in records}))

    days = sorted({record.values["date"] for record in records})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    cores = max(int(record.values["cores"]) for record in records)
    versions = (("Python", "python"), ("JAX", "jax"), ("Optax", "optax"))
    return (
        f"{len(records)} runs, {sum(record.seconds for record in records) / 3600:.1f} hours of "
        f"training steps. {values('device')}, {cores} cores; {when}; "
        + ", ".join(f"{label} {values(name)}" for label, name in versions)
        + f", soap_optax {values('soap_optax')}."
    )


def block_of(preset_name: str, study: str, data: Path) -> str:
    """The text of one block."""
    preset = PRESETS[preset_name]
    records = read_records(data / preset_name)
    if study in WITHOUT_PICTURE:
        table = WITHOUT_PICTURE[study](preset, records)
        return table.markdown if table.rows else NOT_RUN
    own = of_study(study, preset, records)
    table = TABLES[study](preset, records)
    if not own or not table.rows:
        return NOT_RUN
    picture = f"![{PICTURES[study].caption}](../images/{image_name(preset_name, study)})"
    return "\n\n".join((picture, table.markdown, circumstances(list(own.values()))))


def image_name(preset_name: str, study: str) -> str:
    return f"reproduction_{preset_name}_{study.replace('-', '_')}.png"


def page_of(text: str, data: Path) -> str:
    """The page with all blocks made again."""

    def made(match: re.Match[str]) -> str:
        begin, preset_name, study, end = match.groups()
        if preset_name not in PRESETS or study not in (*WITHOUT_PICTURE, *STUDIES):
            raise ValueError(f"the page has a block for {preset_name} {study}")
        return f"{begin}\n{block_of(preset_name, study, data)}\n\n{end}"

    return BLOCK.sub(made, text)


def draw(text: str, data: Path, images: Path) -> list[Path]:
    """Draws the picture of every block that has runs."""
    drawn = []
    for _, preset_name, study, _ in BLOCK.findall(text):
        if study in WITHOUT_PICTURE or block_of(preset_name, study, data) == NOT_RUN:
            continue
        records = read_records(data / preset_name)
        figure = PICTURES[study].draw(
            PRESETS[preset_name], records, read_curves(data / preset_name)
        )
        path = images / image_name(preset_name, study)
        figure.savefig(path, dpi=110)
        drawn.append(path)
    return drawn


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing, compare the tables")
    parser.add_argument("--data", type=Path, default=DATA, help="the folder of the presets' CSVs")
    help_of_page = "the page to update (default: the page of the reproduction, and README.md)"
    parser.add_argument("--page", type=Path, help=help_of_page)
    parser.add_argument("--images", type=Path, default=IMAGES, help="the folder for pictures")
    settings = parser.parse_args(arguments)
    stale = 0
    for page in [settings.page] if settings.page else [PAGE, README]:
        old = page.read_text(encoding="utf-8")
        new = page_of(old, settings.data)
        if not settings.check:
            page.write_text(new, encoding="utf-8")
            for path in draw(new, settings.data, settings.images):
                print(path)
        elif new != old:
            print(f"{page} is stale; run python tests/benchmarks/reproduction.py")
            stale = 1
    return stale


if __name__ == "__main__":
    sys.exit(main())
