"""One network of `experiments.clustr`: trained, attacked in several ways, certified."""

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxclus as jc
from jaxclus.training import TrainingConfig, objectives

#: Radii of the published evaluation.
GRID = tuple(n / 255 for n in (2, 8, 16, 25.5))
#: Radii of certificates, L2.
L2_GRID = (0.25, 0.5, 1.0)
# The published attack: its step, and its restarts.
STEP, RESTARTS = 2 / 255, 10
_BATCH = 250
#: What rows depend on beside the setting; the number goes up when the evaluation changes.
METHOD = (GRID, L2_GRID, STEP, RESTARTS, 1)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the trials of a data set have in common.

    Attributes:
        model: architecture.
        lipschitz: arguments of the Lipschitz-bounded one, `lipschitz_resnet8`.
        eps: Linf radius of training and of AutoAttack, one of the published grid.
        seeds: number of seeds.
        num_images: the first so many train.
        epochs: of each training.
        attack_steps: of PGD in adversarial training and TRADES.
        test_images: the first so many are attacked.
        batch_size: of training.
        nearest: L of the scores, beside all clusters.
        short: whether AutoAttack is a few steps of APGD instead: a smoke test.
    """

    model: str
    lipschitz: tuple[tuple[str, Any], ...]
    eps: float
    seeds: int = 6
    num_images: int | None = None
    epochs: int = 3
    attack_steps: int = 7
    test_images: int = 200
    batch_size: int = 240
    nearest: tuple[int, ...] = (1, 5, 10)
    short: bool = False

    def autoattack(self, ball: jc.threat.Threat) -> jc.attacks.AutoAttack:
        """The ensemble that judges."""
        if not self.short:
            return jc.attacks.AutoAttack(ball)
        members = (jc.attacks.APGD(ball, steps=3),)
        return jc.attacks.AutoAttack(ball, version="custom", attacks=members)


@dataclasses.dataclass(frozen=True)
class Trial:
    """A network that is trained with each seed.

    Attributes:
        name: in tables.
        method: standard, pgd, trades, clustr or qtrades.
        settings: the objective's, where they are not the published ones.
        start: the trial whose network it goes on from, or None.
        parts: of the experiment that have it.
        lipschitz: whether the network is Lipschitz-bounded.
    """

    name: str
    method: str
    settings: tuple[tuple[str, Any], ...] = ()
    start: str | None = None
    parts: tuple[str, ...] = ("headline",)
    lipschitz: bool = False


def trials(part: str) -> list[Trial]:
    """The networks of a part of the experiment: one factor at a time around the published ones."""
    both = ("headline", "ablations")

    def qtrades(name: str, **settings: Any) -> Trial:
        pairs = tuple(settings.items())
        return Trial(f"qtrades, {name}", "qtrades", pairs, "standard", ("ablations",))

    def lipschitz(name: str, **fields: Any) -> Trial:
        return Trial(f"{name}, Lipschitz", name, parts=("certificates",), lipschitz=True, **fields)

    every = [
        Trial("standard", "standard", parts=both),
        Trial("pgd", "pgd"),
        Trial("trades", "trades"),
        Trial("clustr", "clustr", start="standard"),
        Trial("qtrades", "qtrades", start="standard", parts=both),
        qtrades("lambda 2", beta=2.0),
        qtrades("lambda 32", beta=32.0),
        qtrades("K 1", clusters_per_class=1, clusters_per_batch=10),
        qtrades("K 4", clusters_per_class=4),
        qtrades("alpha 1", alpha=1.0),
        lipschitz("standard"),
        lipschitz("clustr", start="standard, Lipschitz"),
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
    }[trial.method]()


def config(trial: Trial, setting: Setting) -> TrainingConfig:
    """How a network is trained.

    ClusTR with Adam, without weight decay, as published, but at a rate of 1e-3 on a cosine instead
    of 1e-4 for up to 90 epochs: the trainings here are short.
    """
    common: dict[str, Any] = {"epochs": setting.epochs, "batch_size": setting.batch_size}
    if trial.method in ("clustr", "qtrades") or trial.lipschitz:
        rate = 5e-3 if trial.lipschitz and trial.method == "standard" else 1e-3
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
        name = "lipschitz_resnet8" if trial.lipschitz else setting.model
        arguments = dict(setting.lipschitz) if trial.lipschitz else {}
        start = jc.models.create(name, train.num_classes, train.input_shape, init, **arguments)
    train = train.take(setting.num_images or len(train))
    goal = objective(trial, setting)
    return jc.training.fit(fit, start, train, goal, config(trial, setting), directory=directory)


def evaluated(
    trial: Trial, setting: Setting, seed: int, test: jc.data.Dataset, model: Any, directory: Path
) -> dict[str, Any]:
    """What a network's accuracies are, by evaluation, and what can be proved."""
    key, begin = jax.random.fold_in(jax.random.key(seed), 1), time.perf_counter()
    network, head = jc.models.parts(model)
    few = test.take(setting.test_images)
    grid = GRID if "headline" in trial.parts else (setting.eps,)
    row: dict[str, Any] = {
        "clean_accuracy": float(jc.evaluation.correct(model, test).mean()),
        "logits": on_grid(key, model, few, grid),
    }
    attack = setting.autoattack(jc.Linf(setting.eps))
    found = jc.evaluation.robustness(key, model, attack, few, directory=directory / "autoattack")
    row["autoattack"] = found.robust_accuracy
    if head is not None:
        row |= scores_attacked(key, trial, setting, network, head, few, grid)
        row["saturated"] = saturated(key, network, head, few, setting.eps)
    elif "headline" in trial.parts:
        row |= as_published(key, model, few, setting, grid)
    if trial.lipschitz:
        row["certificate"] = certified(key, model, few, setting, directory)
    return row | {"evaluation_seconds": round(time.perf_counter() - begin, 1)}


