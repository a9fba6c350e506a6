"""Fine-tuning that pulls logits towards class centres."""

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxclus import _checks
from jaxclus.data import Augmentation, to_float
from jaxclus.threat import image_keys
from jaxclus.training.objectives._base import Outcome, TrainingModel
from jaxclus.training.objectives._over_images import over_images
from jaxclus.training.objectives._wrapped import Wrapped, WrappedState


@dataclasses.dataclass(frozen=True)
class CentrePull(Wrapped):
    """L + beta mean_{b, c} (z_bc - m_{y_b c})^2, with m_y the mean logits of class y at the start.

    The centres m [k, k] are the mean logits of each class over the training set, of the network as
    it comes, in eval mode; they stay as they are. For transfer to k superclasses the network comes
    from `jc.models.with_new_head`: so published, the centres are those of a random head.

    A random head's centres need not lie on their classes' sides. The loss is smallest at
    z = m_y + k / (2 beta) (e_y - softmax(z)), where class y wins against class j if and only if
    m_yy > m_yj - k / (2 beta). A class for which that is wrong is lost, and `fit` warns of it; one
    for which it is hardly right may be. 2 is too much for some heads on features that are large.

    Attributes:
        objective: L; Standard in the paper's code, Adversarial with its flag.
        beta: weight, at least 0; 2 in the paper's code.
        as_published: centres from images that are cropped (padding 4) and flipped at random once,
            instead of the images as they are.

    Bai et al., "Clustering Effect of (Linearized) Adversarial Robust Models", NeurIPS 2021,
    arXiv:2111.12922, the fine-tuning of its domain adaptation.
    """

    beta: float = 2.0
    as_published: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.not_negative("beta", self.beta)

    def init(
        self,
        key: jax.Array,
        model: nnx.Module,
        images: jax.Array,
        labels: jax.Array,
        batch_size: int,
    ) -> WrappedState:
        state = super().init(key, model, images, labels, batch_size)
        if self.objective.head(state.inner) is not None:
            raise ValueError(
                "`objective` must be one that trains the network's own head, whose logits have the "
                f"centres, got {self.objective!r}"
            )
        return state

    def own_state(
        self, key: jax.Array, model: nnx.Module, images: jax.Array, labels: jax.Array
    ) -> jax.Array:
        if self.as_published:
            keys = image_keys(key, jnp.arange(len(images)))
            images = Augmentation(crop_padding=4, flip=True)(keys, images)
        centres = _mean_logits(model, images, labels)
        self._warn_of_lost_classes(np.asarray(centres))
        return centres

    def _warn_of_lost_classes(self, centres: np.ndarray) -> None:
        gaps = _gaps(centres)
        lost = np.flatnonzero(2 * self.beta * gaps >= len(gaps)).tolist()
        if lost:
            warnings.warn(
                f"`beta` {self.beta:g} pulls the classes {lost} to centres where another class "
                f"wins: they will be lost. It must be below {len(gaps) / (2 * gaps.max()):.3g} "
                "with this head",
                stacklevel=2,
            )

    def loss(
        self,
        model: TrainingModel,
        x: jax.Array,
        x_adv: jax.Array,
        y: jax.Array,
        keys: jax.Array,
        state: WrappedState,
    ) -> Outcome:
        found = self.objective.loss(model, x, x_adv, y, keys, state.inner)
        pull = jnp.square(found.logits - state.own[y]).mean()
        metrics = found.metrics | {"distance_to_centre": pull}
        return found._replace(loss=found.loss + self.beta * pull, metrics=metrics)


def _gaps(centres: np.ndarray) -> np.ndarray:
    """max_{j != y} m_yj - m_yy for each class y: above 0, another class leads at its centre."""
    others = np.where(np.eye(len(centres), dtype=bool), -np.inf, centres)
    return others.max(axis=1) - np.diagonal(centres)


def _mean_logits(model: nnx.Module, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean logits of each class, float32 [k, k]; of a class without images, zero."""
    logits = np.asarray(over_images(_logits, model, jnp.asarray(images)), np.float64)
    classes, sums = np.asarray(labels), np.zeros((logits.shape[1],) * 2)
    np.add.at(sums, classes, logits)
    counts = np.bincount(classes, minlength=len(sums))
    return jnp.asarray(sums / np.maximum(counts, 1)[:, None], jnp.float32)


def _logits(model: Any, images: jax.Array) -> jax.Array:
    return model(to_float(images))
