"""The option `--long`, eight devices, small caches and two Hypothesis profiles for all tests."""

import os

# Set before NumPy or JAX loads a BLAS. On matrices this small, its threads cost more than they
# save: a 256x256 QR took 500 ms with them and 2 ms without.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import functools
import gc
import pathlib
import resource
import sys
import tempfile
from collections.abc import Iterator
from typing import Any
from unittest import mock

import hypothesis
import jax
import pytest
from helpers import precision

DEVICES = 8


def start_jax() -> None:
    """Starts JAX with eight simulated CPU devices, which meshes in the tests use.

    A test without a mesh runs on the first device, as it would on a machine with one CPU device.
    """
    environment = {
        # A device that waits in a collective holds a thread of XLA's pool, which has one thread for
        # each device by default. JAX 0.8 deadlocked when other work needed one more thread.
        "NPROC": "32",
        # Devices give up waiting for each other after 40 seconds. A busy machine can need longer.
        "XLA_FLAGS": (
            os.environ.get("XLA_FLAGS", "")
            + " --xla_cpu_collective_call_terminate_timeout_seconds=500"
        ),
    }
    jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))
    jax.config.update("jax_num_cpu_devices", DEVICES)
    # Run one program at a time. Otherwise the devices that wait for each other in one program can
    # hold all threads that another program needs.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    # Processes that tests start do not inherit these variables.
    with mock.patch.dict(os.environ, environment):
        assert jax.device_count() == DEVICES


def is_set(variable: str) -> bool:
    """Whether an environment variable switches something on, as JAX reads it."""
    return os.environ[variable].lower() in ("y", "yes", "t", "true", "on", "1")


def compile_fast() -> None:
    """Makes XLA compile programs for CPUs faster, and these run slower.

    Compiling takes most of the time of the tests: twice as long with XLA's new emitters of fused
    loops, and half as long again with LLVM's optimizations. Tests with `optimized_programs` have
    the latter. JAX 0.12 ignores the option of the former.

    Environment variables reach the processes that tests start.
    """
    os.environ["XLA_FLAGS"] = (
        "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters "
        + os.environ.get("XLA_FLAGS", "")
    )
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    jax.config.update("jax_disable_most_optimizations", is_set("JAX_DISABLE_MOST_OPTIMIZATIONS"))


def share_compiled_programs(config: pytest.Config) -> None:
    """Lets all processes of a run share compiled programs, in a directory that ends with the run.

    This saves a fifth of the time. Set `JAX_COMPILATION_CACHE_DIR` to keep the programs for later
    runs, which then take about half as long.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        directory = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        config.add_cleanup(directory.cleanup)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = directory.name
    for name, value in {
        "jax_compilation_cache_dir": os.environ["JAX_COMPILATION_CACHE_DIR"],
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,  # Any size.
    }.items():
        os.environ[name.upper()] = str(value)
        jax.config.update(name, value)


def pytest_configure(config: pytest.Config) -> None:
    hypothesis.settings.load_profile("long" if runs_long_tests(config) else "short")
    compile_fast()
    share_compiled_programs(config)
    if not config.getoption("numprocesses", None):  # Not in the process that distributes tests.
        start_jax()


for _profile, _examples in (("short", 2), ("long", 10)):
    hypothesis.settings.register_profile(
        _profile,
        # The first example compiles and the others do not, so no deadline suits both.
        deadline=None,
        # The same examples on every run and every machine.
        derandomize=True,
        # Each example compiles a new program, which takes a second or more. There are therefore few
        # examples. Failing examples are not shrunk: that would compile hundreds of programs. Tests
        # that compile nothing ask for more examples.
        max_examples=_examples,
        phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
        suppress_health_check=[
            # The fixture `x64` is meant to hold for all examples of a test.
            hypothesis.HealthCheck.function_scoped_fixture,
            # Compiling is slow here, not drawing arguments.
            hypothesis.HealthCheck.too_slow,
        ],
    )


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A directory of compiled programs for the processes of one test file.

    Kept programs are not for them: a process that is killed while it writes one leaves it damaged.
    """
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def optimized_programs() -> Iterator[None]:
    """Compiles the programs of a test with LLVM's optimizations, as users do."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def implicit_promotion() -> Iterator[None]:
    """Lets Optax, Flax and the code of pages promote dtypes and ranks implicitly.

    The suite also runs with `JAX_NUMPY_DTYPE_PROMOTION=strict` or `JAX_NUMPY_RANK_PROMOTION=raise`.
    """
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def x64() -> Iterator[None]:
    """Enables 64-bit JAX arrays for one test."""
    with precision.x64():
        yield


# The option `--long` ------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="also run the tests marked long")


def runs_long_tests(config: pytest.Config) -> bool:
    """Whether the command line asks for long tests, with `--long` or with `-m long`."""
    return config.getoption("--long") or str(config.getoption("-m")).strip() == "long"


def pytest_report_header(config: pytest.Config) -> str:
    return "long tests: " + ("run" if runs_long_tests(config) else "deselected (--long runs them)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if runs_long_tests(config):
        return
    long = [item for item in items if item.get_closest_marker("long")]
    config.hook.pytest_deselected(items=long)
    items[:] = [item for item in items if not item.get_closest_marker("long")]


# Memory -------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True, scope="module")
def empty_caches(request: pytest.FixtureRequest) -> Iterator[None]:
    """Frees the compiled programs of a test file after its last test, if memory needs it.

    Clearing JAX's caches takes half a second, and the next file traces all operations again.
    """
    yield
    for value in vars(request.module).values():
        if isinstance(value, functools._lru_cache_wrapper):  # Functions under `functools.cache`.
            value.cache_clear()
    if resident_memory() > MEMORY_TO_CLEAR:
        jax.clear_caches()
        gc.collect()


MEMORY_TO_CLEAR = 1.0  # In GB; a worker may hold 2.


def resident_memory() -> float:
    """The memory that this process holds in GB; on systems without procfs the peak so far."""
    try:
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak_memory()
    return pages * resource.getpagesize() / 1e9


PEAKS: dict[str, float] = {}  # Peak resident memory in GB, by the name of the process.


def peak_memory() -> float:
    """The most memory that this process has held so far, in GB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    worker_output = getattr(session.config, "workeroutput", None)
    if worker_output is not None:  # A worker of pytest-xdist.
        worker_output["peak_memory"] = peak_memory()
    else:
        PEAKS["main"] = peak_memory()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Receives the measurement of a pytest-xdist worker."""
    output = getattr(node, "workeroutput", {})
    if "peak_memory" in output:
        PEAKS[node.gateway.id] = output["peak_memory"]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    peaks = ", ".join(f"{name} {peak:.2f} GB" for name, peak in sorted(PEAKS.items()))
    terminalreporter.write_line(f"peak resident memory: {peaks}")
