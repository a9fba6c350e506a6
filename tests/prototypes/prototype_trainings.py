"""Trainings of a small network onto prototypes of digits."""

import jax
import pytest

import jaxclus as jc
from jaxclus.training import TrainingConfig, fit

KEY = jax.random.key(0)
ONE = jax.devices()[:1]
DIGITS = jc.data.load("digits", "train").take(400)
HELD_OUT = jc.data.load("digits", "test").take(100)


def train(objective, directory=None, devices=ONE, **changes):
    model = jc.models.create("cnn", 10, (8, 8, 1), KEY, widths=(8,), hidden=16, embedding_size=20)
    settings = {"epochs": 2, "batch_size": 96, "optimizer": "adamw", "learning_rate": 3e-3}
    return fit(
        KEY, model, DIGITS, objective, TrainingConfig(**settings | changes), validation=HELD_OUT,
        directory=directory, devices=devices, progress=False,
    )  # fmt: skip


def broken_off(kind, run):
    """What `run` returns the second time, after the prototypes' second refresh broke it off."""
    calls, refresh = [], kind.refresh

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return refresh(self, *arguments)

    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(kind, "refresh", interrupted)
        run()
    return run()
