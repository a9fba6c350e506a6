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
    if isinstance(value, (bool, np.bool_, complex, str, list, tuple, dict, type(None))):
        raise TypeError(f"`{name}` must be {allowed}, got {value!r}")
    if not isinstance(value, (int, float, np.generic, np.ndarray, jax.Array)):
        return None
    if isinstance(value, jax.core.Tracer):
        return None
    if np.shape(value):
        raise TypeError(f"`{name}` must be {allowed}, got an array of shape {np.shape(value)}")
    return float(value)


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


def within(name: str, value: float | int, low: float | int, high: float | int) -> None:
    """Raises unless `low <= value <= high`."""
    if not low <= value <= high:
        raise ValueError(f"`{name}` must be in [{low}, {high}], got {value!r}")


def one_of(name: str, value: Any, known: Iterable[str]) -> None:
    """Raises unless `value` is one of the `known` names."""
    known = sorted(known)
    if value not in known:
        raise ValueError(f"`{name}` must be one of {', '.join(known)}; got {value!r}")


def array(name: str, value: Any, allowed: str) -> Any:
    """The value itself; raises unless it is an array of numbers, of NumPy or JAX."""
    if not isinstance(value, (np.ndarray, np.generic, jax.Array)):
        raise TypeError(f"`{name}` must be an array of {allowed}, got {type(value)}")
    if not isinstance(value, jax.Array) and value.dtype.kind in "OSUMm":  # objects, text, times
        raise TypeError(f"`{name}` must be an array of {allowed}, got dtype {value.dtype}")
    return value


def images(name: str, value: Any) -> jax.Array:
    """The images as a float32 array [b, h, w, c] in [0, 1]; raises for anything else.

    NumPy's float64 becomes float32, as everywhere in JAX, unless x64 is switched on.
    """
    dtype = jnp.result_type(array(name, value, "float32 images in [0, 1]"))
    if dtype != jnp.float32:
        raise TypeError(
            f"`{name}` must be float32 images in [0, 1] "
            f"(uint8 pixels: divide by 255 first), got dtype {dtype}"
        )
    value = jnp.asarray(value)
    if value.ndim != 4:
        raise ValueError(f"`{name}` must have the shape [b, h, w, c], got {value.shape}")
    if not value.size:
        raise ValueError(f"`{name}` must hold at least one image, got the shape {value.shape}")
    if is_concrete(value):
        with jax.ensure_compile_time_eval():  # else, within jit, constants' extremes are tracers
            low, high = float(value.min()), float(value.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"`{name}` must be finite and in [0, 1], but holds NaN or infinity")
        if low < 0 or high > 1:
            raise ValueError(f"`{name}` must be in [0, 1], got values from {low:g} to {high:g}")
    return value


def vectors(name: str, value: Any, at_least: int = 1) -> jax.Array:
    """The finite floating-point vectors [n, d], `at_least` of them; raises for anything else."""
    try:
        value = jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"`{name}` must be an array [n, d], got {type(value)}") from error
    if value.ndim != 2 or len(value) < at_least or not value.shape[1]:
        raise ValueError(
            f"`{name}` must have the shape [n, d], n at least {at_least}, got {value.shape}"
        )
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(f"`{name}` must be floating point, got {value.dtype}")
    if is_concrete(value):
        with jax.ensure_compile_time_eval():  # else, within jit, of constants too a tracer
            finite = bool(jnp.isfinite(value).all())
        if not finite:
            raise ValueError(f"`{name}` must be finite, but holds NaN or infinity")
    return value


def embeddings(name: str, value: Any, like: jax.Array, whose: str) -> jax.Array:
    """The finite vectors [b, d] of the size that `like` [m, d] has; raises for anything else."""
    found = vectors(name, value)
    if found.shape[1] != like.shape[1]:
        raise ValueError(f"`{name}` must have the {whose}' size {like.shape[1]}, got {found.shape}")
    return found


def boxes(head: Any, h: Any, low: Any, high: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Embeddings and the ends of their boxes, as the head has them; raises unless low <= high."""
    h, low, high = head.checked(h), head.checked(low, "low"), head.checked(high, "high")
    if not h.shape == low.shape == high.shape:
        raise ValueError(
            f"`low` and `high` must have the embeddings' shape {h.shape}, "
            f"got {low.shape} and {high.shape}"
        )
    if is_concrete(low, high) and (low > high).any():
        raise ValueError("`low` must be at most `high`, but is above it in some entries")
    return h, low, high


def integers(name: str, value: Any, length: int, below: int = 2**31) -> jax.Array:
    """The value as an int32 array [length], each entry in [0, below); raises for anything else."""
    allowed = f"in [0, {below - 1}]"
    dtype = jnp.result_type(array(name, value, f"integers {allowed}"))
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"`{name}` must be integers {allowed}, got dtype {dtype}")
    if value.shape != (length,):
        raise ValueError(
            f"`{name}` must have the shape ({length},), one entry for each image, got {value.shape}"
        )
    if is_concrete(value) and value.size:
        with jax.ensure_compile_time_eval():
            low, high = int(value.min()), int(value.max())
        if low < 0 or high >= below:
            raise ValueError(f"`{name}` must be {allowed}, got values from {low} to {high}")
    return jnp.asarray(value, jnp.int32)


def typed_key(name: str, value: Any) -> jax.Array:
    """The typed PRNG key; raises for raw uint32 keys, arrays of keys and anything else."""
    if not (isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)):
        raise TypeError(f"`{name}` must be a typed key, as jax.random.key(0) makes, got {value!r}")
    if value.shape:
        raise ValueError(f"`{name}` must be one key, got an array of keys {value.shape}")
    return value
