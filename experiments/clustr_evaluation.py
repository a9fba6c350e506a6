"""What a network of `experiments.clustr` withstands, by evaluation, and what can be proved."""

import dataclasses
import time
from pathlib import Path
from typing import Any

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
#: What rows depend on beside the setting; the number goes up when the evaluation changes.
METHOD = (GRID, L2_GRID, STEP, RESTARTS, STEPS, 2)


def evaluated(
    trial: Trial, setting: Setting, seed: int, test: jc.data.Dataset, model: Any, directory: Path
) -> dict[str, Any]:
    """A network's accuracies by evaluation, and its certificates."""
    key, begin = jax.random.fold_in(jax.random.key(seed), 1), time.perf_counter()
    network, head = jc.models.parts(model)
    few = test.take(setting.test_images)
    grid = GRID if "headline" in trial.parts else (setting.eps,)
    row: dict[str, Any] = {
        "clean_accuracy": float(jc.evaluation.correct(model, test).mean()),
    }
    attack = setting.autoattack(jc.Linf(setting.eps))
    found = jc.evaluation.robustness(key, model, attack, few, directory=directory / "autoattack")
    row["autoattack"] = found.robust_accuracy
    row |= on_grid(key, model, few, grid, any_success="logits", largest_loss="published")
    if head is not None:  # its scores are what the published evaluation attacks
        scored = jc.Chain(jc.models.features(network), head.score_classifier)
        row |= on_grid(key, scored, few, grid, any_success="scores", largest_loss="published")
        row["saturated"] = saturated(key, scored, few, setting.eps)
        if trial.name == "qtrades":
            row["nearest"] = by_nearest(key, network, head, few, setting)
    proved = jc.evaluation.certify(model, test, threat=jc.L2(L2_GRID[0]))
    row |= {"lipschitz": proved.lipschitz, "median_radius": float(np.median(proved.radius))}
    if trial.lipschitz:
        row["l2"] = bracketed(key, model, few, setting, directory)
    return row | {"evaluation_seconds": round(time.perf_counter() - begin, 1)}


def on_grid(
    key: jax.Array,
    model: Any,
    images: jc.data.Dataset,
    grid: tuple[float, ...],
    *,
    any_success: str,
    largest_loss: str,
) -> dict[str, dict[str, float]]:
    """Accuracies of the published attack by steps and radius, under the names given."""
    found = {eps: attacked(key, model, images, eps) for eps in grid}
    return {
        f"{name}_{steps}": {eps_name(eps): found[eps][steps][place] for eps in grid}
        for place, name in enumerate((any_success, largest_loss))
        for steps in STEPS
    }


def attacked(
    key: jax.Array, model: Any, images: jc.data.Dataset, eps: float
) -> dict[int, tuple[float, float]]:
    """Accuracies under the published attack after 20 and after 100 steps, judged in two ways.

    Each of 10 restarts begins uniformly in the ball (projected onto the pixels' box here, which the
    code does not) and climbs the cross-entropy of the model's outputs with steps of the gradient's
    sign; an image stops where it is misclassified, else after the last step.

    Returns:
        For each number of steps: the share of images that no restart fooled; and, as the published
        code has it, the share of images that are right at the end of the restart of the largest
        cross-entropy, whether or not another one fooled the network.
    """
    ball, n = jc.Linf(eps), len(images)
    x, y = np.asarray(jc.data.to_float(images.images)), np.asarray(images.labels)
    keys = [jax.random.fold_in(key, number) for number in range(RESTARTS)]
    x_adv = np.concatenate([ball.random_start(key, jnp.asarray(x)) for key in keys])
    labels = np.tile(y, RESTARTS)
    logits = _in_batches(_outputs, np.arange(len(x_adv)), model, x_adv)[0]
    found = {}
    for steps in range(STEPS[0], STEPS[-1] + 1, STEPS[0]):
        standing = np.flatnonzero(logits.argmax(axis=1) == labels)
        if len(standing):
            x_adv[standing], logits[standing] = _in_batches(
                _climb, standing, (model, ball), x_adv, x[np.arange(len(x_adv)) % n], labels
            )
        if steps in STEPS:
            right = (logits.argmax(axis=1) == labels).reshape(RESTARTS, n)
            losses = np.asarray(jc.losses.cross_entropy(*map(jnp.asarray, (logits, labels))))
            largest = losses.reshape(RESTARTS, n).argmax(axis=0)
            found[steps] = (
                float(right.all(axis=0).mean()),
                float(right[largest, np.arange(n)].mean()),
            )
    return found


def _in_batches(
    function: Any, rows: np.ndarray, fixed: Any, *arrays: np.ndarray
) -> tuple[Any, ...]:
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


@jc.jit
def _climb(
    fixed: tuple[Any, jc.Linf], x_adv: jax.Array, x: jax.Array, y: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """20 steps of images that stand, and the outputs at their end."""
    model, ball = fixed

    def loss(x_adv: jax.Array) -> tuple[jax.Array, jax.Array]:
        z = model(x_adv)
        return jc.losses.cross_entropy(z, y).sum(), z

    def step(_: jax.Array, x_adv: jax.Array) -> jax.Array:
        gradient, z = jax.grad(loss, has_aux=True)(x_adv)
        moved = ball.project(x_adv + STEP * jnp.sign(gradient), x)
        stands = z.argmax(axis=1) == y
        return jnp.where(stands[:, None, None, None], moved, x_adv)

    x_adv = jax.lax.fori_loop(0, STEPS[0], step, x_adv)
    return x_adv, model(x_adv)


def by_nearest(
    key: jax.Array, network: Any, head: Any, images: jc.data.Dataset, setting: Setting
) -> dict[str, dict[str, float]]:
    """What the published evaluation says where the scores count the L nearest clusters alone."""
    row = {}
    for nearest in (*setting.nearest, len(head.centres)):
        fewer = dataclasses.replace(head, nearest=nearest)
        model = jc.Chain(jc.models.features(network), fewer.score_classifier)
        row[str(nearest)] = {
            "clean_accuracy": float(jc.evaluation.correct(model, images).mean()),
            "published_20": attacked(key, model, images, setting.eps)[20][1],
        }
    return row


def saturated(key: jax.Array, scored: Any, images: jc.data.Dataset, eps: float) -> float:
    """Share of images whose cross-entropy of the scores has a gradient below 1e-8 everywhere.

    At points drawn from the ball, where attacks begin.
    """
    x = jc.Linf(eps).random_start(key, jc.data.to_float(images.images))
    y = np.asarray(images.labels)
    (slopes,) = _in_batches(_slope, np.arange(len(y)), scored, np.asarray(x), y)
    return float((np.abs(slopes).reshape(len(y), -1).max(axis=1) < 1e-8).mean())


@jc.jit
def _slope(model: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array]:
    return (jax.grad(lambda x: jc.losses.cross_entropy(model(x), y).sum())(x),)


def bracketed(
    key: jax.Array, model: Any, images: jc.data.Dataset, setting: Setting, directory: Path
) -> dict[str, dict[str, float]]:
    """Certified and attacked accuracy in L2 balls."""
    row = {}
    for eps in L2_GRID:
        ball, where = jc.L2(eps), directory / f"autoattack-l2-{eps:g}"
        attack = setting.autoattack(ball)
        broken = jc.evaluation.robustness(key, model, attack, images, directory=where)
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
