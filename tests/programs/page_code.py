"""Code of the documentation, for scripts that run it inside a program."""

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[2]


def fences(page: str, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    text = (ROOT / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def module_text(page: str, names: tuple[str, ...]) -> str:
    """The text of a module with functions of a page's Python blocks, and the page's imports."""
    blocks = fences(page, "python")
    found = {
        node.name: node
        for block in blocks
        for node in ast.parse(block).body
        if isinstance(node, ast.FunctionDef)
    }
    functions: list[ast.stmt] = [found[name] for name in names]
    first = (block for block in blocks if block.startswith(("import", "from")))
    statements = (statement for block in first for statement in ast.parse(block).body)
    imports = [node for node in statements if isinstance(node, ast.Import | ast.ImportFrom)]
    return ast.unparse(ast.Module(body=[*imports, *functions], type_ignores=[]))


def added_file(page: str, path: str) -> str:
    """The text of a file that a page's diff adds."""
    _, _, rest = "\n".join(fences(page, "diff")).partition(f"+++ b/{path}\n")
    lines = rest.partition("\n--- ")[0].splitlines()
    return "\n".join(line[1:] for line in lines if line.startswith("+"))
