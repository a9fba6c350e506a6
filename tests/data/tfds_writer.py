"""Writes prepared TFDS directories, byte by byte and without TFDS's own writer."""

import io
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.proto import tf_example_generated_pb2 as proto


class Prepared(NamedTuple):
    """A prepared TFDS directory written by `write_tfds`, and what it holds."""

    data_dir: Path
    images: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]
    class_names: list[str]


def write_tfds(
    data_dir: Path,
    name: str,
    version: str = "1.0.0",
    channels: int = 3,
    class_names: tuple[str, ...] = ("cat", "dog", "owl"),
    file_format: str = "array_record",
    extra_label: str | None = None,
    encoding: str = "PNG",
    sizes: tuple[tuple[str, int], ...] = (("train", 7), ("test", 4)),
) -> Prepared:
    """Random images of the size 6 x 5 with random labels, one shard for each split."""
    folder = data_dir / name / version
    folder.mkdir(parents=True)
    base = name.split("/")[0]
    rng = np.random.default_rng(3)
    images = {s: rng.integers(0, 256, (n, 6, 5, channels)).astype(np.uint8) for s, n in sizes}
    labels = {s: rng.integers(0, len(class_names), n) for s, n in sizes}
    for split, _ in sizes:
        _write_shard(
            folder / f"{base}-{split}.{file_format}-00000-of-00001",
            [
                _example(encode(image, encoding), label, extra_label)
                for image, label in zip(images[split], labels[split], strict=True)
            ],
        )
    label_names = ["label"] + ([extra_label] if extra_label else [])
    for label_name in label_names:
        (folder / f"{label_name}.labels.txt").write_text("\n".join(class_names) + "\n")
    info = {
        "name": base,
        "version": version,
        "fileFormat": file_format,
        "moduleName": "tensorflow_datasets.core.dataset_builders.adhoc_builder",
        "splits": [
            {
                "name": split,
                "numBytes": "1",
                "shardLengths": [str(count)],
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            }
            for split, count in sizes
        ],
    }
    if "/" in name:
        info["configName"] = name.split("/")[1]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (folder / "features.json").write_text(
        json.dumps(_features(channels, len(class_names), label_names))
    )
    return Prepared(data_dir, images, labels, list(class_names))


def _features(channels, num_classes, label_names):
    core = "tensorflow_datasets.core.features"
    label = {
        "classLabel": {"numClasses": str(num_classes)},
        "pythonClassName": f"{core}.class_label_feature.ClassLabel",
    }
    image = {
        "image": {"dtype": "uint8", "shape": {"dimensions": ["6", "5", str(channels)]}},
        "pythonClassName": f"{core}.image_feature.Image",
    }
    return {
        "pythonClassName": f"{core}.features_dict.FeaturesDict",
        "featuresDict": {"features": {"image": image} | dict.fromkeys(label_names, label)},
    }


def encode(image: np.ndarray, encoding: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(file, encoding)
    return file.getvalue()


def _example(image: bytes, label: int, extra_label: str | None) -> bytes:
    example = proto.Example()
    example.features.feature["image"].bytes_list.value.append(image)
    example.features.feature["label"].int64_list.value.append(int(label))
    if extra_label:
        example.features.feature[extra_label].int64_list.value.append(0)
    return example.SerializeToString()


def _write_shard(path: Path, records: list[bytes]) -> None:
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
