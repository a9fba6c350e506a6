"""Empirical risk minimisation."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxclus import losses
from jaxclus.training.objectives._base import Metrics, Objective, TrainingModel


@dataclasses.dataclass(frozen=True)
class Standard(Objective):
    """Mean cross-entropy on clean images."""

    def loss(
        self, model: TrainingModel, x: jax.Array, y: jax.Array, keys: jax.Array, state: Any
    ) -> tuple[jax.Array, Metrics]:
        return mean_cross_entropy(model, x, y)


def mean_cross_entropy(
    model: TrainingModel, x: jax.Array, y: jax.Array
) -> tuple[jax.Array, Metrics]:
    """Mean cross-entropy in train mode, with the accuracy on these images as a metric."""
    logits = model(x)
    loss = losses.cross_entropy(logits, y).mean()
    accuracy = (jnp.argmax(logits, axis=-1) == y).mean(dtype=jnp.float32)
    return loss, {"accuracy": accuracy}
