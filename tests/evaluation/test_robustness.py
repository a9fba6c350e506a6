import dataclasses
import json

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import jaxclus as jc
from jaxclus import _pytree, attacks
from jaxclus.attacks._base import BoundedAttack, State
from jaxclus.evaluation import MICROBATCH as SIZES
from jaxclus.evaluation import correct, describe, robustness, robustness_curve

ONE = jax.devices()[:1]
MICROBATCH = SIZES["cpu"]
KEY = jax.random.key(0)
PGD = attacks.PGD(jc.Linf(0.05), steps=3)


@pytest.fixture
def as_users_call(monkeypatch):
    """Without the checks of annotations, which in the tests come before our own."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="module")
def on_one_device(network, digits):
    return robustness(KEY, network, PGD, digits, devices=ONE, progress=False)


def _linear(weight, x):
    return x.reshape(x.shape[0], -1) @ weight


def linear_problem(n):
    """n images, two linear logits that are right, the margins in float64 and their gradient."""
    rng = np.random.default_rng(1)
    images = rng.integers(100, 156, (200, 3, 3, 1), dtype=np.uint8)
    x = images.reshape(200, 9) / 255
    direction = rng.normal(size=9)
    # Both classes: no bias is needed when the direction is orthogonal to the mean image.
    direction -= x.mean(axis=0) * (x.mean(axis=0) @ direction) / (x.mean(axis=0) ** 2).sum()
    margins = x @ direction
    weight = np.stack([-direction / 2, direction / 2], axis=1)
    more = rng.integers(100, 156, (100, 3, 3, 1), dtype=np.uint8)
    images, margins = (
        np.concatenate([images, more]),
        np.concatenate([margins, more.reshape(100, 9) / 255 @ direction]),
    )
    data = jc.data.Dataset(images, (margins > 0).astype(np.int32), ("below", "above"))
    model = jax.tree_util.Partial(_linear, jnp.asarray(weight, jnp.float32))
    return model, data.take(n), np.abs(margins[:n]), direction


def verdicts(result):
    return result.clean, result.robust


@pytest.mark.parametrize("count", [2, 8])
def test_verdicts_do_not_depend_on_the_number_of_devices(network, digits, on_one_device, count):
    found = robustness(KEY, network, PGD, digits, devices=jax.devices()[:count], progress=False)
    assert 0.3 < found.robust_accuracy < found.clean_accuracy - 0.1
    # At most 0.1 % of the images may be judged differently: of 364, none.
    for ours, theirs in zip(verdicts(found), verdicts(on_one_device), strict=True):
        assert (ours != theirs).sum() <= len(digits) // 1000
    np.testing.assert_allclose(found.norms, on_one_device.norms, atol=1e-6)


def test_results_are_those_of_the_attack_itself(network, digits, on_one_device):
    # One full microbatch of images that are all right: the same shape, and so the same bits.
    chosen = np.flatnonzero(on_one_device.clean)[:MICROBATCH]
    part = digits.subset(chosen)
    found = robustness(KEY, network, PGD, part, devices=ONE, progress=False)
    x = jc.data.to_float(part.images)
    result = PGD.run(KEY, network, x, part.labels)
    assert found.clean.all()
    np.testing.assert_array_equal(found.robust, ~np.asarray(result.success))
    np.testing.assert_array_equal(found.norms, result.norm)
    assert found.low == result.x_adv.min() and found.high == result.x_adv.max()


def test_images_keep_their_number_in_the_data_set(network, digits, on_one_device):
    # Which images are attacked together is packing; keys come from the place in the data set.
    wrong = np.flatnonzero(~on_one_device.clean)
    assert len(wrong) > 5
    x = jc.data.to_float(digits.images)
    result = PGD.run(KEY, network, x, digits.labels, np.arange(len(digits)))
    np.testing.assert_array_equal(on_one_device.robust, ~np.asarray(result.success))
    np.testing.assert_allclose(on_one_device.norms, result.norm, atol=1e-6)
    # The key matters, so the comparison is one.
    other = PGD.run(jax.random.key(1), network, x, digits.labels)
    assert np.abs(on_one_device.norms - other.norm).max() > 1e-4


def test_an_image_misclassified_without_attack_is_not_robust(network, digits, on_one_device):
    labels = digits.labels.copy()
    labels[::2] = (labels[::2] + 1) % 10
    swapped = dataclasses.replace(digits, labels=labels)
    found = robustness(KEY, network, PGD, swapped, devices=ONE, progress=False)
    logits = np.asarray(network(jc.data.to_float(digits.images)))
    np.testing.assert_array_equal(found.clean, logits.argmax(axis=1) == labels)
    assert not found.robust[~found.clean].any()
    assert (found.norms[~found.clean] == 0).all()
    # The others have the same randomness as in the whole set.
    same = np.flatnonzero(found.clean)[np.flatnonzero(found.clean) % 2 == 1]
    np.testing.assert_array_equal(found.robust[same], on_one_device.robust[same])


def test_nothing_is_classified_correctly(network, digits):
    labels = (np.asarray(network(jc.data.to_float(digits.images))).argmax(axis=1) + 1) % 10
    wrong = dataclasses.replace(digits, labels=labels.astype(np.int32))
    found = robustness(KEY, network, PGD, wrong, devices=ONE, progress=False)
    assert found.clean_accuracy == found.robust_accuracy == 0
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["largest_norm"] == 0


@pytest.mark.parametrize("count", [1, MICROBATCH - 1, MICROBATCH + 1])
def test_padding_never_counts(count):
    model, data, margins, direction = linear_problem(count)
    eps = 0.02
    assert np.abs(margins / np.abs(direction).sum() - eps).min() > 1e-5
    attack = attacks.FGSM(jc.Linf(eps))
    found = robustness(KEY, model, attack, data, devices=ONE, progress=False)
    assert len(found.clean) == len(found.robust) == len(found.norms) == count
    # FGSM is the best attack on two linear logits: eps moves the margin by eps |w|_1.
    np.testing.assert_array_equal(found.robust, margins > eps * np.abs(direction).sum())
    assert correct(model, data, devices=ONE).tolist() == [True] * count


def test_curve_of_nested_balls_is_monotone_and_in_closed_form():
    model, data, margins, direction = linear_problem(150)
    distances = np.sort(margins / np.abs(direction).sum())
    # Halfway between two images' distances to the boundary, far from rounding.
    gaps = (distances[1:] + distances[:-1]) / 2
    eps = [float(gaps[i]) for i in (5, 40, 90, 140)]
    curve = robustness_curve(
        KEY, model, attacks.FGSM(jc.Linf(1.0)), data, eps, devices=ONE, progress=False
    )
    assert [point.attack.threat for point in curve] == [jc.Linf(radius) for radius in eps]
    assert [round(150 * point.robust_accuracy) for point in curve] == [144, 109, 59, 9]
    for smaller, larger in zip(curve, curve[1:], strict=False):
        assert (larger.robust <= smaller.robust).all()
    for point, radius in zip(curve, eps, strict=True):
        assert point.norms.max() <= radius + 1e-6
        single = robustness(KEY, model, point.attack, data, devices=ONE, progress=False)
        for ours, theirs in zip(verdicts(point), verdicts(single), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def counting(model):
    """The model as a closure, and how often it was traced."""
    traces = []

    def closure(x):
        traces.append(x.shape)
        return model(x)

    return closure, traces


def test_a_model_that_hides_its_weights_is_compiled_once(network, digits):
    once, many = digits.take(128), digits
    counts = []
    for data in (once, many):
        model, traces = counting(network)
        robustness(KEY, model, PGD, data, microbatch=64, devices=ONE, progress=False)
        counts.append(len(traces))
    assert counts[0] == counts[1]
    model, traces = counting(network)
    eps = [0.05, 0.1, 0.2]
    robustness_curve(KEY, model, PGD, many, eps, microbatch=64, devices=ONE, progress=False)
    assert len(traces) == counts[0]


def test_a_model_that_hides_its_weights_is_never_stale(network, digits):
    weights = dict(network.args[0])

    def closure(x):
        return network.func(weights, x)

    before = robustness(KEY, closure, PGD, digits, devices=ONE, progress=False)
    weights["head"] = -weights["head"]
    after = robustness(KEY, closure, PGD, digits, devices=ONE, progress=False)
    assert before.clean_accuracy > 0.8 and after.clean_accuracy < 0.2


def test_a_curve_and_new_weights_compile_nothing_new(network, digits, as_users_call):
    program = attacks.bind(network).func.outermost
    few = digits.take(20)
    robustness_curve(KEY, network, PGD, few, [0.05], devices=ONE, progress=False)
    compiled = program._cache_size()
    # Also for numbers that are no Python floats.
    eps = [0.1, np.float64(0.2), np.float32(0.3), 1]
    robustness_curve(KEY, network, PGD, few, eps, devices=ONE, progress=False)
    other = jax.tree.map(lambda leaf: leaf * 1.01, network)
    robustness(jax.random.key(1), other, PGD, digits, devices=ONE, progress=False)
    assert program._cache_size() == compiled


def test_a_model_on_other_devices(network, digits):
    few = digits.take(20)
    wanted = robustness(KEY, network, PGD, few, devices=ONE, progress=False)
    elsewhere = jax.device_put(network, jax.devices()[5])
    for devices in (ONE, None):
        found = robustness(KEY, elsewhere, PGD, few, devices=devices, progress=False)
        np.testing.assert_array_equal(found.robust, wanted.robust)


@_pytree.register
@dataclasses.dataclass(frozen=True)
class Cheat(BoundedAttack):
    """Leaves the ball by a factor, or the box."""

    factor: float = 1.0
    shift: float = 0.0

    steps_per_round = 1

    def start(self, images):
        low = jnp.full(images.y.shape, -jnp.inf)
        return State(images.x, low, images.y < 0, low, ())

    def step(self, model, images, i, state):
        delta = self.threat.eps * self.factor + self.shift
        return state._replace(x_adv=images.x + delta, value=0 * state.value, success=images.y >= 0)


def test_an_image_outside_ball_or_box_does_not_count_as_broken():
    images = np.full((10, 2, 2, 1), 128, np.uint8)
    data = jc.data.Dataset(images, np.zeros(10, np.int32), ("a", "b"))
    # Every brighter image is of the other class.
    model = jax.tree_util.Partial(lambda x: jnp.stack([x[:, 0, 0, 0] * 0, x[:, 0, 0, 0] - 0.51], 1))

    def broken(attack):
        found = robustness(KEY, model, attack, data, devices=ONE, progress=False)
        assert found.clean.all()
        return 1 - found.robust_accuracy

    for threat in (jc.Linf(0.1), jc.L2(0.1)):
        # A constant of eps in each of 4 pixels has the L2 norm 2 eps.
        scale = 1.0 if threat.name == "linf" else 0.5
        assert broken(Cheat(threat, factor=scale)) == 1
        assert broken(Cheat(threat, factor=scale * 1.001)) == 0
    assert broken(Cheat(jc.Linf(0.9), factor=0.5)) == 1
    assert broken(Cheat(jc.Linf(0.9), factor=0.6)) == 0  # above 1


def test_json_is_strict_and_complete(on_one_device, digits):
    found = json.loads(json.dumps(on_one_device.to_json(), allow_nan=False))
    assert found["attack"] == "PGD(steps=3, restarts=1, loss=cross_entropy)"
    assert (found["norm"], found["eps"], found["seed"]) == ("linf", 0.05, [0, 0])
    assert (found["dataset"], found["split"], found["num_images"]) == ("digits", "test", 364)
    assert found["clean"].count("1") == round(364 * found["clean_accuracy"])
    assert found["robust"].count("1") == round(364 * found["robust_accuracy"])
    robust = np.array(list(map(int, found["robust"])), bool)
    np.testing.assert_array_equal(robust, on_one_device.robust)
    assert 0.049 < found["largest_norm"] <= 0.05 + 1e-6
    assert found["range"][0] >= 0 and found["range"][1] <= 1
    assert found["seconds"] > 0 and found["images_per_second"] > 0


def test_describe_is_the_same_in_every_process():
    assert describe(attacks.FGSM(jc.L2(1.0))) == "FGSM(loss=cross_entropy)"
    own = attacks.PGD(jc.Linf(0.1), steps=2, step_size=0.05, loss=jc.losses.margin)
    assert describe(own) == "PGD(steps=2, step_size=0.05, restarts=1, loss=margin)"


def test_progress_is_shown_on_request(network, digits, capfd):
    few = digits.take(20)
    robustness(KEY, network, PGD, few, devices=ONE)
    out, err = capfd.readouterr()
    assert "PGD linf eps 0.05" in err and not out
    robustness(KEY, network, PGD, few, devices=ONE, progress=False)
    assert capfd.readouterr() == ("", "")


def _half(weight, x):
    return _linear(weight, x).astype(jnp.bfloat16)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"key": jnp.zeros(2, jnp.uint32)}, "`key` must be a typed key"),
        ({"model": 3}, "`model`"),
        ({"model": jax.tree_util.Partial(_half, jnp.ones((9, 2)))}, "float32 logits .* bfloat16"),
        (
            {"model": jc.models.create("cnn", 2, (3, 3, 1), KEY, dtype="bfloat16", widths=(4,))},
            r"`model` must compute in float32 .* made in bfloat16: .* TrainingConfig\(",
        ),
        ({"model": jax.tree_util.Partial(_linear, jnp.ones((9, 1)))}, "at least 2 classes"),
        (
            {"data": jc.data.Dataset(np.zeros((1, 3, 3, 1), np.uint8), np.array([2]))},
            r"`data` must have labels in \[0, 1\], the model's classes, got 2",
        ),
        ({"attack": "pgd"}, "`attack`"),
        ({"data": np.zeros((1, 3, 3, 1), np.uint8)}, "`data`"),
        ({"devices": []}, "`devices` must name at least one device"),
    ],
)
def test_bad_input(changes, message, as_users_call):
    model, data, _, _ = linear_problem(4)
    arguments = {"key": KEY, "model": model, "attack": PGD, "data": data, "progress": False}
    with pytest.raises((ValueError, TypeError), match=message) as raised:
        robustness(**(arguments | changes))
    assert "\n" not in str(raised.value)


def test_bad_radii(network, digits, as_users_call):
    with pytest.raises(ValueError, match="`eps` must be a finite number above 0, got 0.0"):
        robustness_curve(KEY, network, PGD, digits, [0.1, 0.0], progress=False)
    with pytest.raises(TypeError, match="`attack` must be one of jc.attacks, got str"):
        robustness_curve(KEY, network, "pgd", digits, [0.1], progress=False)
    assert robustness_curve(KEY, network, PGD, digits, [], progress=False) == []
