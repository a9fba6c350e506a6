"""What every training objective offers the trainer."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxclus import losses
from jaxclus._classifier import Classifier
from jaxclus.attacks import Attack

Metrics = dict[str, jax.Array]
#: Embeddings [b, d] -> logits [b, k].
Head = Callable[[jax.Array], jax.Array]


class Outcome(NamedTuple):
    """What an objective finds on one batch.

    Attributes:
        loss: what is minimised, a scalar.
        logits: of the images that the update sees, the adversarial ones where there are any
            [b, k]; what objectives around this one act on.
        metrics: scalars to log; the trainer adds "loss".
        noted: what `update` is to know of the pass, a pytree of arrays.
    """

    loss: jax.Array
    logits: jax.Array
    metrics: Metrics
    noted: Any = None


class Seen(NamedTuple):
    """What a step has seen, for the objective's `update`.

    Attributes:
        index: the images' numbers in the training set [b].
        x: augmented images [b, h, w, c].
        x_adv: what `perturb` made of them.
        gradient: of the loss with respect to x_adv. It comes out of the same backward pass as the
            weights' gradient; where nobody reads it, the compiler leaves it out.
        noted: that of `Outcome`.
    """

    index: jax.Array
    x: jax.Array
    x_adv: jax.Array
    gradient: jax.Array
    noted: Any


class TrainingModel:
    """A network in train mode inside a training step.

    Calling it uses the batch's statistics and updates the running ones, which the step keeps.
    """

    def __init__(self, graph: Any, params: Any, stats: Any):
        self._graph = graph
        self.network: Any = nnx.merge(graph, params, stats)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits [b, k] in train mode."""
        return self.network(x)

    def features(self, x: jax.Array) -> jax.Array:
        """Embeddings [b, d] in train mode."""
        return self.network.features(x)

    @property
    def params(self) -> Any:
        """The parameters, nested dicts of arrays."""
        return nnx.to_pure_dict(nnx.state(self.network, nnx.Param))

    @property
    def stats(self) -> Any:
        """The running statistics as they are now, nested dicts of arrays."""
        return nnx.to_pure_dict(nnx.state(self.network, nnx.BatchStat))

    def at(self, params: Any) -> "TrainingModel":
        """A copy with other parameters, which updates statistics of its own."""
        return TrainingModel(self._graph, params, self.stats)

    def take_stats(self, other: "TrainingModel") -> None:
        """Takes over the running statistics of a copy."""
        self.network = nnx.merge(self._graph, self.params, other.stats)


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is minimised: min_w mean_i loss(f_w, x_i, x_adv_i, y_i); a frozen, hashable dataclass.

    `perturb` is the inner maximisation, x_adv; `loss` the outer minimisation. By default there is
    no adversary, and the loss is the mean cross-entropy at x_adv. An objective with state (class
    centres, a sampler's losses) makes it in `init`, may read it everywhere, renews it in `update`
    and `refresh`, and finds it again after a resume.
    """

    @property
    def steps_per_batch(self) -> int:
        """How many consecutive steps see the same images, augmented alike."""
        return 1

    def init(
        self,
        key: jax.Array,
        model: nnx.Module,
        images: jax.Array,
        labels: jax.Array,
        batch_size: int,
    ) -> Any:
        """The first state, a pytree of arrays.

        Args:
            key: a typed key.
            model: the network before training, in eval mode.
            images: the training set, uint8 [n, h, w, c].
            labels: int32 [n].
            batch_size: b, images in a step.
        """
        return ()

    def batch(self, key: jax.Array, number: jax.Array, state: Any, size: int) -> jax.Array | None:
        """Which images a batch has: indices [size], or None for shuffled epochs.

        Args:
            key: a typed key of the batch's own.
            number: of the batch since the start of training, int32 scalar.
            state: the objective's state.
            size: images in a batch.
        """
        return None

    def perturb(
        self, keys: jax.Array, model: Classifier, x: jax.Array, y: jax.Array, state: Any
    ) -> jax.Array:
        """The images that the loss sees beside x, x_adv [b, h, w, c]; no gradient flows through.

        Args:
            keys: typed keys [b], one for each image, new with every batch.
            model: the network in eval mode, whose statistics stay as they are.
            x: augmented images, float32 [b, h, w, c] in [0, 1].
            y: labels, int32 [b].
            state: the objective's state.
        """
        return x

    def loss(
        self,
        model: TrainingModel,
        x: jax.Array,
        x_adv: jax.Array,
        y: jax.Array,
        keys: jax.Array,
        state: Any,
    ) -> Outcome:
        """The loss to minimise and what to log.

        Args:
            model: the network in train mode; see `TrainingModel`.
            x: augmented images, float32 [b, h, w, c] in [0, 1].
            x_adv: what `perturb` made of them.
            y: labels, int32 [b].
            keys: the keys that `perturb` had [b].
            state: the objective's state.
        """
        return mean_cross_entropy(model(x_adv), y)

    def update(self, state: Any, seen: Seen) -> Any:
        """The state after a step.

        Args:
            state: the state before.
            seen: what the step was made of.
        """
        return state

    def refresh(
        self,
        key: jax.Array,
        model: nnx.Module,
        images: jax.Array,
        labels: jax.Array,
        state: Any,
    ) -> Any:
        """The state after an epoch.

        Args:
            key: a typed key of the epoch's own.
            model: the network as it is evaluated, in eval mode.
            images: the training set, uint8 [n, h, w, c].
            labels: int32 [n].
            state: the state before.
        """
        return state

    def summary(self, state: Any) -> Metrics:
        """Scalars of the state to log after each `refresh`.

        Args:
            state: the state that `refresh` gave back.
        """
        return {}

    def head(self, state: Any) -> Head | None:
        """What classifies embeddings, a pytree [b, d] -> [b, k]; None for the network's own head.

        It is asked for before training and after every `refresh`, and goes with the weights:
        into validation, checkpoints and the model that training gives back.
        """
        return None

    def validation_attack(self) -> Attack | None:
        """The attack under which a held-out split is judged, or None for clean accuracy."""
        return None


def mean_cross_entropy(logits: jax.Array, y: jax.Array) -> Outcome:
    """Mean cross-entropy, with the accuracy on these images as a metric."""
    return Outcome(losses.cross_entropy(logits, y).mean(), logits, accuracy(logits, y))


def accuracy(logits: jax.Array, y: jax.Array) -> Metrics:
    """The share of right predictions, as a metric."""
    return {"accuracy": (jnp.argmax(logits, axis=-1) == y).mean(dtype=jnp.float32)}


def num_classes(model: nnx.Module, labels: jax.Array) -> int:
    """k, from the network's own head where it has one: images may lack the last classes."""
    own = getattr(getattr(model, "head", None), "out_features", 0)
    return max(own, int(np.asarray(labels).max()) + 1)
