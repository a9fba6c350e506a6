"""Objectives around another objective: what they leave as it is."""

import dataclasses
from typing import Any, NamedTuple

import jax
from flax import nnx

from jaxclus._classifier import Classifier
from jaxclus.attacks import Attack
from jaxclus.training.objectives._base import Head, Objective, Outcome, Seen, TrainingModel


class WrappedState(NamedTuple):
    """The state of an objective around another one.

    Attributes:
        own: its own, a pytree of arrays.
        inner: that of the objective within.
    """

    own: Any
    inner: Any


@dataclasses.dataclass(frozen=True)
class Wrapped(Objective):
    """An objective around another one, which it leaves as it is; subclasses change the loss.

    Attributes:
        objective: the objective within.
    """

    objective: Objective

    def __post_init__(self) -> None:
        if not isinstance(self.objective, Objective):
            raise TypeError(
                f"`objective` must be a training objective as Standard() is, got {self.objective!r}"
            )

    def own_state(
        self, key: jax.Array, model: nnx.Module, images: jax.Array, labels: jax.Array
    ) -> Any:
        """The state that this objective adds before training; `model` is in eval mode."""
        return ()

    def refreshed(self, model: nnx.Module, images: jax.Array, labels: jax.Array, own: Any) -> Any:
        """The state that this objective adds, after an epoch; `model` is in eval mode."""
        return own

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
    ) -> WrappedState:
        inner = self.objective.init(key, model, images, labels, batch_size)
        own_key = jax.random.fold_in(key, 1)
        return WrappedState(self.own_state(own_key, model, images, labels), inner)

    def batch(
        self, key: jax.Array, number: jax.Array, state: WrappedState, size: int
    ) -> jax.Array | None:
        return self.objective.batch(key, number, state.inner, size)

    def perturb(
        self, keys: jax.Array, model: Classifier, x: jax.Array, y: jax.Array, state: WrappedState
    ) -> jax.Array:
        return self.objective.perturb(keys, model, x, y, state.inner)

    def loss(
        self,
        model: TrainingModel,
        x: jax.Array,
        x_adv: jax.Array,
        y: jax.Array,
        keys: jax.Array,
        state: WrappedState,
    ) -> Outcome:
        return self.objective.loss(model, x, x_adv, y, keys, state.inner)

    def update(self, state: WrappedState, seen: Seen) -> WrappedState:
        return state._replace(inner=self.objective.update(state.inner, seen))

    def refresh(
        self,
        key: jax.Array,
        model: nnx.Module,
        images: jax.Array,
        labels: jax.Array,
        state: WrappedState,
    ) -> WrappedState:
        return WrappedState(
            self.refreshed(model, images, labels, state.own),
            self.objective.refresh(key, model, images, labels, state.inner),
        )

    def head(self, state: WrappedState) -> Head | None:
        return self.objective.head(state.inner)

    def validation_attack(self) -> Attack | None:
        return self.objective.validation_attack()
