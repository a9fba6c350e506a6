"""Where attacks lead, on a model whose logits are pixels: the second brightest pixel is reached."""

import itertools
import json

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import jaxclus as jc
from jaxclus.evaluation import success_pattern

ONE = jax.devices()[:1]
KEY = jax.random.key(0)
FGSM = jc.attacks.FGSM(jc.Linf(4 / 255))
GROUPS = (("x", (0, 3, 4)), ("alone", (1,)), ("y", (2, 5)))
OF_CLASS = [0, 1, 2, 0, 0, 2]


def _pixels(scale, x):
    return x.reshape(x.shape[0], -1) * scale


MODEL = jax.tree_util.Partial(_pixels, jnp.float32(20))


def image(first, second, margin):
    """Six pixels: one is the brightest, by `margin` before the second, and that by 30."""
    pixels = np.full(6, 100, np.uint8)
    pixels[[first, second]] = 130 + margin, 130
    return pixels.reshape(2, 3, 1)


def problem(pairs, margins, labels, groups=GROUPS):
    images = np.stack([image(*pair, m) for pair, m in zip(pairs, margins, strict=True)])
    return jc.data.Dataset(images, np.array(labels), tuple("abcdef"), groups, "pixels", "test")


def pattern(data, groups=None, attack=FGSM, model=MODEL, **more):
    return success_pattern(KEY, model, attack, data, groups, devices=ONE, progress=False, **more)


def random_problem(n, seed=0, likely=0.0):
    """Images that break (margin below 2 eps) or stand, and some that are misclassified anyway."""
    rng = np.random.default_rng(seed)
    pairs, labels = [], []
    for _ in range(n):
        first = rng.integers(6)
        others = [c for c in range(6) if c != first]
        near = [c for c in others if OF_CLASS[c] == OF_CLASS[first]]
        pairs.append((first, rng.choice(near if near and rng.random() < likely else others)))
        labels.append(first if rng.random() < 0.9 else rng.integers(6))
    return problem(pairs, rng.choice([3, 20], n), labels), np.array(pairs)


def by_hand(data, pairs):
    counts = np.zeros((6, 6), int)
    for pixels, (first, second), label in zip(data.images, pairs, data.labels, strict=True):
        if label == first and int(pixels.max()) - 130 < 8:
            counts[first, second] += 1
    return counts


