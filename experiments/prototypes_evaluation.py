"""How the networks of `experiments.repulsive_prototypes` are judged."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxclus as jc
from experiments.prototypes_trials import Setting, Trial
from jaxclus.attacks import (
    PGD,
    Ensemble,
    Guided,
    HopSkipJump,
    Square,
    TargetedAPGD,
    Transfer,
)
from jaxclus.attacks.adaptive import DistanceLogits
from jaxclus.prototypes import PrototypeHead, prototype_loss, separation
from jaxclus.threat import image_keys

GRID = tuple(number / 255 for number in (2, 4, 8, 12, 16, 24, 32))
RULES = ("inner_product", "cosine", "linf", "l2")
# What the claims compare: items that every network has, whatever it has for a head.
COMMON = ("own-loss", "margin", "autoattack")
HEADLINE = ("noise", *COMMON, "prototypes", "transfer", "masking")
# Of HopSkipJump: some 7,000 queries, about as many as Square has.
_ITERATIONS = 20
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
    images = test.subset(setting.first_image + np.arange(setting.test_images))
    few = images.take(setting.few_images)
    headline, own = "headline" in trial.parts, eps_name(setting.eps)
    grid = GRID if headline else (setting.eps,)
    row: dict[str, Any] = {"clean_accuracy": float(jc.evaluation.correct(model, test).mean())}
    row["clean_attacked"] = float(jc.evaluation.correct(model, images).mean())
    source, loss = own_source(trial, model), _OWN[head is not None]
    row["published"] = published(key, model, source, loss, images, grid)
    row["published_20"] = published(key, model, source, loss, images, (setting.eps,), 20)
    row["published_margin"] = published(key, model, model, "margin", images, grid)
    attack = TargetedAPGD(jc.Linf(setting.eps), "difference", setting.steps)
    curve = jc.evaluation.robustness_curve(key, model, attack, images, grid)
    row["targeted"] = {
        eps_name(eps): found.robust_accuracy for eps, found in zip(grid, curve, strict=True)
    }
    suite = jc.evaluation.adaptive_suite(
        key, model, images, jc.Linf(setting.eps), own_loss(trial, head),
        items=_items(setting, headline), steps=setting.steps, restarts=setting.restarts,
        directory=directory / "suite",
    )  # fmt: skip
    row["suite"] = {name: found.robust_accuracy for name, found in suite.results.items()}
    row["not_run"] = dict(suite.not_run)
    row["temperature"] = suite.temperature * (1 if head is None else float(head.temperature))
    row["masking_gap"] = suite.masking_gap
    if suite.masking is not None:
        row["findings"] = [finding.name for finding in suite.masking.findings]
        row["masking"] = dict(suite.masking.figures)
    targeted = curve[grid.index(setting.eps)].robust
    common = [suite.results[name].robust for name in COMMON if name in suite.results]
    stands = np.all([targeted, *common], axis=0)
    row["common"], row["worst"] = float(stands.mean()), float((stands & suite.robust).mean())
    row["hidden"] = row["published"][own] - row["worst"]
    if headline and not setting.short:
        white_box = (stands & suite.robust)[: len(few)]
        row |= _without_gradients(key, model, few, attack, surrogates, white_box)
    if isinstance(head, PrototypeHead):
        row["separation"] = dataclasses.asdict(separation(head.prototypes))
        row |= _cross_entropy(key, model, images, attack)
        row["rules"] = _by_rule(key, model, few, attack, RULES[: 1 if setting.short else None])
    if headline and seed == setting.pictured:
        row["picture"] = _picture(key, model, images.take(min(200, len(images))), attack.threat)
    return row


def own_loss(trial: Trial, head: PrototypeHead | None) -> Callable[..., jax.Array]:
    """What an image's embedding was pulled by, or the cross-entropy of its logits.

    Of TRADES without the divergence, and of cosines along the batch the image's own.
    """
    if head is None:
        return jc.losses.cross_entropy
    distance, prototypes = _distance(trial), head.prototypes
    return lambda h, y: prototype_loss(h, prototypes[y], distance)


def own_source(trial: Trial, model: Any) -> Any:
    """Images -> what the published attack differentiates: -D to each prototype, or the logits.

    The sign of the distance's gradient is that of its square's, so that steps are the own loss's.
    """
    network, head = jc.models.parts(model)
    if head is None:
        return model
    distance = _distance(trial).removesuffix("_squared")
    return DistanceLogits(jc.models.features(network), head.prototypes, distance)


def _distance(trial: Trial) -> Any:
    return dict(trial.settings).get("distance", "linf")


def _own_distance(negative: jax.Array, y: jax.Array) -> jax.Array:
    return -jnp.take_along_axis(negative, y[:, None], axis=1)[:, 0]


# By whether there are prototypes. Functions of this module, so that programs are found again.
_OWN = {True: _own_distance, False: "cross_entropy"}


def published(
    key: jax.Array,
    model: Any,
    source: Any,
    loss: Any,
    images: jc.data.Dataset,
    grid: Sequence[float],
    steps: int = STEPS,
) -> dict[str, float]:
    """Accuracy by radius at the last iterate of one run of PGD on a loss of the source's outputs.

    All radii and losses start from the same draws.
    """
    found = dict.fromkeys(map(eps_name, grid), 0)
    for begin in range(0, len(images), _BATCH):
        rows = np.arange(begin, min(begin + _BATCH, len(images)))
        x, y = jc.data.to_float(images.images[rows]), jnp.asarray(images.labels[rows])
        for eps in grid:
            attack = PGD(jc.Linf(eps), steps, STEP, loss=loss)
            with jax.default_matmul_precision("highest"):
                _, right = _attacked(
                    attack, model, source, image_keys(key, jnp.asarray(rows)), x, y
                )
            found[eps_name(eps)] += int(right.sum())
    return {name: count / len(images) for name, count in found.items()}


@jax.jit
def _attacked(attack, model, source, keys, x, y):
    """The last iterates, and whether the model is right there."""
    x_adv = attack.perturb(keys, source, x, y)
    return x_adv, model(x_adv).argmax(axis=1) == y


def eps_name(eps: float) -> str:
    """A radius as a key of rows, as "8/255"."""
    return f"{255 * eps:g}/255"


def _items(setting: Setting, headline: bool) -> tuple[str, ...]:
    if setting.short:
        return ("own-loss", "margin")
    return HEADLINE if headline else COMMON


def _without_gradients(
    key: jax.Array,
    model: Any,
    few: jc.data.Dataset,
    attack: TargetedAPGD,
    surrogates: Mapping[str, Any],
    white_box: np.ndarray,
) -> dict[str, Any]:
    """Accuracy after each attack that does not see the model's gradients, each on all images."""
    ball = attack.threat
    attacks = {"Square": Square(ball), "HopSkipJump": HopSkipJump("linf", ball, _ITERATIONS)}
    attacks |= {f"from {name}": Transfer(attack, source) for name, source in surrogates.items()}
    found = {
        name: jc.evaluation.robustness(key, model, each, few) for name, each in attacks.items()
    }
    stands = np.all([each.robust for each in found.values()], axis=0)
    l2 = jc.evaluation.robustness(key, model, HopSkipJump("l2", steps=_ITERATIONS), few)
    return {
        "without_gradients": {name: each.robust_accuracy for name, each in found.items()},
        "white_box": float(white_box.mean()),
        "without_gradients_alone": float((white_box & ~stands).mean()),
        "hop_skip_jump_l2": float(np.median(l2.norms[l2.clean])) if l2.clean.any() else None,
    }


