import jax
import pytest


@pytest.fixture(scope="module")
def small_programs():
    """For files whose time goes into compiling small programs that run once: not optimised."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
