"""The networks of `experiments.clustr`: which there are, and how each is trained."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

import jaxclus as jc
from jaxclus.training import TrainingConfig, objectives


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the trials of a data set have in common.

    Attributes:
        model: architecture.
        arguments: of the architecture.
        lipschitz: those of the Lipschitz-bounded one, `lipschitz_resnet8`.
        eps: Linf radius of training and of AutoAttack, one of the published grid.
        seeds: of weights, order and attacks; a pilot has seen 0 to 5.
        num_images: the first so many train.
        epochs: of a training, times the trial's `epochs`.
        attack_steps: of PGD in adversarial training and TRADES.
        first_image: where the attacked test images begin; a pilot has seen the first 1,000.
        test_images: how many are attacked.
        lipschitz_images: how many with the Lipschitz-bounded network, whose convolutions of few
            channels take eleven times as long.
        batch_size: of training.
        nearest: L of the scores, beside the number of clusters.
        short: whether AutoAttack is a few steps of APGD instead: a smoke test.
    """

    model: str
    arguments: tuple[tuple[str, Any], ...]
    lipschitz: tuple[tuple[str, Any], ...]
    eps: float
    seeds: tuple[int, ...] = (6, 7, 8, 9, 10, 11)
    num_images: int | None = None
    epochs: int = 8
    attack_steps: int = 7
    first_image: int = 1000
    test_images: int = 1000
    lipschitz_images: int = 100
    batch_size: int = 240
    nearest: tuple[int, ...] = (1, 5, 10)
    short: bool = False

    def autoattack(self, ball: jc.threat.Threat) -> jc.attacks.AutoAttack:
        """The ensemble that judges."""
        if not self.short:
            return jc.attacks.AutoAttack(ball)
        members = (jc.attacks.APGD(ball, steps=3),)
        return jc.attacks.AutoAttack(ball, version="custom", attacks=members)

    def targeted(self, ball: jc.threat.Threat) -> jc.attacks.TargetedAPGD:
        """The attack on the distances to clusters, and in L2 balls."""
        return jc.attacks.TargetedAPGD(ball, steps=3 if self.short else 100)


@dataclasses.dataclass(frozen=True)
class Trial:
    """A network that is trained with each seed.

    Attributes:
        name: in tables.
        method: standard, pgd, trades, clustr, qtrades, clustr_trades or clustr_free.
        settings: the objective's, where they are not the published ones.
        start: the trial whose network it goes on from, or None.
        parts: of the experiment that have it.
        base: the trial that it differs from in one thing.
        epochs: how many times the setting's epochs it is trained.
        lipschitz: whether the network is Lipschitz-bounded.
    """

    name: str
    method: str
    settings: tuple[tuple[str, Any], ...] = ()
    start: str | None = None
    parts: tuple[str, ...] = ("headline",)
    base: str | None = None
    epochs: float = 1
    lipschitz: bool = False


def trials(part: str) -> list[Trial]:
    """The networks of a part of the experiment.

    PGD training and TRADES have as many epochs as ClusTR and the network that it starts from. A
    batch of free training is used four times over, in a quarter of the epochs.
    """
    both, ablations, certificates = ("headline", "ablations"), ("ablations",), ("certificates",)

    def other(
        name: str, base: str = "qtrades", method: str = "qtrades", epochs: float = 1, **given: Any
    ) -> Trial:
        settings = tuple(given.items())
        return Trial(name, method, settings, "standard", ablations, base, epochs)

    lipschitz = {"parts": certificates, "lipschitz": True}
    every = [
        Trial("standard", "standard", parts=both),
        Trial("standard, continued", "standard", start="standard"),
        Trial("pgd", "pgd", epochs=2, parts=both),
        Trial("trades", "trades", epochs=2),
        Trial("clustr", "clustr", start="standard", parts=both),
        Trial("qtrades", "qtrades", start="standard", parts=both),
        other("qtrades, lambda 2", beta=2.0),
        other("qtrades, lambda 32", beta=32.0),
        # One cluster for each class allows no more than 10 to a batch.
        other("qtrades, m 10", clusters_per_batch=10),
        other("qtrades, m 10, K 1", "qtrades, m 10", clusters_per_batch=10, clusters_per_class=1),
        other("qtrades, K 4", clusters_per_class=4),
        other("qtrades, alpha 1", alpha=1.0),
        other("qtrades, L 10", nearest=10),
        other("qtrades, epochs x 3", epochs=3),
        other("qtrades, as published", as_published=True),
        other("qtrades, adversary of TRADES", method="clustr_trades"),
        other("clustr, epochs x 3", "clustr", "clustr", epochs=3),
        other("clustr, free", "clustr", "clustr_free", epochs=0.25),
        Trial("standard, Lipschitz", "standard", **lipschitz),
        Trial(
            "standard, Lipschitz, continued", "standard", start="standard, Lipschitz", **lipschitz
        ),
        Trial("clustr, Lipschitz", "clustr", start="standard, Lipschitz", **lipschitz),
    ]
    return [trial for trial in every if part in trial.parts]


def objective(trial: Trial, setting: Setting) -> objectives.Objective:
    """What is minimised."""
    ball, given = jc.Linf(setting.eps), dict(trial.settings)
    return {
        "standard": lambda: objectives.Standard(),
        "pgd": lambda: objectives.Adversarial(jc.attacks.PGD(ball, steps=setting.attack_steps)),
        "trades": lambda: objectives.TRADES(ball, steps=setting.attack_steps),
        "clustr": lambda: jc.clustr.ClusTR(**given),
        "qtrades": lambda: jc.clustr.QTRADES(threat=ball, **given),
        "clustr_trades": lambda: jc.clustr.ClusTRTRADES(threat=ball, **given),
        "clustr_free": lambda: jc.clustr.FreeClusTR(threat=ball, **given),
    }[trial.method]()


def config(trial: Trial, setting: Setting) -> TrainingConfig:
    """How a network is trained.

    What goes on from another network with Adam, without weight decay, as ClusTR is published, but
    at a rate of 1e-3 on a cosine instead of 1e-4 for up to 90 epochs: the trainings here are short.
    """
    epochs = max(1, round(trial.epochs * setting.epochs))
    common: dict[str, Any] = {"epochs": epochs, "batch_size": setting.batch_size}
    if trial.start is not None or trial.lipschitz:
        rate = 5e-3 if trial.lipschitz and trial.start is None else 1e-3
        return TrainingConfig(optimizer="adamw", learning_rate=rate, weight_decay=0.0, **common)
    return TrainingConfig(learning_rate=0.1, weight_decay=5e-4, schedule="cyclic", **common)


def trained(
    trial: Trial,
    setting: Setting,
    seed: int,
    train: jc.data.Dataset,
    start: jc.models.Classifier | None,
    directory: Path,
) -> jc.training.Run:
    """The network of a seed; all trials of a seed start from weights of the same key."""
    init, fit = jax.random.split(jax.random.key(seed))
    if start is None:
        name, arguments = setting.model, setting.arguments
        if trial.lipschitz:
            name, arguments = "lipschitz_resnet8", setting.lipschitz
        shape, classes = train.input_shape, train.num_classes
        start = jc.models.create(name, classes, shape, init, **dict(arguments))
    train = train.take(setting.num_images or len(train))
    goal = objective(trial, setting)
    return jc.training.fit(fit, start, train, goal, config(trial, setting), directory=directory)
