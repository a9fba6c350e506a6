"""What TFDS has prepared on this machine, read from the directories alone.

Nothing here imports TFDS or can reach the network: asked for a set that is not on disk, TFDS itself
would retry downloads for minutes.
"""

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

# As TFDS names them: "cifar10", "cifar10_corrupted/fog_3", each with ":1.0.0" behind or not.
_NAME = re.compile(r"(?P<base>\w+(/[\w.+-]+)?)(:(?P<version>\d+\.\d+\.\d+))?")

READABLE_FORMAT = "array_record"


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """A data set that can be loaded now.

    Attributes:
        name: what `load` takes.
        version: version of the prepared data.
        splits: (split, number of images) for each split.
        path: directory it was found in; None for data that comes with a package.
        file_format: as TFDS calls it; only "array_record" can be read without TensorFlow.
            "embedded" for data that comes with a package.
    """

    name: str
    version: str
    splits: tuple[tuple[str, int], ...]
    path: Path | None
    file_format: str

    @property
    def readable(self) -> bool:
        """Whether `load` can read it."""
        return self.file_format in (READABLE_FORMAT, "embedded")


def tfds_directory(data_dir: str | os.PathLike[str] | None) -> Path:
    """`data_dir`, else $TFDS_DATA_DIR, else TFDS's own default, ~/tensorflow_datasets."""
    return Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def prepared(directory: Path) -> list[DatasetInfo]:
    """All sets prepared in a TFDS directory, sorted by name and version."""
    depths = ("*/*/dataset_info.json", "*/*/*/dataset_info.json")
    found = [_read_info(file, directory) for depth in depths for file in directory.glob(depth)]
    return sorted(filter(None, found), key=lambda info: (info.name, _numbers(info.version)))


def find(name: str, directory: Path) -> DatasetInfo | None:
    """The newest prepared version of `name`, one that can be read if there is any, or None."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    files = (directory / match["base"]).glob("*/dataset_info.json")
    versions = [info for file in files if (info := _read_info(file, directory)) is not None]
    if match["version"]:
        versions = [info for info in versions if info.version == match["version"]]
    return max(versions, key=lambda info: (info.readable, _numbers(info.version)), default=None)


def _read_info(file: Path, directory: Path) -> DatasetInfo | None:
    """The description in a prepared directory; None for one that TFDS has not finished."""
    version = file.parent.name
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        return None
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        splits = tuple(
            (split["name"], sum(map(int, split["shardLengths"]))) for split in content["splits"]
        )
        formats = [content.get("fileFormat", "tfrecord")]
        formats += content.get("alternativeFileFormats", [])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged ({error!r}): prepare the data set anew") from error
    return DatasetInfo(
        name=file.parent.parent.relative_to(directory).as_posix(),
        version=version,
        splits=splits,
        path=file.parent,
        file_format=READABLE_FORMAT if READABLE_FORMAT in formats else formats[0],
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))
