"""What a network of `experiments.clustr` withstands, by evaluation, and what can be proved."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxclus as jc
from experiments.clustr_trials import Setting, Trial

#: Radii of the published evaluation.
GRID = tuple(n / 255 for n in (2, 8, 16, 25.5))
#: Radii of certificates, L2.
L2_GRID = (0.1, 0.25, 0.5)
# The published attack: its step, its restarts, and the two numbers of steps.
STEP, RESTARTS, STEPS = 2 / 255, 10, (20, 100)
_BATCH = 250


def evaluated(
    trial: Trial,
    setting: Setting,
    seed: int,
    test: jc.data.Dataset,
    model: Any,
    directory: Path,
    headline: bool,
) -> dict[str, Any]:
    """A network's accuracies by evaluation, and its certificates; of the headline at all radii."""
    key = jax.random.fold_in(jax.random.key(seed), 1)
    network, head = jc.models.parts(model)
    count = setting.lipschitz_images if trial.lipschitz else setting.test_images
    few = test.subset(setting.first_image + np.arange(count))
    own = eps_name(setting.eps)
    grid = GRID if headline else (setting.eps,)
    row: dict[str, Any] = {"clean_accuracy": float(jc.evaluation.correct(model, test).mean())}
    ensembles = {}
    # At a second radius: ClusTR, and what it started from.
    second = headline and trial.method not in ("pgd", "trades")
    for eps in dict.fromkeys([setting.eps] + [8 / 255] * second):
        attack, where = setting.autoattack(jc.Linf(eps)), directory / f"autoattack-{eps:.4f}"
        ensembles[eps] = jc.evaluation.robustness(key, model, attack, few, directory=where)
    row["autoattack"] = {eps_name(eps): found.robust_accuracy for eps, found in ensembles.items()}
    found = ensembles[setting.eps]
    row["clean_attacked"], worst = found.clean_accuracy, found.robust
    attacks = {"logits": model}
    if head is not None:  # its scores are what the published evaluation attacks
        attacks["scores"] = jc.Chain(jc.models.features(network), head.score_classifier)
        distances = jc.attacks.adaptive.DistanceLogits(
            jc.models.features(network), head.centres, "squared_l2", head.centre_classes
        )
        worst = worst & adapted(key, distances, model, few, setting)
    for name, attacked_model in attacks.items():
        results = {eps: attacked(key, attacked_model, model, few, eps) for eps in grid}
        for steps in STEPS:
            row[f"{name}_{steps}"] = {
                eps_name(eps): float(result.robust[steps].mean()) for eps, result in results.items()
            }
            # Of the scores, which come last, where there are any.
            row[f"published_{steps}"] = row[f"published_{name}_{steps}"] = {
                eps_name(eps): result.published[steps] for eps, result in results.items()
            }
        row[f"standing_{name}"] = results[setting.eps].standing
        row[f"stuck_{name}"] = results[setting.eps].stuck
        worst = worst & results[setting.eps].robust[STEPS[-1]]
    row["worst"] = float(worst.mean())
    row["hidden"] = row[f"published_{STEPS[-1]}"][own] - row["worst"]
    if headline and trial.name == "qtrades":
        row["nearest"] = by_nearest(key, network, head, few, setting)
    proved = jc.evaluation.certify(model, test, threat=jc.L2(L2_GRID[0]))
    row |= {"lipschitz": proved.lipschitz, "median_radius": float(np.median(proved.radius))}
    if trial.lipschitz:
        row["l2"] = bracketed(key, model, few, setting)
    return row


def adapted(
    key: jax.Array, distances: Any, model: Any, images: jc.data.Dataset, setting: Setting
) -> np.ndarray:
    """Whether the model is right [n] after targeted APGD on the distances to the clusters."""
    attack = setting.targeted(jc.Linf(setting.eps))
    found = jc.evaluation.robustness(key, distances, attack, images)
    (logits,) = in_batches(_outputs, np.arange(len(images)), model, found.adversarial)
    return logits.argmax(axis=1) == images.labels


class Attacked(NamedTuple):
    """What the published attack found.

    Attributes:
        robust: by number of steps, whether the classifier is right at an image and at the end of
            each restart [n].
        published: by number of steps, the share of images that the published code calls robust: of
            its restarts the one of the largest cross-entropy counts, whether or not another one
            fooled the network.
        standing: how many ends of restarts the classifier still gets right.
        stuck: of those, the share where the attacked loss has gradient 0 in every pixel, so that
            no step leads away; None without any.
    """

    robust: dict[int, np.ndarray]
    published: dict[int, float]
    standing: int
    stuck: float | None


