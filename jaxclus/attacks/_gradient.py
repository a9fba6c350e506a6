"""Loss and gradient of a classifier at given images, as every gradient attack takes them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxclus import compose
from jaxclus._classifier import Classifier
from jaxclus.losses import Loss


class Evaluation(NamedTuple):
    """A classifier at b images.

    Attributes:
        loss: the loss of each image [b].
        wrong: whether the image is misclassified [b].
        gradient: of each image's loss with respect to the image [b, h, w, c].
    """

    loss: jax.Array
    wrong: jax.Array
    gradient: jax.Array


def evaluate(
    model: Classifier, keys: jax.Array, loss: Loss, x: jax.Array, y: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Loss [b] and whether the image is misclassified [b], averaged over an EOT's passes."""

    def one_pass(keys: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = compose.with_keys(model, keys)(x)
        return loss(logits, y), (jnp.argmax(logits, axis=-1) != y).astype(jnp.float32)

    each, wrong = mean_over_passes(one_pass, model, keys)
    return each, wrong > 0.5


def evaluate_with_gradient(
    model: Classifier, keys: jax.Array, loss: Loss, x: jax.Array, y: jax.Array
) -> Evaluation:
    """Loss, prediction and gradient at the images, averaged over an EOT's passes.

    Args:
        model: a classifier.
        keys: typed keys [b] for a stochastic one; unused otherwise.
        loss: (logits [b, k], y [b]) -> [b].
        x: images [b, h, w, c].
        y: labels [b].
    """

    def one_pass(keys: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        def total(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            logits = compose.with_keys(model, keys)(x)
            each = loss(logits, y)
            return each.sum(), (each, (jnp.argmax(logits, axis=-1) != y).astype(jnp.float32))

        gradient, (each, wrong) = jax.grad(total, has_aux=True)(x)
        return each, wrong, gradient

    each, wrong, gradient = mean_over_passes(one_pass, model, keys)
    return Evaluation(each, wrong > 0.5, computed_once(gradient))


def computed_once(array: jax.Array) -> jax.Array:
    """The array, computed once for all that read it.

    XLA's CPU backend repeats the end of a computation in every operation that reads its result,
    number by number, at several times the cost of the attack's own work: a convolution's input
    gradient ends by putting pixels into order (`models/_ops.py`). An `optimization_barrier` does
    not stop it. What a conditional returns is computed once; here both branches do the same.
    """

    def through_conditional(array: jax.Array) -> jax.Array:
        def same(array: jax.Array) -> jax.Array:  # not so that XLA could tell
            return jnp.where(jnp.isnan(array), jnp.nan, array)

        return lax.cond(array.ravel()[0] <= jnp.inf, lambda array: array, same, array)

    return lax.platform_dependent(array, cpu=through_conditional, default=lambda a: a)


def mean_over_passes(one_pass, model: Classifier, keys: jax.Array):
    """The mean of `one_pass(keys)` over the passes of an EOT model; one pass for others."""
    if compose.samples(model) == 1:
        return one_pass(keys)

    def add(sums, number):
        return jax.tree.map(jnp.add, sums, one_pass(compose.split(keys, number))), None

    first = one_pass(compose.split(keys, 0))
    sums = lax.scan(add, first, jnp.arange(1, compose.samples(model)))[0]
    return jax.tree.map(lambda total: total / compose.samples(model), sums)
