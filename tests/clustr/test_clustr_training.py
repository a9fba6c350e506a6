"""Whole trainings with ClusTR's objectives: learned, loaded, resumed, on eight devices."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxclus as jc
from jaxclus.clustr import QTRADES, ClusTR, FreeClusTR
from jaxclus.training import TrainingConfig, _step, fit

ONE = jax.devices()[:1]
BALL = jc.Linf(0.1)
KEY = jax.random.key(0)
SETTINGS = {"clusters_per_class": 2, "clusters_per_batch": 4, "alpha": 1.0}
DIGITS = jc.data.load("digits", "train").take(400)
HELD_OUT = jc.data.load("digits", "test").take(100)


def train(objective, directory=None, devices=ONE, **changes):
    model = jc.models.create("cnn", 10, (8, 8, 1), KEY, widths=(8,), hidden=16)
    config = TrainingConfig(
        epochs=3, batch_size=96, optimizer="adamw", learning_rate=3e-3, weight_decay=0.0
    )
    return fit(
        KEY, model, DIGITS, objective, dataclasses.replace(config, **changes), validation=HELD_OUT,
        directory=directory, devices=devices, progress=False,
    )  # fmt: skip


def test_training_separates_the_classes_and_is_loaded_again(tmp_path):
    run = train(ClusTR(nearest=10), tmp_path, epochs=6)
    after = [line for line in run.history if "full_magnet_loss" in line]
    assert [line["epoch"] for line in after] == [1, 2, 3, 4, 5, 6]
    assert after[-1]["full_magnet_loss"] < after[0]["full_magnet_loss"]
    accuracy = jc.evaluation.correct(run.model, HELD_OUT).mean()
    assert accuracy > 0.8
    best = max(line.get("validation_accuracy", 0) for line in run.history)
    assert accuracy == pytest.approx(best)
    loaded, x = jc.load(tmp_path), jc.data.to_float(HELD_OUT.images)
    np.testing.assert_array_equal(loaded(x), run.model(x))
    network, head = jc.models.parts(loaded)
    assert head.nearest == 10 and head.centre_classes == tuple(np.repeat(np.arange(10), 2))
    jc.export(loaded, tmp_path / "model.safetensors")
    again = jc.load(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(again(x), run.model(x))
    assert jc.models.parts(again)[1].nearest == 10


def on_the_device(step):
    """The compiled step, which after its first call may take nothing from the host."""
    guards = itertools.chain(["allow"], itertools.repeat("disallow"))

    def guarded(*arguments, **fixed):
        with jax.transfer_guard(next(guards)):
            return step(*arguments, **fixed)

    return guarded


def test_transfers_are_seen():
    sine = on_the_device(jax.jit(jnp.sin))
    sine(np.ones(3))
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        sine(np.ones(3))


def test_training_goes_on_where_it_was_broken_off(tmp_path):
    objective = FreeClusTR(**SETTINGS, threat=BALL, replays=2)  # the one with most state
    with pytest.MonkeyPatch.context() as patched:
        step = _step.train_step.outermost
        patched.setattr(_step, "train_step", on_the_device(step))
        whole = train(objective, tmp_path / "whole", epochs=2)
    before = step._cache_size()
    calls = []

    def refresh(self, *arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return ClusTR_refresh(self, *arguments)

    ClusTR_refresh = ClusTR.refresh
    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(ClusTR, "refresh", refresh)
        train(objective, tmp_path / "broken", epochs=2)
    again = train(objective, tmp_path / "broken", epochs=2)
    assert step._cache_size() == before + 1  # one program for all steps of both runs
    for mine, theirs in zip(*map(jax.tree.leaves, (again.model, whole.model)), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_all_devices_do_as_one(tmp_path):
    runs = [
        train(ClusTR(**SETTINGS), devices=devices, epochs=1) for devices in (ONE, jax.devices())
    ]
    ours, theirs = (np.asarray(run.model(jc.data.to_float(HELD_OUT.images))) for run in runs)
    np.testing.assert_allclose(ours, theirs, rtol=0.02, atol=0.02 * np.abs(ours).max())


def test_the_published_variant_trains():
    run = train(QTRADES(**SETTINGS, threat=BALL, beta=2.0, as_published=True), epochs=1)
    assert np.isfinite(run.history[0]["loss"])
