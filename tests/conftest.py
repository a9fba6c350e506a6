import functools
import os

import jax
import pytest

# Directories and files whose time goes into compiling, but for files that run for long or compare
# with programs compiled elsewhere.
UNOPTIMISED = {"attacks", "cli", "clustr", "evaluation", "linear", "models", "prototypes"}
UNOPTIMISED |= {"test_objectives", "test_clustering_objectives", "test_kmeans", "test_compose"}
UNOPTIMISED |= {
    "test_clustr_experiment",
    "test_prototypes_experiment",
    "test_readme",
    "test_benchmarks",
    "test_train_step",
}
UNOPTIMISED |= {"test_fit", "test_experiments"}
LONG = {"test_conformance", "test_ops", "test_packing"}

# The suite's time goes into compiling thousands of small programs: half of it so.
FLAGS = ["--xla_backend_optimization_level=1"]
if jax.__version_info__ < (0, 11):  # in newer ones the emitters that are slow to compile stay
    FLAGS += ["--xla_cpu_use_fusion_emitters=false"]
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module", autouse=True)
def two_devices(request):
    """Where nobody names devices there are two: on few cores each of eight adds its own time."""
    from jaxclus import parallel

    mesh = parallel.mesh

    def small_mesh(devices=None):
        return mesh(jax.devices()[:2] if devices is None else devices)

    with pytest.MonkeyPatch.context() as patch:
        if request.path.stem != "test_parallel":
            patch.setattr(parallel, "mesh", small_mesh)
        yield


@pytest.fixture(scope="module")
def few_queries():
    """HopSkipJump in the adaptive suite with 3 of its 50 iterations, which take 25,000 queries."""
    from jaxclus.attacks import HopSkipJump
    from jaxclus.evaluation import _adaptive_plan

    short = functools.partial(HopSkipJump, steps=3)
    short.NORMS = HopSkipJump.NORMS
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_adaptive_plan, "HopSkipJump", short)
        yield


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Compiled programs of one file are of no use to the next, and take gigabytes together."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module", autouse=True)
def small_programs(request):
    """Without optimising, where nearly all time goes into compiling programs that run once."""
    small = request.path.parent.name in UNOPTIMISED or request.path.stem in UNOPTIMISED
    jax.config.update("jax_disable_most_optimizations", small and request.path.stem not in LONG)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
