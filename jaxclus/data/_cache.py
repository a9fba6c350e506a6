"""Decoded images on disk, so that a data set is decoded once and not at every start."""

import functools
import hashlib
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxclus import runs
from jaxclus.data._dataset import digest

_FORMAT = 1  # raise it whenever what the file holds, or how images are decoded, changes


class Decoded(NamedTuple):
    """What a source holds, before groups are attached and everything is checked."""

    images: np.ndarray  # uint8 [n, h, w, c]
    labels: np.ndarray  # int32 [n]
    class_names: tuple[str, ...]


def cached(
    name: str, version: str, split: str, source: Iterable[Path], decode: Callable[[], Decoded]
) -> Decoded:
    """What `decode()` returns, from the cache where it is there and whole.

    A file is trusted only if the SHA-256 stored in it is that of its arrays; a damaged one is
    written anew. Where nothing can be written, everything works without the cache, with a warning.

    Args:
        name, version, split: of the data set; they begin the file's name.
        source: the files that are decoded. Their paths, sizes and modification times and the
            decoder's version end the file's name, so that changed data is decoded anew.
        decode: decodes the source.
    """
    stem = re.sub(r"[^\w.-]+", "_", f"{name}-{version}-{split}-{_source_hash(source)}")
    path = runs.cache_directory() / f"{stem}.npz"
    decoded = _read(path)
    if decoded is None:
        decoded = decode()
        try:
            _write(path, decoded)
        except OSError as error:
            _warn_once(
                f"decoded images are not kept for the next time: {path.parent} cannot be written "
                f"({error.strerror or error}); JAXCLUS_CACHE names another directory"
            )
    return decoded


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def _source_hash(source: Iterable[Path]) -> str:
    from PIL import __version__, features

    decoder = (__version__, features.version("jpg"), features.version("libjpeg_turbo"))
    sha = hashlib.sha256(repr((_FORMAT, decoder)).encode())
    for file in source:
        status = file.stat()
        sha.update(repr((str(file.resolve()), status.st_size, status.st_mtime_ns)).encode())
    return sha.hexdigest()[:16]


def _read(path: Path) -> Decoded | None:
    """The cache file's content, or None where there is none or it is damaged."""
    try:
        # Opened here because NumPy leaves a file open that turns out to be no archive.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            images, labels, names = (archive[key] for key in ("images", "labels", "class_names"))
            whole = str(archive["sha256"]) == digest(images, labels, names)
    # What NumPy and zipfile raise for truncated, overwritten and foreign files.
    except (OSError, EOFError, KeyError, TypeError, ValueError, RuntimeError, zipfile.BadZipFile):
        return None
    return Decoded(images, labels, tuple(map(str, names))) if whole else None


def _write(path: Path, decoded: Decoded) -> None:
    names = np.array(decoded.class_names)
    sha256 = np.array(digest(decoded.images, decoded.labels, names))
    with runs.atomic_file(path) as file:
        np.savez(
            file, images=decoded.images, labels=decoded.labels, class_names=names, sha256=sha256
        )
