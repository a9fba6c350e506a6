import dataclasses
import hashlib

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jaxclus.data import Dataset, to_float


def make(n=12, classes=3, **kwargs):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, 4, 5, 3)).astype(np.uint8)
    return Dataset(images, np.arange(n, dtype=np.int32) % classes, **kwargs)


def test_own_arrays_get_names_and_properties():
    ds = make()
    assert ds.class_names == ("0", "1", "2")
    assert (len(ds), ds.num_classes, ds.input_shape) == (12, 3, (4, 5, 3))
    assert ds.groups is None
    assert repr(ds) == "Dataset(name='custom', split='all', 12 images 4x5x3, 3 classes)"


def test_is_immutable_but_leaves_the_callers_array_writable():
    images = np.zeros((2, 4, 4, 1), np.uint8)
    ds = Dataset(images, np.array([0, 1], np.int32))
    with pytest.raises(dataclasses.FrozenInstanceError):
        ds.name = "other"
    with pytest.raises(ValueError, match="read-only"):
        ds.images[0] = 1
    images[0] = 1
    assert images[0].all()


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_other_integer_labels_become_int32(dtype):
    ds = Dataset(np.zeros((2, 4, 4, 1), np.uint8), np.array([0, 4], dtype))
    assert ds.labels.dtype == np.int32
    assert ds.num_classes == 5


@pytest.mark.parametrize(
    ("images", "labels", "kwargs", "error", "message"),
    [
        (np.zeros((2, 4, 4, 1)), [0, 1], {}, TypeError, "`images` must be uint8.*float64"),
        (np.zeros((2, 4, 4), np.uint8), [0, 1], {}, ValueError, r"`images`.*\(2, 4, 4\)"),
        (np.zeros((0, 4, 4, 1), np.uint8), [], {}, ValueError, r"`images`.*\(0, 4, 4, 1\)"),
        (None, [0.0, 1.0], {}, TypeError, "`labels` must be integers, got dtype float64"),
        (None, [True, False], {}, TypeError, "`labels` must be integers, got dtype bool"),
        (None, [0, 1, 2], {}, ValueError, r"`labels`.*\(2,\), one for each image, got \(3,\)"),
        (None, [0, -1], {}, ValueError, "`labels` must be at least 0, got -1 to 0"),
        (None, [0, 2**31], {}, ValueError, "`labels`"),
        (None, [0, 2], {"class_names": ("a", "b")}, ValueError, r"`labels`.*\[0, 1\].*got 2"),
        (None, [0, 1], {"class_names": ("a", "a")}, ValueError, "`class_names`.*'a' more than"),
        (None, [0, 1], {"groups": (("x", (0,)),)}, ValueError, r"`groups`.*got \[0\]"),
        (None, [0, 1], {"groups": (("x", (0, 1)), ("y", (1,)))}, ValueError, "`groups`"),
        (None, [0, 1], {"groups": (("x", (0, 1, 2)),)}, ValueError, "`groups`"),
        (None, [0, 1], {"groups": (("x", (0, 1)), ("y", ()))}, ValueError, "at least one class"),
        (None, [0, 1], {"groups": (("x", (0,)), ("x", (1,)))}, ValueError, "different names"),
    ],
)
def test_bad_arrays(images, labels, kwargs, error, message):
    images = np.zeros((2, 4, 4, 1), np.uint8) if images is None else images
    with pytest.raises(error, match=message) as caught:
        Dataset(images, np.array(labels), **kwargs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("groups", "got"),
    [
        ([0, 0, 1], "the group 0"),
        (np.array([0, 0, 1]), "ndarray"),
        (1, "int"),
        ({"x": (0, 1), "y": (2,)}, "dict"),
        ("xy", "str"),
        ((("x", (0, 1)), (2,)), r"the group \(2,\)"),
        ((("x", (0, 1)), ("y", 2)), r"the group \('y', 2\)"),
        ((("x", (0, 1)), ("y", "2")), r"the group \('y', '2'\)"),
        ((("x", (0, 1)), (3, (2,))), r"the group \(3, \(2,\)\)"),
        ((("x", (0, 1)), "yz"), "the group 'yz'"),
        ((("x", np.arange(99)),), r"the group \('x', array\(\[ 0, 1, .* 98\]\)\)"),
    ],
)
def test_groups_of_another_form(monkeypatch, groups, got):
    # Without the checks of annotations, which in the tests come before our own.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    form = r"`groups` must be \(\(name, \(class index, \.\.\.\)\), \.\.\.\)"
    with pytest.raises(TypeError, match=f"{form}, got {got}$") as caught:
        make(groups=groups)
    assert "\n" not in str(caught.value)