def on_grid(
    key: jax.Array, model: Any, images: jc.data.Dataset, grid: tuple[float, ...]
) -> dict[str, float]:
    """Accuracy under PGD-20 with 10 restarts by radius, where any success counts."""
    attack = jc.attacks.PGD(jc.Linf(grid[0]), steps=20, step_size=STEP, restarts=RESTARTS)
    curve = jc.evaluation.robustness_curve(key, model, attack, images, grid, progress=False)
    return {_name(eps): r.robust_accuracy for eps, r in zip(grid, curve, strict=True)}


def scores_attacked(
    key: jax.Array,
    trial: Trial,
    setting: Setting,
    network: jc.models.Classifier,
    head: jc.clustr.ClusterClassifier,
    images: jc.data.Dataset,
    grid: tuple[float, ...],
) -> dict[str, Any]:
    """The same attack on the scores; L other than all clusters, for the published settings."""
    model = jc.Chain(jc.models.features(network), head.score_classifier)
    row: dict[str, Any] = {"scores": on_grid(key, model, images, grid)}
    row |= as_published(key, model, images, setting, grid)
    if trial.name == "qtrades":
        row["nearest"] = {}
        for nearest in setting.nearest:
            fewer = dataclasses.replace(head, nearest=nearest)
            model = jc.Chain(jc.models.features(network), fewer.score_classifier)
            row["nearest"][str(nearest)] = {
                "clean_accuracy": float(jc.evaluation.correct(model, images).mean()),
                "published_20": published(key, model, images, setting.eps, 20),
            }
    return row


def as_published(
    key: jax.Array,
    model: Any,
    images: jc.data.Dataset,
    setting: Setting,
    grid: tuple[float, ...],
) -> dict[str, Any]:
    """Accuracies of the published evaluation by steps and radius."""
    return {
        "published_20": {_name(eps): published(key, model, images, eps, 20) for eps in grid},
        "published_100": {_name(setting.eps): published(key, model, images, setting.eps, 100)},
    }


