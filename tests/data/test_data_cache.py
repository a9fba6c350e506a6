import io
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from tfds_writer import write_tfds

import jaxclus.data as data
from jaxclus import runs


def cache_files() -> list[Path]:
    return sorted(runs.cache_directory().glob("*"))


@pytest.fixture
def decodings(monkeypatch):
    """How often images were really decoded."""
    from jaxclus.data import _tfds

    counted, decode = [], _tfds._decode

    def counting(*args):
        counted.append(args)
        return decode(*args)

    monkeypatch.setattr(_tfds, "_decode", counting)
    return counted


def test_the_second_load_decodes_nothing(tiny, decodings):
    first, second = data.load("tiny"), data.load("tiny")
    assert len(decodings) == 1
    assert first.fingerprint == second.fingerprint
    assert first.class_names == second.class_names == ("cat", "dog", "owl")
    assert (second.images.dtype, second.labels.dtype) == (np.uint8, np.int32)
    (file,) = cache_files()
    assert file.name.startswith("tiny-1.0.0-train-") and file.suffix == ".npz"


def test_splits_and_configurations_have_their_own_files(tmp_path, decodings):
    write_tfds(tmp_path, "noisy/fog_3")
    for split in ("train", "test"):
        data.load("noisy/fog_3", split, tmp_path)
    assert [file.name[:24] for file in cache_files()] == [
        "noisy_fog_3-1.0.0-test-" + cache_files()[0].name[23],
        "noisy_fog_3-1.0.0-train-",
    ]


def test_changed_files_are_decoded_anew(tiny, decodings):
    data.load("tiny")
    shard = next((tiny.data_dir / "tiny/1.0.0").glob("*train*"))
    os.utime(shard, ns=(1, 1))
    data.load("tiny")
    assert len(decodings) == 2


def test_another_decoder_decodes_anew(tiny, decodings, monkeypatch):
    data.load("tiny")
    monkeypatch.setattr("PIL.__version__", "0.0.1")
    data.load("tiny")
    assert len(decodings) == 2


def damage_byte(content: bytes) -> bytes:
    at = len(content) // 2
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def npy_bytes() -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros(3))
    return file.getvalue()


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: b"something else",
        lambda content: npy_bytes(),
        damage_byte,
    ],
)
def test_damaged_files_are_rebuilt(tiny, decodings, damage):
    expected = data.load("tiny").fingerprint
    (file,) = cache_files()
    file.write_bytes(damage(file.read_bytes()))
    assert data.load("tiny").fingerprint == expected
    assert len(decodings) == 2
    assert data.load("tiny").fingerprint == expected
    assert len(decodings) == 2


def test_a_whole_archive_with_a_wrong_checksum_is_rebuilt(tiny, decodings):
    """zip's own checksums fit here: only the stored SHA-256 tells."""
    expected = data.load("tiny").fingerprint
    (file,) = cache_files()
    with np.load(file) as archive:
        arrays = dict(archive)
    np.savez(file, **(arrays | {"images": arrays["images"] ^ 1}))
    assert data.load("tiny").fingerprint == expected
    arrays.pop("sha256")
    np.savez(file, **arrays)
    assert data.load("tiny").fingerprint == expected
    assert len(decodings) == 3


def test_pickles_are_never_loaded(tiny, decodings):
    data.load("tiny")
    (file,) = cache_files()
    np.savez(file, images=np.array([print], dtype=object), labels=0, class_names=0, sha256="")
    data.load("tiny")
    assert len(decodings) == 2


def test_unwritable_directory_only_warns(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv("JAXCLUS_CACHE", str(tmp_path / "file/cache"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(2):
            np.testing.assert_array_equal(data.load("tiny").images, tiny.images["train"])
    assert len(caught) == 1
    assert "JAXCLUS_CACHE" in str(caught[0].message) and "\n" not in str(caught[0].message)


def test_a_failed_write_leaves_nothing_behind(tiny, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numpy.savez", full)
    with pytest.warns(UserWarning, match="No space left on device"):
        np.testing.assert_array_equal(data.load("tiny").images, tiny.images["train"])
    assert cache_files() == []


def test_default_directory(monkeypatch):
    monkeypatch.delenv("JAXCLUS_CACHE")
    monkeypatch.setenv("HOME", "/home/someone")
    assert runs.cache_directory() == Path("/home/someone/.cache/jaxclus")
