"""`load` and the functions behind `jaxclus data`: every source of data sets under one name."""

import os
from pathlib import Path

import numpy as np

from jaxclus import _checks
from jaxclus.data import _catalogue, _tfds
from jaxclus.data._cache import Decoded
from jaxclus.data._catalogue import DatasetInfo
from jaxclus.data._dataset import Dataset
from jaxclus.data._files import load_folder, load_npz
from jaxclus.data._groups import class_groups

# How many of scikit-learn's digits the two parts of the fixed split hold.
_DIGITS = DatasetInfo("digits", "1.0.0", (("train", 1433), ("test", 364)), None, "embedded")


def load(
    name: str | os.PathLike[str],
    split: str = "train",
    data_dir: str | os.PathLike[str] | None = None,
) -> Dataset:
    """Loads a data set into memory. Nothing is ever downloaded.

    What `name` can be, in the order of looking:

    - "digits": scikit-learn's 1,797 digits, 8 x 8, values 0 to 16 scaled to round(255 v / 16). The
      split is fixed: each class in the order of NumPy's `RandomState(0)`, the first 80 % train, the
      rest test.
    - an image classification set of TFDS that is prepared as array_record, as "cifar10",
      "cifar10_corrupted/fog_3" or "mnist:3.0.1". Without a version, the newest one.
    - a directory of class folders of images, `root/train/CLASS/*` and `root/test/CLASS/*`, or
      `root/CLASS/*`; all images of one size, 8-bit grey or colour.
    - an .npz archive of `train_images`, `train_labels`, `test_images` and `test_labels`, or of
      `images` and `labels`, with `class_names` if wanted.

    Decoded images of TFDS sets and folders are kept in $JAXCLUS_CACHE (default ~/.cache/jaxclus)
    and decoded anew when the files have changed.

    Args:
        name: a name, or a path; a `Path` object is never taken for a name.
        split: "train", "test", or another split that the data has. Data without splits has
            "train" and "all", the same images.
        data_dir: TFDS directory; default $TFDS_DATA_DIR, else ~/tensorflow_datasets.

    Returns:
        The images in the order of the source, with the class groups that ship for `name`.

    Raises:
        FileNotFoundError: `name` is a set that TFDS knows, but is not prepared here.
        ValueError: `name` is unknown, or there is no such split, or the data is not as it must be.
    """
    info = None if isinstance(name, os.PathLike) else _find(name, data_dir)
    if info is not None:
        _checks.one_of("split", split, [known for known, _ in info.splits])
        decoded = _digits(split) if info is _DIGITS else _tfds.load_prepared(info, split)
        return _dataset(decoded, info.name, split)
    path = Path(name).expanduser()
    if path.is_dir():
        return _dataset(load_folder(path, split), path.resolve().name, split)
    if path.is_file() and path.suffix == ".npz":
        return _dataset(load_npz(path, split), path.stem, split)
    raise _not_found(os.fspath(name), data_dir)


def available(data_dir: str | os.PathLike[str] | None = None) -> list[DatasetInfo]:
    """The data sets that are here now: "digits", and what TFDS has prepared.

    Args:
        data_dir: TFDS directory; default $TFDS_DATA_DIR, else ~/tensorflow_datasets.

    Returns:
        Their descriptions, with every version, also those in formats that cannot be read
        (`DatasetInfo.readable` says which).
    """
    return [_DIGITS, *_catalogue.prepared(_catalogue.tfds_directory(data_dir))]


def info(name: str, data_dir: str | os.PathLike[str] | None = None) -> DatasetInfo:
    """The description of one named data set, the one that `load` would take.

    Args:
        name: "digits", or the name of a prepared TFDS set.
        data_dir: TFDS directory; default $TFDS_DATA_DIR, else ~/tensorflow_datasets.

    Raises:
        FileNotFoundError: TFDS knows the set, but it is not prepared here.
        ValueError: `name` is unknown.
    """
    found = _find(name, data_dir)
    if found is None:
        raise _not_found(name, data_dir)
    return found


def _find(name: str, data_dir: str | os.PathLike[str] | None) -> DatasetInfo | None:
    if name == "digits":
        return _DIGITS
    return _catalogue.find(name, _catalogue.tfds_directory(data_dir))


def _not_found(name: str, data_dir: str | os.PathLike[str] | None) -> Exception:
    directory = _catalogue.tfds_directory(data_dir)
    if _tfds.is_known(name):
        option = "" if data_dir is None else f" --data-dir {directory}"
        return FileNotFoundError(
            f"`name` {name} is not prepared in {directory}; prepare it with: "
            f"jaxclus data prepare {name}{option}"
        )
    known = ", ".join(sorted({info.name for info in available(data_dir)}))
    return ValueError(
        f"`name` must be one of {known} (prepared in {directory}), another TFDS set after "
        f"jaxclus data prepare NAME, or the path of a directory of class folders or of an .npz "
        f"file; got {name!r}"
    )


def _dataset(decoded: Decoded, name: str, split: str) -> Dataset:
    groups = class_groups(name)
    # Groups of a set that only shares its name with the well-known one would be wrong.
    if groups is not None and sum(len(members) for _, members in groups) != len(
        decoded.class_names
    ):
        groups = None
    return Dataset(*decoded, groups=groups, name=name, split=split)


def _digits(split: str) -> Decoded:
    from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)
    # RandomState's stream never changes (NEP 19), so neither does the split.
    order = np.random.RandomState(0).permutation(len(labels))
    train = np.zeros(len(labels), bool)
    for label in range(10):
        members = order[labels[order] == label]
        train[members[: int(0.8 * len(members))]] = True
    chosen = train if split == "train" else ~train
    images = np.round(values.reshape(-1, 8, 8, 1) * 255 / 16).astype(np.uint8)
    return Decoded(images[chosen], labels[chosen].astype(np.int32), tuple(map(str, range(10))))
