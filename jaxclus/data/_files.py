"""Data sets from files of the user: class folders of images, and .npz archives."""

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jaxclus.data._cache import Decoded, cached
from jaxclus.data._decode import decode_image, stack_images

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


def load_folder(root: Path, split: str) -> Decoded:
    """Images in `root/SPLIT/CLASS/*`, or in `root/CLASS/*` where there are no splits.

    The classes are those of all splits, sorted by name, so that a class that is absent from one
    split does not shift the labels. Hidden entries and files that are no images are passed over.
    """
    splits = [path for path in _folders(root) if path.name in ("train", "test") and _folders(path)]
    if splits:
        splits = _folders(root)
        _check_split(root, split, [path.name for path in splits])
    else:
        _check_no_split(root, split)
        splits = [root]
    names = sorted({folder.name for path in splits for folder in _folders(path)})
    files = _image_files(root / split if root not in splits else root, names)
    if not files:
        raise ValueError(f"`name` must be a directory of class folders of images, got {root}")

    labels = np.array([label for _, label in files], np.int32)

    def decode() -> Decoded:
        images = stack_images((str(file), decode_image(str(file), str(file))) for file, _ in files)
        return Decoded(images, labels, tuple(names))

    source = [file for file, _ in files]
    images = cached(root.resolve().name, "folder", split, source, decode).images
    # Not the cached labels: a class that is new in another split changes them, but no file here.
    return Decoded(images, labels, tuple(names))


def load_npz(path: Path, split: str) -> Decoded:
    """`SPLIT_images`, `SPLIT_labels`, or `images`, `labels`; and `class_names` if there."""
    with path.open("rb") as file:
        try:
            archive = np.load(file, allow_pickle=False)
        except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"`name` must be an .npz archive, got {path}: {error}") from error
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError(f"`name` must be an .npz archive, got a single array in {path}")
        with archive:
            return _from_archive(archive, path, split)


def _from_archive(archive: Mapping[str, np.ndarray], path: Path, split: str) -> Decoded:
    splits = [key.removesuffix("_images") for key in archive if key.endswith("_images")]
    if splits:
        _check_split(path, split, splits)
        keys = [f"{split}_images", f"{split}_labels"]
    else:
        _check_no_split(path, split)
        keys = ["images", "labels"]
    if missing := [key for key in keys if key not in archive]:
        raise ValueError(
            f"{path} must hold `images` and `labels`, or `train_images`, `train_labels`, "
            f"`test_images` and `test_labels`; {' and '.join(missing)} missing"
        )
    if "class_names" in archive:
        names = tuple(map(str, archive["class_names"]))
    else:
        # Over all splits, so that train and test agree on the number of classes.
        largest = max(archive[key].max() for key in archive if key.endswith("labels"))
        names = tuple(map(str, range(int(largest) + 1)))
    return Decoded(archive[keys[0]], archive[keys[1]], names)


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and path.name[0] != ".")


def _image_files(root: Path, names: list[str]) -> list[tuple[Path, int]]:
    """The image files of the class folders in `root` with their labels, sorted by name."""
    return [
        (root / name / file, label)
        for label, name in enumerate(names)
        if (root / name).is_dir()
        for file in sorted(os.listdir(root / name))
        if file.lower().endswith(_SUFFIXES) and file[0] != "."
    ]


def _check_split(path: Path, split: str, splits: list[str]) -> None:
    if split not in splits:
        raise ValueError(f"`split` of {path} must be one of {', '.join(splits)}; got {split!r}")


def _check_no_split(path: Path, split: str) -> None:
    # Handing out the training images as "test" would make every figure on them worthless.
    if split not in ("train", "all"):
        raise ValueError(
            f'`split` of {path}, which has no splits, must be "train" or "all", '
            f"each meaning all its images; got {split!r}"
        )
