"""What every training objective offers the trainer."""

import abc
import dataclasses
from typing import Any

import jax
from flax import nnx

from jaxclus.attacks import Attack

Metrics = dict[str, jax.Array]


class TrainingModel:
    """A network inside a training step: called, it trains; `frozen`, it is a classifier.

    Calling it runs in train mode (batch statistics are used, and their running averages updated).
    `frozen` is the same weights in eval mode: attacks see it, and leave the statistics alone.
    """

    def __init__(self, train: nnx.Module, frozen: nnx.Module):
        self._train = train
        self.frozen = frozen

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits [b, k] in train mode."""
        return self._train(x)  # pyright: ignore[reportCallIssue]

    def features(self, x: jax.Array) -> jax.Array:
        """Embeddings [b, d] in train mode."""
        return self._train.features(x)  # pyright: ignore[reportAttributeAccessIssue]


@dataclasses.dataclass(frozen=True)
class Objective(abc.ABC):
    """What is minimised; a frozen, hashable dataclass.

    Only `loss` must be given. An objective with state (class centres, a sampler's queue) makes it
    in `init`, may read it everywhere, renews it in `refresh`, and finds it again after a resume.
    """

    @abc.abstractmethod
    def loss(
        self, model: TrainingModel, x: jax.Array, y: jax.Array, keys: jax.Array, state: Any
    ) -> tuple[jax.Array, Metrics]:
        """The loss to minimise and what to log.

        Args:
            model: the network; see `TrainingModel`.
            x: augmented images, float32 [b, h, w, c] in [0, 1].
            y: labels, int32 [b].
            keys: typed keys [b], one for each image, new in every step.
            state: the objective's state.

        Returns:
            The loss, a scalar, which is logged as "loss", and further metrics, a dict of scalars.
        """

    def init(self, key: jax.Array, images: jax.Array, labels: jax.Array) -> Any:
        """The first state, a pytree of arrays, from the training set (uint8 images)."""
        return ()

    def batch(self, key: jax.Array, step: jax.Array, state: Any, size: int) -> jax.Array | None:
        """Indices [size] of the step's images, or None for shuffled epochs."""
        return None

    def refresh(self, model: nnx.Module, images: jax.Array, labels: jax.Array, state: Any) -> Any:
        """The state after an epoch; `model` is in eval mode."""
        return state

    def validation_attack(self) -> Attack | None:
        """The attack under which a held-out split is judged, or None for clean accuracy."""
        return None
