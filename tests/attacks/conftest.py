import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def small_programs(request):
    """Nearly all time here goes into compiling small programs that run once: without optimising."""
    plain = request.module.__name__ != "test_conformance"  # which runs the whole AutoAttack
    jax.config.update("jax_disable_most_optimizations", plain)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
