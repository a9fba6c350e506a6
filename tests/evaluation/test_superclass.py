"""Superclass accuracy of a model whose logits are pixels, against counts by hand."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import jaxclus as jc
from jaxclus.evaluation import SuperclassLogits, superclass_accuracy

ONE = jax.devices()[:1]
GROUPS = (("x", (0, 3)), ("y", (1, 2, 4)), ("z", (5,)))
OF_CLASS = np.array([0, 1, 1, 0, 1, 2])


def _pixels(scale, x):
    return x.reshape(x.shape[0], -1) * scale


MODEL = jax.tree_util.Partial(_pixels, jnp.float32(1))  # six pixels, six classes


def problem(n=200, names=("x", "y", "z")):
    """Random images, whose largest pixel is the predicted class, and random superclasses."""
    rng = np.random.default_rng(0)
    images = np.stack([rng.permutation(6) * 40 for _ in range(n)]).astype(np.uint8)
    labels = rng.integers(0, len(names), n)
    labels[: len(names)] = np.arange(len(names))
    return jc.data.Dataset(images.reshape(n, 2, 3, 1), labels, names)


@pytest.fixture
def as_users_call(monkeypatch):
    """Without the checks of annotations, which in the tests come before our own."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.parametrize("groups", [GROUPS, OF_CLASS.tolist(), OF_CLASS])
def test_counts_by_hand(groups):
    target = problem()
    found = superclass_accuracy(MODEL, target, groups, devices=ONE)
    confusion = np.zeros((3, 3), int)
    for image, label in zip(target.images.reshape(-1, 6), target.labels, strict=True):
        confusion[label, OF_CLASS[int(image.argmax())]] += 1
    np.testing.assert_array_equal(found.confusion, confusion)
    assert found.num_images == 200
    assert found.accuracy == (confusion[0, 0] + confusion[1, 1] + confusion[2, 2]) / 200
    # Labels that know nothing of the images: chance, within five standard deviations.
    chance = (confusion.sum(axis=0) / 200) @ (confusion.sum(axis=1) / 200)
    assert abs(found.accuracy - chance) < 5 * np.sqrt(chance * (1 - chance) / 200)


