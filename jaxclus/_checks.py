"""Checks of public arguments: one line that names the argument, what is allowed and what came.

Values are checked on the host only: inside a transformation (tracers) shapes and dtypes still are.
"""

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np


def is_concrete(*values: Any) -> bool:
    """Whether the values can be read now, that is, none of them is a tracer."""
    return not any(isinstance(value, jax.core.Tracer) for value in values)


def _number(name: str, value: Any, allowed: str) -> float | None:
    """The value on the host, or None for tracers and the placeholders of pytree operations."""
    if isinstance(value, (bool, str, type(None))):
        raise TypeError(f"`{name}` must be {allowed}, got {value!r}")
    if not isinstance(value, (int, float, np.generic, np.ndarray, jax.Array)):
        return None
    return None if isinstance(value, jax.core.Tracer) else float(value)


def positive(name: str, value: Any) -> None:
    """Raises unless `value` is a finite number above 0."""
    number = _number(name, value, "a number above 0")
    if number is not None and not (math.isfinite(number) and number > 0):
        raise ValueError(f"`{name}` must be a finite number above 0, got {value!r}")


def not_negative(name: str, value: Any) -> None:
    """Raises unless `value` is a finite number of at least 0."""
    number = _number(name, value, "a number of at least 0")
    if number is not None and not (math.isfinite(number) and number >= 0):
        raise ValueError(f"`{name}` must be a finite number of at least 0, got {value!r}")


def at_least(name: str, value: Any, minimum: int) -> None:
    """Raises unless `value` is an integer of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"`{name}` must be an integer of at least {minimum}, got {value!r}")
    if value < minimum:
        raise ValueError(f"`{name}` must be at least {minimum}, got {value!r}")


def within(name: str, value: float, low: float, high: float) -> None:
    """Raises unless `low <= value <= high`."""
    if not low <= value <= high:
        raise ValueError(f"`{name}` must be in [{low}, {high}], got {value!r}")


def one_of(name: str, value: Any, known: Iterable[str]) -> None:
    """Raises unless `value` is one of the `known` names."""
    known = sorted(known)
    if value not in known:
        raise ValueError(f"`{name}` must be one of {', '.join(known)}; got {value!r}")


def images(name: str, value: Any) -> jax.Array:
    """The images as a float32 array [b, h, w, c] in [0, 1]; raises for anything else."""
    dtype = jnp.result_type(value)
    if dtype != jnp.float32:
        raise TypeError(
            f"`{name}` must be float32 images in [0, 1] "
            f"(uint8 pixels: divide by 255 first), got dtype {dtype}"
        )
    value = jnp.asarray(value)
    if value.ndim != 4:
        raise ValueError(f"`{name}` must have the shape [b, h, w, c], got {value.shape}")
    if is_concrete(value) and value.size:
        low, high = float(value.min()), float(value.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"`{name}` must be finite and in [0, 1], but holds NaN or infinity")
        if low < 0 or high > 1:
            raise ValueError(f"`{name}` must be in [0, 1], got values from {low:g} to {high:g}")
    return value


def integers(name: str, value: Any, length: int, below: int | None = None) -> jax.Array:
    """The value as an int32 array [length], each entry in [0, below); raises for anything else."""
    dtype = jnp.result_type(value)
    allowed = "at least 0" if below is None else f"in [0, {below - 1}]"
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"`{name}` must be integers {allowed}, got dtype {dtype}")
    value = jnp.asarray(value, jnp.int32)
    if value.shape != (length,):
        raise ValueError(
            f"`{name}` must have the shape ({length},), one entry for each image, got {value.shape}"
        )
    if is_concrete(value) and value.size:
        low, high = int(value.min()), int(value.max())
        if low < 0 or (below is not None and high >= below):
            raise ValueError(f"`{name}` must be {allowed}, got values from {low} to {high}")
    return value


def typed_key(name: str, value: Any) -> jax.Array:
    """The typed PRNG key; raises for raw uint32 keys and anything else."""
    if not (hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)):
        raise TypeError(f"`{name}` must be a typed key, as jax.random.key(0) makes, got {value!r}")
    return value
