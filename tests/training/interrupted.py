"""A training run that is cut short: python interrupted.py DIRECTORY HOW.

HOW is "epoch" (half a line of metrics written in the middle of the second epoch, then it waits to
be killed), "seal" (kills itself when the third epoch's checkpoint is written, but not yet sealed)
or "sigterm" (gets SIGTERM in the middle of the fourth epoch).
"""

import os
import signal
import sys
import time

import jax

import jaxclus as jc
from jaxclus.training import Preempted, TrainingConfig, _fit, fit
from jaxclus.training.objectives import Standard

STEPS = 6  # in an epoch


def train(directory=None, initial=0, **changes):
    """The run; the tests do it too, without interruption."""
    digits = jc.data.load("digits")
    settings = {"epochs": 5, "batch_size": 16, "log_every": 1, "ema_decay": 0.9} | changes
    model = jc.models.create("cnn", 10, (8, 8, 1), jax.random.key(initial), widths=(4,), hidden=8)
    return fit(
        jax.random.key(7), model, digits.take(100), Standard(), TrainingConfig(**settings),
        validation=digits.subset(range(1000, 1050)),
        augmentation=jc.data.Augmentation(crop_padding=1, flip=False),
        directory=directory, devices=jax.devices()[:1], progress=False,
    )  # fmt: skip


def _at_step(wanted, act):
    """Does something once the metrics of a step are written."""
    write = _fit.Log.write

    def write_and_act(log, line):
        write(log, line)
        if line["step"] == wanted:
            act(log)

    _fit.Log.write = write_and_act


def _wait_for_the_kill(log):
    with open(log.path, "a") as file:
        file.write('{"step": 10, "epo')
    print("waiting", flush=True)
    time.sleep(600)


def _kill_before_the_seal():
    write_json = jc.runs.write_json

    def write_or_die(path, value):
        if path.name == f"{3 * STEPS}.sha256.json":
            os.kill(os.getpid(), signal.SIGKILL)
        write_json(path, value)

    jc.runs.write_json = write_or_die


def main(directory, how):
    if how == "epoch":
        _at_step(STEPS + 3, _wait_for_the_kill)
    elif how == "seal":
        _kill_before_the_seal()
    else:
        _at_step(3 * STEPS + 2, lambda log: os.kill(os.getpid(), signal.SIGTERM))
    try:
        train(directory)
    except Preempted as error:
        print(error)


if __name__ == "__main__":
    main(*sys.argv[1:])
