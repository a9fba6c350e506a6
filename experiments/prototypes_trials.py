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
        eps: Linf radius of training and of the suite, one of the grid.
        seeds: of weights, prototypes, order and attacks; pilots have seen 0 to 5.
        num_images: the first so many train; None for all.
        epochs: of a training, times the trial's `epochs`.
        attack_steps: of PGD in adversarial training and TRADES.
        first_image: where the attacked test images begin; pilots have seen the first 1,000.
        test_images: how many are attacked.
        few_images: how many of them without gradients, and by the other rules.
        batch_size: of training.
        embedding_size: d of the trials that do not say otherwise.
        steps: of the suite's PGD and APGD; published evaluations have 100 of their own.
        restarts: of the suite's attacks on own losses and margins.
        pictured: the seed whose embeddings are drawn.
        short: whether a smoke test leaves the long attacks out.
    """

    model: str
    arguments: tuple[tuple[str, Any], ...]
    eps: float
    seeds: tuple[int, ...] = (6, 7, 8, 9, 10, 11)
    num_images: int | None = 20_000
    epochs: int = 8
    attack_steps: int = 7
    first_image: int = 1000
    test_images: int = 500
    few_images: int = 100
    batch_size: int = 240
    embedding_size: int = 100
    steps: int = 50
    restarts: int = 5
    pictured: int = 6
    short: bool = False


@dataclasses.dataclass(frozen=True)
class Trial:
    """A network that is trained with each seed.

    Attributes:
        name: in tables.
        method: standard, pgd, trades, prototypes, prototypes_pgd, prototypes_trades or learned.
        settings: the objective's, where they are not the published ones.
        parts: of the experiment that have it.
        base: the trial that it differs from in one thing.
        embedding_size: d, where it is not the setting's.
        epochs: multiple of the setting's epochs.
    """

    name: str
    method: str
    settings: tuple[tuple[str, Any], ...] = ()
    parts: tuple[str, ...] = ("headline",)
    base: str | None = None
    embedding_size: int | None = None
    epochs: int = 1


def trials(part: str) -> list[Trial]:
    """The networks of a part of the experiment.

    "published" is what the released runs trained: repulsive prototypes, the Linf distance, inner
    products. "cosine" has prototypes, distance and rule that fit together. "learned" classifies by
    its own dense head, as published. Under an adversary, twice the epochs.

    Not among the factors: Linf distances summed over the batch, which under Adam is the same
    training; around "published" the generators that give nearly the simplex (hyperspherical) or
    prototypes as far apart as uniform ones (Hadamard).
    """
    both = ("headline", "ablations")
    every = [
        Trial("standard", "standard", parts=both),
        Trial("pgd", "pgd", parts=both, epochs=2),
        Trial("trades", "trades", epochs=2),
        Trial("published", "prototypes", parts=both),
        Trial("cosine", "prototypes", COSINE, both),
        Trial("max-mahalanobis", "prototypes", MAX_MAHALANOBIS),
        Trial("learned", "learned", (("rule", None),)),
        Trial("published, pgd", "prototypes_pgd", epochs=2),
        Trial("cosine, pgd", "prototypes_pgd", COSINE, epochs=2),
        Trial("cosine, trades", "prototypes_trades", COSINE, epochs=2),
        _varied("published", "mean", generator="repulsive_mean"),
        _varied("published", "uniform", generator="uniform"),
        _varied("published", "simplex", generator="simplex"),
        _varied("published", "scale 0.1", scale=0.1),
        _varied("published", "trained by cosine", distance="cosine"),
        _varied("published", "trained by l2", distance="l2"),
        _varied("published", "d 9", size=9),
        _varied("published", "d 10", size=10),
        _varied("published", "d 50", size=50),
        _varied("published", "d 500", size=500),
        _varied("published", "4 times the epochs", epochs=4),
        _varied("cosine", "uniform", generator="uniform"),
        _varied("cosine", "repulsive", generator="repulsive"),
        _varied("cosine", "hyperspherical", generator="hyperspherical"),
        _varied("cosine", "hadamard", generator="hadamard"),
        _varied("cosine", "trained by linf", distance="linf"),
        _varied("cosine", "trained by l2", distance="l2"),
        _varied("cosine", "trained by its square", distance="cosine_squared"),
        _varied("cosine, repulsive", "batch axis", as_published=True),
        _varied("cosine", "4 times the epochs", epochs=4),
    ]
    return [trial for trial in every if part in trial.parts]


COSINE = (("generator", "simplex"), ("distance", "cosine"), ("rule", "cosine"))
MAX_MAHALANOBIS = (("generator", "simplex"), ("distance", "l2"), ("rule", "l2"), ("scale", 10.0))
_BASES = {
    "published": {},
    "cosine": dict(COSINE),
    "cosine, repulsive": dict(COSINE) | {"generator": "repulsive"},
}


def _varied(
    base: str, what: str, size: int | None = None, epochs: int = 1, **changed: Any
) -> Trial:
    settings = tuple((_BASES[base] | changed).items())
    return Trial(f"{base}, {what}", "prototypes", settings, ("ablations",), base, size, epochs)


def objective(trial: Trial, setting: Setting) -> objectives.Objective:
    """What is minimised."""
    ball, given = jc.Linf(setting.eps), dict(trial.settings)
    adversary = {"threat": ball, "steps": setting.attack_steps}
    return {
        "standard": lambda: objectives.Standard(),
        "pgd": lambda: objectives.Adversarial(jc.attacks.PGD(ball, steps=setting.attack_steps)),
        "trades": lambda: objectives.TRADES(**adversary),
        "prototypes": lambda: PrototypeTraining(**given),
        "prototypes_pgd": lambda: AdversarialPrototypes(**given, **adversary),
        "prototypes_trades": lambda: PrototypeTRADES(**given, **adversary),
        "learned": lambda: LearnedPrototypes(**given),
    }[trial.method]()


def config(trial: Trial, setting: Setting) -> TrainingConfig:
    """How a network is trained: all alike, but for the epochs."""
    return TrainingConfig(
        epochs=trial.epochs * setting.epochs, batch_size=setting.batch_size, optimizer="adamw",
        learning_rate=3e-3, weight_decay=0.0,
    )  # fmt: skip


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
