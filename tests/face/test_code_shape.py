"""The shape of the code: short functions with few parameters, in short modules."""

import ast
import pathlib
from collections.abc import Iterator

import soap_optax

PACKAGE = pathlib.Path(soap_optax.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
# Users call these with keywords, and their bodies check arguments.
PUBLIC_CONSTRUCTORS = {"soap", "scale_by_soap", "shampoo", "scale_by_shampoo"}

MOST_PARAMETERS = 6
MOST_LINES_OF_A_BODY = 40
MOST_LINES_OF_A_MODULE = 300


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    """All functions of the package but the public constructors, also those inside others."""
    for module in MODULES:
        for node in ast.walk(ast.parse(module.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name not in PUBLIC_CONSTRUCTORS:
                yield f"{module.relative_to(PACKAGE)}:{node.lineno} {node.name}", node


def lines_of_body(function: ast.FunctionDef) -> int:
    """The lines after the signature and the docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body and body[-1].end_lineno else 0


def parameters(function: ast.FunctionDef) -> list[str]:
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return [argument.arg for argument in every if argument.arg not in ("self", "cls")]


def test_no_function_has_more_than_six_parameters() -> None:
    long = {name: parameters(function) for name, function in functions()}
    assert {name: them for name, them in long.items() if len(them) > MOST_PARAMETERS} == {}


def test_no_function_body_is_longer_than_forty_lines() -> None:
    long = {name: lines_of_body(function) for name, function in functions()}
    assert {name: lines for name, lines in long.items() if lines > MOST_LINES_OF_A_BODY} == {}


def test_no_module_is_longer_than_three_hundred_lines() -> None:
    lines = {str(module): len(module.read_text().splitlines()) for module in MODULES}
    assert {name: n for name, n in lines.items() if n > MOST_LINES_OF_A_MODULE} == {}