def _cross_entropy(
    key: jax.Array, model: Any, images: jc.data.Dataset, attack: TargetedAPGD
) -> dict[str, float]:
    """PGD on the cross-entropy of the head, at temperature 1 and at its own."""
    network, head = jc.models.parts(model)
    embed, entropy = jc.models.features(network), PGD(attack.threat, attack.steps)
    plain = jc.Chain(embed, dataclasses.replace(head, temperature=1.0))
    return {
        name: jc.evaluation.robustness(key, each, entropy, images).robust_accuracy
        for name, each in (("cross_entropy", plain), ("cross_entropy_calibrated", model))
    }


def _by_rule(
    key: jax.Array, model: Any, few: jc.data.Dataset, attack: TargetedAPGD, rules: Sequence[str]
) -> dict[str, dict[str, float]]:
    """The same embeddings by each rule, all under the same two attacks.

    One on the rule's own scores, one on smooth distances to the prototypes: the gradient of a Linf
    score is that of one entry.
    """
    network, head = jc.models.parts(model)
    embed = jc.models.features(network)
    smooth = Guided(attack, DistanceLogits(embed, head.prototypes, "l8"))
    both = Ensemble(attack.threat, (attack, smooth), ("scores", "l8"))
    found = {}
    for rule in rules:
        other = jc.Chain(embed, dataclasses.replace(head, rule=rule))
        result = jc.evaluation.robustness(key, other, both, few)
        found[rule] = {"clean": result.clean_accuracy, "attacked": result.robust_accuracy}
    return found


def _picture(key: jax.Array, model: Any, images: jc.data.Dataset, ball: jc.Linf) -> dict[str, Any]:
    """Features' first two principal components, clean and at the end of PGD-100 on the margin."""
    network, head = jc.models.parts(model)
    features = jc.jit(lambda network, x: network.features(x))
    x, y = jc.data.to_float(images.images), jnp.asarray(images.labels)
    keys, attack = image_keys(key, jnp.arange(len(y))), PGD(ball, STEPS, STEP, loss="margin")
    x_adv, right = _attacked(attack, model, model, keys, x, y)
    before, after = (np.asarray(features(network, each)) for each in (x, x_adv))
    mean = before.mean(axis=0)
    axes = np.linalg.svd(before - mean, full_matrices=False)[2][:2]
    points = {"before": before, "after": after}
    if isinstance(head, PrototypeHead):
        points["prototypes"] = np.asarray(head.prototypes)
    shown = {name: ((each - mean) @ axes.T).round(3).tolist() for name, each in points.items()}
    return shown | {"labels": images.labels.tolist(), "right": right.tolist()}
