"""What `adaptive_suite` is given: the parts of its model, and checks before any attack."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from jaxclus import _checks, _classifier, compose
from jaxclus._classifier import Classifier
from jaxclus._jaxpr import constants
from jaxclus.attacks.adaptive import divided
from jaxclus.clustr import ClusterClassifier
from jaxclus.compose import Chain
from jaxclus.data import Dataset, to_float
from jaxclus.data._dataset import digest
from jaxclus.evaluation._adaptive_plan import ATTACKS, centres
from jaxclus.evaluation._progress import hash_of
from jaxclus.evaluation._robustness import _check as _check_data
from jaxclus.losses import Loss
from jaxclus.prototypes import PrototypeHead
from jaxclus.threat import Threat

#: What `adaptive_suite` can run, in its order.
ITEMS = (*ATTACKS, "masking")


def parts(model: Any, embed: Any, head: Any) -> tuple[Any, Any]:
    """The embedding and the head, those of the chain where they are not given."""
    if head is not None and not isinstance(head, (PrototypeHead, ClusterClassifier)):
        raise TypeError(
            "`head` must be a jc.prototypes.PrototypeHead or a jc.clustr.ClusterClassifier, "
            f"got {type(head)}"
        )
    chained = _flat(model)
    while isinstance(chained[-1], Partial) and chained[-1].func is divided:  # temperatures
        chained.pop()
    if len(chained) > 1 and isinstance(chained[-1], (PrototypeHead, ClusterClassifier)):
        own = chained[0] if len(chained) == 2 else Chain(*chained[:-1])
        embed = own if embed is None else embed
        head = chained[-1] if head is None else head
    return embed, head


def _flat(model: Any) -> list[Any]:
    """The parts of a chain of chains."""
    if not isinstance(model, Chain):
        return [model]
    return [inner for part in model.parts for inner in _flat(part)]


def _check_source(name: str, source: Any) -> None:
    if not callable(source) or not _classifier.is_pytree(source):
        raise TypeError(
            f"`{name}` must be a callable pytree of arrays, as an NNX module or "
            f"jax.tree_util.Partial(fn, weights) is, got {type(source)}"
        )


def named_loss(
    model: Classifier,
    data: Dataset,
    own_loss: Loss | None,
    embed: Any,
    head: Any,
    surrogates: Mapping[str, Any],
) -> Loss | None:
    """The own loss under a name that tells it from others; raises for what does not fit."""
    image = to_float(data.images[:1])
    classes = _classifier.num_classes(model, image)
    if head is not None and head.num_classes != classes:
        raise ValueError(f"`head` must have the {classes} classes of the model, got {head}")
    outputs = jax.ShapeDtypeStruct((1, classes), jnp.float32)
    if embed is not None:
        _check_source("embed", embed)
        outputs = jax.eval_shape(_classifier.logits(embed), image)
        shape, dtype = getattr(outputs, "shape", ()), getattr(outputs, "dtype", type(outputs))
        size = None if head is None else centres(head).shape[1]
        fits = len(shape) == 2 and shape[0] == 1 and size in (None, shape[1])
        if not fits or not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"`embed` must return floating-point embeddings [b, {size or 'd'}], of the head's "
                f"size if there is one, got {dtype} {shape} for one image"
            )
    for name, net in surrogates.items():
        _check_source(f"surrogates[{name!r}]", net)
        if _classifier.num_classes(net, image) != classes:
            raise ValueError(f"`surrogates[{name!r}]` must have the {classes} classes of the model")
    if own_loss is None:
        return None
    if not callable(own_loss):
        raise TypeError(f"`own_loss` must be a callable (embeddings, y) -> [b], got {own_loss!r}")
    y = jnp.asarray(data.labels[:1])
    found = jax.make_jaxpr(own_loss)(outputs, y).out_avals
    if [each.shape for each in found] != [(1,)] or not jnp.issubdtype(found[0].dtype, jnp.floating):
        raise ValueError(
            "`own_loss` must return one loss for each image, floating point [1] for one, got "
            f"{found}"
        )
    # With its derivative, which may be one of its own.
    program = jax.make_jaxpr(jax.value_and_grad(lambda h: own_loss(h, y).sum()))(outputs)
    mark = hash_of(f"{program}{digest(*constants(program))}")[:8]

    # Evaluations that are gone on with tell losses apart by their names.
    def named(outputs: jax.Array, y: jax.Array) -> jax.Array:
        return own_loss(outputs, y)

    named.__name__ = named.__qualname__ = f"own_loss_{mark}"
    return named


def check(
    key: jax.Array,
    model: Classifier,
    data: Dataset,
    threat: Threat,
    items: Sequence[str],
    steps: int,
    restarts: int,
) -> None:
    _checks.typed_key("key", key)
    if compose.is_stochastic(model):
        raise TypeError("`model` must draw no random numbers: attack a jc.Stochastic by jc.EOT")
    _check_data(model, data)
    if not isinstance(threat, Threat):
        raise TypeError(f"`threat` must be one as Linf(8 / 255) makes, got {threat!r}")
    for item in items:
        _checks.one_of("items", item, ITEMS)
    _checks.at_least("steps", steps, 1)
    _checks.at_least("restarts", restarts, 1)
