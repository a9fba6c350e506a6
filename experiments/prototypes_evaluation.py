"""How the networks of `experiments.repulsive_prototypes` are judged."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

import jaxclus as jc
from experiments.prototypes_trials import Setting, Trial
from jaxclus.attacks import PGD, TargetedAPGD
from jaxclus.prototypes import PrototypeHead, prototype_loss, separation
from jaxclus.threat import image_keys

GRID = tuple(number / 255 for number in (2, 4, 8, 12, 16, 24, 32))
RULES = ("inner_product", "cosine", "linf", "l2")
# The published attack's steps, on the pixel scale, and how many.
STEP, STEPS = 2 / 255, 100
_BATCH = 100


def evaluated(
    trial: Trial,
    setting: Setting,
    seed: int,
    test: jc.data.Dataset,
    model: Any,
    surrogates: Mapping[str, Any],
    directory: Path,
) -> dict[str, Any]:
    """A network's accuracies by evaluation, and how far apart its prototypes are."""
    key = jax.random.fold_in(jax.random.key(seed), 1)
    network, head = jc.models.parts(model)
    few = test.subset(setting.first_image + np.arange(setting.test_images))
    headline, own = "headline" in trial.parts, eps_name(setting.eps)
    grid = GRID if headline else (setting.eps,)
    loss = own_loss(trial, head)
    embed = model if head is None else jc.models.features(network)
    row: dict[str, Any] = {"clean_accuracy": float(jc.evaluation.correct(model, test).mean())}
    row["clean_attacked"] = float(jc.evaluation.correct(model, few).mean())
    row["published"] = published(key, model, embed, loss, few, grid)
    attack = TargetedAPGD(jc.Linf(setting.eps), "difference", setting.steps)
    curve = jc.evaluation.robustness_curve(key, model, attack, few, grid)
    row["targeted"] = {
        eps_name(eps): found.robust_accuracy for eps, found in zip(grid, curve, strict=True)
    }
    suite = jc.evaluation.adaptive_suite(
        key, model, few, jc.Linf(setting.eps), loss, None if head is None else embed, head,
        surrogates if headline else None, items=_items(setting, headline), steps=setting.steps,
        restarts=setting.restarts, directory=directory / "suite",
    )  # fmt: skip
    row["suite"] = {name: found.robust_accuracy for name, found in suite.results.items()}
    row["not_run"] = dict(suite.not_run)
    worst = suite.robust & curve[grid.index(setting.eps)].robust
    row["worst"] = float(worst.mean())
    row["hidden"] = row["published"][own] - row["worst"]
    row["own_loss_gap"] = suite.masking_gap
    row["gradient_free_alone"] = suite.gradient_free_alone
    row["temperature"] = suite.temperature
    if isinstance(head, PrototypeHead):
        row["separation"] = dataclasses.asdict(separation(head.prototypes))
        rules = (head.rule,) if setting.short else RULES
        row |= _by_head(key, network, head, few, attack, rules)
        if headline and seed == setting.seeds[0]:
            row["picture"] = _picture(network, few, suite.adversarial)
    return row


def own_loss(trial: Trial, head: PrototypeHead | None) -> Any:
    """What the network's own evaluation attacks: of its embeddings, or of its logits."""
    if head is None:
        return jc.losses.cross_entropy
    distance = dict(trial.settings).get("distance", "l2" if trial.method == "learned" else "linf")
    distance = "linf" if distance == "linf_sum" else distance
    prototypes = head.prototypes
    return lambda h, y: prototype_loss(h, prototypes[y], distance)


def published(
    key: jax.Array,
    model: Any,
    embed: Any,
    loss: Any,
    images: jc.data.Dataset,
    grid: Sequence[float],
) -> dict[str, float]:
    """Accuracy by radius at the last iterate of one run of PGD-100 on the network's own loss."""

    @jax.jit
    def right(attack, model, embed, keys, x, y):
        return (model(attack.perturb(keys, embed, x, y)).argmax(axis=1) == y).sum()

    found = dict.fromkeys(map(eps_name, grid), 0)
    for begin in range(0, len(images), _BATCH):
        rows = np.arange(begin, min(begin + _BATCH, len(images)))
        x, y = jc.data.to_float(images.images[rows]), jnp.asarray(images.labels[rows])
        for eps in grid:
            attack = PGD(jc.Linf(eps), STEPS, STEP, loss=loss)
            with jax.default_matmul_precision("highest"):
                count = right(attack, model, embed, image_keys(key, jnp.asarray(rows)), x, y)
            found[eps_name(eps)] += int(count)
    return {name: count / len(images) for name, count in found.items()}


def eps_name(eps: float) -> str:
    """A radius as a key of rows, as "8/255"."""
    return f"{255 * eps:g}/255"


def _items(setting: Setting, headline: bool) -> tuple[str, ...]:
    if setting.short:
        return ("noise", "own-loss", "margin")
    if headline:
        return jc.evaluation.ITEMS
    return ("own-loss", "margin", "prototypes", "autoattack")


def _by_head(
    key: jax.Array,
    network: Any,
    head: PrototypeHead,
    images: jc.data.Dataset,
    attack: Any,
    rules: Sequence[str],
) -> dict[str, Any]:
    """Cross-entropy at T = 1, and rules on the same embeddings."""
    embed = jc.models.features(network)
    plain = jc.Chain(embed, dataclasses.replace(head, temperature=1.0))
    entropy = PGD(attack.threat, attack.steps)
    found = jc.evaluation.robustness(key, plain, entropy, images)
    row: dict[str, Any] = {"cross_entropy": found.robust_accuracy, "rules": {}}
    for rule in rules:
        other = jc.Chain(embed, dataclasses.replace(head, rule=rule))
        found = jc.evaluation.robustness(key, other, attack, images)
        row["rules"][rule] = {
            "clean": found.clean_accuracy, "targeted": found.robust_accuracy,
        }  # fmt: skip
    return row


def _picture(network: Any, images: jc.data.Dataset, x_adv: np.ndarray) -> dict[str, Any]:
    """The embeddings' first two principal components, before and after the attack."""
    features = jc.jit(Partial(lambda network, x: network.features(x), network))
    before, after = (
        np.asarray(features(x)) for x in (jc.data.to_float(images.images), jnp.asarray(x_adv))
    )
    mean = before.mean(axis=0)
    axes = np.linalg.svd(before - mean, full_matrices=False)[2][:2]
    return {
        "labels": images.labels.tolist(),
        "before": ((before - mean) @ axes.T).round(3).tolist(),
        "after": ((after - mean) @ axes.T).round(3).tolist(),
    }
