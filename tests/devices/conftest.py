"""Programs for eight devices are large, so each test frees its own."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def no_programs_from_test_to_test() -> Iterator[None]:
    yield
    jax.clear_caches()
