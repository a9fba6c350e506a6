"""TFDS sets: a prepared directory written by the test itself, and the real ones where they are."""

import hashlib
import io
import json
import os
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tfds_writer import encode, write_tfds

import jaxclus.data as data

SHARED = Path(__file__).parents[3] / "shared"
REAL = Path(os.environ.get("JAXCLUS_TEST_TFDS") or SHARED / "data/tfds")
VERDICTS = SHARED / "reference/autoattack.json"


@pytest.mark.parametrize("split", ["train", "test"])
def test_reads_what_was_written(tiny, split):
    ds = data.load("tiny", split=split)
    np.testing.assert_array_equal(ds.images, tiny.images[split])
    np.testing.assert_array_equal(ds.labels, tiny.labels[split])
    assert ds.images.dtype == np.uint8 and ds.labels.dtype == np.int32
    assert ds.class_names == ("cat", "dog", "owl")
    assert (ds.name, ds.split, ds.groups) == ("tiny", split, None)


def test_needs_no_tensorflow(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # any import of it fails
    assert len(data.load("tiny")) == 7


def test_more_images_than_are_read_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxclus.data._tfds._CHUNK", 3)
    tiny = write_tfds(tmp_path, "tiny")
    ds = data.load("tiny", data_dir=tmp_path)
    np.testing.assert_array_equal(ds.images, tiny.images["train"])
    np.testing.assert_array_equal(ds.labels, tiny.labels["train"])


def test_grey_images_and_an_explicit_directory(tmp_path):
    grey = write_tfds(tmp_path / "elsewhere", "grey", channels=1)
    ds = data.load("grey", "test", data_dir=str(tmp_path / "elsewhere"))
    assert ds.input_shape == (6, 5, 1)
    np.testing.assert_array_equal(ds.images, grey.images["test"])


def test_jpeg_is_decoded_by_pillow(tmp_path):
    photos = write_tfds(tmp_path, "photos", encoding="JPEG")
    expected = [
        np.asarray(Image.open(io.BytesIO(encode(x, "JPEG")))) for x in photos.images["test"]
    ]
    np.testing.assert_array_equal(data.load("photos", "test", tmp_path).images, expected)


def test_the_label_named_label_is_taken(tmp_path):
    """CIFAR-100 has `coarse_label` besides."""
    both = write_tfds(tmp_path, "both", extra_label="coarse_label")
    np.testing.assert_array_equal(data.load("both", data_dir=tmp_path).labels, both.labels["train"])


def test_newest_version_and_configurations(tmp_path):
    for version in ("1.9.0", "1.10.0"):
        write_tfds(tmp_path, "tiny", version=version, sizes=(("train", int(version[2:-2])),))
    write_tfds(tmp_path, "noisy/fog_3")
    assert len(data.load("tiny", data_dir=tmp_path)) == 10
    assert len(data.load("tiny:1.9.0", data_dir=tmp_path)) == 9
    assert data.load("noisy/fog_3", data_dir=tmp_path).name == "noisy/fog_3"
    names = [(info.name, info.version) for info in data.available(tmp_path)]
    assert names == [
        ("digits", "1.0.0"),
        ("noisy/fog_3", "1.0.0"),
        ("tiny", "1.9.0"),
        ("tiny", "1.10.0"),
    ]


def test_known_names_get_their_groups_if_the_classes_fit(tmp_path):
    write_tfds(tmp_path, "cifar10", class_names=tuple("abcdefghij"))
    write_tfds(tmp_path, "mnist")
    assert data.load("cifar10", data_dir=tmp_path).groups == data.class_groups("cifar10")
    assert data.load("mnist", data_dir=tmp_path).groups is None


def test_available_and_info(tiny):
    expected = data.DatasetInfo(
        "tiny",
        "1.0.0",
        (("train", 7), ("test", 4)),
        tiny.data_dir / "tiny/1.0.0",
        "array_record",
    )
    assert data.available()[1:] == [expected]
    assert data.info("tiny") == expected
    assert data.info("digits").splits == (("train", 1433), ("test", 364))


def test_unfinished_preparations_are_not_listed(tiny):
    (tiny.data_dir / "tiny/1.0.0").rename(tiny.data_dir / "tiny/1.0.0.incompleteAB12")
    assert [info.name for info in data.available()] == ["digits"]


def test_not_prepared_fails_at_once(tmp_path):
    start = time.monotonic()
    with pytest.raises(FileNotFoundError) as caught:
        data.load("cifar100")
    assert time.monotonic() - start < 10
    assert str(caught.value) == (
        f"`name` cifar100 is not prepared in {tmp_path / 'tfds'}; "
        "prepare it with: jaxclus data prepare cifar100"
    )
    with pytest.raises(FileNotFoundError, match=f"prepare cifar100 --data-dir {tmp_path}$"):
        data.info("cifar100", data_dir=tmp_path)


def test_default_directory_is_that_of_tfds(monkeypatch):
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", "/nowhere")
    with pytest.raises(FileNotFoundError, match="/nowhere/tensorflow_datasets;"):
        data.load("cifar100")


def test_unknown_name_lists_what_is_there(tiny):
    for function in (data.load, data.info):
        with pytest.raises(ValueError, match="one of digits, tiny .*got 'no_such_set'") as caught:
            function("no_such_set")
        assert "\n" not in str(caught.value)


def test_unknown_split(tiny):
    with pytest.raises(ValueError, match="`split` must be one of test, train; got 'validation'"):
        data.load("tiny", split="validation")


def test_tfrecord_is_named(tmp_path):
    write_tfds(tmp_path, "tiny", file_format="tfrecord")
    with pytest.raises(ValueError, match="tiny 1.0.0 in .* is prepared as tfrecord.*data prepare"):
        data.load("tiny", data_dir=tmp_path)
    with pytest.raises(ValueError, match="already prepared as tfrecord.*remove that directory"):
        data.prepare("tiny", data_dir=tmp_path)
    assert [info.readable for info in data.available(tmp_path)] == [True, False]
    # An older version that can be read is better than a newer one that cannot.
    write_tfds(tmp_path, "tiny", version="0.9.0")
    assert len(data.load("tiny", data_dir=tmp_path)) == 7


def test_array_record_beside_tfrecord_is_read(tmp_path):
    """As `tfds convert_format` leaves it."""
    both = write_tfds(tmp_path, "tiny")
    file = tmp_path / "tiny/1.0.0/dataset_info.json"
    info = json.loads(file.read_text())
    file.write_text(
        json.dumps(info | {"fileFormat": "tfrecord", "alternativeFileFormats": ["array_record"]})
    )
    np.testing.assert_array_equal(data.load("tiny", data_dir=tmp_path).images, both.images["train"])


def test_damaged_description_is_named(tiny):
    file = tiny.data_dir / "tiny/1.0.0/dataset_info.json"
    file.write_text(file.read_text()[:50])
    with pytest.raises(ValueError, match="dataset_info.json is damaged"):
        data.load("tiny")


def test_sets_that_are_no_image_classification(tmp_path):
    write_tfds(tmp_path, "tiny")
    file = tmp_path / "tiny/1.0.0/features.json"
    features = json.loads(file.read_text())
    both = features["featuresDict"]["features"]
    both["second_image"] = both["image"]
    file.write_text(json.dumps(features))
    with pytest.raises(ValueError, match="one image and one class label.*second_image"):
        data.load("tiny", data_dir=tmp_path)
    del both["second_image"]
    both["image"]["image"]["dtype"] = "uint16"
    file.write_text(json.dumps(features))
    with pytest.raises(ValueError, match="uint8 images with 1, 3 or 4 channels.*uint16"):
        data.load("tiny", data_dir=tmp_path)


def test_prepare_without_tensorflow_fails_at_once(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError) as caught:
        data.prepare("cifar100")
    assert 'pip install "jaxclus[prepare]"' in str(caught.value)
    assert "\n" not in str(caught.value)


def test_prepare_asks_tfds_for_array_record(tmp_path, monkeypatch):
    """TensorFlow is not here: what TFDS would do is stood in for."""

    def builder(name, data_dir, file_format):
        def download_and_prepare():
            write_tfds(Path(data_dir), f"{name}/fog_1", file_format=file_format)

        info = types.SimpleNamespace(full_name=f"{name}/fog_1/1.0.0")
        return types.SimpleNamespace(download_and_prepare=download_and_prepare, info=info)

    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("tensorflow_datasets.builder", builder)
    info = data.prepare("cifar10_corrupted", data_dir=tmp_path)
    assert info == data.info("cifar10_corrupted/fog_1", data_dir=tmp_path)
    with pytest.raises(ValueError, match="`name` must be one of TFDS's data sets"):
        data.prepare("no_such_set", data_dir=tmp_path)


def test_prepare_leaves_what_is_there(tiny):
    assert data.prepare("tiny") == data.info("tiny")


@pytest.mark.skipif(
    not (REAL.is_dir() and VERDICTS.is_file()), reason="../shared is absent: no real TFDS sets"
)
@pytest.mark.parametrize("name", ["cifar10", "mnist", "fashion_mnist"])
def test_real_sets_are_decoded_as_the_reference_did(name):
    """Bytes and labels of the first test images, as AutoAttack's reference run saw them."""
    ds = data.load(name, split="test", data_dir=REAL)
    assert len(ds) == 10_000
    for count, expected in json.loads(VERDICTS.read_text())["data"][name].items():
        first = ds.take(int(count))
        assert hashlib.sha256(first.images.tobytes()).hexdigest() == expected["images_sha256"]
        assert "".join(map(str, first.labels)) == expected["labels"]
