"""Classifiers as the library takes them: any callable from images [b, h, w, c] to logits [b, k]."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxclus import _compile, compose
from jaxclus.threat import image_keys

#: images -> logits; a `jc.Stochastic` one, or a `jc.Chain` with one, takes a key before the images.
Classifier = Callable[..., jax.Array]

# The number under which an image's key is split for verdicts: none that attacks count up to.
_VERDICT = 2**31 - 1


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


def single_pass(model: Any, x: jax.Array) -> Any:
    """The model's logits [b, k], of one pass with a fixed key if it is stochastic."""
    return compose.with_keys(model, image_keys(jax.random.key(0), jnp.arange(x.shape[0])))(x)


#: `logits(model)(x)`: the model's logits [b, k], compiled; of one pass, if it is stochastic.
logits = jit_over_model(single_pass)


def verdict(model: Classifier, keys: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean logits [b, k] and the predicted class [b], by majority if the model is stochastic.

    Args:
        model: a classifier.
        keys: the images' typed keys [b].
        x: images [b, h, w, c].
    """
    if not compose.is_stochastic(model):
        z = model(x)
        return z, jnp.argmax(z, axis=-1)
    keys = compose.split(keys, _VERDICT)

    def one_pass(number: jax.Array) -> tuple[jax.Array, jax.Array]:
        z = compose.with_keys(model, compose.split(keys, number))(x)
        return z, jax.nn.one_hot(jnp.argmax(z, axis=-1), z.shape[-1])

    def add(carry: Any, number: jax.Array) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, carry, one_pass(number)), None

    count = compose.passes(model)
    sums, votes = jax.lax.scan(add, one_pass(jnp.array(0)), jnp.arange(1, count))[0]
    return sums / count, jnp.argmax(votes, axis=-1)


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
    # Logits that are float32 in the end alone come from `jc.models.create(..., dtype="bfloat16")`.
    computed = getattr(getattr(model, "spec", None), "dtype", "float32")
    if computed != "float32":
        raise TypeError(
            f"`model` must compute in float32 (verdicts need it), got one made in {computed}: to "
            f"train faster, give a float32 model TrainingConfig(precision={computed!r})"
        )
    if out.shape[1] < 2:
        raise ValueError(f"`model` must return logits of at least 2 classes, got {out.shape}")
    return out.shape[1]
