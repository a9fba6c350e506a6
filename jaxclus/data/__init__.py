"""Data sets as uint8 arrays in memory, their class groups, and augmentation on the device."""

from jaxclus.data._augment import NO_AUGMENTATION, Augmentation, default_augmentation
from jaxclus.data._catalogue import DatasetInfo
from jaxclus.data._dataset import Dataset, Groups, to_float
from jaxclus.data._groups import class_groups, coarse_groups, transfer_groups
from jaxclus.data._load import available, info, load
from jaxclus.data._subclasses import SubclassSplit, cifar20, split_subclasses
from jaxclus.data._tfds import prepare

__all__ = [
    "NO_AUGMENTATION",
    "Augmentation",
    "Dataset",
    "DatasetInfo",
    "Groups",
    "SubclassSplit",
    "available",
    "cifar20",
    "class_groups",
    "coarse_groups",
    "default_augmentation",
    "info",
    "load",
    "prepare",
    "split_subclasses",
    "to_float",
    "transfer_groups",
]
