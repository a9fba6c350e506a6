"""`Dataset`: images in memory as uint8 [n, h, w, c] with int32 labels [n], class names and groups.

Pixels stay uint8 until a step needs them: a whole data set then fits on the device, and `to_float`
makes the float32 images in [0, 1] that models and attacks take.
"""

import dataclasses
import functools
import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from jaxclus import _checks

# Named groups of classes, each with the indices of its classes.
Groups = tuple[tuple[str, tuple[int, ...]], ...]

_PIXELS = np.arange(256, dtype=np.float32) / np.float32(255)


def to_float(images: Any) -> Float32[Array, "..."]:
    """Images on the pixel scale [0, 1]: each value divided by 255, correctly rounded.

    The quotients come from a table of all 256, because XLA turns a division by a constant into a
    product with its rounded reciprocal, which is one unit in the last place off for half of them.
    Works inside `jax.jit`.

    Args:
        images: uint8, any shape.

    Returns:
        float32 of the same shape, in [0, 1].

    Raises:
        TypeError: `images` is not uint8.
    """
    if jnp.result_type(images) != jnp.uint8:
        raise TypeError(f"`images` must be uint8, got dtype {jnp.result_type(images)}")
    if isinstance(images, np.ndarray):  # no program to compile for every shape
        return jnp.asarray(_PIXELS[images])
    return jnp.asarray(_PIXELS).at[jnp.asarray(images)].get(mode="promise_in_bounds")


def digest(*arrays: np.ndarray) -> str:
    """SHA-256, as hex digits, of the arrays' shapes and C-ordered bytes."""
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(str(array.shape).encode())
        # As bytes, since NumPy has no buffers of bfloat16.
        sha.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return sha.hexdigest()


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Labelled images of one size, in memory; read-only.

    A user's own arrays are a data set too: `Dataset(images, labels)`.

    Attributes:
        images: uint8 [n, h, w, c], 0 to 255, n at least 1.
        labels: int32 [n], class indices from 0 (other integers are converted).
        class_names: one name for each class; default "0", "1", ... up to the largest label.
        groups: named groups of classes, ((name, (class index, ...)), ...), each class in exactly
            one and no group empty; or None.
        name: name of the data set.
        split: name of the split, as "train" or "test".
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...] = ()
    groups: Groups | None = None
    name: str = "custom"
    split: str = "all"

    def __post_init__(self) -> None:
        images, labels = _images(self.images), _labels(self.labels, len(self.images))
        names = tuple(self.class_names) or tuple(map(str, range(int(labels.max()) + 1)))
        _check_labels(labels, names)
        if self.groups is not None:
            check_groups(self.groups, len(names), partition=True)
        object.__setattr__(self, "images", images)
        object.__setattr__(self, "labels", labels)
        object.__setattr__(self, "class_names", names)

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        size = "x".join(map(str, self.input_shape))
        return (
            f"Dataset(name={self.name!r}, split={self.split!r}, {len(self)} images {size}, "
            f"{self.num_classes} classes)"
        )

    @property
    def num_classes(self) -> int:
        """Number of classes, k."""
        return len(self.class_names)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape of one image, (h, w, c)."""
        _, height, width, channels = self.images.shape
        return height, width, channels

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256, as hex digits, of the shapes and bytes of images and labels."""
        return digest(self.images, self.labels)

    def take(self, n: int) -> "Dataset":
        """The first `n` images; raises ValueError unless there are that many."""
        _checks.at_least("n", n, 1)
        if n > len(self):
            raise ValueError(f"`n` must be at most {len(self)}, the number of images, got {n}")
        return dataclasses.replace(self, images=self.images[:n], labels=self.labels[:n])

    def subset(self, indices: Any) -> "Dataset":
        """The images with these numbers, in this order.

        Args:
            indices: integers [m], each in [0, n), m at least 1; repeats are allowed.

        Returns:
            The data set of those m images, with the same classes and groups.

        Raises:
            TypeError, ValueError: `indices` is anything else, as a mask or a negative number.
        """
        indices = np.asarray(indices)
        if not np.issubdtype(indices.dtype, np.integer):
            raise TypeError(f"`indices` must be integers, got dtype {indices.dtype}")
        if indices.ndim != 1 or not len(indices):
            raise ValueError(f"`indices` must have the shape [m], m > 0, got {indices.shape}")
        if indices.min() < 0 or indices.max() >= len(self):
            raise ValueError(
                f"`indices` must be in [0, {len(self) - 1}], got {indices.min()} to {indices.max()}"
            )
        return dataclasses.replace(self, images=self.images[indices], labels=self.labels[indices])

    def holdout(self, key: jax.Array, fraction: float) -> tuple["Dataset", "Dataset"]:
        """Splits off a validation set, the same share of every class.

        Of each class's m images, round(fraction * m) (halves up) are drawn without replacement.
        Both parts keep the order of the images. The same key gives the same parts.

        Args:
            key: a typed key.
            fraction: share of each class that is held out, in (0, 1).

        Returns:
            The rest, under the same split name, and the held-out part, split "validation".

        Raises:
            ValueError: `fraction` is outside (0, 1) or leaves one part empty.
        """
        _checks.typed_key("key", key)
        if not 0 < fraction < 1:
            raise ValueError(f"`fraction` must be in (0, 1), got {fraction!r}")
        order = np.asarray(jax.random.permutation(key, len(self)))
        held = np.zeros(len(self), bool)
        for label in range(self.num_classes):
            members = order[self.labels[order] == label]
            held[members[: int(fraction * len(members) + 0.5)]] = True
        if held.all() or not held.any():
            raise ValueError(
                f"`fraction` must leave images in both parts, got {fraction!r} of {len(self)} "
                f"images in {self.num_classes} classes"
            )
        validation = self.subset(np.flatnonzero(held))
        return (
            self.subset(np.flatnonzero(~held)),
            dataclasses.replace(validation, split="validation"),
        )