@pytest.fixture
def as_users_call(monkeypatch):
    """Without the checks of annotations, which in the tests come before our own."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.parametrize("likely", [0.0, 0.5])
def test_against_counts_by_hand(likely):
    data, pairs = random_problem(300, 1, likely)
    found, counts = pattern(data), by_hand(data, pairs)
    np.testing.assert_array_equal(found.counts, counts)
    assert 80 < found.num_broken == counts.sum() < 200
    within = chance = 0.0
    for i, j in itertools.product(range(6), repeat=2):
        within += counts[i, j] * (OF_CLASS[i] == OF_CLASS[j])
        chance += counts[i, j] * (OF_CLASS.count(OF_CLASS[i]) - 1) / 5
    assert found.within == pytest.approx(within / counts.sum())
    assert found.chance == pytest.approx(chance / counts.sum())
    sums = [
        sum(counts[i, j] for i in range(6) for j in range(6) if order[i] == order[j])
        for order in set(itertools.permutations(OF_CLASS))
    ]
    assert found.exact and found.num_labellings == 60 == len(sums)  # 6! / (3! 2! 1!)
    assert found.p_value == np.mean(np.array(sums) >= within)
    assert found.smallest_p == 1 / 60


def test_second_choices_at_random_are_at_chance_and_others_above():
    found = pattern(random_problem(2000, 2)[0])
    spread = np.sqrt(found.chance * (1 - found.chance) / found.num_broken)
    assert abs(found.within - found.chance) < 5 * spread
    above = pattern(random_problem(2000, 2, likely=0.5)[0])
    assert above.within > above.chance + 5 * spread
    assert above.p_value == above.smallest_p


def test_a_class_alone_in_its_group_is_never_within():
    found = pattern(problem([(1, 0)] * 5, [3] * 5, [1] * 5))
    assert found.counts[1, 0] == found.num_broken == 5
    assert found.within == found.chance == 0


def test_all_within_and_chance_in_closed_form():
    # Class 0 has 2 of 5 wrong classes in its group, class 2 has 1: (3 * 2 + 1 * 1) / 5 / 4.
    found = pattern(problem([(0, 3), (0, 4), (0, 3), (2, 5)], [3] * 4, [0, 0, 0, 2]))
    assert found.within == 1
    assert found.chance == pytest.approx(7 / 20)


def test_nothing_broken():
    found = pattern(problem([(0, 3), (2, 5)], [20, 20], [0, 2]))
    assert found.robustness.robust_accuracy == 1
    assert found.num_broken == 0 and not found.counts.any()
    assert (found.within, found.chance, found.p_value) == (None, None, None)
    assert found.smallest_p == 1 / 60
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["within"] is None


def test_misclassified_images_do_not_count():
    found = pattern(problem([(0, 3), (2, 5)], [3, 3], [0, 4]))
    assert found.counts.sum() == found.counts[0, 3] == 1


def test_equals_the_attack_itself(network, digits):
    attack = jc.attacks.PGD(jc.Linf(0.05), steps=3)
    found = pattern(digits, attack=attack, model=network)
    x = jc.data.to_float(digits.images)
    result = attack.run(KEY, network, x, digits.labels, np.arange(len(digits)))
    before, after = (np.asarray(network(z)).argmax(axis=1) for z in (x, result.x_adv))
    broken = (before == digits.labels) & (after != digits.labels)
    counts = np.zeros((10, 10), int)
    np.add.at(counts, (digits.labels[broken], after[broken]), 1)
    np.testing.assert_array_equal(found.counts, counts)
    assert found.num_broken > 50
    assert found.robustness.robust_accuracy == np.mean((before == digits.labels) & ~broken)


def test_groups_that_are_given_win():
    data = problem([(0, 1), (2, 5)], [3, 3], [0, 2])
    assert pattern(data).within == 0.5
    other = (("p", (0, 1, 2)), ("q", (3, 4, 5)))
    found = pattern(data, other)
    assert found.within == 0.5 and found.groups == other
    assert found.counts[0, 1] == found.counts[2, 5] == 1
    assert found.chance == pytest.approx(2 / 5) and found.num_labellings == 10


def test_record_is_strict_json(tmp_path):
    data, _ = random_problem(40)
    found = pattern(data, directory=tmp_path)
    record = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert record["counts"] == found.counts.tolist()
    assert record["groups"] == [["x", [0, 3, 4]], ["alone", [1]], ["y", [2, 5]]]
    assert record["class_names"] == list("abcdef")
    assert record["num_broken"] == found.num_broken
    assert record["robustness"]["attack"] == jc.evaluation.describe(FGSM)
    assert record["robustness"]["dataset"] == "pixels"
    for name in ("within", "chance", "p_value", "smallest_p", "num_labellings", "exact"):
        assert record[name] == getattr(found, name)
    # A finished evaluation is read, not done again.
    again = pattern(data, directory=tmp_path)
    assert again.robustness.to_json()["seconds"] == record["robustness"]["seconds"]
    np.testing.assert_array_equal(again.counts, found.counts)


def test_bad_arguments(as_users_call):
    data = problem([(0, 3), (2, 5)], [3, 3], [0, 2])
    bare = jc.data.Dataset(data.images, data.labels, data.class_names)

    def bad(error, message, *args, **kwargs):
        with pytest.raises(error, match=message) as caught:
            pattern(*args, **kwargs)
        assert "\n" not in str(caught.value)

    bad(TypeError, "`data` must be a jc.data.Dataset, got ndarray", data.images)
    bad(ValueError, "`groups` must be given for 'custom', which has none of its own", bare)
    bad(TypeError, "`groups` must be pairs of a name and its classes, got", bare, OF_CLASS)
    bad(ValueError, "`groups` must hold every class, but class 5", bare, (("x", range(5)),))
    alone = tuple((c, (i,)) for i, c in enumerate("abcdef"))
    bad(ValueError, "`groups` must be at least two, one of them with at least two", bare, alone)
    fewer = jc.data.Dataset(data.images, data.labels, tuple("abc"), (("x", (0, 1)), ("y", (2,))))
    bad(ValueError, "`model` must have the classes of `data`, 3, got 6 logits", fewer)
    bad(TypeError, "`attack` must be one of jc.attacks, got str", data, attack="pgd")
    bad(ValueError, "`batch_size` must be at least 1, got 0", data, batch_size=0)
    with pytest.raises(TypeError, match="`key` must be a typed key"):
        success_pattern(jax.random.key_data(KEY), MODEL, FGSM, data)
