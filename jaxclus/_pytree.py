"""Registration of frozen dataclasses as pytrees."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import jax

T = TypeVar("T")


def register(cls: type[T]) -> type[T]:
    """Registers a dataclass as a pytree; fields with `metadata={"static": True}` are no leaves.

    As `jax.tree_util.register_dataclass`, but JAX rebuilds objects without calling `__init__`: what
    it checks holds for values that users pass, not for the tracers, gradients, stacked arrays and
    placeholders that transformations put in their place.
    """
    fields = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
    static = [field.name for field in fields if field.metadata.get("static")]
    leaves = [field.name for field in fields if not field.metadata.get("static")]

    def flatten(value: T):
        children = [(jax.tree_util.GetAttrKey(name), getattr(value, name)) for name in leaves]
        return children, tuple(getattr(value, name) for name in static)

    def unflatten(constants: tuple[Any, ...], children: Any) -> T:
        value = object.__new__(cls)
        for names, values in ((leaves, children), (static, constants)):
            for name, child in zip(names, values, strict=True):
                object.__setattr__(value, name, child)
        return value

    jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
    return cls


def record(value: Any) -> dict[str, Any] | None:
    """The class and the static fields of a registered dataclass, as JSON has them; None of None."""
    if value is None:
        return None
    static = {field.name: getattr(value, field.name) for field in _static(type(value))}
    return {"class": type(value).__name__, **static}


def rebuild(cls: type[T], record: Mapping[str, Any], arrays: Mapping[str, Any]) -> T:
    """The dataclass of a `record`, read from JSON, and of the arrays of its other fields."""
    static = {field.name: record[field.name] for field in _static(cls)}
    lists = {name: tuple(value) for name, value in static.items() if isinstance(value, list)}
    return cls(**arrays, **static | lists)


def _static(cls: type) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(cls) if field.metadata.get("static")]
