"""Variants of SOAP as a command line names them: `name:option=value,...`."""

import argparse
import ast
import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any

import soap_optax

COMMA_OUTSIDE_BRACKETS = re.compile(r",(?![^(]*\))")
THINNING = re.compile(r"thinning(\(.*\))")


@dataclasses.dataclass(frozen=True)
class Variant:
    """Arguments of `soap_optax.soap`.

    Attributes:
      name: the variant's name.
      options: the arguments.
      text: the arguments as written, in alphabetical order and without blanks.
    """

    name: str
    options: Mapping[str, Any]
    text: str


def read_variant(text: str, reserved: Collection[str]) -> Variant:
    """Reads a variant. A name alone means no options; a reserved name is an error."""
    name, _, rest = text.partition(":")
    parts = COMMA_OUTSIDE_BRACKETS.split(re.sub(r"\s", "", rest))
    pairs = sorted(part.partition("=") for part in parts if part)
    if not name or name in reserved or not all(equals for _, equals, _ in pairs):
        raise argparse.ArgumentTypeError(
            "must be name:option=value,... with a name other than "
            f"{', '.join(reserved)}, got {text!r}"
        )
    try:
        options = {option: value_of(value) for option, _, value in pairs}
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{error}, in {text!r}") from error
    return Variant(name, options, ",".join(map("".join, pairs)))


def value_of(text: str) -> Any:
    """A schedule for `thinning(dense,most)`, a Python literal, or otherwise the string itself."""
    if match := THINNING.fullmatch(text):
        arguments = literal(match[1])
        return soap_optax.thinning_frequency(
            *(arguments if isinstance(arguments, tuple) else (arguments,))
        )
    return literal(text)


def literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text
