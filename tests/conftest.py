"""What every test shares: one BLAS thread, one hypothesis profile, float64 on request."""

import os

# Before NumPy or JAX loads a BLAS: on matrices this small its threads cost more than they bring
# (a 256x256 QR has taken 500 ms with them and 2 ms without).
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from collections.abc import Iterator

import hypothesis
import jax
import pytest

hypothesis.settings.register_profile(
    "soap_optax",
    # The first example compiles and the others do not, so no deadline suits both.
    deadline=None,
    # The same examples on every run and every machine.
    derandomize=True,
    # A new tree is a new program to compile, a second or more each, so that there are few examples,
    # and one that fails is reported as it is: to shrink it would mean to compile hundreds.
    max_examples=10,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
    suppress_health_check=[
        # `x64` holds for the whole test, for every example alike, which is what it is for.
        hypothesis.HealthCheck.function_scoped_fixture,
        # Drawing arguments is quick; what counts as slow here is compiling.
        hypothesis.HealthCheck.too_slow,
    ],
)
hypothesis.settings.load_profile("soap_optax")


@pytest.fixture
def x64() -> Iterator[None]:
    """Enables 64-bit JAX arrays for one test and restores what was before."""
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)
