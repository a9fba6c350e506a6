"""Changed copies of models. A copy shares no variable with the original: either can be trained."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from jaxclus.models._classifier import Classifier
from jaxclus.models._layers import Activation, Identity


def without_batch_norm(model: Classifier) -> Classifier:
    """A copy in which the identity stands for every BatchNorm: no statistics, scale or bias left.

    With `jc.linearize` it gives the linear sub-network of Bai et al. (2021), "Clustering Effect of
    (Linearized) Adversarial Robust Models", arXiv 2111.12922.

    Args:
        model: any `Classifier`; left as it is.

    Returns:
        The copy. Its `spec` is None, as no name stands for the changed network.
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
    """
    return _with_replaced(
        model, lambda module: isinstance(module, Activation), lambda: Activation(fn)
    )


def features(model: Classifier) -> jax.tree_util.Partial:
    """The network without its head: a pytree callable, images [b, h, w, c] -> embeddings [b, d].

    It is a copy of the model as it is now: later training does not change it.

    Args:
        model: any `Classifier`; left as it is.
    """
    return jax.tree_util.Partial(_features, nnx.clone(model))


def _features(model: Classifier, x: jax.Array) -> jax.Array:
    return model.features(x)


def _with_replaced(
    model: Classifier, matches: Callable[[Any], bool], make: Callable[[], nnx.Module]
) -> Classifier:
    copy = nnx.recursive_map(lambda _, node: make() if matches(node) else node, nnx.clone(model))
    copy.spec = None
    return copy
