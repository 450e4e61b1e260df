"""What a divided update exchanges, read from its compiled program."""

import eight
import exchanges
import pytest

pytestmark = pytest.mark.timeout(eight.LIMIT_IN_SECONDS + 60)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> eight.Results:
    return eight.results_of(exchanges.__file__, tmp_path_factory.mktemp("exchanges"))


@pytest.mark.parametrize("name", exchanges.CHECKS)
def test_exchanges(name: str, results: eight.Results) -> None:
    assert results[name] is None, results[name]
