"""Classifiers as the library takes them: any callable from images [b, h, w, c] to logits [b, k]."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxclus import _compile

Classifier = Callable[[jax.Array], jax.Array]


def is_pytree(model: Any) -> bool:
    """Whether the model's weights are visible: a pytree with array leaves and no other ones."""
    leaves = jax.tree.leaves(model)
    numbers = (jax.Array, np.ndarray, np.generic, int, float)
    return bool(leaves) and all(isinstance(leaf, numbers) for leaf in leaves)


def jit_over_model(
    fn: Callable[..., Any], static_argnames: Sequence[str] = ()
) -> Callable[[Classifier], Callable[..., Any]]:
    """`fn(model, ...)` compiled: call the result with a model, then with the other arguments.

    A pytree of arrays is an argument of the program, so that new weights reuse it. Any other
    callable is part of the program, which is traced anew for every binding: weights that a closure
    or a bound method hides can change between two calls, and old code would act on the old ones.
    """
    shared = _compile.jit(fn, static_argnames=static_argnames)

    def bind(model: Classifier) -> Callable[..., Any]:
        if is_pytree(model):
            return partial(shared, model)
        return _compile.jit(partial(fn, model), static_argnames=static_argnames)

    return bind


def _apply(model: Any, x: jax.Array) -> Any:
    return model(x)


#: `logits(model)(x)`: the model's logits [b, k], compiled.
logits = jit_over_model(_apply)


def num_classes(model: Classifier, x: jax.Array) -> int:
    """The number of classes k, from the shape of the logits; raises if they are not fit for use."""
    if not callable(model):
        raise TypeError(f"`model` must be a callable from images to logits, got {type(model)}")
    # Through `logits`, since eval_shape too keeps what it traced, under the callable's identity.
    out = jax.eval_shape(logits(model), jax.ShapeDtypeStruct(x.shape, x.dtype))
    if not hasattr(out, "shape") or len(out.shape) != 2 or out.shape[0] != x.shape[0]:
        shape = getattr(out, "shape", type(out))
        raise ValueError(
            f"`model` must map images {x.shape} to logits ({x.shape[0]}, k), got {shape}"
        )
    if not jnp.issubdtype(out.dtype, jnp.floating) or jnp.finfo(out.dtype).bits < 32:
        raise TypeError(f"`model` must return float32 logits (verdicts need them), got {out.dtype}")
    if out.shape[1] < 2:
        raise ValueError(f"`model` must return logits of at least 2 classes, got {out.shape}")
    return out.shape[1]
