import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

import jaxclus.data as data


def write_images(folder, images):
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i}.png")


def random_images(count, channels=3, seed=0):
    shape = (count, 6, 5, 3) if channels == 3 else (count, 6, 5)
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


# Digits


def test_digits_split():
    values, labels = load_digits(return_X_y=True)
    train, test = data.load("digits"), data.load("digits", split="test")
    assert (len(train), len(test)) == (1433, 364)
    assert train.input_shape == (8, 8, 1) and train.class_names == tuple("0123456789")
    assert train.groups == data.class_groups("digits")
    for digit, total in enumerate(np.bincount(labels)):
        assert (train.labels == digit).sum() == int(0.8 * total)
    together = np.concatenate([train.images, test.images]).reshape(-1, 64)
    scaled = np.array([round(v * 255 / 16) for v in range(17)])[values.astype(int)]
    np.testing.assert_array_equal(np.unique(together, axis=0), np.unique(scaled, axis=0))
    assert len(np.unique(scaled, axis=0)) == len(values)  # no digit twice: the parts are disjoint


def test_digits_never_change():
    """Figures of experiments rest on this split."""
    assert [data.load("digits", split).fingerprint[:16] for split in ("train", "test")] == [
        "7b95eba3024ee192",
        "5b19f0f1abc5e525",
    ]


def test_digits_split_name():
    with pytest.raises(ValueError, match="`split` must be one of test, train; got 'all'"):
        data.load("digits", split="all")


# Folders


@pytest.fixture
def folder(tmp_path):
    images = random_images(6)
    write_images(tmp_path / "pets/train/dog", images[:2])
    write_images(tmp_path / "pets/train/cat", images[2:3])
    write_images(tmp_path / "pets/train/ant", images[3:4])
    # No cats: the labels must be those of the training split all the same.
    write_images(tmp_path / "pets/test/dog", images[4:])
    (tmp_path / "pets/train/.hidden").mkdir()
    (tmp_path / "pets/train/dog/notes.txt").write_text("no image")
    return tmp_path / "pets", images


@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_folder_with_splits(folder, kind):
    root, images = folder
    train, test = data.load(kind(root)), data.load(kind(root), split="test")
    np.testing.assert_array_equal(train.images, images[[3, 2, 0, 1]])
    assert list(train.labels) == [0, 1, 2, 2] and list(test.labels) == [2, 2]
    np.testing.assert_array_equal(test.images, images[4:])
    assert train.class_names == test.class_names == ("ant", "cat", "dog")
    assert (train.name, train.split, test.split) == ("pets", "train", "test")


def test_folder_without_splits(tmp_path):
    images = random_images(3, channels=1)
    write_images(tmp_path / "train", images[:1])  # a class of trains, not a split
    write_images(tmp_path / "bus", images[1:])
    for split in ("train", "all"):
        ds = data.load(tmp_path, split=split)
        np.testing.assert_array_equal(ds.images[..., 0], images[[1, 2, 0]])
        assert ds.class_names == ("bus", "train") and ds.split == split
    with pytest.raises(ValueError, match="which has no splits.*got 'test'"):
        data.load(tmp_path, split="test")


def test_folder_split_that_is_not_there(folder):
    with pytest.raises(ValueError, match="must be one of test, train; got 'validation'"):
        data.load(folder[0], split="validation")


def test_folder_is_read_anew_when_a_file_changes(folder):
    root, images = folder
    data.load(root)
    write_images(root / "train/eel", images[5:])
    changed = data.load(root)
    assert len(changed) == 5 and changed.class_names[-1] == "eel"


def test_a_new_class_in_another_split_moves_the_labels(folder):
    """The cached training images are the same files, but their labels are not."""
    root, images = folder
    assert list(data.load(root).labels) == [0, 1, 2, 2]
    write_images(root / "test/bee", images[:1])
    changed = data.load(root)
    assert list(changed.labels) == [0, 2, 3, 3]
    assert changed.class_names == ("ant", "bee", "cat", "dog")


