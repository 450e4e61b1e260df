"""Pages with blocks that a program makes from the CSVs of its runs.

A block stands between `<!-- begin FIRST SECOND -->` and `<!-- end -->`. The two words say what it
shows.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "docs" / "images"
BLOCK = re.compile(r"(<!-- begin (\S+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


class Maker(NamedTuple):
    """What a program makes.

    Attributes:
      program: the name of its file.
      prefix: of the file names of pictures.
      pages: the pages to update.
      data: the folder of the CSVs.
      text_of: the text of a block, from its two words and the folder. Raises ValueError if no block
        has these words.
      figure_of: its picture, from the same, or None where it has none.
    """

    program: str
    prefix: str
    pages: Sequence[Path]
    data: Path
    text_of: Callable[[str, str, Path], str]
    figure_of: Callable[[str, str, Path], Figure | None]


def image_name(prefix: str, first: str, second: str) -> str:
    """The file name of a block's picture."""
    return f"{prefix}_{first}_{second}.png".replace("-", "_")


def values_of(records: Sequence[Any], column: str) -> str:
    """All values of a column of the CSV."""
    return ", ".join(sorted({record.values[column] for record in records}))


def circumstances(records: Sequence[Any], packages: Sequence[str]) -> str:
    """Where and when runs took place, and their versions of Python, packages and soap_optax."""
    days = sorted({record.values["date"] for record in records})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    cores = max(int(record.values["cores"]) for record in records)
    names = ("Python", *packages, "soap_optax")
    versions = ", ".join(f"{name} {values_of(records, name.lower())}" for name in names)
    return f"{values_of(records, 'device')}, {cores} cores; {when}; {versions}."


def page_of(text: str, data: Path, maker: Maker) -> str:
    """The page with all blocks made again."""

    def made(match: re.Match[str]) -> str:
        begin, first, second, end = match.groups()
        return f"{begin}\n{maker.text_of(first, second, data)}\n\n{end}"

    return BLOCK.sub(made, text)


def draw(text: str, data: Path, images: Path, maker: Maker) -> list[Path]:
    """Draws the pictures of a page's blocks."""
    drawn = []
    for _, first, second, _ in BLOCK.findall(text):
        if figure := maker.figure_of(first, second, data):
            path = images / image_name(maker.prefix, first, second)
            figure.savefig(path, dpi=110)
            drawn.append(path)
    return drawn


def main(arguments: Sequence[str] | None, description: str | None, maker: Maker) -> int:
    """Updates the pages, or only compares them; returns 1 if one was stale."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = " and ".join(str(page.relative_to(ROOT)) for page in maker.pages)
    parser.add_argument("--check", action="store_true", help="write nothing, compare the tables")
    parser.add_argument("--data", type=Path, default=maker.data, help="the folder of the CSVs")
    parser.add_argument("--page", type=Path, help=f"the page to update (default: {names})")
    parser.add_argument("--images", type=Path, default=IMAGES, help="the folder for pictures")
    settings = parser.parse_args(arguments)
    stale = 0
    for page in [settings.page] if settings.page else maker.pages:
        old = page.read_text(encoding="utf-8")
        new = page_of(old, settings.data, maker)
        if not settings.check:
            page.write_text(new, encoding="utf-8")
            for path in draw(new, settings.data, settings.images, maker):
                print(path)
        elif new != old:
            print(f"{page} is stale; run python tests/benchmarks/{maker.program}")
            stale = 1
    return stale
