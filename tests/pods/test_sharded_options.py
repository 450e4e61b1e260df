"""Divided updates with all options, on eight simulated devices."""

import eight
import pytest
import sharded_options

pytestmark = [pytest.mark.timeout(eight.LIMIT_IN_SECONDS + 60), pytest.mark.long]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> eight.Results:
    return eight.results_of(sharded_options.__file__, tmp_path_factory.mktemp("sharded_options"))


@pytest.mark.parametrize("name", sharded_options.CHECKS)
def test_options_on_eight_devices(name: str, results: eight.Results) -> None:
    assert results[name] is None, results[name]
