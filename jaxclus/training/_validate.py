"""Accuracy on a held-out split during training."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxclus import _compile, metrics, parallel
from jaxclus.data import Dataset, to_float
from jaxclus.threat import image_keys
from jaxclus.training._step import Program, Weights
from jaxclus.training.objectives import Head


@partial(_compile.jit, static_argnames=("program",))
def _counts(weights, head, key, images, labels, index, valid, *, program: Program):
    model = program.classifier(weights, head)
    x = to_float(images)
    counts = {"validation_accuracy": metrics.count(metrics.correct(model(x), labels), valid)}
    attack = program.objective.validation_attack()
    if attack is not None:
        x_adv = attack.perturb(image_keys(key, index), model, x, labels)
        robust = metrics.correct(model(x_adv), labels)
        counts["validation_robust_accuracy"] = metrics.count(robust, valid)
    return counts


def validation_scores(
    key: jax.Array, program: Program, weights: Weights, head: Head | None, data: Dataset
) -> dict[str, float]:
    """Shares of right predictions: clean, and on the last iterates of the objective's attack.

    The batches have the training's size, the last one padded; each image's attack has its own key,
    the same after every epoch.
    """
    size = program.config.batch_size
    placement = parallel.over_batch(program.mesh)
    totals: dict[str, jax.Array] = {}
    for start in range(0, len(data), size):
        index = np.arange(start, start + size)
        inside = np.minimum(index, len(data) - 1)
        batch = (data.images[inside], data.labels[inside], inside, index < len(data))
        counts = _counts(weights, head, key, *jax.device_put(batch, placement), program=program)
        totals = jax.tree.map(jnp.add, totals, counts) if totals else counts
    return {name: int(total) / len(data) for name, total in jax.device_get(totals).items()}
