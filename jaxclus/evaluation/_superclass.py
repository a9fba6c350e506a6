"""How well a classifier of some subclasses recognises others of the same superclasses."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from jaxclus import _checks, _classifier, _pytree, parallel
from jaxclus._classifier import Classifier
from jaxclus.clustering import group_ids
from jaxclus.clustering._score import count_classes, named
from jaxclus.data import Augmentation, Dataset, to_float
from jaxclus.evaluation._predict import predict


@_pytree.register
@dataclasses.dataclass(frozen=True)
class SuperclassLogits:
    """Logits of k classes [b, k] -> those of s superclasses [b, s]: the highest of each group.

    arg max over superclasses is the group of the arg max over classes, the read-out of
    `superclass_accuracy`. Behind a classifier of subclasses, `jc.Chain(model, SuperclassLogits(...
    ))` is the classifier of superclasses for attacks to reach from one superclass into another.
    (The published code attacks subclasses with superclass labels.)

    Attributes:
        groups: superclass of each of the k classes, as named groups or group ids [k].

    Raises:
        TypeError, ValueError: `groups` are no such groups.
    """

    groups: Sequence[Any] | ArrayLike = dataclasses.field(metadata={"static": True})

    def __post_init__(self) -> None:
        # One form of all that groups can be given as, and hashable.
        ids = group_ids(self.groups, count_classes(self.groups))
        object.__setattr__(self, "groups", tuple(ids.tolist()))

    def __call__(self, logits: jax.Array) -> jax.Array:
        ids = np.array(self.groups)
        if logits.shape[-1] != len(ids):
            raise ValueError(
                f"`logits` must be of the {len(ids)} classes that have a group, got {logits.shape}"
            )
        return jax.ops.segment_max(logits.T, ids, int(ids.max()) + 1).T


@dataclasses.dataclass(frozen=True, eq=False)
class SuperclassAccuracy:
    """What `superclass_accuracy` found for s superclasses.

    Attributes:
        confusion: number of images of each true superclass that are taken for each one,
            integers [s, s].
    """

    confusion: np.ndarray

    @property
    def num_images(self) -> int:
        """Number of images."""
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        """Share of the images whose superclass is recognised."""
        return float(np.trace(self.confusion) / self.num_images)


def superclass_accuracy(
    model: Classifier,
    target: Dataset,
    groups: Sequence[Any] | ArrayLike,
    *,
    as_published: bool = False,
    key: jax.Array | None = None,
    devices: Sequence[Any] | None = None,
) -> SuperclassAccuracy:
    """Transfer without tuning: the superclass of the predicted subclass, on unseen subclasses.

    The predicted superclass of an image is the group of arg max_j z_j; for groups of four in a
    row it is floor(arg max / 4). Logits are computed under matmul precision "highest".

    Args:
        model: a classifier of the k source classes.
        target: images whose labels are superclasses, as `jc.data.split_subclasses` makes them.
        groups: superclass of each of the k classes: named groups, as the source's `groups`, whose
            names are the target's class names in their order; or group ids [k], integers, whose
            ranks are the target's labels.
        as_published: test images are cropped (padding 4) and flipped at random, as the published
            code does, instead of taken as they are; needs `key`.
        key: a typed key; image i uses `fold_in(key, i)`, and so do the verdicts of a stochastic
            classifier.
        devices: default: all.

    Raises:
        TypeError, ValueError: `target`, `groups` or `model` do not fit one another, `key` is no
            typed key or not given where `as_published` needs it.

    Bai et al., "Clustering Effect of (Linearized) Adversarial Robust Models", NeurIPS 2021,
    arXiv:2111.12922, the domain adaptation of the published code.
    """
    if not isinstance(target, Dataset):
        raise TypeError(f"`target` must be a jc.data.Dataset, got {type(target).__name__}")
    if key is None:
        if as_published:
            raise ValueError("`key` must be given for `as_published=True`, got None")
        key = jax.random.key(0)
    _checks.typed_key("key", key)
    k = _classifier.num_classes(model, to_float(target.images[:1]))
    ids = _superclass_ids(groups, k, target)
    mesh = parallel.mesh(devices)
    augmentation = Augmentation(crop_padding=4, flip=True) if as_published else None
    _, predicted = predict(key, model, target.images, mesh, augmentation=augmentation)
    confusion = np.zeros((target.num_classes,) * 2, np.int64)
    np.add.at(confusion, (target.labels, ids[predicted]), 1)
    return SuperclassAccuracy(confusion)


def _superclass_ids(groups: Any, k: int, target: Dataset) -> np.ndarray:
    """The superclass of each class [k], checked against the target's classes."""
    ids = group_ids(groups, k)
    if ids.max() + 1 != target.num_classes:
        raise ValueError(
            f"`groups` must be as many as `target` has classes, {target.num_classes}, "
            f"got {ids.max() + 1}"
        )
    # Named groups in another order would be counted against the wrong superclasses.
    names = tuple(group[0] for group in groups) if named(groups) else target.class_names
    if names != target.class_names:
        raise ValueError(
            f"`groups` must be named as the classes of `target`, {target.class_names}, got {names}"
        )
    return ids
