"""The documentation: its Python prints the output on the page, and its links have targets."""

import contextlib
import dataclasses
import inspect
import io
import pathlib
import re
from collections.abc import Iterator

import pytest

import soap_optax

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = [
    page
    for page in (
        *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
        *sorted((ROOT / "docs").rglob("*.md")),
    )
    if page.exists() and "_build" not in page.parts
]
MOST_COLUMNS = 8
LONGEST_LINE_OF_CODE = 88


@dataclasses.dataclass(frozen=True)
class Fence:
    """A fenced block of a page."""

    language: str
    text: str
    line: int  # The number of its first line of text, from 1.


def fences(page: pathlib.Path) -> Iterator[Fence]:
    """The fenced blocks of a page, in order."""
    language, text, first = None, [], 0
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        if language is None and line.startswith("```"):
            language, text, first = line[3:].strip(), [], number + 1
        elif language is not None and line.rstrip() == "```":
            yield Fence(language, "\n".join(text), first)
            language = None
        elif language is not None:
            text.append(line)
    assert language is None, f"{page}: the fence above line {first} is not closed"


def prose(page: pathlib.Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: pathlib.Path) -> set[str]:
    """The anchors of the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def name(page: pathlib.Path) -> str:
    return page.relative_to(ROOT).as_posix()


PAGES_WITH_PYTHON = [page for page in PAGES if any(f.language == "python" for f in fences(page))]


def test_there_are_pages_with_python() -> None:
    assert ROOT / "docs" / "tutorial.md" in PAGES_WITH_PYTHON


# These pages train many models, or compile many programs.
LONG_PAGES = [
    f"docs/{page}.md"
    for page in (
        *("explanation/numerics", "explanation/planning", "explanation/shampoo", "how-to/chain"),
        *("how-to/choose-a-refresh", "how-to/diagnostics", "how-to/flax", "how-to/keep-norms"),
        *("how-to/keep-updates-in-bounds", "how-to/kl-factors", "how-to/levanter"),
        *("how-to/migrate", "how-to/pods", "how-to/shampoo", "how-to/tune", "how-to/wrap"),
    )
]


@pytest.mark.usefixtures("implicit_promotion")
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=name(page), marks=[pytest.mark.long] * (name(page) in LONG_PAGES))
        for page in PAGES_WITH_PYTHON
    ],
)
def test_the_python_of_a_page_runs_and_prints_the_text_below_it(page: pathlib.Path) -> None:
    """A `text` block has the output of the `python` block before it, line for line."""
    namespace = {"__name__": "__page__"}
    printed = None
    for fence in fences(page):
        if fence.language == "python":
            output = io.StringIO()
            # The empty lines give tracebacks the line numbers of the page.
            code = compile("\n" * (fence.line - 1) + fence.text, str(page), "exec")
            with contextlib.redirect_stdout(output):
                exec(code, namespace)
            printed = output.getvalue().rstrip("\n")
        elif fence.language == "text" and printed is not None:
            assert printed == fence.text, f"{name(page)}, line {fence.line}"
            printed = None


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_to_files_and_headings_exist(page: pathlib.Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):  # A link to another site.
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.is_relative_to(ROOT), f"{target} leads out of the project"
        assert linked.exists(), f"{target} is not there"
        if anchor:
            assert anchor in anchors(linked), f"{target} names no heading of {name(linked)}"


def listed_in(page: pathlib.Path) -> set[pathlib.Path]:
    """The pages in the table of contents of a page, and in their tables of contents."""
    listed: set[pathlib.Path] = set()
    for fence in fences(page):
        if fence.language == "{toctree}":
            for line in fence.text.splitlines():
                if line and not line.startswith(":"):
                    listed.update(page.parent.glob(f"{line}.md"))
    return listed.union(*map(listed_in, listed))


def test_every_page_is_in_a_table_of_contents() -> None:
    docs = ROOT / "docs"
    pages = {page for page in PAGES if docs in page.parents}
    assert pages - listed_in(docs / "index.md") == {docs / "index.md"}


# Layout.


def test_no_table_has_more_than_eight_columns() -> None:
    wide = {}
    for page in PAGES:
        rows = re.findall(r"^\|(.+)\|\s*$", prose(page), flags=re.MULTILINE)
        columns = max((len(re.split(r"(?<!\\)\|", row)) for row in rows), default=0)
        if columns > MOST_COLUMNS:
            wide[name(page)] = columns
    assert wide == {}


def test_no_line_of_code_needs_scrolling() -> None:
    long = [
        f"{name(page)}, line {number}"
        for page in PAGES
        for fence in fences(page)
        if fence.language in ("python", "bash")
        for number, line in enumerate(fence.text.splitlines(), fence.line)
        if len(line) > LONGEST_LINE_OF_CODE
    ]
    assert long == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_citation_has_the_version_of_the_package() -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.findall(r"^version: (.+)$", citation, re.M) == [soap_optax.__version__]


# The reference.


def test_the_option_table_names_every_argument_with_its_default() -> None:
    parameters = inspect.signature(soap_optax.soap).parameters
    expected = {
        argument: "required" if parameter.default is parameter.empty else f"`{parameter.default!r}`"
        for argument, parameter in parameters.items()
    }
    assert {argument: default for argument, default, _ in option_table()} == expected


def test_the_option_table_marks_exactly_the_static_arguments() -> None:
    static = tuple(argument for argument, _, kinds in option_table() if kinds == "static")
    assert static == soap_optax.STATIC_ARGS


def option_table() -> list[tuple[str, str, str]]:
    """The rows of the reference's option table: argument, default, kinds of values."""
    page = (ROOT / "docs" / "reference.md").read_text()
    section = page.partition("## Options\n")[2].partition("\n## ")[0]
    rows = [re.split(r"\s*\|\s*", row.strip("| ")) for row in re.findall(r"^\| `.*", section, re.M)]
    return [(row[0].strip("`"), row[1], row[3]) for row in rows]
