import numpy as np
import pytest

from jaxclus.data import class_groups, coarse_groups, transfer_groups

CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()
# Coarse label of each fine class 0 to 99, in the official order.
CIFAR100_COARSE = [
    4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11,
    6, 11, 5, 10, 7, 6, 13, 15, 3, 15, 0, 11, 1, 10, 12, 14, 16, 9, 11, 5,
    5, 19, 8, 8, 15, 13, 14, 17, 18, 10, 16, 4, 17, 4, 2, 0, 17, 4, 18, 17,
    10, 3, 2, 12, 12, 16, 12, 1, 9, 19, 2, 10, 0, 1, 16, 12, 9, 13, 15, 13,
    16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14, 13,
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "classes"),
    [("cifar10", 10), ("cifar100", 100), ("fashion_mnist", 10), ("mnist", 10), ("digits", 10)],
)
def test_groups_are_a_partition(name, classes):
    groups = class_groups(name)
    assert sorted(i for _, members in groups for i in members) == list(range(classes))
    assert len({group for group, _ in groups}) == len(groups)


def test_cifar10():
    named = {group: {CIFAR10[i] for i in members} for group, members in class_groups("cifar10")}
    assert named == {
        "animals": {"bird", "cat", "deer", "dog", "frog", "horse"},
        "vehicles": {"airplane", "automobile", "ship", "truck"},
    }


def test_cifar100_is_the_official_table():
    groups = class_groups("cifar100")
    assert [len(members) for _, members in groups] == [5] * 20
    for coarse, (_, members) in enumerate(groups):
        assert list(members) == list(np.flatnonzero(np.array(CIFAR100_COARSE) == coarse))


def test_cifar100_superclasses_of_cifar20():
    """The four superclasses of the transfer experiment, by coarse id (arXiv:2111.12922)."""
    groups = class_groups("cifar100")
    assert groups[1] == ("fish", (1, 32, 67, 73, 91))
    assert groups[2] == ("flowers", (54, 62, 70, 82, 92))
    assert groups[5] == ("household_electrical_devices", (22, 39, 40, 86, 87))
    assert groups[14] == ("people", (2, 11, 35, 46, 98))


def test_configurations_versions_and_unknown_names():
    assert class_groups("cifar10_corrupted/fog_3") == class_groups("cifar10")
    assert class_groups("mnist:3.0.1") == class_groups("digits")
    assert class_groups("svhn_cropped") is None


def test_transfer_groups_are_disjoint_superclasses():
    groups = transfer_groups("fashion_mnist")
    members = [c for _, classes in groups for c in classes]
    assert len(set(members)) == len(members) and set(members) <= set(range(10))
    assert len({name for name, _ in groups}) == len(groups)
    assert sum(len(classes) >= 2 for _, classes in groups) >= 2
    assert transfer_groups("fashion_mnist:3.0.1") == groups
    assert transfer_groups("digits") is None


def test_coarse_labels_make_the_groups_of_cifar100():
    names = [name for name, _ in class_groups("cifar100")]
    fine = np.random.default_rng(0).permutation(np.repeat(np.arange(100), 3))
    coarse = np.array(CIFAR100_COARSE)[fine]
    assert coarse_groups(fine, coarse, names) == class_groups("cifar100")
    numbered = coarse_groups(fine, coarse)
    assert numbered[3] == ("3", dict(class_groups("cifar100"))["food_containers"])
    few = coarse_groups(np.arange(3), np.array([5, 0, 5]))
    assert few == (("0", (1,)), ("5", (0, 2)))


@pytest.mark.parametrize(
    ("labels", "coarse", "names", "message"),
    [
        ([0, 1, 1], [0, 0, 1], None, r"`coarse_labels` must be the same .* several for \[1\]"),
        ([0, 2], [0, 0], None, r"`labels` must have images of every class .* got \[0, 2\]"),
        ([0, 1], [0], None, r"`coarse_labels` must be integers \[2\], .* got int64 \[1\]"),
        ([0.0, 1.0], [0, 1], None, r"`labels` must be integers \[2\], .* got float64 \[2\]"),
        ([[0], [1]], [0, 1], None, r"`labels` must be integers \[2\], .* got int64 \[2, 1\]"),
        ([], [], None, r"`labels` must be integers \[n\], one for each of n >= 1"),
        ([0, 1], [0, 2], ["a", "b"], r"`names` must name every coarse label, got 2 for \[2\]"),
        ([0, 1], [0, -1], None, r"`names` must name every coarse label, got 1 for \[-1\]"),
    ],
)
def test_labels_that_make_no_groups(labels, coarse, names, message):
    with pytest.raises(ValueError, match=message):
        coarse_groups(np.array(labels), np.array(coarse), names)