def test_groups_of_four_in_a_row_are_the_floor_of_a_quarter():
    rng = np.random.default_rng(1)
    images = rng.permuted(np.tile(np.arange(16, dtype=np.uint8), (100, 1)), axis=1)
    names = tuple("abcd")
    groups = tuple((name, tuple(range(4 * s, 4 * s + 4))) for s, name in enumerate(names))
    target = jc.data.Dataset(images.reshape(100, 4, 4, 1), np.arange(100) % 4, names)
    found = superclass_accuracy(MODEL, target, groups, devices=ONE)
    assert found.accuracy == np.mean(images.argmax(axis=1) // 4 == np.arange(100) % 4)


def test_a_split_fits_its_own_groups():
    rng = np.random.default_rng(2)
    labels = np.arange(120) % 6
    images = rng.integers(0, 100, (120, 2, 3, 1)).astype(np.uint8)
    groups = (("x", (0, 1, 2)), ("alone", (5,)), ("y", (3, 4)))
    data = jc.data.Dataset(images, labels, groups=groups)
    source, target = jc.data.split_subclasses(data)  # 0, 1, 3 against 2, 4
    bright = target.images.reshape(40, 6).copy()
    bright[:, 0] = np.where(target.labels == 0, 255, 0)  # class 0, of x
    bright[:, 2] = np.where(target.labels == 1, 255, 0)  # class 3 of the set, 2 of the source
    bright[:, 3:] = 0
    shown = jc.data.Dataset(bright.reshape(40, 2, 3, 1), target.labels, target.class_names)

    def model(x):
        return x.reshape(x.shape[0], -1)[:, :3]

    found = superclass_accuracy(model, shown, source.groups, devices=ONE)
    np.testing.assert_array_equal(found.confusion, [[20, 0], [0, 20]])
    assert found.accuracy == 1


def test_as_published_test_images_are_cropped_and_flipped():
    images = np.zeros((400, 2, 3, 1), np.uint8)
    images[:, 0, 0] = 255  # class 0, of x; mirrored class 2, of y
    target = jc.data.Dataset(images, np.zeros(400, int), ("x", "y", "z"))
    plain = superclass_accuracy(MODEL, target, GROUPS, devices=ONE)
    assert plain.accuracy == 1
    key = jax.random.key(3)
    found = superclass_accuracy(MODEL, target, GROUPS, as_published=True, key=key, devices=ONE)
    keys = jc.threat.image_keys(key, jnp.arange(400))
    seen = jc.data.Augmentation(crop_padding=4, flip=True)(keys, jnp.asarray(images))
    classes = np.argmax(MODEL(jc.data.to_float(seen)), axis=1)
    superclass = jc.clustering.group_ids(GROUPS, 6)[classes]
    np.testing.assert_array_equal(found.confusion[0], np.bincount(superclass, minlength=3))
    assert 0 < found.confusion[0, 1] and found.accuracy < 1


def test_bad_arguments(as_users_call):
    target, key = problem(), jax.random.key(0)

    def bad(error, message, *, data=target, groups=GROUPS, **more):
        with pytest.raises(error, match=message) as caught:
            superclass_accuracy(MODEL, data, groups, devices=ONE, **more)
        assert "\n" not in str(caught.value)

    bad(TypeError, "`target` must be a jc.data.Dataset, got ndarray", data=target.images)
    bad(ValueError, "`key` must be given for `as_published=True`, got None", as_published=True)
    bad(TypeError, "`key` must be a typed key", key=jax.random.key_data(key), as_published=True)
    bad(ValueError, "`groups` must give a group for each of the 6 classes", groups=[0, 1, 2])
    bad(ValueError, "`groups` must be as many as `target` has classes, 3, got 2", groups=[0, 1] * 3)
    bad(
        ValueError,
        r"`groups` must be named as the classes of `target`, \('x', 'y', 'z'\), got \('z', 'y'",
        groups=GROUPS[::-1],
    )


@pytest.mark.parametrize("groups", [GROUPS, OF_CLASS.tolist()])
def test_superclass_logits_are_the_highest_of_each_group(groups):
    head = SuperclassLogits(groups)
    logits = jnp.array([[0.0, 5, -1, 3, 4, 2], [7, 1, 1, 1, 1, 8]])
    expected = [[3, 5, 2], [7, 1, 8]]
    np.testing.assert_array_equal(head(logits), expected)
    np.testing.assert_array_equal(jax.jit(SuperclassLogits.__call__)(head, logits), expected)
    np.testing.assert_array_equal(jax.vmap(lambda z: head(z[None])[0])(logits), expected)
    # The gradient is that of the class that wins.
    gradient = jax.grad(lambda z: head(z)[:, 1].sum())(logits[:1])
    np.testing.assert_array_equal(gradient, [[0, 1, 0, 0, 0, 0]])


def test_a_classifier_of_superclasses_decides_as_the_read_out_does():
    target = problem()
    chained = jc.Chain(MODEL, SuperclassLogits(GROUPS))
    found = superclass_accuracy(MODEL, target, GROUPS, devices=ONE).accuracy
    assert jc.evaluation.correct(chained, target, devices=ONE).mean() == pytest.approx(found)
    # An attack within the ball of half a level, less than any two pixels differ, changes nothing.
    attack = jc.attacks.PGD(jc.Linf(0.5 / 255), steps=3)
    robust = jc.evaluation.robustness(jax.random.key(0), chained, attack, target, devices=ONE)
    assert robust.robust_accuracy == pytest.approx(found)
    # One of 30 levels, more than half of what neighbours in order differ by, does: every image
    # whose two highest pixels are of two superclasses is turned.
    attack = jc.attacks.PGD(jc.Linf(30 / 255), steps=10)
    robust = jc.evaluation.robustness(jax.random.key(0), chained, attack, target, devices=ONE)
    order = np.argsort(target.images.reshape(-1, 6), axis=1)
    same = OF_CLASS[order[:, -1]] == OF_CLASS[order[:, -2]]
    held = same & (OF_CLASS[order[:, -1]] == target.labels)
    assert (robust.robust <= held).all() and 0 < robust.robust.sum()


def test_superclass_logits_refuse_other_logits():
    with pytest.raises(ValueError, match=r"`logits` must be of the 6 classes .* got \(2, 5\)"):
        SuperclassLogits(GROUPS)(jnp.zeros((2, 5)))
    with pytest.raises(ValueError, match="`groups` must "):
        SuperclassLogits((("x", (0, 2)),))
