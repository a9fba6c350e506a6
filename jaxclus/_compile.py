"""Compilation: `jax.jit` with the settings under which convolutions are fast on CPUs.

XLA's CPU backend hands convolutions to YNNPACK by default. In jaxlib 0.10 that runs those with 64
channels on one core, in 0.11 those of small images at a third of the speed of XLA's own (Eigen)
ones: PGD on a ResNet-18 takes 1.3 and 1.6 times as long (benchmarks/pgd.py). Other backends ignore
the setting.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxclus import _checks

_SETTINGS = {"xla_cpu_experimental_ynn_fusion_type": ""}


@functools.cache
def settings() -> dict[str, str]:
    """XLA's settings for an outermost `jax.jit(..., compiler_options=settings())`."""
    try:
        jax.jit(lambda: 0, compiler_options=_SETTINGS)()
    except jax.errors.JaxRuntimeError:  # this version of XLA has no such setting
        return {}
    return _SETTINGS


class jit:
    """`jax.jit(fn, **arguments)` under our settings; inside another program, under that one's.

    JAX takes settings for outermost programs only.
    """

    def __init__(self, fn: Callable[..., Any], **arguments: Any):
        functools.update_wrapper(self, fn)
        self._fn, self._arguments = fn, arguments
        self._inner = jax.jit(fn, **arguments)

    @functools.cached_property
    def outermost(self) -> Any:
        """The `jax.jit` with our settings."""
        return jax.jit(self._fn, compiler_options=settings(), **self._arguments)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self._inner if _inside((args, kwargs)) else self.outermost)(*args, **kwargs)


def _inside(arguments: Any) -> bool:
    """Whether JAX is tracing now, in which case new constants too are tracers, or transforming."""
    return not _checks.is_concrete(jnp.zeros(()), *jax.tree.leaves(arguments))
