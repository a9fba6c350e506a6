import dataclasses
import signal

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from training_problems import (
    ONE,
    PLAIN_SGD,
    Memorise,
    Memory,
    assert_same_weights,
    memory_after,
    one_image_per_label,
    small_cnn,
    weights,
)

import jaxclus as jc
from jaxclus import parallel
from jaxclus.training import TrainingConfig, TrainingDiverged, _fit, _step, fit
from jaxclus.training.objectives import Adversarial, Standard

DIGITS = TrainingConfig(epochs=4, batch_size=64, learning_rate=0.1)
ATTACK = jc.attacks.PGD(jc.Linf(0.1), steps=3)


@pytest.fixture(scope="module")
def digits():
    return jc.data.load("digits")


@pytest.fixture(scope="module")
def standard_run(digits):
    return fit(
        jax.random.key(0), small_cnn(widths=(8, 16), hidden=32), digits, Standard(), DIGITS,
        progress=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def adversarial_run(digits):
    return fit(
        jax.random.key(0), small_cnn(widths=(8, 16), hidden=32), digits, Adversarial(ATTACK),
        DIGITS, devices=ONE, progress=False,
    )  # fmt: skip


def test_standard_training_learns_the_digits(standard_run):
    test = jc.data.load("digits", "test")
    assert jc.evaluation.correct(standard_run.model, test).mean() > 0.93
    losses = [line["loss"] for line in standard_run.history]
    assert losses[-1] < 0.2 < 1.0 < losses[0]
    assert standard_run.directory is None
    assert [line["step"] for line in standard_run.history] == [22, 44, 66, 88]


def test_adversarial_training_makes_robust(standard_run, adversarial_run):
    test = jc.data.load("digits", "test").take(100)
    x, y = jc.data.to_float(test.images), test.labels

    def robust(model):
        return 1 - ATTACK.run(jax.random.key(1), model, x, y).success.mean()

    assert robust(adversarial_run.model) > 0.6
    assert robust(adversarial_run.model) > robust(standard_run.model) + 0.2
    # What is logged is the accuracy under attack, which is lower than the clean one.
    clean = jc.evaluation.correct(adversarial_run.model, test).mean()
    assert adversarial_run.history[-1]["accuracy"] < clean


def test_the_given_model_is_left_as_it_is(digits):
    model = small_cnn(widths=(8, 16), hidden=32)
    before = {name: array.copy() for name, array in weights(model).items()}
    run = fit(jax.random.key(0), model, digits, Standard(), DIGITS, progress=False)
    after = weights(model)
    assert all((after[name] == before[name]).all() for name in before)
    # The result is a model of its own, in eval mode, with the same record.
    assert run.model.spec == model.spec
    assert run.model.blocks[0].norm.use_running_average is True
    run.model.head.kernel[...] += 1
    assert (model.head.kernel[...] == before["['head']['kernel']"]).all()


def test_weights_depend_on_key_and_initial_weights_and_nothing_is_compiled_anew(
    digits, standard_run
):
    compiled = _step.train_step.outermost._cache_size()

    def train(key, model_key):
        model = small_cnn(model_key, widths=(8, 16), hidden=32)
        run = fit(jax.random.key(key), model, digits, Standard(), DIGITS, progress=False)
        return run.model

    assert_same_weights(train(0, 0), standard_run.model)
    kernels = [np.asarray(train(*keys).head.kernel[...]) for keys in [(1, 0), (0, 1), (2, 2)]]
    kernels.append(np.asarray(standard_run.model.head.kernel[...]))
    for i, one in enumerate(kernels):
        assert all((one != other).any() for other in kernels[:i])
    assert _step.train_step.outermost._cache_size() == compiled


def test_a_trained_model_trains_on_on_other_devices(digits, standard_run):
    config = dataclasses.replace(DIGITS, epochs=1, learning_rate=0.01)
    everywhere = jax.device_put(
        standard_run.model, parallel.replicated(parallel.mesh(jax.devices()))
    )
    run = fit(
        jax.random.key(5), everywhere, digits.take(128), Standard(), config,
        devices=jax.devices()[1:2], progress=False,
    )  # fmt: skip
    assert run.history[-1]["loss"] < 0.5
    # And its result goes together with arrays on any device.
    x = jax.device_put(jnp.zeros((1, 8, 8, 1)), jax.devices()[2])
    assert run.model(x).shape == (1, 10)


def test_augmentation_uses_a_key_of_each_image():
    data = one_image_per_label(8)
    augmentation = jc.data.Augmentation(crop_padding=2, flip=True)
    seen, _ = memory_after(0, data, order=tuple(range(8)), augmentation=augmentation)
    # It does not depend on the place in the batch, nor on what else is in it.
    moved, _ = memory_after(0, data, order=(5, 2, 7, 0, 3, 1, 6, 4), augmentation=augmentation)
    np.testing.assert_array_equal(seen, moved)
    part = (6, 1, 3, 2, 0)
    fewer, _ = memory_after(0, data, order=part, augmentation=augmentation)
    np.testing.assert_array_equal(seen[list(part)], fewer[list(part)])
    other, _ = memory_after(1, data, order=tuple(range(8)), augmentation=augmentation)
    assert (other != seen).any()
    plain, _ = memory_after(0, data, order=tuple(range(8)))
    np.testing.assert_array_equal(plain, np.asarray(jc.data.to_float(data.images)))
    same, _ = memory_after(
        0, one_image_per_label(8, same=True), order=tuple(range(8)), augmentation=augmentation
    )
    assert len({image.tobytes() for image in same}) > 4


def test_augmentation_is_drawn_anew_in_every_step():
    data = one_image_per_label(8)
    augmentation = jc.data.Augmentation(crop_padding=2, flip=True)
    batch = tuple(range(8))
    config = dataclasses.replace(PLAIN_SGD, epochs=2)
    first, _ = memory_after(0, data, order=batch, augmentation=augmentation)
    both, _ = memory_after(0, data, config, order=batch, augmentation=augmentation)
    second = both - first
    changed = (np.abs(second - first) > 1e-6).any(axis=(1, 2, 3))
    assert changed.sum() > 4


def test_an_epoch_visits_each_image_at_most_once():
    data = one_image_per_label(10)
    config = dataclasses.replace(PLAIN_SGD, batch_size=4)
    seen, history = memory_after(0, data, config)
    x = np.asarray(jc.data.to_float(data.images))
    times = seen.sum(axis=(1, 2, 3)) / x.sum(axis=(1, 2, 3))
    # Two batches of 4: the remaining 2 images are left out.
    assert sorted(np.round(times, 5)) == [0] * 2 + [1] * 8
    assert len(history) == 2


def test_each_epoch_is_shuffled_anew():
    data = one_image_per_label(10)
    config = dataclasses.replace(PLAIN_SGD, epochs=3, batch_size=1, learning_rate=1e-3)
    _, history = memory_after(0, data, config)
    epochs = np.array([line["first"] for line in history]).reshape(3, 10)
    for epoch in epochs:
        assert sorted(epoch) == list(range(10))
    assert len({tuple(epoch) for epoch in (*epochs, np.arange(10.0))}) == 4
    _, other = memory_after(1, data, config)
    assert [line["first"] for line in other] != [line["first"] for line in history]


def test_metrics_are_means_over_log_every_steps():
    data = one_image_per_label(10)
    config = dataclasses.replace(PLAIN_SGD, batch_size=1, learning_rate=1e-3)
    _, each = memory_after(0, data, config)
    _, grouped = memory_after(0, data, dataclasses.replace(config, log_every=4))
    first = [line["first"] for line in each]
    assert [line["step"] for line in grouped] == [4, 8, 10]
    assert [line["epoch"] for line in grouped] == [0.4, 0.8, 1.0]
    assert [line["first"] for line in grouped] == [
        np.mean(first[:4]), np.mean(first[4:8]), np.mean(first[8:])
    ]  # fmt: skip
    assert [line["learning_rate"] for line in grouped] == [np.float32(1e-3)] * 3
    assert all(line["images_per_second"] > 0 for line in grouped)


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_the_best_weights_on_validation_are_returned(ema_decay, digits, monkeypatch):
    train, held_out = digits.take(200).holdout(jax.random.key(0), 0.2)
    config = TrainingConfig(epochs=4, batch_size=16, learning_rate=0.05, ema_decay=ema_decay)
    # Equal scores: the first one wins, also where float32 rounds it down, as 0.9.
    scores, judged = iter([0.3, 0.9, 0.5, 0.9]), []

    def score(key, program, weights, head, data):
        assert data is held_out and head is None
        judged.append(jax.tree.map(np.asarray, weights))
        return {"validation_accuracy": next(scores)}

    monkeypatch.setattr(_fit, "validation_scores", score)
    run = fit(
        jax.random.key(0), small_cnn(), train, Standard(), config, validation=held_out,
        devices=ONE, progress=False,
    )  # fmt: skip
    ours = _step.weights_of(run.model)
    for mine, best, last in zip(*map(jax.tree.leaves, (ours, judged[1], judged[3])), strict=True):
        np.testing.assert_array_equal(mine, best)
        assert (np.asarray(mine) != last).any()
    logged = [line for line in run.history if "validation_accuracy" in line]
    assert [line["validation_accuracy"] for line in logged] == [0.3, 0.9, 0.5, 0.9]
    assert [line["epoch"] for line in logged] == [1, 2, 3, 4]


def test_validation_scores_are_those_of_the_evaluation(digits):
    # 70 images in batches of 64: the padding must not count.
    train, held_out = digits.take(128), digits.subset(np.arange(200, 270))
    config = dataclasses.replace(DIGITS, epochs=2)
    attack = jc.attacks.FGSM(jc.Linf(0.05))
    run = fit(
        jax.random.key(0), small_cnn(), train, Adversarial(attack), config, validation=held_out,
        devices=ONE, progress=False,
    )  # fmt: skip
    best = max(
        (line for line in run.history if "validation_accuracy" in line),
        key=lambda line: line["validation_robust_accuracy"],
    )
    found = jc.evaluation.robustness(
        jax.random.key(0), run.model, attack, held_out, devices=ONE, progress=False
    )
    assert best["validation_accuracy"] == pytest.approx(found.clean_accuracy)
    # A last iterate can be right where the clean image was wrong: that counts here, not there.
    x = np.asarray(jc.data.to_float(held_out.images))
    keys = jax.random.split(jax.random.key(0), len(x))
    x_adv = attack.perturb(keys, run.model, jnp.asarray(x), jnp.asarray(held_out.labels))
    right = np.asarray(run.model(x_adv)).argmax(axis=1) == held_out.labels
    assert best["validation_robust_accuracy"] == pytest.approx(right.mean())


def test_padding_of_the_last_validation_batch_does_not_count():
    # 5 images, each of one bright pixel, and a memory of them that is always right.
    images = np.zeros((5, 4, 4, 1), np.uint8)
    images.reshape(5, 16)[np.arange(5), np.arange(5)] = 255
    data = jc.data.Dataset(images, np.arange(5))
    model = Memory(data)
    model.seen[...] = jnp.asarray(images, jnp.float32)
    config = dataclasses.replace(PLAIN_SGD, batch_size=4, learning_rate=1e-3)
    run = fit(
        jax.random.key(0), model, data, Memorise(), config, validation=data, devices=ONE,
        progress=False,
    )  # fmt: skip
    assert run.history[-1]["validation_accuracy"] == 1.0
    wrong = dataclasses.replace(data, labels=np.array([0, 1, 2, 3, 0]))
    run = fit(
        jax.random.key(0), model, data, Memorise(), config, validation=wrong, devices=ONE,
        progress=False,
    )  # fmt: skip
    assert run.history[-1]["validation_accuracy"] == 0.8


def test_bfloat16_trains_and_returns_float32(digits, standard_run):
    config = dataclasses.replace(DIGITS, precision="bfloat16")
    run = fit(
        jax.random.key(0), small_cnn(widths=(8, 16), hidden=32), digits, Standard(), config,
        devices=ONE, progress=False,
    )  # fmt: skip
    assert all(array.dtype == np.float32 for array in weights(run.model).values())
    assert run.model.spec.dtype == "float32"
    assert run.model.blocks[0].conv.dtype == jnp.float32
    test = jc.data.load("digits", "test")
    assert jc.evaluation.correct(run.model, test).mean() > 0.9
    # It did train in bfloat16: the first losses differ from float32's by its rounding, not more.
    ours, exact = run.history[0]["loss"], standard_run.history[0]["loss"]
    assert 1e-5 < abs(ours - exact) / exact < 0.05


def test_bfloat16_needs_a_model_that_can_be_built_again():
    config = dataclasses.replace(PLAIN_SGD, precision="bfloat16", batch_size=4)
    data = one_image_per_label(4)
    with pytest.raises(ValueError, match="`precision` must be float32"):
        fit(jax.random.key(0), Memory(data), data, Standard(), config, devices=ONE, progress=False)


def test_divergence_names_the_learning_rate_and_keeps_the_checkpoint_before(digits, tmp_path):
    config = TrainingConfig(
        epochs=5, batch_size=16, learning_rate=1e30, schedule="cyclic", optimizer="adamw"
    )
    # Cyclic rates begin at 0, so that the first step changes nothing.
    with pytest.raises(TrainingDiverged, match=r"lower `learning_rate`, now at most 1e\+30"):
        fit(
            jax.random.key(0), small_cnn(), digits.take(16), Standard(), config,
            directory=tmp_path, devices=ONE, progress=False,
        )  # fmt: skip
    assert (tmp_path / "checkpoints" / "1.sha256.json").exists()
    assert all(np.isfinite(array).all() for array in weights(jc.load(tmp_path)).values())


def test_weights_that_overflow_in_the_last_update_are_not_kept(tmp_path):
    data = one_image_per_label(4)
    # The loss of the only step is 0, and its update overflows.
    config = dataclasses.replace(PLAIN_SGD, batch_size=4, learning_rate=3e38, momentum=0.5)
    images = jc.data.Dataset(np.full((4, 4, 4, 1), 255, np.uint8), np.zeros(4, np.int32))
    model = Memory(data)
    with pytest.raises(TrainingDiverged, match="`learning_rate`"):
        fit(
            jax.random.key(0), model, images, Memorise(), config,
            directory=tmp_path, devices=ONE, progress=False,
        )  # fmt: skip
    assert not list((tmp_path / "checkpoints").glob("*"))


def test_sigterm_is_left_as_it_was(digits):
    def handler(*_):
        pass

    before = signal.signal(signal.SIGTERM, handler)
    try:
        memory_after(0, one_image_per_label(4), dataclasses.replace(PLAIN_SGD, batch_size=4))
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_progress_goes_to_stderr(capfd):
    data = one_image_per_label(4)
    config = dataclasses.replace(PLAIN_SGD, batch_size=4)
    fit(jax.random.key(0), Memory(data), data, Memorise(), config, devices=ONE)
    out, err = capfd.readouterr()
    assert "training (Memorise)" in err and "100 %" in err
    assert not out
    fit(jax.random.key(0), Memory(data), data, Memorise(), config, devices=ONE, progress=False)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"key": jnp.zeros(2, jnp.uint32)}, "`key` must be a typed key"),
        (
            {"config": TrainingConfig(batch_size=12), "devices": jax.devices()},
            r"`batch_size` must be a multiple .* 8, got 12",
        ),
        ({"config": TrainingConfig(batch_size=64)}, "`data` must hold at least one batch of 64"),
        ({"data": np.zeros((32, 8, 8, 1))}, "`data` must be a jc.data.Dataset, got ndarray"),
        ({"validation": 0.1}, "`validation` must be a jc.data.Dataset, got float"),
        ({"devices": []}, "`devices` must name at least one"),
        (
            {"model": jc.Chain(jc.models.features(small_cnn()), jnp.sin)},
            r"`model` must be a Flax NNX network, got Chain; .* take jc.models.parts\(model\)\[0\]",
        ),
        ({"objective": Standard}, r"`objective` must be one as .*ClusTR\(\) makes, got <class"),
        ({"objective": "clustr"}, "`objective` must be one as .* got 'clustr'"),
        (
            {"data": one_image_per_label(32)},
            r"`data` must hold images of the model's shape \(8, 8, 1\), got \(4, 4, 1\)",
        ),
        (
            {"validation": jc.data.Dataset(np.zeros((2, 8, 8, 1), np.uint8), np.array([0, 10]))},
            "`validation` must have at most the model's 10 classes, got 11",
        ),
    ],
)
def test_bad_input(changes, message, monkeypatch):
    # In the tests annotations are checked before our own checks.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    images = np.zeros((32, 8, 8, 1), np.uint8)
    arguments = {
        "key": jax.random.key(0),
        "model": small_cnn(),
        "data": jc.data.Dataset(images, np.arange(32) % 10),
        "objective": Standard(),
        "config": TrainingConfig(batch_size=16),
        "progress": False,
    } | changes
    with pytest.raises((ValueError, TypeError), match=message) as raised:
        fit(**arguments)
    assert "\n" not in str(raised.value)


def test_a_directory_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    data, config = one_image_per_label(4), dataclasses.replace(PLAIN_SGD, batch_size=4)
    for directory in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(OSError, match=f"`directory` .* got {directory}: ") as raised:
            fit(
                jax.random.key(0), Memory(data), data, Standard(), config,
                directory=directory, devices=ONE, progress=False,
            )  # fmt: skip
        assert "\n" not in str(raised.value)