def _images(images: Any) -> np.ndarray:
    """The images as a read-only array, checked."""
    images = np.asarray(images)
    if images.dtype != np.uint8:
        raise TypeError(f"`images` must be uint8 pixels, 0 to 255, got dtype {images.dtype}")
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(
            f"`images` must have the shape [n, h, w, c], none of them 0, got {images.shape}"
        )
    return _read_only(images)


def _labels(labels: Any, count: int) -> np.ndarray:
    """The labels as a read-only int32 array, dtype and shape checked."""
    labels = np.asarray(labels)
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"`labels` must be integers, got dtype {labels.dtype}")
    if labels.shape != (count,):
        raise ValueError(
            f"`labels` must have the shape ({count},), one for each image, got {labels.shape}"
        )
    if labels.min() < 0 or labels.max() > np.iinfo(np.int32).max:
        raise ValueError(f"`labels` must be at least 0, got {labels.min()} to {labels.max()}")
    return _read_only(labels.astype(np.int32, copy=False))


def _read_only(array: np.ndarray) -> np.ndarray:
    """A view that cannot be written to (the caller's own array still can)."""
    view = array.view()
    view.flags.writeable = False
    return view


def _check_labels(labels: np.ndarray, names: tuple[str, ...]) -> None:
    if labels.max() >= len(names):
        raise ValueError(
            f"`labels` must be in [0, {len(names) - 1}], one of the {len(names)} `class_names`, "
            f"got {labels.max()}"
        )
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"`class_names` must be different, got {twice!r} more than once")


def check_groups(groups: Any, num_classes: int, *, partition: bool) -> None:
    """Raises unless `groups` are names with their classes, each name and each class at most once.

    Args:
        groups: whatever was given as ((name, (class index, ...)), ...).
        num_classes: k; the indices are in [0, k).
        partition: whether each class must be in a group, and no group be empty.

    Raises:
        TypeError: `groups` have another form.
        ValueError: they hold other classes, or one of them or a name twice.
    """
    _check_form(groups)
    classes = [c for _, members in groups for c in members]
    for c in classes:
        if not isinstance(c, (int, np.integer)) or not 0 <= c < num_classes:
            raise ValueError(
                f"`groups` must hold class indices in [0, {num_classes - 1}], got {c!r}"
            )
    names = [name for name, _ in groups]
    for what, held in (("each class", classes), ("different names, each name", names)):
        twice = [one for one, count in Counter(held).items() if count > 1]
        if twice:
            raise ValueError(f"`groups` must hold {what} once, got {twice[0]!r} twice")
    if partition and len(classes) < num_classes:
        raise ValueError(
            f"`groups` must hold each class index from 0 to {num_classes - 1} exactly once, "
            f"got {sorted(classes)}"
        )
    empty = [name for name, members in groups if not members]
    if partition and empty:
        raise ValueError(f"`groups` must have at least one class each, got none in {empty[0]!r}")


def _check_form(groups: Any) -> None:
    allowed = "`groups` must be ((name, (class index, ...)), ...)"
    if not _is_sequence(groups):
        raise TypeError(f"{allowed}, got {type(groups).__name__}")
    for group in groups:
        pair = _is_sequence(group) and len(group) == 2
        if not (pair and isinstance(group[0], str) and _is_sequence(group[1])):
            one_line = " ".join(repr(group).split())  # an array's has several
            raise TypeError(f"{allowed}, got the group {one_line}")


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
