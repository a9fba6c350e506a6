import dataclasses
import json
import os
import signal
import subprocess
import sys

import interrupted
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interrupted import STEPS
from test_checkpoint import flip_a_byte
from training_problems import ONE, PLAIN_SGD, Memory, assert_same_weights, one_image_per_label

import jaxclus as jc
from jaxclus.training import Checkpoints, CorruptCheckpointError, Preempted, _fit, fit
from jaxclus.training.objectives import Objective, Outcome


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return interrupted.train(tmp_path_factory.mktemp("uninterrupted"))


def run_script(directory, how):
    command = [sys.executable, "-W", "error", interrupted.__file__, str(directory), how]
    cache = str(directory.parent / "compiled")
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": cache,
                          "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"},
    )  # fmt: skip


def sealed(directory):
    return sorted(int(path.name.split(".")[0]) for path in directory.rglob("*.sha256.json"))


def logged(directory):
    """The lines of metrics without their times, as sorted items."""
    lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [sorted((k, v) for k, v in line.items() if k != "images_per_second") for line in lines]


def test_killed_three_times_and_still_the_same_bit_for_bit(tmp_path, uninterrupted):
    directory = tmp_path / "run"

    # kill -9 in the middle of an epoch and of a line.
    process = run_script(directory, "epoch")
    assert process.stdout.readline() == "waiting\n", process.communicate()
    assert sealed(directory) == [STEPS]
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert (directory / "metrics.jsonl").read_text().endswith('"epo')

    # kill -9 between two epochs: the newest checkpoint is written, but not sealed.
    process = run_script(directory, "seal")
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    assert sealed(directory) == [STEPS, 2 * STEPS]
    assert (directory / "checkpoints" / str(3 * STEPS)).exists()

    # SIGTERM in the middle of an epoch: saved there, and said so.
    process = run_script(directory, "sigterm")
    message, errors = process.communicate()
    assert process.returncode == 0, errors
    # The signal is seen after the step that was under way.
    last = sealed(directory)[-1]
    assert 3 * STEPS + 2 <= last < 4 * STEPS
    assert message == (
        f"stopped by SIGTERM after step {last}: saved in {directory}; the same command goes on\n"
    )
    assert sealed(directory) == [3 * STEPS, last]

    run = interrupted.train(directory)
    assert_same_weights(run.model, uninterrupted.model)
    assert logged(directory) == logged(uninterrupted.directory)
    assert [line["step"] for line in run.history if "loss" in line] == [*range(1, 5 * STEPS + 1)]
    assert sealed(directory) == [4 * STEPS, 5 * STEPS]
    assert_same_weights(jc.load(directory), uninterrupted.model)
    assert_same_state(directory, uninterrupted.directory)


def assert_same_state(directory, other):
    states = (Checkpoints(path / "checkpoints").restore()[0] for path in (directory, other))
    for ours, theirs in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_finished_run_comes_back_at_once(uninterrupted, monkeypatch):
    monkeypatch.setattr(_fit._step, "train_step", None)
    again = interrupted.train(uninterrupted.directory)
    assert_same_weights(again.model, uninterrupted.model)
    assert again.history == uninterrupted.history


def test_training_goes_on_from_the_checkpoint_before_a_damaged_one(tmp_path, uninterrupted):
    directory = tmp_path / "run"
    _stop_after(directory, 3 * STEPS + 2)
    assert sealed(directory) == [2 * STEPS, 3 * STEPS]
    flip_a_byte(directory / "checkpoints" / str(3 * STEPS))
    with pytest.warns(UserWarning, match=f"passed over: {directory}/checkpoints/{3 * STEPS} "):
        run = interrupted.train(directory)
    assert_same_weights(run.model, uninterrupted.model)
    assert logged(directory) == logged(uninterrupted.directory)


def test_only_damaged_checkpoints(tmp_path):
    directory = tmp_path / "run"
    _stop_after(directory, 2 * STEPS + 2)
    for step in (STEPS, 2 * STEPS):
        flip_a_byte(directory / "checkpoints" / str(step))
    with (
        pytest.warns(UserWarning, match="passed over"),
        pytest.raises(CorruptCheckpointError, match=f"{directory}/checkpoints/{STEPS} does not"),
    ):
        interrupted.train(directory)


def _stop_after(directory, step):
    """Breaks the run off once a step's metrics are written, as Ctrl-C does."""
    write = _fit.Log.write

    def write_and_break(log, line):
        write(log, line)
        if line["step"] == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(_fit.Log, "write", write_and_break)
        interrupted.train(directory)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"learning_rate": 0.2}, "with config.learning_rate = 0.1, not 0.2"),
        ({"epochs": 6}, "with config.epochs = 5, not 6"),
        ({"ema_decay": None}, "with config.ema_decay = 0.9, not None"),
        # As in fine-tuning, where the network is an input and the key the same.
        ({"initial": 1}, "with initial weights = '[0-9a-f]{64}', not '[0-9a-f]{64}'"),
    ],
)
def test_other_settings_in_the_same_directory(uninterrupted, changes, message):
    before = logged(uninterrupted.directory)
    with pytest.raises(ValueError, match=f"`directory` .* {message}") as raised:
        interrupted.train(uninterrupted.directory, **changes)
    assert str(uninterrupted.directory) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert logged(uninterrupted.directory) == before


