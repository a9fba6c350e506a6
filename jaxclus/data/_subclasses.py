"""Data sets for transfer between subclasses: trained on some classes of a group, tested on another.

The target's images show classes that the source does not have, of superclasses that it does have.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from jaxclus.data._dataset import Dataset, Groups, check_groups

# The superclasses of CIFAR-20, in the order of its labels.
_CIFAR20 = ("fish", "flowers", "household_electrical_devices", "people")
_CIFAR20_SIZE = 5


class SubclassSplit(NamedTuple):
    """What `split_subclasses` made.

    Attributes:
        source: the subclasses to train on; its `groups` are the superclasses.
        target: one subclass of each superclass, labelled with the superclass.
    """

    source: Dataset
    target: Dataset


def split_subclasses(
    data: Dataset, groups: Groups | None = None, target: int = -1
) -> SubclassSplit:
    """Takes one class out of each group: the others are the source, the ones taken the target.

    Groups with at least two classes take part, in their order: they are the superclasses, numbered
    s = 0, 1, .... Source classes are numbered group by group, members in ascending order of their
    old index; for groups of five classes the source label is 4 s + position. The target label is s.
    Both parts keep the order of the images.

    Args:
        data: the data set, with at least one image of each class that takes part.
        groups: named groups of its classes, ((name, (class index, ...)), ...), each class in at
            most one; at least two groups of two classes or more. Default: `data.groups`.
        target: place of the class that is taken out among its group's members, in [-m, m) for
            every superclass of m classes; the last one by default, as published.

    Returns:
        The source, with the old class names, the superclasses as `groups` and "/source" behind
        `data.name`; and the target, with the superclasses as classes, no groups, and "/target".

    Raises:
        TypeError: `target` is no integer, or `groups` have another form.
        ValueError: an argument is not as said.

    Bai et al., "Clustering Effect of (Linearized) Adversarial Robust Models", NeurIPS 2021,
    arXiv:2111.12922, where it makes CIFAR-20 of CIFAR-100 (`cifar20`).
    """
    superclasses = _superclasses(data, groups)
    _check_target(superclasses, target)
    _check_images(data, superclasses)
    held = [members[target] for _, members in superclasses]
    kept = [tuple(c for c in members if c != members[target]) for _, members in superclasses]
    ends = np.cumsum([0, *map(len, kept)]).tolist()
    names = tuple(name for name, _ in superclasses)
    source = _relabelled(data, [c for classes in kept for c in classes])
    numbers = [tuple(range(*span)) for span in zip(ends[:-1], ends[1:], strict=True)]
    return SubclassSplit(
        dataclasses.replace(
            source, groups=tuple(zip(names, numbers, strict=True)), name=f"{data.name}/source"
        ),
        dataclasses.replace(_relabelled(data, held), class_names=names, name=f"{data.name}/target"),
    )


def cifar20(data: Dataset, as_published: bool = False) -> SubclassSplit:
    """CIFAR-20: four superclasses of CIFAR-100, of five subclasses each.

    The fifth subclass by fine label is the target (trout, tulip, television, woman), the other
    four are the source, with 16 labels 4 s + position.

    Args:
        data: CIFAR-100, or a set whose `groups` hold fish, flowers, household_electrical_devices
            and people of five classes each; `coarse_groups` makes them of coarse labels.
        as_published: with the pixel values v that the published code trains and tests on,
            (256 - v) mod 256: it turns float images from 0 to 255 into 8 bits as if they were from
            0 to 1. The zeros that crops pad with stay 0, there and here.

    Returns:
        The split of `split_subclasses`, named "cifar100/cifar20/source" and so on.

    Raises:
        ValueError: `data` has no groups, not those, of another size, or a class without images.

    Bai et al., arXiv:2111.12922. The published description speaks of five superclasses of four
    subclasses; the published code has four of five.
    """
    groups = dict(data.groups or ())
    missing = [name for name in _CIFAR20 if name not in groups]
    if missing:
        advice = '; those of CIFAR-100 are `groups=jc.data.class_groups("cifar100")`'
        raise ValueError(
            f"`data` must have the groups {', '.join(_CIFAR20)}, got {data.name!r} without "
            f"{', '.join(missing)}{'' if data.groups else advice}"
        )
    sizes = {name: len(groups[name]) for name in _CIFAR20}
    if set(sizes.values()) != {_CIFAR20_SIZE}:
        raise ValueError(
            f"`data` must have groups of {_CIFAR20_SIZE} classes, got "
            f"{', '.join(f'{name} of {size}' for name, size in sizes.items())}"
        )
    named = dataclasses.replace(
        data, name=f"{data.name}/cifar20{'_as_published' if as_published else ''}"
    )
    split = split_subclasses(named, tuple((name, groups[name]) for name in _CIFAR20))
    return SubclassSplit(*map(_inverted, split)) if as_published else split


def _inverted(data: Dataset) -> Dataset:
    # uint8 is the integers modulo 256, so that (256 - v) mod 256 is the negative.
    return dataclasses.replace(data, images=np.negative(data.images))


def _superclasses(data: Dataset, groups: Groups | None) -> Groups:
    """The groups that take part, each with its classes in ascending order, checked."""
    groups = data.groups if groups is None else groups
    if groups is None:
        raise ValueError(f"`groups` must be given for {data.name!r}, which has none of its own")
    check_groups(groups, data.num_classes, partition=False)
    taking_part = tuple((name, tuple(sorted(members))) for name, members in groups)
    taking_part = tuple(group for group in taking_part if len(group[1]) >= 2)
    if len(taking_part) < 2:
        raise ValueError(
            "`groups` must hold at least two groups of two classes or more, got "
            f"{[(name, len(members)) for name, members in groups]}"
        )
    return taking_part


def _check_target(superclasses: Groups, target: int) -> None:
    if isinstance(target, bool) or not isinstance(target, (int, np.integer)):
        raise TypeError(f"`target` must be an integer, got {target!r}")
    for name, members in superclasses:
        m = len(members)
        if not -m <= target < m:
            raise ValueError(
                f"`target` must be in [{-m}, {m - 1}], a place in {name!r} of {m} classes, "
                f"got {target}"
            )


def _check_images(data: Dataset, superclasses: Groups) -> None:
    counts = np.bincount(data.labels, minlength=data.num_classes)
    empty = [data.class_names[c] for _, members in superclasses for c in members if not counts[c]]
    if empty:
        raise ValueError(
            "`data` must hold images of every class that takes part, got none of "
            f"{', '.join(empty)}"
        )


def _relabelled(data: Dataset, classes: list[int]) -> Dataset:
    """The images of these classes, in the order of the set; the labels are places in `classes`."""
    places = np.full(data.num_classes, -1, np.int32)
    places[classes] = np.arange(len(classes))
    chosen = np.flatnonzero(places[data.labels] >= 0)
    return dataclasses.replace(
        data,
        images=data.images[chosen],
        labels=places[data.labels[chosen]],
        class_names=tuple(data.class_names[c] for c in classes),
        groups=None,
    )
