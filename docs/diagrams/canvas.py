"""A small kit for drawing diagrams as SVG text: boxes, labels, arrows, in light and in dark colors.

Every drawing has a background, so that it stays readable if the theme of a page and the system of
the reader disagree. Fonts differ between readers: leave room around labels.
"""

import re
from collections.abc import Sequence
from xml.sax.saxutils import escape

# Fill and stroke of each style, light and dark.
STYLES = {
    "page": ("#ffffff", "#d0d5dd", "#1b1e23", "#3a3f47"),
    "lane": ("#f6f7f9", "#e4e7ec", "#22262c", "#333941"),
    "grey": ("#eef1f5", "#64748b", "#2f353e", "#94a3b8"),
    "blue": ("#dbeafe", "#2563eb", "#1e3a5f", "#60a5fa"),
    "green": ("#dcfce7", "#15803d", "#16402a", "#4ade80"),
    "orange": ("#ffedd5", "#c2410c", "#4a2c12", "#fb923c"),
    "purple": ("#ede9fe", "#6d28d9", "#392a5e", "#a78bfa"),
    "red": ("#fee2e2", "#b91c1c", "#4c1d1d", "#f87171"),
}
INK = {"label": ("#16181d", "#e6e8eb"), "muted": ("#5b6370", "#a3abb6")}
MARKUP = re.compile(
    r"\*(?P<italic>[^*]+)\*|`(?P<code>[^`]+)`|_\{(?P<sub>[^}]+)\}|\^\{(?P<sup>[^}]+)\}"
)
Point = tuple[float, float]


class Canvas:
    """A drawing that grows element by element; `svg` gives its text."""

    def __init__(self, width: int, height: int, title: str, description: str) -> None:
        self.size = width, height
        self.names = title, description
        self.elements: list[str] = []
        self.rectangle(1, 1, width - 2, height - 2, "page", radius=10)

    def rectangle(
        self, x: float, y: float, width: float, height: float, style: str, radius: float = 6
    ) -> None:
        """Draws a rectangle; a style of two words, such as "blue dashed", dashes its outline."""
        self.elements.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" '
            f'class="{style}"/>'
        )

    def text(
        self,
        x: float,
        y: float,
        text: str,
        style: str = "label",
        size: int = 15,
        anchor: str = "middle",
    ) -> None:
        """Writes a line, baseline at `y`: *italic*, `code`, _{subscript}, ^{superscript}."""
        self.elements.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" '
            f'class="{style}">{_spans(text, size)}</text>'
        )

    def box(
        self, x: float, y: float, width: float, height: float, style: str, lines: Sequence[str]
    ) -> None:
        """Draws a rectangle with lines in its middle; the first line is bold."""
        self.rectangle(x, y, width, height, style)
        first = y + height / 2 - 10.5 * (len(lines) - 1) + 5
        for number, line in enumerate(lines):
            emphasis = "label bold" if number == 0 and len(lines) > 1 else "label"
            self.text(
                x + width / 2, first + 21 * number, line, emphasis, size=15 if number == 0 else 14
            )

    def line(self, *points: Point, style: str = "plain") -> None:
        """Draws straight lines from point to point, in the color of a style."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.elements.append(f'<polyline points="{path}" class="line {style}"/>')

    def arrow(self, *points: Point, style: str = "plain") -> None:
        """Draws straight lines from point to point, with a head at the last one."""
        self.line(*points, style=style)
        self.elements[-1] = self.elements[-1].replace("/>", ' marker-end="url(#head)"/>')

    def svg(self) -> str:
        """The drawing as the text of an SVG file."""
        (width, height), (title, description) = self.size, self.names
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
                f'width="{width}" height="{height}" font-family="sans-serif" role="img">',
                f"<title>{escape(title)}</title>",
                f"<desc>{escape(description)}</desc>",
                f"<style>\n{_stylesheet()}</style>",
                '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" '
                'markerHeight="7" orient="auto"><path d="M0,0 L10,5 L0,10 z" class="head"/>'
                "</marker></defs>",
                *self.elements,
                "</svg>\n",
            ]
        )


def _spans(text: str, size: int) -> str:
    """Markup as `tspan` elements; a superscript is set above the subscript before it."""
    spans, position, shift, width_before = [], 0, 0.0, 0.0

    def add(content: str, attributes: str = "", to: float = 0.0, back: float = 0.0) -> None:
        nonlocal shift
        moves = f' dy="{to - shift:g}"' if to != shift else ""
        moves += f' dx="{-back:g}"' if back else ""
        spans.append(f"<tspan{attributes}{moves}>{escape(content)}</tspan>")
        shift = to

    for match in MARKUP.finditer(text):
        if match.start() > position:
            add(text[position : match.start()])
            width_before = 0.0
        kind, content = str(match.lastgroup), match[str(match.lastgroup)]
        small = f' font-size="{round(0.72 * size)}"'
        if kind == "sub":
            add(content, small, to=0.3 * size)
            width_before = 0.45 * size * len(content)
        elif kind == "sup":
            add(content, small, to=-0.4 * size, back=width_before)
        elif kind == "italic":
            add(content, ' font-style="italic"')
        else:
            add(content, f' font-family="monospace" font-size="{size - 1}"')
        width_before = width_before if kind == "sub" else 0.0
        position = match.end()
    if position < len(text):
        add(text[position:])
    return "".join(spans)


def _stylesheet() -> str:
    light = [
        *(
            f".{name} {{ fill: {fill}; stroke: {stroke}; }}"
            for name, (fill, stroke, *_) in STYLES.items()
        ),
        *(f".{name} {{ fill: {color}; }}" for name, (color, _) in INK.items()),
        ".line { fill: none; stroke-width: 1.6; }",
        f".plain {{ stroke: {INK['muted'][0]}; }}",
        f".head {{ fill: {INK['muted'][0]}; }}",
        ".bold { font-weight: bold; }",
        ".dashed { stroke-dasharray: 5 4; }",
        ".thin { stroke-width: 1; }",
    ]
    dark = [
        *(
            f".{name} {{ fill: {fill}; stroke: {stroke}; }}"
            for name, (*_, fill, stroke) in STYLES.items()
        ),
        *(f".{name} {{ fill: {color}; }}" for name, (_, color) in INK.items()),
        ".line { fill: none; }",
        f".plain {{ stroke: {INK['muted'][1]}; }}",
        f".head {{ fill: {INK['muted'][1]}; }}",
    ]
    inside = "".join(f"  {rule}\n" for rule in dark)
    return (
        "".join(f"{rule}\n" for rule in light)
        + f"@media (prefers-color-scheme: dark) {{\n{inside}}}\n"
    )
