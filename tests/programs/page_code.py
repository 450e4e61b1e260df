"""Code of the documentation, for scripts that run it inside a program."""

import ast
import pathlib
import re
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]


def fences(page: str, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    text = (ROOT / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def functions_of(page: str, names: tuple[str, ...]) -> list[ast.stmt]:
    """Functions of a page's Python blocks."""
    found = {
        node.name: node
        for block in fences(page, "python")
        for node in ast.parse(block).body
        if isinstance(node, ast.FunctionDef)
    }
    return [found[name] for name in names]


def run_functions(page: str, names: tuple[str, ...], namespace: dict[str, Any]) -> None:
    """Defines functions of a page's Python blocks in a namespace, which has all that they use."""
    module = ast.Module(body=functions_of(page, names), type_ignores=[])
    exec(compile(module, page, "exec"), namespace)


def module_text(page: str, names: tuple[str, ...]) -> str:
    """The text of a module with functions of a page, and with the page's imports."""
    blocks = (block for block in fences(page, "python") if block.startswith(("import", "from")))
    statements = (statement for block in blocks for statement in ast.parse(block).body)
    imports = [node for node in statements if isinstance(node, ast.Import | ast.ImportFrom)]
    return ast.unparse(ast.Module(body=[*imports, *functions_of(page, names)], type_ignores=[]))


def added_file(page: str, path: str) -> str:
    """The text of a file that a page's diff adds."""
    _, _, rest = "\n".join(fences(page, "diff")).partition(f"+++ b/{path}\n")
    lines = rest.partition("\n--- ")[0].splitlines()
    return "\n".join(line[1:] for line in lines if line.startswith("+"))
