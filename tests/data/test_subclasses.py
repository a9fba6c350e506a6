import dataclasses

import jaxtyping
import numpy as np
import pytest
from tfds_writer import write_tfds

import jaxclus as jc
from jaxclus.data import Dataset, cifar20, class_groups, default_augmentation, split_subclasses
from jaxclus.data._groups import _CIFAR100_NAMES

GROUPS = (("b", (5, 0, 3)), ("alone", (1,)), ("a", (2, 4)))
FORM = r"`groups` must be \(\(name, \(class index, \.\.\.\)\), \.\.\.\)"
NAMES = ("zero", "one", "two", "three", "four", "five")
# The published tables: fine labels of each superclass's source, and of its target.
SOURCE = [(1, 32, 67, 73), (54, 62, 70, 82), (22, 39, 40, 86), (2, 11, 35, 46)]
TARGET = [91, 92, 87, 98]
TARGET_NAMES = ["trout", "tulip", "television", "woman"]


@pytest.fixture
def as_users_call(monkeypatch):
    """Without the checks of annotations, which in the tests come before our own."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def make(n=60, **changes):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, 2, 3, 1)).astype(np.uint8)
    kwargs = {"class_names": NAMES, "groups": GROUPS, "name": "own", "split": "train"} | changes
    return Dataset(images, rng.permutation(np.arange(n) % 6), **kwargs)


def like_cifar100(**changes):
    """Every class three times in random order; the first two pixels tell class and place."""
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(100), 3))
    images = np.zeros((300, 2, 2, 1), np.uint8)
    images[:, 0, 0, 0], images[:, 0, 1, 0] = labels, np.arange(300) % 256
    kwargs = {"groups": class_groups("cifar100"), "name": "cifar100", "split": "test"} | changes
    return Dataset(images, labels, tuple(_CIFAR100_NAMES), **kwargs)


def by_loops(data, target):
    """(image number, label) of source and target for GROUPS, written out."""
    taking_part = [(0, 3, 5), (2, 4)]
    held = [members[target] for members in taking_part]
    kept = [c for members in taking_part for c in members if c not in held]
    pairs = list(enumerate(data.labels.tolist()))
    return (
        [(i, kept.index(c)) for i, c in pairs if c in kept],
        [(i, held.index(c)) for i, c in pairs if c in held],
    )


@pytest.mark.parametrize(
    ("target", "kept", "held", "members"),
    [
        (-1, ("zero", "three", "two"), (5, 4), ((0, 1), (2,))),
        (1, ("zero", "five", "two"), (3, 4), ((0, 1), (2,))),
        (0, ("three", "five", "four"), (0, 2), ((0, 1), (2,))),
        (-2, ("zero", "five", "four"), (3, 2), ((0, 1), (2,))),
    ],
)
def test_split_against_loops(target, kept, held, members):
    data = make()
    source, goal = split_subclasses(data, target=target)
    for part, wanted in zip((source, goal), by_loops(data, target), strict=True):
        numbers, labels = zip(*wanted, strict=True)
        np.testing.assert_array_equal(part.images, data.images[list(numbers)])
        np.testing.assert_array_equal(part.labels, labels)
        assert part.split == "train"
    assert source.class_names == kept
    assert source.groups == tuple(zip(("b", "a"), members, strict=True))
    assert (goal.class_names, goal.groups) == (("b", "a"), None)
    assert set(data.labels[np.isin(data.labels, held)]) == set(held)
    assert (source.name, goal.name) == ("own/source", "own/target")


def test_groups_that_are_given_win_and_need_not_cover_all_classes():
    source, target = split_subclasses(make(), (("x", (4, 1)), ("y", (2, 0))))
    assert source.class_names == ("one", "zero")
    assert source.groups == (("x", (0,)), ("y", (1,)))
    assert target.class_names == ("x", "y")
    assert len(source) == len(target) == 20


def test_fashion_mnist_has_two_superclasses_and_keeps_its_augmentation():
    fashion = make(20, class_names=tuple("abcdefghij"), groups=None, name="fashion_mnist")
    fashion = dataclasses.replace(
        fashion, labels=np.arange(20) % 10, groups=class_groups("fashion_mnist")
    )
    source, target = split_subclasses(fashion)
    assert source.groups == (("shoulders", (0, 1, 2, 3)), ("feet", (4, 5)))
    assert source.class_names == tuple("acde" + "fh")
    assert target.class_names == ("shoulders", "feet")
    for part in (source, target):
        assert default_augmentation(part.name) == default_augmentation("fashion_mnist")
        assert default_augmentation(part.name) != jc.data.NO_AUGMENTATION


@pytest.mark.parametrize(
    ("changes", "arguments", "error", "message"),
    [
        ({"groups": None}, {}, ValueError, "`groups` must be given for 'own', which has none"),
        (
            {"groups": (("x", (0, 1, 2, 3, 4)), ("y", (5,)))},
            {},
            ValueError,
            r"at least two groups of two classes or more, got \[\('x', 5\), \('y', 1\)\]",
        ),
        ({}, {"groups": ()}, ValueError, r"at least two groups of two classes or more, got \[\]"),
        ({}, {"groups": (("x", (0, 1)), ("y", (2, 6)))}, ValueError, r"in \[0, 5\], got 6"),
        ({}, {"groups": (("x", (0, 1)), ("y", (2, -1)))}, ValueError, r"in \[0, 5\], got -1"),
        ({}, {"groups": (("x", (0, 1)), ("y", (2, 3.0)))}, ValueError, r"in \[0, 5\], got 3.0"),
        ({}, {"groups": (("x", (0, 1)), ("y", (2, 1)))}, ValueError, "each class once, got 1"),
        ({}, {"groups": (("x", (0, 1)), ("x", (2, 3)))}, ValueError, "each name once, got 'x'"),
        ({}, {"groups": [0, 0, 0, 1, 1, 1]}, TypeError, rf"{FORM}, got the group 0$"),
        ({}, {"target": 2}, ValueError, r"`target` must be in \[-2, 1\], a place in 'a' of 2.*2"),
        ({}, {"target": -3}, ValueError, r"`target` must be in \[-2, 1\], .* got -3"),
        ({}, {"target": 1.0}, TypeError, "`target` must be an integer, got 1.0"),
        ({}, {"target": True}, TypeError, "`target` must be an integer, got True"),
    ],
)
def test_bad_splits(as_users_call, changes, arguments, error, message):
    with pytest.raises(error, match=message) as caught:
        split_subclasses(make(**changes), **arguments)
    assert "\n" not in str(caught.value)


def test_classes_without_images():
    data = make()
    without = data.subset(np.flatnonzero(~np.isin(data.labels, [2, 3])))
    with pytest.raises(ValueError, match="`data` must hold images of every.* none of three, two"):
        split_subclasses(without)
    without_the_lone_one = data.subset(np.flatnonzero(data.labels != 1))
    assert len(split_subclasses(without_the_lone_one).source) == 30


def test_cifar20_is_the_published_table():
    data = like_cifar100()
    source, target = cifar20(data)
    assert len(source) == 48 and len(target) == 12
    fine = source.images[:, 0, 0, 0]
    for s, classes in enumerate(SOURCE):
        for position, c in enumerate(classes):
            assert source.class_names[4 * s + position] == data.class_names[c]
            np.testing.assert_array_equal(source.labels[fine == c], [4 * s + position] * 3)
        np.testing.assert_array_equal(target.labels[target.images[:, 0, 0, 0] == TARGET[s]], s)
    assert [data.class_names[c] for c in TARGET] == TARGET_NAMES
    assert source.class_names[:4] == ("aquarium_fish", "flatfish", "ray", "shark")
    assert source.groups == tuple(
        (name, (4 * s, 4 * s + 1, 4 * s + 2, 4 * s + 3))
        for s, name in enumerate(target.class_names)
    )
    assert target.class_names == ("fish", "flowers", "household_electrical_devices", "people")
    assert (source.name, target.name) == ("cifar100/cifar20/source", "cifar100/cifar20/target")
    assert default_augmentation(source.name) == default_augmentation("cifar100")
    assert source.split == target.split == "test"


def test_cifar20_does_not_depend_on_the_order_of_the_groups():
    source, target = cifar20(like_cifar100())
    turned = cifar20(like_cifar100(groups=class_groups("cifar100")[::-1]))
    assert turned.source.fingerprint == source.fingerprint
    assert turned.target.fingerprint == target.fingerprint


def test_as_published_all_256_values_go_through_its_conversions():
    images = np.zeros((300, 16, 16, 1), np.uint8) + np.arange(256, dtype=np.uint8).reshape(
        16, 16, 1
    )
    data = dataclasses.replace(like_cifar100(), images=images)
    # Stored as floats from 0 to 255; ToTensor leaves floats as they are; ToPILImage multiplies by
    # 255 and keeps the low 8 bits.
    wanted = (np.arange(256, dtype=np.float64) * 255).astype(np.int64) & 255
    assert wanted[[0, 1, 100, 255]].tolist() == [0, 255, 156, 1]
    for plain, part in zip(cifar20(data), cifar20(data, as_published=True), strict=True):
        np.testing.assert_array_equal(part.images.reshape(-1, 256), np.tile(wanted, (len(part), 1)))
        np.testing.assert_array_equal(part.labels, plain.labels)
        assert part.images.dtype == np.uint8 and part.groups == plain.groups
        assert part.name == plain.name.replace("cifar20", "cifar20_as_published")
        np.testing.assert_array_equal(plain.images, images[: len(plain)])


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            None,
            "'cifar100' without fish, flowers, household_electrical_devices, people; "
            r'those of CIFAR-100 are `groups=jc.data.class_groups\("cifar100"\)`$',
        ),
        (
            (("people", tuple(range(50))), ("fish", tuple(range(50, 100)))),
            "'cifar100' without flowers, household_electrical_devices$",
        ),
    ],
)
def test_cifar20_names_the_groups_that_are_missing(groups, message):
    with pytest.raises(ValueError, match=f"`data` must have the groups fish, .*{message}"):
        cifar20(like_cifar100(groups=groups))


def test_cifar20_wants_five_classes_each():
    groups = dict(class_groups("cifar100"))
    groups["fish"], groups["people"] = groups["fish"][1:], groups["people"] + groups["fish"][:1]
    with pytest.raises(ValueError, match="groups of 5 classes, got fish of 4, .*people of 6"):
        cifar20(like_cifar100(groups=tuple(groups.items())))


def test_cifar20_names_classes_without_images():
    data = like_cifar100()
    without = data.subset(np.flatnonzero(~np.isin(data.labels, [91, 0])))
    with pytest.raises(ValueError, match="`data` must hold images .* got none of trout$"):
        cifar20(without)


def test_cifar20_of_a_prepared_cifar100(tmp_path):
    names, classes = _CIFAR100_NAMES, sum(SOURCE, ()) + tuple(TARGET)
    sizes = (("train", 600), ("test", 4))
    wrote = write_tfds(tmp_path, "cifar100", class_names=tuple(names), sizes=sizes)
    data = jc.data.load("cifar100", "train", data_dir=tmp_path)
    source, target = cifar20(data)
    labels = wrote.labels["train"]
    assert len(source) + len(target) == np.isin(labels, classes).sum()
    np.testing.assert_array_equal(target.images, wrote.images["train"][np.isin(labels, TARGET)])