def test_groups_of_no_class_indices(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    for bad in (3, -1, 2.0, "2", None):
        with pytest.raises(ValueError, match=rf"`groups` must .* in \[0, 2\], got {bad!r}$"):
            make(groups=(("x", (0, 1)), ("y", (bad,))))


def test_take_and_subset():
    ds = make(class_names=("a", "b", "c"), groups=(("x", (0, 2)), ("y", (1,))), name="n", split="s")
    part = ds.subset([5, 0, 5])
    np.testing.assert_array_equal(part.images, ds.images[[5, 0, 5]])
    np.testing.assert_array_equal(part.labels, ds.labels[[5, 0, 5]])
    for other in (part, ds.take(1)):
        assert other.class_names == ds.class_names
        assert (other.groups, other.name, other.split) == (ds.groups, "n", "s")
    np.testing.assert_array_equal(ds.take(12).images, ds.images)


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        ([0, 12], ValueError, r"`indices` must be in \[0, 11\], got 0 to 12"),
        ([-1], ValueError, "got -1 to -1"),
        ([], TypeError, "`indices` must be integers"),
        (np.zeros(0, int), ValueError, r"`indices` must have the shape \[m\]"),
        (np.zeros((2, 2), int), ValueError, "`indices` must have the shape"),
        (np.ones(12, bool), TypeError, "`indices` must be integers, got dtype bool"),
    ],
)
def test_bad_indices(indices, error, message):
    with pytest.raises(error, match=message):
        make().subset(indices)


@pytest.mark.parametrize(("n", "message"), [(0, "`n`.*at least 1"), (13, "`n`.*at most 12")])
def test_bad_take(n, message):
    with pytest.raises(ValueError, match=message):
        make().take(n)


def test_holdout_is_a_stratified_partition_in_order():
    # Class sizes 20, 10 and 5: a fifth of each is 4, 2 and 1.
    labels = np.random.default_rng(1).permutation(np.repeat([0, 1, 2], [20, 10, 5]))
    images = np.arange(35, dtype=np.uint8).reshape(35, 1, 1, 1)
    train, validation = Dataset(images, labels, split="train").holdout(jax.random.key(0), 0.2)
    assert list(np.bincount(validation.labels)) == [4, 2, 1]
    assert list(np.bincount(train.labels)) == [16, 8, 4]
    kept, held = train.images.ravel(), validation.images.ravel()
    assert sorted([*kept, *held]) == list(range(35))
    assert (np.diff(kept.astype(int)) > 0).all() and (np.diff(held.astype(int)) > 0).all()
    np.testing.assert_array_equal(validation.labels, labels[held])
    assert (train.split, validation.split) == ("train", "validation")


def test_holdout_depends_on_the_key_alone():
    ds = make(60)
    first, again, other = (ds.holdout(jax.random.key(k), 0.3)[1].fingerprint for k in (0, 0, 1))
    assert first == again != other


def test_holdout_draws_uniformly():
    ds = Dataset(np.arange(8, dtype=np.uint8).reshape(8, 1, 1, 1), np.zeros(8, np.int32))
    counts = np.zeros(8)
    for i in range(200):
        counts[ds.holdout(jax.random.key(i), 0.25)[1].images.ravel()] += 1
    # 400 draws over 8 images, 50 expected; chi-squared with 7 degrees, 0.1 % point 24.3
    assert ((counts - 50) ** 2 / 50).sum() < 24.3


@pytest.mark.parametrize(
    ("fraction", "message"),
    [(0.0, r"in \(0, 1\)"), (1.0, r"in \(0, 1\)"), (0.01, "both parts"), (0.99, "both parts")],
)
def test_bad_fraction(fraction, message):
    with pytest.raises(ValueError, match=f"`fraction`.*{message}"):
        make().holdout(jax.random.key(0), fraction)


def test_holdout_wants_a_typed_key():
    with pytest.raises(TypeError, match="`key` must be a typed key"):
        make().holdout(jnp.zeros(2, jnp.uint32), 0.5)


def test_fingerprint_is_the_documented_hash():
    ds = make()
    expected = hashlib.sha256(
        b"(12, 4, 5, 3)" + ds.images.tobytes() + b"(12,)" + ds.labels.tobytes()
    ).hexdigest()
    assert ds.fingerprint == expected
    assert ds.take(11).fingerprint != expected
    relabelled = dataclasses.replace(ds, labels=np.roll(ds.labels, 1))
    assert relabelled.fingerprint != expected
    reshaped = dataclasses.replace(ds, images=ds.images.reshape(12, 5, 4, 3))
    assert reshaped.fingerprint != expected


def test_to_float_is_the_rounded_quotient_everywhere():
    values = np.arange(256, dtype=np.uint8).reshape(4, 4, 4, 4)
    expected = values.astype(np.float32) / np.float32(255)
    for function in (to_float, jax.jit(to_float), jax.vmap(to_float)):
        result = function(values)
        assert result.dtype == jnp.float32
        np.testing.assert_array_equal(result, expected)


def test_to_float_wants_uint8():
    with pytest.raises(TypeError, match="`images` must be uint8, got dtype float32"):
        to_float(jnp.ones((1, 2, 2, 1)))
