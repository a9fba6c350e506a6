"""Objectives around another objective: what they leave as it is."""

import dataclasses
from typing import Any

import jax
from flax import nnx

from jaxclus._classifier import Classifier
from jaxclus.attacks import Attack
from jaxclus.training.objectives._base import Objective, Outcome, TrainingModel


@dataclasses.dataclass(frozen=True)
class Wrapped(Objective):
    """Another objective; subclasses change its loss.

    Attributes:
        objective: the objective within, which has the state.
    """

    objective: Objective

    def __post_init__(self) -> None:
        if not isinstance(self.objective, Objective):
            raise TypeError(
                f"`objective` must be a training objective as Standard() is, got {self.objective!r}"
            )

    @property
    def steps_per_batch(self) -> int:
        return self.objective.steps_per_batch

    def init(
        self,
        key: jax.Array,
        model: nnx.Module,
        images: jax.Array,
        labels: jax.Array,
        batch_size: int,
    ) -> Any:
        return self.objective.init(key, model, images, labels, batch_size)

    def batch(self, key: jax.Array, step: jax.Array, state: Any, size: int) -> jax.Array | None:
        return self.objective.batch(key, step, state, size)

    def perturb(
        self, keys: jax.Array, model: Classifier, x: jax.Array, y: jax.Array, state: Any
    ) -> jax.Array:
        return self.objective.perturb(keys, model, x, y, state)

    def loss(
        self,
        model: TrainingModel,
        x: jax.Array,
        x_adv: jax.Array,
        y: jax.Array,
        keys: jax.Array,
        state: Any,
    ) -> Outcome:
        return self.objective.loss(model, x, x_adv, y, keys, state)

    def update(self, state: Any, x: jax.Array, x_adv: jax.Array, gradient: jax.Array) -> Any:
        return self.objective.update(state, x, x_adv, gradient)

    def refresh(self, model: nnx.Module, images: jax.Array, labels: jax.Array, state: Any) -> Any:
        return self.objective.refresh(model, images, labels, state)

    def validation_attack(self) -> Attack | None:
        return self.objective.validation_attack()
