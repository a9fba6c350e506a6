"""Full batches, whatever is asked for; stopped and resumed; the verdicts of the attack itself."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interrupted_evaluation import attack, dataset, evaluate
from networks import random_features

import jaxclus as jc
from jaxclus import attacks
from jaxclus.evaluation import _packing, _progress, robustness, robustness_over_seeds, spread

ONE = jax.devices()[:1]
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def model():
    return random_features()


@pytest.fixture(scope="module")
def data():
    return dataset()


@pytest.fixture(scope="module")
def unbroken(model, data):
    return evaluate(model, data)


def record(result):
    """The report without what a second run may change."""
    found = json.loads(json.dumps(result.to_json(), allow_nan=False))
    for entry in (found, *found["members"]):
        del entry["seconds"], entry["images_per_second"]
    del found["command"]
    return found


def assert_same(found, wanted):
    assert record(found) == record(wanted)
    np.testing.assert_array_equal(found.adversarial, wanted.adversarial)


def test_an_ensemble_breaks_images_one_member_after_the_other(model, data, unbroken):
    names = [member.name for member in unbroken.members]
    assert names == ["APGD", "TargetedAPGD", "TargetedFAB", "Square"]
    standing = unbroken.clean
    for member in unbroken.members:
        assert member.attacked == standing.sum()
        assert (member.robust <= standing).all() and member.forward > 0
        standing = member.robust
    np.testing.assert_array_equal(unbroken.robust, standing)
    assert 0 < unbroken.robust_accuracy < unbroken.members[0].robust.mean()
    assert unbroken.clean_accuracy > 0.8 and unbroken.disagreements == 0
    broken = unbroken.clean & ~unbroken.robust
    x, x_adv = jc.data.to_float(data.images), unbroken.adversarial
    np.testing.assert_array_equal(x_adv[~broken], x[~broken])
    delta = np.abs(np.float64(x_adv) - np.float64(x)).max(axis=(1, 2, 3))
    assert (delta[broken] > 0).all() and delta.max() <= 0.05 + 1e-6
    np.testing.assert_allclose(unbroken.norms, delta, atol=1e-7)
    np.testing.assert_array_equal(np.argmax(model(x_adv), axis=1) == data.labels, unbroken.robust)


@pytest.mark.parametrize("batch_size", [1, 7, 250])
def test_verdicts_do_not_depend_on_the_batch_size(model, data, unbroken, batch_size, tmp_path):
    assert_same(evaluate(model, data, batch_size=batch_size, directory=tmp_path), unbroken)


@pytest.mark.parametrize("count", [2, 8])
def test_verdicts_do_not_depend_on_the_number_of_devices(model, data, unbroken, count):
    devices = jax.devices()[:count]
    found = robustness(
        jax.random.key(3), model, attack(), data, microbatch=4, devices=devices, progress=False
    )
    # At most 0.1 % of the images may be judged differently: of 40, none.
    np.testing.assert_array_equal(found.robust, unbroken.robust)
    assert found.num_devices == count


@pytest.mark.parametrize("saves", [1, 4, 9])
def test_a_killed_evaluation_goes_on(model, data, unbroken, saves, tmp_path):
    script = os.path.join(os.path.dirname(__file__), "interrupted_evaluation.py")
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    ended = subprocess.run(
        [sys.executable, script, str(tmp_path), str(saves)], env=os.environ | flags, timeout=300
    )
    assert ended.returncode == -signal.SIGKILL
    assert (tmp_path / "state.npz").exists()
    assert_same(evaluate(model, data, directory=tmp_path), unbroken)
    assert not (tmp_path / "state.npz").exists()


def test_every_save_is_a_place_to_go_on_from(model, data, unbroken, tmp_path, monkeypatch):
    """Stopped again and again, after every second save."""

    class Stopped(Exception):
        pass

    save, saves = _progress.Progress._save, []

    def save_and_stop(progress, *arguments):
        save(progress, *arguments)
        saves.append(1)
        if len(saves) % 2 == 0:
            raise Stopped

    monkeypatch.setattr(_progress, "_INTERVAL", 0.0)
    monkeypatch.setattr(_progress.Progress, "_save", save_and_stop)
    for _ in range(100):
        try:
            found = evaluate(model, data, directory=tmp_path)
            break
        except Stopped:
            continue
    assert len(saves) > 8
    assert_same(found, unbroken)


def test_a_finished_evaluation_is_read(model, data, unbroken, tmp_path, monkeypatch):
    evaluate(model, data, directory=tmp_path)
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert written["robust_accuracy"] == unbroken.robust_accuracy

    def never(*arguments):
        raise AssertionError("attacked again")

    monkeypatch.setattr(_packing, "run", never)
    again = evaluate(model, data, directory=tmp_path)
    assert_same(again, unbroken)
    assert again.seconds == pytest.approx(written["seconds"], abs=0.01)


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"attack": attacks.AutoAttack(jc.Linf(0.05), "custom", ("square",))}, "attack"),
        ({"attack": dataclasses.replace(attack(), threat=jc.Linf(0.06))}, "eps"),
        ({"key": KEY}, "seed"),
        ({"data": "other"}, "images"),
        ({"model": jax.tree.map(lambda leaf: 1.01 * leaf, random_features())}, "model"),
        ({"microbatch": 8}, "microbatch"),
    ],
)
def test_another_evaluations_directory_is_refused(model, data, tmp_path, changes, name):
    evaluate(model, data.take(3), directory=tmp_path)
    before = (tmp_path / "evaluation.json").read_bytes()
    arguments = {
        "key": jax.random.key(3), "model": model, "attack": attack(), "data": data.take(3),
        "microbatch": 16,
    }  # fmt: skip
    changes = {"data": data.take(4)} if changes.get("data") == "other" else changes
    with pytest.raises(ValueError, match=f"`directory` must .* one of {name} "):
        robustness(**(arguments | changes), directory=tmp_path, devices=ONE, progress=False)
    assert (tmp_path / "evaluation.json").read_bytes() == before


def forth(x):
    return jnp.round(16 * x) / 16


def noisy(weights, key, x):
    return weights(x + 0.02 * jax.random.normal(key, x.shape))


def other_models(weights):
    """Pairs of models with the same weights, and what tells them apart."""
    chain, noise = jc.Chain, jax.tree_util.Partial(noisy, weights)
    identity, double = (jc.attacks.BPDA(forth, back) for back in (lambda x: x, lambda x: 2 * x))
    return {
        "program": (weights, chain(jax.tree_util.Partial(forth), weights), "model's program"),
        "backwards": (chain(identity, weights), chain(double, weights), "model's program"),
        "hidden": (lambda x: weights(x), lambda x: 2 * weights(x), "model"),
        "passes": (jc.Stochastic(noise, 3), jc.Stochastic(noise, 5), "passes"),
        "samples": (
            *(jc.attacks.EOT(jc.Stochastic(noise, 3), samples) for samples in (2, 4)),
            "samples",
        ),
    }


@pytest.mark.parametrize("case", ["program", "backwards", "hidden", "passes", "samples"])
def test_another_models_directory_is_refused_though_its_weights_are_the_same(
    model, data, tmp_path, case
):
    one, other, name = other_models(model)[case]
    fixed = {"data": data.take(3), "directory": tmp_path, "devices": ONE, "progress": False}
    single = attacks.FGSM(jc.Linf(0.05))
    found = robustness(KEY, one, single, **fixed)
    assert_same(robustness(KEY, other_models(model)[case][0], single, **fixed), found)
    with pytest.raises(ValueError, match=f"`directory` must .* one of {name} "):
        robustness(KEY, other, single, **fixed)


def test_a_transfer_from_another_sources_directory_is_refused(model, data, tmp_path):
    fixed = {"data": data.take(3), "directory": tmp_path, "devices": ONE, "progress": False}
    crafted = attacks.FGSM(jc.Linf(0.05))
    robustness(KEY, model, attacks.Transfer(crafted, model), **fixed)
    other = jax.tree.map(lambda leaf: 1.01 * leaf, model)
    with pytest.raises(ValueError, match="`directory` must .* one of attack's arrays "):
        robustness(KEY, model, attacks.Transfer(crafted, other), **fixed)


def test_a_directory_serves_a_model_without_a_gradient(model, data, tmp_path):
    def outside(x):
        shape = jax.ShapeDtypeStruct((x.shape[0], 10), jnp.float32)
        return jax.pure_callback(lambda x: np.asarray(model(jnp.asarray(x))), shape, x)

    fixed = {"data": data.take(3), "directory": tmp_path, "devices": ONE, "progress": False}
    search = attacks.Square(jc.Linf(0.05), queries=3)
    found = robustness(KEY, outside, search, **fixed)
    assert_same(robustness(KEY, outside, search, **fixed), found)


def test_verdicts_that_depend_on_the_size_of_the_batch_are_counted(data, model):
    """A model whose logits are turned over for the brighter images, in batches of 4 alone."""

    def moody(x):
        bright = x.mean(axis=(1, 2, 3))[:, None] > 0.3
        return jnp.where(bright & (x.shape[0] == 4), -model(x), model(x))

    few = data.take(20)
    found = robustness(
        KEY, moody, attacks.FGSM(jc.Linf(1e-6)), few, microbatch=8, devices=ONE, progress=False
    )
    x = jc.data.to_float(few.images)
    bright = np.asarray(x.mean(axis=(1, 2, 3)) > 0.3)
    right = np.argmax(model(x), axis=1) == few.labels
    assert 0 < found.disagreements == (bright & right).sum() < right.sum()
    assert found.robust.sum() == right.sum()


def test_the_report_says_how_many_passes_a_random_model_took(data, model):
    random = jc.attacks.EOT(jc.Stochastic(jax.tree_util.Partial(noisy, model), 3), samples=2)
    attack = attacks.APGD(jc.Linf(1e-6), steps=2)
    found = robustness(KEY, random, attack, data.take(5), devices=ONE, progress=False).to_json()
    assert (found["passes"], found["samples"]) == (3, 2)
    assert found["robust"] == found["clean"]  # so that each image takes all steps
    assert found["members"][0]["gradient"] == 2 * 3 * found["clean"].count("1") > 0


@pytest.mark.parametrize(
    "single",
    [
        attacks.APGD(jc.L2(0.3), steps=10, restarts=2),
        attacks.TargetedAPGD(jc.L1(1.0), steps=10, targets=3),
        attacks.TargetedFAB("l2", jc.L2(0.3), steps=5, targets=3),
        attacks.Square(jc.Linf(0.03), queries=100),
    ],
    ids=lambda attack: type(attack).__name__,
)
def test_packed_images_fare_as_in_one_batch(model, data, single):
    """Also their passes are counted alike, but for those of rounds that ran ahead."""
    found = robustness(KEY, model, single, data, microbatch=8, devices=ONE, progress=False)
    wanted = single.run(KEY, model, jc.data.to_float(data.images), data.labels)
    np.testing.assert_array_equal(found.robust, ~np.asarray(wanted.success))
    assert 0 < found.robust_accuracy < found.clean_accuracy
    forward = int(wanted.queries.forward.sum()) - 40 - int(found.clean.sum())
    assert abs(found.members[0].forward - forward) <= 0.25 * forward
    if single.rounds(10) == 1:
        assert found.members[0].forward == forward
        np.testing.assert_allclose(found.adversarial, wanted.x_adv, atol=1e-5)


def test_a_batch_that_shrinks(model, data, unbroken, monkeypatch):
    sizes = []
    shrunk = _packing._shrunk

    def noted(work, attack, pending, size):
        sizes.append((len(pending.image), size))
        return shrunk(work, attack, pending, size)

    monkeypatch.setattr(_packing, "_shrunk", noted)
    monkeypatch.setitem(_packing._WORTH_COMPILING, "cpu", 0.0)
    found = evaluate(model, data)
    assert sizes and all(new <= old // 2 for old, new in sizes)
    np.testing.assert_array_equal(found.robust, unbroken.robust)


@pytest.mark.parametrize(
    "count, size",
    [
        (1, 16),
        (94, 96),
        (256, 256),
        (310, 160),  # two batches, not one and a remainder
        (846, 288),
        (7000, 288),  # many: the largest, whose steps cost least per image
    ],
)
def test_the_size_of_the_first_batch(count, size):
    assert _packing._fitting(_packing.sizes(288), count) == size


def test_the_next_rounds_of_images_that_no_slot_holds_come_first():
    ledger = _packing.Ledger.of(np.array([True, False, True, True]))
    assert ledger.take(2, rounds=3) == [(0, 0), (2, 0)]
    assert ledger.take(4, rounds=3) == [(3, 0), (0, 1), (2, 1), (3, 1)]
    ledger.running[0] = 0  # both of its rounds ended
    assert ledger.take(1, rounds=3) == [(0, 2)]
    ledger.waiting[2] = False
    assert ledger.open(3)
    assert ledger.take(9, rounds=3) == [(3, 2)]
    assert not ledger.open(3)


def test_several_seeds(model, data):
    square = attacks.Square(jc.Linf(0.06), queries=8)
    found = robustness_over_seeds(
        KEY, model, square, data, 3, microbatch=16, devices=ONE, progress=False
    )
    assert len({result.seed for result in found}) == 3
    summary, accuracies = spread(found), [result.robust_accuracy for result in found]
    assert len(set(accuracies)) > 1
    assert summary.mean == pytest.approx(np.mean(accuracies))
    assert summary.std == pytest.approx(np.std(accuracies, ddof=1))
    assert summary.worst == np.mean(found[0].robust & found[1].robust & found[2].robust)
    assert spread(found[:1]).std == 0
    with pytest.raises(ValueError, match="`results` must hold at least one evaluation, got none"):
        spread([])


def test_members_without_enough_classes_are_left_out():
    net = jc.models.create("cnn", 3, (8, 8, 1), jax.random.key(0), widths=(4,), hidden=8)
    digits = jc.data.load("digits", "test").take(4)
    labels = np.asarray(jnp.argmax(net(jc.data.to_float(digits.images)), axis=1))
    data = jc.data.Dataset(digits.images, labels, ("a", "b", "c"))
    threat = jc.Linf(0.01)
    ensemble = attacks.AutoAttack(
        threat, "custom", (attacks.TargetedAPGD(threat), attacks.APGD(threat, steps=3))
    )
    found = robustness(KEY, net, ensemble, data, devices=ONE, progress=False)
    assert [member.name for member in found.members] == ["APGD"]
    assert "at least 4 classes" in found.to_json()["skipped"]["TargetedAPGD"]
    with pytest.raises(ValueError, match="at least 4 classes"):
        robustness(KEY, net, attacks.TargetedAPGD(threat), data, devices=ONE, progress=False)


def test_a_minimum_norm_attack_needs_a_threat_to_be_judged_by(model, data):
    with pytest.raises(ValueError, match="`attack` must have a threat model to be judged by"):
        robustness(KEY, model, attacks.FAB("linf"), data, devices=ONE, progress=False)


def test_images_that_make_the_model_fail_break_nothing():
    """NaN gradients: the search has nowhere to go, and says so in numbers that JSON has."""

    def predict(weight, x):
        logits = x.reshape(x.shape[0], -1) @ weight
        return logits + 0 * jnp.sqrt(jnp.minimum(x.sum(axis=(1, 2, 3)) - 1e3, 0) * 0)[:, None]

    rng = np.random.default_rng(0)
    net = jax.tree_util.Partial(predict, jnp.asarray(rng.normal(size=(64, 4)), jnp.float32))
    images = rng.integers(0, 256, (6, 8, 8, 1), np.uint8)
    labels = np.asarray(jnp.argmax(net(jc.data.to_float(images)), axis=1))
    assert bool(jnp.isnan(jax.grad(lambda x: net(x).sum())(jc.data.to_float(images))).all())
    data = jc.data.Dataset(images, labels)
    for single in (attacks.PGD(jc.Linf(0.1)), attacks.APGD(jc.L2(0.5), steps=3)):
        found = robustness(KEY, net, single, data, devices=ONE, progress=False)
        assert np.isfinite(found.adversarial).all()
        json.dumps(found.to_json(), allow_nan=False)