def test_palette_and_bilevel_images(tmp_path):
    grey = Image.fromarray(random_images(1, channels=1)[0])
    (tmp_path / "a").mkdir()
    grey.convert("1").save(tmp_path / "a/0.png")
    expected = np.asarray(grey.convert("1").convert("L"))
    np.testing.assert_array_equal(data.load(tmp_path).images[0, ..., 0], expected)
    colour = Image.fromarray(random_images(1)[0]).convert("P")
    colour.save(tmp_path / "a/0.png")
    np.testing.assert_array_equal(data.load(tmp_path).images[0], np.asarray(colour.convert("RGB")))


def test_first_file_of_another_size_is_named(tmp_path):
    write_images(tmp_path / "a", random_images(2))
    write_images(tmp_path / "b", [random_images(1)[0][:5], random_images(1)[0][:4]])
    with pytest.raises(ValueError, match=r"b/0.png is \(5, 5, 3\), but .*a/0.png is \(6, 5, 3\)"):
        data.load(tmp_path)


@pytest.mark.parametrize(
    ("mode", "message"), [("RGBA", "Pillow's mode RGBA"), ("I;16", "Pillow's mode I;16")]
)
def test_modes_that_would_lose_something(tmp_path, mode, message):
    (tmp_path / "a").mkdir()
    Image.new(mode, (4, 4)).save(tmp_path / "a/0.png")
    with pytest.raises(ValueError, match=f"a/0.png must be an 8-bit grey or RGB.*{message}"):
        data.load(tmp_path)


@pytest.mark.parametrize("keep", [0, 30])
def test_damaged_image_is_named(tmp_path, keep):
    write_images(tmp_path / "a", random_images(1))
    file = tmp_path / "a/0.png"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match="a/0.png cannot be decoded"):
        data.load(tmp_path)


def test_directory_without_images(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match="`name` must be a directory of class folders"):
        data.load(tmp_path)


# Archives


def test_npz_with_splits(tmp_path):
    images = random_images(5)
    labels = np.array([0, 1, 1, 3, 0])
    file = tmp_path / "mine.npz"
    np.savez(
        file,
        train_images=images[:3],
        train_labels=labels[:3],
        test_images=images[3:],
        test_labels=labels[3:],
    )
    train, test = data.load(file), data.load(str(file), split="test")
    np.testing.assert_array_equal(train.images, images[:3])
    np.testing.assert_array_equal(test.labels, labels[3:])
    assert train.class_names == test.class_names == ("0", "1", "2", "3")
    assert (train.name, test.split, train.labels.dtype) == ("mine", "test", np.int32)
    with pytest.raises(ValueError, match="must be one of train, test; got 'all'"):
        data.load(file, split="all")


def test_npz_without_splits(tmp_path):
    images, file = random_images(2), tmp_path / "mine.npz"
    np.savez(file, images=images, labels=[0, 1], class_names=["cat", "dog"])
    ds = data.load(file)
    np.testing.assert_array_equal(ds.images, images)
    assert ds.class_names == ("cat", "dog")
    with pytest.raises(ValueError, match="which has no splits.*got 'test'"):
        data.load(file, split="test")


def test_bad_npz(tmp_path):
    images, file = random_images(2), tmp_path / "mine.npz"
    np.savez(file, pictures=images, labels=[0, 1])
    with pytest.raises(ValueError, match="must hold `images` and `labels`.*images missing"):
        data.load(file)
    np.savez(file, images=images / 255, labels=[0, 1])
    with pytest.raises(TypeError, match="`images` must be uint8 pixels.*float64"):
        data.load(file)
    with file.open("wb") as stream:
        np.save(stream, images)
    with pytest.raises(ValueError, match="must be an .npz archive, got a single array in"):
        data.load(file)
    for content in (b"", b"no archive", b"PK\x03\x04"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="`name` must be an .npz archive, got .*mine.npz"):
            data.load(file)


def test_npz_never_unpickles(tmp_path):
    file = tmp_path / "mine.npz"
    np.savez(
        file,
        images=random_images(2),
        labels=[0, 1],
        class_names=np.array(["a", None], dtype=object),
    )
    with pytest.raises(ValueError, match="allow_pickle=False"):
        data.load(file)


def test_a_path_object_is_never_a_name(tmp_path, tiny, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "tiny/a", random_images(1))
    assert len(data.load("tiny")) == 7
    assert len(data.load(type(tmp_path)("tiny"))) == len(data.load("./tiny")) == 1
