"""Changed copies of models. A copy shares no variable with the original: either can be trained."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from jaxclus import _checks
from jaxclus.compose import Chain
from jaxclus.models._classifier import Classifier, checked
from jaxclus.models._layers import Activation, Identity, Linear


def without_batch_norm(model: Classifier) -> Classifier:
    """A copy in which the identity stands for every BatchNorm: no statistics, scale or bias left.

    With `jc.linearize` it gives the linear sub-network of Bai et al. (2021), "Clustering Effect of
    (Linearized) Adversarial Robust Models", arXiv 2111.12922.

    Args:
        model: any `Classifier`; left as it is.

    Returns:
        The copy. Its `spec` is None, as no name stands for the changed network.

    Raises:
        TypeError: the model is no `Classifier`.
    """
    return _with_replaced(model, lambda module: isinstance(module, nnx.BatchNorm), Identity)


def replace_activation(model: Classifier, fn: Callable[[jax.Array], jax.Array]) -> Classifier:
    """A copy in which `fn` stands for every activation.

    Args:
        model: any `Classifier`; left as it is.
        fn: array -> array of the same shape, elementwise. Pass the same object each time: a new
            lambda is a new function to the compiler.

    Returns:
        The copy. Its `spec` is None, as no name stands for the changed network.

    Raises:
        TypeError: the model is no `Classifier`.
    """
    return _with_replaced(
        model, lambda module: isinstance(module, Activation), lambda: Activation(fn)
    )


def with_new_head(model: Classifier, num_classes: int, key: jax.Array) -> Classifier:
    """A copy with a fresh head for other classes, to go on training from the features of `model`.

    Args:
        model: any `Classifier`; left as it is.
        num_classes: k, the number of logits, at least 1.
        key: typed PRNG key; the same key gives the same head.

    Returns:
        The copy, images [b, h, w, c] -> logits [b, k]. Its `spec` is the model's with k classes, so
        that it can be exported and loaded; None where the model has none.

    Raises:
        TypeError, ValueError: an argument is anything else.

    With it Bai et al. (2021), arXiv 2111.12922, transfer from subclasses to superclasses.
    """
    _checks.at_least("num_classes", num_classes, 1)
    rngs = nnx.Rngs(_checks.typed_key("key", key))
    copy, old = nnx.clone(checked("model", model)), model.head
    dtype: Any = old.dtype  # never None, which nnx allows for
    copy.head = Linear(old.in_features, num_classes, dtype=dtype, rngs=rngs)
    if copy.spec is not None:
        copy.spec = dataclasses.replace(copy.spec, num_classes=int(num_classes))
    return copy


def features(model: Classifier) -> jax.tree_util.Partial:
    """The network without its head: a pytree callable, images [b, h, w, c] -> embeddings [b, d].

    It is a copy of the model as it is now: later training does not change it.

    Args:
        model: any `Classifier`; left as it is.
    """
    return jax.tree_util.Partial(_features, nnx.clone(model))


def parts(model: Callable[..., Any]) -> tuple[Classifier, Callable[..., Any] | None]:
    """The network of a model, and what classifies its embeddings where that is not its own head.

    Args:
        model: a `Classifier`, or `jc.Chain(jc.models.features(network), head)`.

    Returns:
        The network, and the head [b, d] -> [b, k]; None for the network's own.

    Raises:
        TypeError: if the model is anything else.
    """
    if isinstance(model, Classifier):
        return model, None
    if isinstance(model, Chain) and len(model.parts) == 2:
        embed, head = model.parts
        if isinstance(embed, jax.tree_util.Partial) and embed.func is _features:
            return embed.args[0], head
    raise TypeError(
        "`model` must be a network of jc.models or jc.Chain(jc.models.features(network), head), "
        f"got {type(model)}"
    )


def _features(model: Classifier, x: jax.Array) -> jax.Array:
    return model.features(x)


def _with_replaced(
    model: Classifier, matches: Callable[[Any], bool], make: Callable[[], nnx.Module]
) -> Classifier:
    copy = nnx.clone(checked("model", model))
    copy = nnx.recursive_map(lambda _, node: make() if matches(node) else node, copy)
    copy.spec = None
    return copy
