"""Draws the diagrams of the documentation into docs/images.

python docs/diagrams/draw.py            write the files
python docs/diagrams/draw.py --check    write nothing; exit with 1 if a file would change
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from block import refresh, step
from canvas import Canvas
from package import gradient, wings
from shampoo import routes
from stack import sharding, stacks

IMAGES = Path(__file__).resolve().parents[1] / "images"
DRAWINGS: dict[str, Callable[[], Canvas]] = {
    "step.svg": step,
    "refresh.svg": refresh,
    "stacks.svg": stacks,
    "sharding.svg": sharding,
    "wings.svg": wings,
    "gradient.svg": gradient,
    "shampoo.svg": routes,
}


def main() -> int:
    """Writes or checks all drawings; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    check = parser.parse_args().check
    stale = []
    for name, draw in DRAWINGS.items():
        path, text = IMAGES / name, draw().svg()
        if not check:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
    if stale:
        print(f"not as drawn: {', '.join(stale)}; run python docs/diagrams/draw.py")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
