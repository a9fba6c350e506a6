"""Compilation: `jax.jit` with the settings under which convolutions are fast on CPUs.

XLA's CPU backend hands convolutions to YNNPACK by default. In jaxlib 0.10 that runs those with 64
output channels on one core only, and PGD on a ResNet-18 takes 1.45 times as long as with XLA's own
(Eigen) convolutions (benchmarks/pgd.py, the rows "jaxclus" and "jaxclus, jax.jit"). Other backends
ignore the setting.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxclus import _checks

_SETTINGS = {"xla_cpu_experimental_ynn_fusion_type": ""}
_QUICKLY = {"xla_backend_optimization_level": "1"}


@functools.cache
def settings(quickly: bool = False) -> dict[str, str]:
    """XLA's settings for an outermost `jax.jit(..., compiler_options=settings())`.

    Args:
        quickly: whether to compile fast rather than for speed, on CPUs.
    """
    chosen = _SETTINGS | (_QUICKLY if quickly and jax.default_backend() == "cpu" else {})
    return {name: value for name, value in chosen.items() if _known(name, value)}


def _known(name: str, value: str) -> bool:
    """Whether this version of XLA has the setting."""
    try:
        jax.jit(lambda: 0, compiler_options={name: value})()
    except jax.errors.JaxRuntimeError:
        return False
    return True


class jit:
    """`jax.jit(fn, **arguments)`, with the settings under which convolutions are fast on CPUs.

    What the library compiles itself goes through it; it is for programs of your own around
    `attack.perturb` or a model. Inside another program, that program's settings hold: JAX takes
    settings for outermost programs only.

    Args:
        fn: a function of pytrees of arrays.
        quickly: whether to compile fast rather than for speed, on CPUs.
        **arguments: those of `jax.jit`, but for `compiler_options`.
    """

    def __init__(self, fn: Callable[..., Any], *, quickly: bool = False, **arguments: Any):
        functools.update_wrapper(self, fn)
        self._fn, self._quickly, self._arguments = fn, quickly, arguments
        self._inner = jax.jit(fn, **arguments)

    @functools.cached_property
    def outermost(self) -> Any:
        """The `jax.jit` with our settings."""
        return jax.jit(self._fn, compiler_options=settings(self._quickly), **self._arguments)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _inside((args, kwargs)):
            return self._inner(*args, **kwargs)
        try:
            return self.outermost(*args, **kwargs)
        except ValueError as error:
            # A gradient is being taken with respect to something that `fn` closes over.
            if "top-level `jax.jit`" not in str(error):
                raise
            return self._inner(*args, **kwargs)


def _inside(arguments: Any) -> bool:
    """Whether JAX is tracing now, in which case new constants too are tracers, or transforming."""
    return not _checks.is_concrete(jnp.zeros(()), *jax.tree.leaves(arguments))
