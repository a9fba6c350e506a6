"""The networks of `experiments.repulsive_prototypes`: which there are, and how each is trained."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

import jaxclus as jc
from jaxclus.prototypes import (
    AdversarialPrototypes,
    LearnedPrototypes,
    PrototypeTRADES,
    PrototypeTraining,
)
from jaxclus.training import TrainingConfig, objectives


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the trials of a data set have in common.

    Attributes:
        model: architecture.
        arguments: of the architecture.
        eps: Linf radius of training and of the suite, one of the published grid.
        seeds: of weights, prototypes, order and attacks; a pilot has seen 0 to 5.
        num_images: the first so many train; None for all.
        epochs: of a training, times the trial's `epochs`.
        attack_steps: of PGD in adversarial training and TRADES.
        first_image: where the attacked test images begin; a pilot has seen the first 1,000.
        test_images: how many are attacked.
        batch_size: of training.
        embedding_size: d of the trials that do not say otherwise.
        steps: of the suite's PGD and APGD; published evaluations have 100 of their own.
        restarts: of the suite's attacks on own losses and margins.
        short: whether the suite has no AutoAttack and no gradient-free attacks: a smoke test.
    """

    model: str
    arguments: tuple[tuple[str, Any], ...]
    eps: float
    seeds: tuple[int, ...] = (6, 7, 8, 9, 10, 11)
    num_images: int | None = 20_000
    epochs: int = 8
    attack_steps: int = 7
    first_image: int = 1000
    test_images: int = 200
    batch_size: int = 240
    embedding_size: int = 100
    steps: int = 50
    restarts: int = 5
    short: bool = False


@dataclasses.dataclass(frozen=True)
class Trial:
    """A network that is trained with each seed.

    Attributes:
        name: in tables.
        method: standard, pgd, prototypes, prototypes_pgd, prototypes_trades or learned.
        settings: the objective's, where they are not the published ones.
        parts: of the experiment that have it.
        base: the trial that it differs from in one thing.
        embedding_size: d, where it is not the setting's.
    """

    name: str
    method: str
    settings: tuple[tuple[str, Any], ...] = ()
    parts: tuple[str, ...] = ("headline",)
    base: str | None = None
    embedding_size: int | None = None

    @property
    def epochs(self) -> int:
        """How many times the setting's epochs it is trained: twice under an adversary."""
        return 2 if self.method in ("pgd", "prototypes_pgd", "prototypes_trades") else 1


def trials(part: str) -> list[Trial]:
    """The networks of a part of the experiment.

    "published" is what the released runs trained: repulsive prototypes, the Linf distance, inner
    products. "cosine" has prototypes, distance and rule that fit together.
    """
    both, ablations = ("headline", "ablations"), ("ablations",)

    def varied(name: str, base: str = "cosine", size: int | None = None, **given: Any) -> Trial:
        own = COSINE | given if base == "cosine" else given
        return Trial(name, "prototypes", tuple(own.items()), ablations, base, size)

    cosine = tuple(COSINE.items())
    every = [
        Trial("standard", "standard", parts=both),
        Trial("pgd", "pgd", parts=both),
        Trial("published", "prototypes", parts=both),
        Trial("cosine", "prototypes", cosine, both),
        Trial("max-mahalanobis", "prototypes", tuple(MAX_MAHALANOBIS.items())),
        Trial("learned", "learned"),
        Trial("published, pgd", "prototypes_pgd"),
        Trial("cosine, pgd", "prototypes_pgd", cosine),
        Trial("cosine, trades", "prototypes_trades", cosine),
        varied("published, mean", "published", generator="repulsive_mean"),
        varied("published, uniform", "published", generator="uniform"),
        varied("published, linf_sum", "published", distance="linf_sum"),
        varied("uniform", generator="uniform"),
        varied("repulsive", generator="repulsive"),
        varied("hyperspherical", generator="hyperspherical", generator_steps=2000),
        varied("hadamard", generator="hadamard"),
        varied("cosine_squared", distance="cosine_squared"),
        varied("batch-axis cosine", as_published=True),
        varied("d 9", size=9),
        varied("d 10", size=10),
        varied("d 50", size=50),
        varied("d 500", size=500),
    ]
    return [trial for trial in every if part in trial.parts]


COSINE = {"generator": "simplex", "distance": "cosine", "rule": "cosine"}
MAX_MAHALANOBIS = {"generator": "simplex", "distance": "l2", "rule": "l2", "scale": 10.0}


def objective(trial: Trial, setting: Setting) -> objectives.Objective:
    """What is minimised."""
    ball, given = jc.Linf(setting.eps), dict(trial.settings)
    adversary = {"threat": ball, "steps": setting.attack_steps}
    return {
        "standard": lambda: objectives.Standard(),
        "pgd": lambda: objectives.Adversarial(jc.attacks.PGD(ball, steps=setting.attack_steps)),
        "prototypes": lambda: PrototypeTraining(**given),
        "prototypes_pgd": lambda: AdversarialPrototypes(**given, **adversary),
        "prototypes_trades": lambda: PrototypeTRADES(**given, **adversary),
        "learned": lambda: LearnedPrototypes(**given),
    }[trial.method]()


def config(trial: Trial, setting: Setting) -> TrainingConfig:
    """How a network is trained: alike, but for the published SGD of softmax networks."""
    common: dict[str, Any] = {
        "epochs": trial.epochs * setting.epochs,
        "batch_size": setting.batch_size,
    }
    if trial.method in ("standard", "pgd"):
        return TrainingConfig(learning_rate=0.1, weight_decay=5e-4, schedule="cyclic", **common)
    return TrainingConfig(optimizer="adamw", learning_rate=3e-3, weight_decay=0.0, **common)


def trained(
    trial: Trial, setting: Setting, seed: int, train: jc.data.Dataset, directory: Path
) -> jc.training.Run:
    """The network of a seed; all trials of a seed start from weights of the same key."""
    init, fit = jax.random.split(jax.random.key(seed))
    size = trial.embedding_size or setting.embedding_size
    start = jc.models.create(
        setting.model, train.num_classes, train.input_shape, init, embedding_size=size,
        **dict(setting.arguments),
    )  # fmt: skip
    train = train.take(setting.num_images or len(train))
    goal = objective(trial, setting)
    return jc.training.fit(fit, start, train, goal, config(trial, setting), directory=directory)
