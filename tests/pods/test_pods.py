"""A state that is divided among eight simulated devices."""

import eight
import pytest
import sharded_state

pytestmark = pytest.mark.timeout(eight.LIMIT_IN_SECONDS + 60)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> eight.Results:
    return eight.results_of(sharded_state.__file__, tmp_path_factory.mktemp("sharded_state"))


@pytest.mark.parametrize("name", sharded_state.CHECKS)
def test_on_eight_devices(name: str, results: eight.Results) -> None:
    assert results[name] is None, results[name]
