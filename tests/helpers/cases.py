"""Parameters of tests, most of them for the long suite only."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest

ParameterSet = type(pytest.param(None))


def mostly_long(cases: Iterable[Any], short: Collection[Any]) -> list[Any]:
    """Marks all cases as long, except the cases of the short suite.

    Args:
      cases: values, or parameter sets with an id.
      short: the values or ids of the cases of the short suite; each must be in `cases`.
    """
    parameters = [case if isinstance(case, ParameterSet) else pytest.param(case) for case in cases]
    names = [p.id if p.id is not None else p.values[0] for p in parameters]
    assert all(name in names for name in short), f"{short} must be among {names}"
    return [
        p if name in short else pytest.param(*p.values, id=p.id, marks=[*p.marks, pytest.mark.long])
        for p, name in zip(parameters, names, strict=True)
    ]


def named(cases: dict[str, Any]) -> list[Any]:
    """Parameter sets with their names as ids."""
    return [pytest.param(case, id=name) for name, case in cases.items()]
