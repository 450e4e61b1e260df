"""SOAP on meshes of eight simulated devices, explicit and automatic, and Optax's tests for them."""

import eight
import eight_devices
import pytest

pytestmark = pytest.mark.timeout(eight.LIMIT_IN_SECONDS + 60)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> eight.Results:
    return eight.results_of(eight_devices.__file__, tmp_path_factory.mktemp("eight_devices"))


@pytest.mark.parametrize("name", eight_devices.CHECKS)
def test_on_eight_devices(name: str, results: eight.Results) -> None:
    assert results[name] is None, results[name]
