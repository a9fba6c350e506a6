"""Which wrong classes attacks reach: those of the true class's group, more often than by chance?"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxclus import _checks, _classifier, parallel
from jaxclus._classifier import Classifier
from jaxclus.attacks import Attack
from jaxclus.clustering import permutation_test
from jaxclus.clustering._score import named, scored_ids
from jaxclus.data import Dataset, Groups, to_float
from jaxclus.evaluation._predict import predict
from jaxclus.evaluation._result import Robustness
from jaxclus.evaluation._robustness import robustness


@dataclasses.dataclass(frozen=True, eq=False)
class SuccessPattern:
    """Where an attack leads the images that it breaks; n_i are those of class i, of k classes.

    Attributes:
        counts: number of broken images of each true class that are taken for each class after the
            attack, integers [k, k], with a diagonal of 0.
        groups: the groups of the classes.
        class_names: the names of the classes.
        within: share of the broken images whose wrong class is in the true class's group; never so
            for a class that is alone in its group. None if no image is broken.
        chance: what `within` is expected to be if each wrong class is as likely,
            sum_i n_i (|g_i| - 1) / (k - 1) / sum_i n_i. A class that attracts images of all others
            beats it as well: whether the groups matter is what the p-value says. None if no image
            is broken.
        p_value: share of the labellings of the classes with groups of these sizes for which as many
            images or more stay within, the observed one included. None if no image is broken.
        smallest_p: the smallest value that `p_value` could have taken for groups of these sizes.
        num_labellings: labellings looked at.
        exact: whether those are all that are different partitions.
        robustness: the evaluation under the attack.
    """

    counts: np.ndarray
    groups: Groups
    class_names: tuple[str, ...]
    within: float | None
    chance: float | None
    p_value: float | None
    smallest_p: float
    num_labellings: int
    exact: bool
    robustness: Robustness

    @property
    def num_broken(self) -> int:
        """Number of images that are classified correctly and broken, sum_i n_i."""
        return int(self.counts.sum())

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values, the evaluation's without its images."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return fields | {
            "counts": self.counts.tolist(),
            "groups": [[name, list(members)] for name, members in self.groups],
            "class_names": list(self.class_names),
            "num_broken": self.num_broken,
            "robustness": self.robustness.to_json(),
        }


def success_pattern(
    key: jax.Array,
    model: Classifier,
    attack: Attack,
    data: Dataset,
    groups: Groups | None = None,
    *,
    batch_size: int = 250,
    directory: Path | str | None = None,
    devices: Sequence[Any] | None = None,
    progress: bool = True,
) -> SuccessPattern:
    """Attacks a data set, and counts the classes that its broken images are taken for.

    An image counts if the model classifies it correctly and the attack's final image, inside the
    threat model, wrongly; its wrong class is the prediction there. The p-value compares the number
    of images that stay within their group with that of all other labellings of the classes by
    groups of the same sizes, as `jc.clustering.clustering_score` does; above a million of them it
    is sampled.

    Args:
        key: a typed key; image i uses `fold_in(key, i)`.
        model: a classifier of the data set's k classes.
        attack: the attack; a minimum-norm one with its `threat`.
        data: the data set.
        groups: named groups, each class in exactly one; at least two, one of them with two
            classes or more. Default: `data.groups`.
        batch_size: as for `jc.evaluation.robustness`, which evaluates the attack.
        directory: as for `robustness`, whose finished evaluations it reads.
        devices: default: all.
        progress: whether to show a progress bar.

    Raises:
        TypeError, ValueError: there are no groups, or no such ones; the model has other classes
            than the data set; and as for `robustness`.

    The pattern is that of Bai et al., "Clustering Effect of (Linearized) Adversarial Robust
    Models", NeurIPS 2021, arXiv:2111.12922; chance and p-value are ours.
    """
    _checks.typed_key("key", key)
    groups, ids = _groups(model, data, groups)
    result = robustness(
        key, model, attack, data, batch_size=batch_size, directory=directory, devices=devices,
        progress=progress,
    )  # fmt: skip
    counts = _counts(key, model, data, result, devices)
    broken, same = counts.sum(), ids[:, None] == ids
    test = permutation_test((counts + counts.T).astype(np.float64), ids)
    reachable = counts.sum(axis=1) @ (same.sum(axis=1) - 1)
    return SuccessPattern(
        counts=counts,
        groups=groups,
        class_names=data.class_names,
        within=float(counts[same].sum() / broken) if broken else None,
        chance=float(reachable / (len(ids) - 1) / broken) if broken else None,
        p_value=test.p_value if broken else None,
        smallest_p=test.smallest_p,
        num_labellings=test.num_labellings,
        exact=test.exact,
        robustness=result,
    )


def _groups(model: Classifier, data: Dataset, groups: Groups | None) -> tuple[Groups, np.ndarray]:
    """The groups and the group of each class [k], checked before the attack takes its time."""
    if not isinstance(data, Dataset):
        raise TypeError(f"`data` must be a jc.data.Dataset, got {type(data).__name__}")
    groups = data.groups if groups is None else groups
    if groups is None:
        raise ValueError(f"`groups` must be given for {data.name!r}, which has none of its own")
    if not named(groups):
        raise TypeError(f"`groups` must be pairs of a name and its classes, got {groups!r}")
    k = _classifier.num_classes(model, to_float(data.images[:1]))
    if k != data.num_classes:
        raise ValueError(
            f"`model` must have the classes of `data`, {data.num_classes}, got {k} logits"
        )
    return groups, scored_ids(groups, k)


def _counts(
    key: jax.Array,
    model: Classifier,
    data: Dataset,
    result: Robustness,
    devices: Sequence[Any] | None,
) -> np.ndarray:
    """The broken images by true and wrong class, integers [k, k]."""
    counts = np.zeros((data.num_classes,) * 2, np.int64)
    broken = np.flatnonzero(result.clean & ~result.robust)
    if not len(broken):
        return counts
    _, predicted = predict(
        key, model, result.adversarial[broken], parallel.mesh(devices), index=broken
    )
    np.add.at(counts, (data.labels[broken], predicted), 1)
    # In a batch of others an image at the very boundary may be right again: it is none of these.
    np.fill_diagonal(counts, 0)
    return counts