def attacked(
    key: jax.Array,
    model: Any,
    judge: Any,
    images: jc.data.Dataset,
    eps: float,
    steps: tuple[int, ...] = STEPS,
) -> Attacked:
    """The published attack on the model's outputs, after 20 and after 100 steps.

    Each of 10 restarts begins uniformly in the ball (projected onto the pixels' box here, which the
    code does not) and climbs the cross-entropy of the outputs with steps of the gradient's sign; it
    ends where the outputs misclassify, else after the last step.

    Args:
        key: a typed key.
        model: what is attacked, and published numbers are taken from.
        judge: the classifier that decides about success.
        images: the images.
        eps: Linf radius.
        steps: after how many of them to look, multiples of 20; the last one ends the attack.
    """
    ball, n = jc.Linf(eps), len(images)
    clean, y = np.asarray(jc.data.to_float(images.images)), np.asarray(images.labels)
    keys = [jax.random.fold_in(key, number) for number in range(RESTARTS)]
    x_adv = np.concatenate([ball.random_start(key, jnp.asarray(clean)) for key in keys])
    x, labels, every = np.tile(clean, (RESTARTS, 1, 1, 1)), np.tile(y, RESTARTS), np.arange(n)
    everywhere = np.arange(len(x_adv))
    logits = in_batches(_outputs, everywhere, model, x_adv)[0]
    clean_right = in_batches(_outputs, every, judge, clean)[0].argmax(axis=1) == y
    robust, published, right = {}, {}, np.zeros(len(x_adv), bool)
    for done in range(STEPS[0], steps[-1] + 1, STEPS[0]):
        standing = np.flatnonzero(logits.argmax(axis=1) == labels)
        if len(standing):
            x_adv[standing], logits[standing] = in_batches(
                climb, standing, (model, ball), x_adv, x, labels
            )
        if done in steps:
            right = in_batches(_outputs, everywhere, judge, x_adv)[0].argmax(axis=1) == labels
            robust[done] = right.reshape(RESTARTS, n).all(axis=0) & clean_right
            losses = np.asarray(jc.losses.cross_entropy(*map(jnp.asarray, (logits, labels))))
            largest = losses.reshape(RESTARTS, n).argmax(axis=0)
            kept = logits.reshape(RESTARTS, n, -1)[largest, every]
            published[done] = float((kept.argmax(axis=1) == y).mean())
    standing = np.flatnonzero(right)
    stuck = None
    if len(standing):
        stuck = float((in_batches(_slope, standing, model, x_adv, labels)[0] == 0).mean())
    return Attacked(robust, published, len(standing), stuck)


def in_batches(function: Any, rows: np.ndarray, fixed: Any, *arrays: np.ndarray) -> tuple[Any, ...]:
    """The function's results for these rows of the arrays, in batches of one size."""
    parts, size = [], min(_BATCH, len(arrays[0]))
    for begin in range(0, len(rows), size):
        some = np.resize(rows[begin : begin + size], size)
        with jax.default_matmul_precision("highest"):
            parts.append(jax.device_get(function(fixed, *(array[some] for array in arrays))))
    return tuple(np.concatenate(column)[: len(rows)] for column in zip(*parts, strict=True))


@jc.jit
def _outputs(model: Any, x: jax.Array) -> tuple[jax.Array]:
    return (model(x),)


def _loss(x: jax.Array, model: Any, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    z = model(x)
    return jc.losses.cross_entropy(z, y).sum(), z


@jc.jit
def climb(
    fixed: tuple[Any, jc.Linf], x_adv: jax.Array, x: jax.Array, y: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """20 steps of images that stand, and the outputs at their end."""
    model, ball = fixed

    def step(_: jax.Array, x_adv: jax.Array) -> jax.Array:
        gradient, z = jax.grad(_loss, has_aux=True)(x_adv, model, y)
        moved = ball.project(x_adv + STEP * jnp.sign(gradient), x)
        stands = z.argmax(axis=1) == y
        return jnp.where(stands[:, None, None, None], moved, x_adv)

    x_adv = jax.lax.fori_loop(0, STEPS[0], step, x_adv)
    return x_adv, model(x_adv)


@jc.jit
def _slope(model: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array]:
    """The largest derivative of each image's loss [b]."""
    gradient = jax.grad(_loss, has_aux=True)(x, model, y)[0]
    return (jnp.abs(gradient).max(axis=(1, 2, 3)),)


def by_nearest(
    key: jax.Array, network: Any, head: Any, images: jc.data.Dataset, setting: Setting
) -> dict[str, dict[str, float]]:
    """What the published evaluation says where the scores count the L nearest clusters alone."""
    row = {}
    for nearest in (*setting.nearest, len(head.centres)):
        fewer = dataclasses.replace(head, nearest=nearest)
        model = jc.Chain(jc.models.features(network), fewer.score_classifier)
        found = attacked(key, model, model, images, setting.eps, STEPS[:1])
        row[str(nearest)] = {
            "clean_accuracy": float(jc.evaluation.correct(model, images).mean()),
            "published_20": found.published[STEPS[0]],
        }
    return row


def bracketed(
    key: jax.Array, model: Any, images: jc.data.Dataset, setting: Setting
) -> dict[str, dict[str, float]]:
    """Certified and attacked accuracy in L2 balls."""
    row = {}
    for eps in L2_GRID:
        ball = jc.L2(eps)
        broken = jc.evaluation.robustness(key, model, setting.targeted(ball), images)
        proved = jc.evaluation.certify(model, images, threat=ball)
        found = jc.evaluation.bracket(proved, broken)
        row[f"{eps:g}"] = {
            "certified": found.certified_accuracy,
            "attacked": broken.robust_accuracy,
        }
    return row


def eps_name(eps: float) -> str:
    """A radius as a key of rows, as "25.5/255"."""
    return f"{255 * eps:g}/255"
