"""Programs for eight devices are large: they compile without most optimizations, and are freed.

LLVM's optimizations come after the communication is decided. The examples compile as users do.
"""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def fast_compilation(unoptimized_programs: None) -> None:
    """Applies the fixture to all tests in this folder."""


@pytest.fixture(autouse=True)
def no_programs_from_test_to_test() -> Iterator[None]:
    yield
    jax.clear_caches()