def published(key: jax.Array, model: Any, images: jc.data.Dataset, eps: float, steps: int) -> float:
    """Accuracy as the published code measures it.

    Each of 10 restarts begins uniformly in the ball (projected onto the pixels' box here, which the
    code does not) and climbs the cross-entropy of the model's outputs; an image stops where it is
    misclassified, else after the last step. Of the restarts the one of the largest cross-entropy is
    kept, whether or not another one fooled the network, and that one is classified.
    """
    right = 0
    for start in range(0, len(images), _BATCH):
        x = jc.data.to_float(images.images[start : start + _BATCH])
        y = jnp.asarray(images.labels[start : start + _BATCH])
        logits = np.asarray(_restarts(key, model, jc.Linf(eps), x, y, steps=steps))
        losses = np.stack([jc.losses.cross_entropy(z, y) for z in jnp.asarray(logits)])
        kept = logits[losses.argmax(axis=0), np.arange(len(y))]
        right += int((kept.argmax(axis=1) == np.asarray(y)).sum())
    return right / len(images)


@functools.partial(jc.jit, static_argnames=("steps",))
def _restarts(
    key: jax.Array, model: Any, ball: jc.Linf, x: jax.Array, y: jax.Array, *, steps: int
) -> jax.Array:
    """The outputs at the end of each restart [10, b, k]."""

    def loss(x_adv: jax.Array) -> tuple[jax.Array, jax.Array]:
        z = model(x_adv)
        return jc.losses.cross_entropy(z, y).sum(), z

    def step(_: jax.Array, x_adv: jax.Array) -> jax.Array:
        gradient, z = jax.grad(loss, has_aux=True)(x_adv)
        moved = ball.project(x_adv + STEP * jnp.sign(gradient), x)
        stands = z.argmax(axis=1) == y
        return jnp.where(stands[:, None, None, None], moved, x_adv)

    def restart(number: jax.Array) -> jax.Array:
        first = ball.random_start(jax.random.fold_in(key, number), x)
        return model(jax.lax.fori_loop(0, steps, step, first))

    with jax.default_matmul_precision("highest"):
        return jax.lax.map(restart, jnp.arange(RESTARTS))


def saturated(
    key: jax.Array, network: Any, head: Any, images: jc.data.Dataset, eps: float
) -> float:
    """Share of images whose cross-entropy of the scores has a gradient below 1e-8 everywhere.

    At points drawn from the ball, where attacks begin.
    """
    x = jc.Linf(eps).random_start(key, jc.data.to_float(images.images))
    y = jnp.asarray(images.labels)

    @jc.jit
    def slope(x: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            return jax.grad(
                lambda x: jc.losses.cross_entropy(head.scores(network.features(x)), y).sum()
            )(x)

    return float((np.abs(np.asarray(slope(x))).reshape(len(x), -1).max(axis=1) < 1e-8).mean())


def certified(
    key: jax.Array, model: Any, images: jc.data.Dataset, setting: Setting, directory: Path
) -> dict[str, Any]:
    """Certified and attacked accuracy in L2 balls, and the median certified radius."""
    row: dict[str, Any] = {"l2": {}}
    for eps in L2_GRID:
        ball = jc.L2(eps)
        proved = jc.evaluation.certify(model, images, threat=ball)
        attack = setting.autoattack(ball)
        where = directory / f"autoattack-l2-{eps:g}"
        broken = jc.evaluation.robustness(key, model, attack, images, directory=where)
        found = jc.evaluation.bracket(proved, broken)
        row["l2"][f"{eps:g}"] = {
            "certified": found.certified_accuracy,
            "attacked": broken.robust_accuracy,
        }
        row |= {"lipschitz": proved.lipschitz, "median_radius": float(np.median(proved.radius))}
    return row


def _name(eps: float) -> str:
    return f"{255 * eps:g}/255"