def test_meta_says_what_a_checkpoint_belongs_to(uninterrupted):
    _, meta = Checkpoints(uninterrupted.directory / "checkpoints").restore()
    assert meta["version"] == jc.__version__
    assert meta["model"]["name"] == "cnn"
    assert meta["config"]["batch_size"] == 16
    assert meta["objective"] == "Standard()"
    assert meta["augmentation"] == "Augmentation(crop_padding=1, flip=False)"
    assert meta["data"] == jc.data.load("digits").take(100).fingerprint
    assert meta["key"] == [0, 7]


def test_sigterm_at_the_end_of_an_epoch(tmp_path):
    # That step's checkpoint stands already.
    data, config = one_image_per_label(4), dataclasses.replace(PLAIN_SGD, epochs=2, batch_size=4)
    before = signal.getsignal(signal.SIGTERM)

    def train(objective, directory):
        return fit(
            jax.random.key(0), Memory(data), data, objective, config,
            directory=directory, devices=ONE, progress=False,
        )  # fmt: skip

    with pytest.raises(Preempted, match=f"after step 1: saved in {tmp_path};"):
        train(_Terminate(), tmp_path)
    with pytest.raises(Preempted, match="after step 1: nothing is kept: no directory was given"):
        train(_Terminate(), None)
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_Terminate, "refresh", Objective.refresh)
        run = train(_Terminate(), tmp_path)
    seen = np.asarray(jc.data.to_float(data.images))
    np.testing.assert_allclose(-run.model.seen[...], 2 * seen, rtol=1e-6)


@dataclasses.dataclass(frozen=True)
class _Terminate(Objective):
    def loss(self, model, x, x_adv, y, keys, state):
        logits = model(x)
        return Outcome(jnp.take_along_axis(logits, y[:, None], axis=1).sum(), logits, {})

    def refresh(self, key, model, images, labels, state):
        os.kill(os.getpid(), signal.SIGTERM)
        return state


@dataclasses.dataclass(frozen=True)
class Counting(Objective):
    """State through every hook: the epoch chooses the images, and refresh keeps the model."""

    def init(self, key, model, images, labels, batch_size):
        return {
            "epoch": jnp.int32(0),
            "key": key,
            "labels": labels,
            "memory": jnp.zeros((8, 4, 4, 1)),
        }

    def batch(self, key, number, state, size):
        # The first half of the images in even epochs, the second in odd ones.
        return jnp.arange(size) + size * (state["epoch"] % 2)

    def loss(self, model, x, x_adv, y, keys, state):
        logits = model(x)
        own = jnp.take_along_axis(logits, y[:, None], axis=1).sum()
        metrics = {"epoch_of_state": state["epoch"], "draw": jax.random.uniform(state["key"])}
        return Outcome(own, logits, metrics)

    def refresh(self, key, model, images, labels, state):
        # On the host and from arrays of the trainer, as an objective may.
        assert images.dtype == jnp.uint8 and labels.shape == (8,)
        return {
            "epoch": np.int32(int(state["epoch"]) + 1),
            "key": jax.random.fold_in(state["key"], 1),
            "labels": labels,
            "memory": model.seen[...],
        }


def _count(directory):
    data = one_image_per_label(8)
    config = dataclasses.replace(PLAIN_SGD, epochs=3, batch_size=4)
    return fit(
        jax.random.key(0), Memory(data), data, Counting(), config,
        directory=directory, devices=ONE, progress=False,
    )  # fmt: skip


def test_an_objective_keeps_its_state(tmp_path):
    run = _count(tmp_path / "whole")
    data = one_image_per_label(8)
    seen = np.asarray(jc.data.to_float(data.images))
    # Two steps in an epoch: epochs 0 and 2 saw the first four images, epoch 1 the others.
    times = np.array([4, 4, 4, 4, 2, 2, 2, 2]).reshape(8, 1, 1, 1)
    np.testing.assert_allclose(-run.model.seen[...], times * seen, rtol=1e-6)
    assert [line["epoch_of_state"] for line in run.history] == [0, 0, 1, 1, 2, 2]
    draws = [line["draw"] for line in run.history]
    assert draws[0] == draws[1] != draws[2] == draws[3] != draws[4]
    state, _ = Checkpoints(tmp_path / "whole" / "checkpoints").restore()
    assert state["objective"]["epoch"] == 3
    np.testing.assert_array_equal(state["objective"]["memory"], run.model.seen[...])


def test_an_objective_finds_its_state_again(tmp_path):
    whole, write = _count(tmp_path / "whole"), _fit.Log.write

    def write_and_break(log, line):
        write(log, line)
        if line["step"] == 3:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(_fit.Log, "write", write_and_break)
        _count(tmp_path / "broken")
    assert sealed(tmp_path / "broken") == [2]
    run = _count(tmp_path / "broken")
    assert_same_weights(run.model, whole.model)
    assert logged(tmp_path / "broken") == logged(tmp_path / "whole")
    assert_same_state(tmp_path / "broken", tmp_path / "whole")


def test_a_refreshed_state_compiles_nothing_new():
    _count(None)
    compiled = _fit._step.train_step.outermost._cache_size()
    _count(None)
    assert _fit._step.train_step.outermost._cache_size() == compiled
