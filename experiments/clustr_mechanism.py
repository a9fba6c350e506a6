"""Why an attack on ClusTR's scores stops short, in the networks of `experiments.clustr`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxclus as jc
from experiments.clustr_evaluation import STEPS, climb, in_batches
from experiments.clustr_trials import Setting

SHARES = ("flat", "opposed", "opposed_at_first", "broken", "broken_on_scores")


def stopped_short(
    key: jax.Array, model: Any, images: jc.data.Dataset, setting: Setting
) -> dict[str, float | None]:
    """What is to be seen where PGD-100 on the scores ends and the classifier is still right.

    One restart of the published attack. Shares of the images that stand at its end:

    - flat: the cross-entropy of the scores is at least log k - 0.001. All scores are nearly 0
      there, far from all clusters: the loss has nothing left to gain, but the nearest cluster is
      still one of the own class.
    - opposed: the gradients of the cross-entropies of scores and of logits have a negative inner
      product, so that a small step along the one is a step back for the other; "at first": of the
      same images, where the attack began.
    - broken: the classifier is fooled if as many steps go on from there, on the logits; "on
      scores": if they go on as before.

    Args:
        key: a typed key.
        model: a network under a `ClusterClassifier`.
        images: the images.
        setting: the experiment's; its `eps` is the radius.

    Returns:
        "standing", of all images; the `SHARES` of those, None where none stands.
    """
    network, head = jc.models.parts(model)
    scores = jc.Chain(jc.models.features(network), head.score_classifier)
    ball, clean = jc.Linf(setting.eps), jc.data.to_float(images.images)
    every, labels = np.arange(len(images)), np.asarray(images.labels)
    points = np.asarray(ball.random_start(key, clean))
    clean = np.asarray(clean)

    def climbed(classifier: Any, points: np.ndarray, rows: np.ndarray) -> np.ndarray:
        ends = points.copy()
        for _ in range(STEPS[-1] // STEPS[0]):
            ends[rows], _ = in_batches(climb, rows, (classifier, ball), ends, clean, labels)
        return ends

    def seen(points: np.ndarray) -> tuple[Any, ...]:
        return in_batches(_seen, every, (scores, model), points, labels)

    ends = climbed(scores, points, every)
    right, loss, product = seen(ends)
    stand = np.flatnonzero(right)
    if not len(stand):
        return {"standing": 0.0} | dict.fromkeys(SHARES)
    k = len(set(head.centre_classes))
    found = (
        loss >= np.log(k) - 1e-3,
        product < 0,
        seen(points)[2] < 0,
        ~seen(climbed(model, ends, stand))[0],
        ~seen(climbed(scores, ends, stand))[0],
    )
    shares = (float(each[stand].mean()) for each in found)
    return {"standing": len(stand) / len(images)} | dict(zip(SHARES, shares, strict=True))


@jc.jit
def _seen(
    classifiers: tuple[Any, Any], x: jax.Array, y: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Whether the classifier is right, the scores' loss, and the two gradients' product [b]."""
    scores, model = classifiers

    def loss(x: jax.Array, classifier: Any) -> tuple[jax.Array, jax.Array]:
        losses = jc.losses.cross_entropy(classifier(x), y)
        return losses.sum(), losses

    (of_scores, losses), (of_logits, _) = (
        jax.grad(loss, has_aux=True)(x, classifier) for classifier in (scores, model)
    )
    # Of directions alone: the scores' gradients are tiny.
    product = (_direction(of_scores) * _direction(of_logits)).sum(axis=(1, 2, 3))
    return model(x).argmax(axis=1) == y, losses, product


def _direction(gradient: jax.Array) -> jax.Array:
    largest = jnp.abs(gradient).max(axis=(1, 2, 3), keepdims=True)
    return gradient / jnp.where(largest > 0, largest, 1)
