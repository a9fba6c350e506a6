import os

import jax
import pytest

# The suite's time goes into compiling thousands of small programs: half of it so.
FLAGS = ["--xla_backend_optimization_level=1"]
if jax.__version_info__ < (0, 11):  # in newer ones the emitters that are slow to compile stay
    FLAGS += ["--xla_cpu_use_fusion_emitters=false"]
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Compiled programs of one file are of no use to the next, and take gigabytes together."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def small_programs():
    """For files whose time goes into compiling small programs that run once: not optimised."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
