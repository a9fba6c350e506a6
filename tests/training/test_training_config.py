import dataclasses
import math

import jaxtyping
import numpy as np
import pytest

from jaxclus.training import TrainingConfig
from jaxclus.training._config import learning_rate


def rates(config, steps_per_epoch, steps):
    schedule = learning_rate(config, steps_per_epoch)
    return np.array([float(schedule(np.int32(step))) for step in steps])


def test_step_schedule_decays_after_its_milestones():
    config = TrainingConfig(
        epochs=10, learning_rate=0.8, schedule="step", milestones=(3, 6), decay=0.5
    )
    found = rates(config, 5, [0, 14, 15, 29, 30, 49])
    np.testing.assert_allclose(found, [0.8, 0.8, 0.4, 0.4, 0.2, 0.2], rtol=1e-6)
    constant = dataclasses.replace(config, milestones=())
    np.testing.assert_allclose(rates(constant, 5, [0, 15, 49]), 0.8, rtol=1e-6)


def test_cosine_schedule_is_half_a_period():
    config = TrainingConfig(epochs=4, learning_rate=0.3, schedule="cosine")
    steps = np.arange(0, 41)
    wanted = [0.15 * (1 + math.cos(math.pi * step / 40)) for step in steps]
    np.testing.assert_allclose(rates(config, 10, steps), wanted, rtol=1e-5, atol=1e-8)
    assert rates(config, 10, [0]) == np.float32(0.3)
    assert rates(config, 10, [40]) == 0


def test_cyclic_schedule_rises_and_falls():
    config = TrainingConfig(epochs=5, learning_rate=0.2, schedule="cyclic")
    # 50 steps: up until 20, then down.
    found = rates(config, 10, [0, 10, 20, 35, 50])
    np.testing.assert_allclose(found, [0, 0.1, 0.2, 0.1, 0], rtol=1e-6, atol=1e-9)


def test_a_configuration_is_a_key():
    assert hash(TrainingConfig(milestones=(1,))) == hash(TrainingConfig(milestones=(1,)))
    assert TrainingConfig() != TrainingConfig(epochs=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainingConfig().epochs = 3


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"epochs": 0}, "`epochs` must be at least 1, got 0"),
        ({"batch_size": 1.5}, "`batch_size` must be an integer"),
        ({"checkpoint_every": 0}, "`checkpoint_every`"),
        ({"log_every": 0}, "`log_every`"),
        ({"learning_rate": 0.0}, "`learning_rate` must be a finite number above 0, got 0.0"),
        ({"learning_rate": math.nan}, "`learning_rate`"),
        ({"weight_decay": -1.0}, "`weight_decay`"),
        ({"momentum": 1.1}, r"`momentum` must be in \[0, 1\], got 1.1"),
        ({"decay": 0.0}, "`decay`"),
        ({"decay": 2.0}, r"`decay` must be in \[0, 1\], got 2.0"),
        ({"ema_decay": 1.0}, r"`ema_decay` must be in \[0, 1\) or None, got 1.0"),
        ({"optimizer": "lion"}, "`optimizer` must be one of adamw, sgd; got 'lion'"),
        ({"schedule": "linear"}, "`schedule` must be one of cosine, cyclic, step"),
        ({"precision": "float16"}, "`precision` must be one of bfloat16, float32"),
        ({"milestones": (0,)}, "`milestones`"),
        ({"milestones": [3]}, r"`milestones` must be a tuple of epochs, got \[3\]"),
    ],
)
def test_bad_settings(changes, message, monkeypatch):
    # In the tests annotations are checked before our own checks.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises((ValueError, TypeError), match=message) as raised:
        TrainingConfig(**changes)
    assert "\n" not in str(raised.value)
