"""Class groups of known data sets, fixed here before any result is seen.

Hierarchies found in a classifier are scored against these (clustering scores, superclass
transfer), so each follows one rule that can be stated without looking at a model.
"""

from collections.abc import Sequence

import numpy as np
from jax.typing import ArrayLike

from jaxclus.data._dataset import Groups

# Living things and machines, as in "Clustering Effect of (Linearized) Adversarial Robust Models"
# (arXiv:2111.12922): bird, cat, deer, dog, frog, horse against airplane, automobile, ship, truck.
_CIFAR10: Groups = (("animals", (2, 3, 4, 5, 6, 7)), ("vehicles", (0, 1, 8, 9)))

# The 20 coarse classes of Krizhevsky (2009), in the order of the official coarse labels 0 to 19.
_CIFAR100_CLASSES = {
    "aquatic_mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food_containers": "bottle bowl can cup plate",
    "fruit_and_vegetables": "apple mushroom orange pear sweet_pepper",
    "household_electrical_devices": "clock keyboard lamp telephone television",
    "household_furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large_carnivores": "bear leopard lion tiger wolf",
    "large_man-made_outdoor_things": "bridge castle house road skyscraper",
    "large_natural_outdoor_scenes": "cloud forest mountain plain sea",
    "large_omnivores_and_herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium_mammals": "fox porcupine possum raccoon skunk",
    "non-insect_invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small_mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles_1": "bicycle bus motorcycle pickup_truck train",
    "vehicles_2": "lawn_mower rocket streetcar tank tractor",
}
# The official fine labels are the alphabetical order of the 100 names.
_CIFAR100_NAMES = sorted(" ".join(_CIFAR100_CLASSES.values()).split())
_CIFAR100: Groups = tuple(
    (coarse, tuple(_CIFAR100_NAMES.index(name) for name in fine.split()))
    for coarse, fine in _CIFAR100_CLASSES.items()
)

# By where a thing is worn. T-shirt/top, pullover, dress, coat and shirt all hang from the
# shoulders and share a neckline and (mostly) sleeves: the dress belongs to them rather than to the
# trousers, which start at the waist and part into two legs. A bag is carried.
_FASHION_MNIST: Groups = (
    ("shoulders", (0, 2, 3, 4, 6)),
    ("legs", (1,)),
    ("feet", (5, 7, 9)),
    ("carried", (8,)),
)

# By stroke: a round closed loop (0, 6, 8, 9); else only straight strokes (1, 4, 7; the 4 has no
# round part, whether its top is open or not); else open curves (2, 3, 5).
_DIGITS: Groups = (
    ("closed_loops", (0, 6, 8, 9)),
    ("straight_strokes", (1, 4, 7)),
    ("open_curves", (2, 3, 5)),
)

_GROUPS = {
    "cifar10": _CIFAR10,
    "cifar10_corrupted": _CIFAR10,
    "cifar100": _CIFAR100,
    "digits": _DIGITS,
    "fashion_mnist": _FASHION_MNIST,
    "mnist": _DIGITS,
}


# Superclasses for transfer between subclasses, where the groups above would be too easy to tell
# apart (tops from shoes). Of Fashion-MNIST's tops, those that are worn over others (pullover, coat)
# stand against the rest.
_TRANSFER = {
    "fashion_mnist": (("outer", (2, 4)), ("tops", (0, 3, 6)), ("shoes", (5, 7, 9))),
}


def transfer_groups(name: str) -> Groups | None:
    """Superclasses for `split_subclasses` that ship for a data set beside its groups, or None.

    Args:
        name: name of the data set, as for `class_groups`.

    Returns:
        (superclass, class indices) for each, not necessarily of all classes, or None.
    """
    return _TRANSFER.get(_base(name))


def class_groups(name: str) -> Groups | None:
    """The groups that ship for a data set, or None.

    Args:
        name: name of the data set, as "cifar10"; a configuration or version after it
            ("cifar10_corrupted/fog_3", "mnist:3.0.1") makes no difference.

    Returns:
        (group, class indices) for each group, a partition of the classes, or None if no groups
        are known.
    """
    return _GROUPS.get(_base(name))


def coarse_groups(
    labels: ArrayLike, coarse_labels: ArrayLike, names: Sequence[str] | None = None
) -> Groups:
    """The groups that a second, coarser label of every image makes of the classes.

    For sets with two labels, as CIFAR-100's "label" and "coarse_label" are.

    Args:
        labels: the class of each image, integers [n]; from 0 on, each class with an image.
        coarse_labels: its superclass, integers [n]; the same for all images of a class.
        names: of the superclasses, by coarse label; default their numbers.

    Returns:
        (name, class indices) for each superclass that occurs, in the order of the coarse labels: a
        partition of the classes, for `Dataset.groups`.

    Raises:
        ValueError: the labels are no integers [n], leave out a class, or disagree on one; a coarse
            label has no name.
    """
    fine, coarse = np.asarray(labels), np.asarray(coarse_labels)
    for name, values in (("labels", fine), ("coarse_labels", coarse)):
        if values.dtype.kind not in "iu" or values.shape != (fine.size,) or not fine.size:
            raise ValueError(
                f"`{name}` must be integers [{fine.size or 'n'}], one for each of n >= 1 images, "
                f"got {values.dtype} {list(values.shape)}"
            )
    pairs = np.unique(np.stack([fine, coarse]), axis=1)
    classes, superclasses = np.unique(pairs[0], return_counts=True)
    if not np.array_equal(classes, np.arange(len(classes))):
        raise ValueError(
            f"`labels` must have images of every class from 0 on, got {classes.tolist()}"
        )
    if superclasses.max() > 1:
        raise ValueError(
            "`coarse_labels` must be the same for all images of a class, got several for "
            f"{classes[superclasses > 1].tolist()}"
        )
    present = np.unique(pairs[1]).tolist()
    known = list(map(str, range(max(present) + 1))) if names is None else list(names)
    unnamed = [c for c in present if not 0 <= c < len(known)]
    if unnamed:
        raise ValueError(f"`names` must name every coarse label, got {len(known)} for {unnamed}")
    return tuple((known[c], tuple(np.flatnonzero(pairs[1] == c).tolist())) for c in present)


def _base(name: str) -> str:
    """The data set's name without configuration and version."""
    return name.split("/")[0].split(":")[0]
