"""64-bit arrays for a part of a test."""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def x64() -> Iterator[None]:
    """Enables 64-bit JAX arrays, and restores the setting afterwards."""
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)
