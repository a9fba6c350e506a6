"""An evaluation that kills itself: python interrupted_evaluation.py DIRECTORY SAVES.

It dies by SIGKILL right after its state has been saved so many times.
"""

import os
import signal
import sys

import jax
from networks import random_features

import jaxclus as jc
from jaxclus.evaluation import _progress


def attack():
    """An ensemble with small budgets: the tests run it too, without interruption."""
    threat = jc.Linf(0.05)
    members = (
        jc.attacks.APGD(threat, steps=8),
        jc.attacks.TargetedAPGD(threat, steps=6, targets=3),
        jc.attacks.TargetedFAB("linf", threat, steps=4, targets=2),
        jc.attacks.Square(threat, queries=150),
    )
    return jc.attacks.AutoAttack(threat, version="custom", attacks=members)


def evaluate(model, data, **arguments):
    """The evaluation, on one device in batches of 16."""
    return jc.evaluation.robustness(
        jax.random.key(3), model, attack(), data, microbatch=16, devices=jax.devices()[:1],
        progress=False, **arguments,
    )  # fmt: skip


def dataset():
    return jc.data.load("digits", "test").take(40)


if __name__ == "__main__":
    directory, saves = sys.argv[1], int(sys.argv[2])
    _progress._INTERVAL = 0.0
    write, written = _progress.Progress._save, []

    def save_and_die(progress, *arguments):
        write(progress, *arguments)
        written.append(1)
        if len(written) == saves:
            os.kill(os.getpid(), signal.SIGKILL)

    _progress.Progress._save = save_and_die
    evaluate(random_features(), dataset(), directory=directory)
