"""Image classification sets of TensorFlow Datasets: reading without TensorFlow, and preparing."""

import importlib.util
import io
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxclus.data._cache import Decoded, cached
from jaxclus.data._catalogue import READABLE_FORMAT, DatasetInfo, find, tfds_directory
from jaxclus.data._decode import decode_image, stack_images

_CHUNK = 1000  # records read at once


def load_prepared(info: DatasetInfo, split: str) -> Decoded:
    """One split of a set that is prepared as array_record."""
    assert info.path is not None
    if not info.readable:
        raise ValueError(
            f"`name` {info.name} {info.version} in {info.path} is prepared as {info.file_format}, "
            f"which only TensorFlow reads: remove that directory, then run "
            f"jaxclus data prepare {info.name}"
        )
    source = sorted(path for path in info.path.iterdir() if path.is_file())
    return cached(info.name, info.version, split, source, lambda: _decode(info, split))


def is_known(name: str) -> bool:
    """Whether TFDS has code to prepare `name` (asks the installed package, not the network)."""
    import tensorflow_datasets as tfds

    builders = tfds.list_builders(with_community_datasets=False)
    return name.split("/")[0].split(":")[0] in builders


def prepare(name: str, data_dir: str | os.PathLike[str] | None = None) -> DatasetInfo:
    """Downloads a TFDS set and prepares it as array_record, which `load` reads.

    The one function of jaxclus that uses the network and TensorFlow. A set that is there already
    is left as it is.

    Args:
        name: name of the TFDS set, as "cifar10", "cifar10_corrupted/fog_3" or "mnist:3.0.1".
        data_dir: where it goes; default $TFDS_DATA_DIR, else ~/tensorflow_datasets.

    Returns:
        What was prepared.

    Raises:
        ImportError: TensorFlow is not installed.
        ValueError: TFDS has no such set, or it is already prepared in another format.
    """
    directory = tfds_directory(data_dir)
    info = find(name, directory)
    if info is not None and info.readable:
        return info
    if info is not None:
        raise ValueError(
            f"`name` {info.name} {info.version} is already prepared as {info.file_format} in "
            f"{info.path}: remove that directory or choose another `data_dir`"
        )
    if not is_known(name):
        raise ValueError(f"`name` must be one of TFDS's data sets, got {name!r}")
    if importlib.util.find_spec("tensorflow") is None:
        raise ImportError(
            f'preparing {name} needs TensorFlow: pip install "jaxclus[prepare]" (reading does not)'
        )
    import tensorflow_datasets as tfds

    builder = tfds.builder(name, data_dir=directory, file_format=READABLE_FORMAT)
    builder.download_and_prepare()
    # A name without configuration became TFDS's default one, as "cifar10_corrupted/brightness_1".
    base, version = builder.info.full_name.rsplit("/", 1)
    info = find(f"{base}:{version}", directory)
    assert info is not None and info.readable
    return info


def _decode(info: DatasetInfo, split: str) -> Decoded:
    import tensorflow_datasets as tfds

    assert info.path is not None
    builder: Any = tfds.builder_from_directory(info.path)
    features = builder.info.features
    image_key, label_key = _keys(features, info)
    channels = features[image_key].shape[-1]
    source = builder.as_data_source(
        split, decoders={image_key: tfds.decode.SkipDecoding()}, file_format=READABLE_FORMAT
    )
    labels = np.empty(len(source), np.int32)

    def images() -> Iterator[tuple[str, np.ndarray]]:
        for start in range(0, len(source), _CHUNK):
            chunk = range(start, min(start + _CHUNK, len(source)))
            for i, record in zip(chunk, source.__getitems__(chunk), strict=True):
                labels[i] = record[label_key]
                label = f"image {i} of {info.name}, split {split},"
                yield label, decode_image(label, io.BytesIO(record[image_key]), channels)

    pixels = stack_images(images())
    return Decoded(pixels, labels, tuple(features[label_key].names))


def _keys(features: Any, info: DatasetInfo) -> tuple[str, str]:
    """Names of the one image and the label; "label" where there are several labels."""
    import tensorflow_datasets as tfds

    images = [key for key, value in features.items() if isinstance(value, tfds.features.Image)]
    labels = [key for key, value in features.items() if isinstance(value, tfds.features.ClassLabel)]
    if len(images) != 1 or not labels or (len(labels) > 1 and "label" not in labels):
        raise ValueError(
            f"`name` must be a set with one image and one class label for each example, but "
            f"{info.name} has the images {images} and the labels {labels}"
        )
    if features[images[0]].np_dtype != np.uint8 or features[images[0]].shape[-1] not in (1, 3, 4):
        raise ValueError(
            f"`name` must be a set of uint8 images with 1, 3 or 4 channels, but {info.name} has "
            f"{features[images[0]]}"
        )
    return images[0], "label" if "label" in labels else labels[0]
