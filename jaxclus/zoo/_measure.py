"""The figures of model cards: measured, and measured again."""

from collections.abc import Sequence
from typing import Any

import jax

from jaxclus import _checks, attacks, clustering, data, evaluation, models, threat
from jaxclus.data import Dataset
from jaxclus.evaluation._result import as_digits
from jaxclus.zoo._cards import Figures, card
from jaxclus.zoo._weights import load_shipped


def measure(
    model: models.Classifier,
    images: Dataset,
    ball: threat.Threat,
    num_images: int,
    *,
    devices: Sequence[Any] | None = None,
) -> Figures:
    """Clean, PGD and AutoAttack accuracy and the clustering score, as model cards have them.

    Args:
        model: a network of `jc.models`.
        images: the test set, with groups.
        ball: the threat model.
        num_images: the first so many are attacked, in [1, number of images].
        devices: default: all.

    Raises:
        TypeError, ValueError: before anything is attacked: the test set has no groups, or fewer
            images; and as `jc.evaluation.implicit_correlation` and
            `jc.clustering.clustering_score`.
    """
    if images.groups is None:
        raise ValueError(f"`images` must come with groups to score against, got {images!r}")
    _checks.at_least("num_images", num_images, 1)
    _checks.within("num_images", num_images, 1, len(images))
    # Seconds, and they may refuse the model or the groups: before the attacks take their time.
    matrix = evaluation.implicit_correlation(model, images.input_shape)
    score = clustering.clustering_score(matrix, images.groups)
    key, few = jax.random.key(0), images.take(num_images)
    found = [
        evaluation.robustness(key, model, attack, few, devices=devices)
        for attack in (attacks.PGD(ball, steps=20), attacks.AutoAttack(ball))
    ]
    return Figures(
        clean_accuracy=float(evaluation.correct(model, images, devices=devices).mean()),
        clean_images=len(images),
        attacked_images=num_images,
        pgd_accuracy=found[0].robust_accuracy,
        autoattack_accuracy=found[1].robust_accuracy,
        pgd_verdicts=as_digits(found[0].robust),
        autoattack_verdicts=as_digits(found[1].robust),
        within_minus_between=round(score.difference, 3),
        adjusted_rand=round(score.adjusted_rand, 3),
    )


def remeasure(
    name: str, num_images: int | None = None, *, devices: Sequence[Any] | None = None
) -> tuple[Figures, Figures]:
    """The figures on a network's card, and the same ones measured here and now.

    On CPUs of the same instruction set and with the versions on the card they are equal, image by
    image; elsewhere rounding may decide single images differently.

    Args:
        name: one of `jc.zoo.list()`.
        num_images: the first so many are attacked, at most as many as on the card; default all.
        devices: default: all.

    Raises:
        ValueError: for another name or number, or if the test set here is not the one on the card.
        FileNotFoundError: if the test set is not prepared.
    """
    found = card(name)
    count = found.figures.attacked_images if num_images is None else num_images
    wanted = found.figures.first(count)
    images = data.load(found.dataset, "test")
    if images.fingerprint != found.test_fingerprint:
        raise ValueError(
            f"{found.dataset} must be the set that {name} was measured on ({found.note}, "
            f"fingerprint {found.test_fingerprint[:12]}), got {images.fingerprint[:12]}"
        )
    ball = threat.create(found.norm, found.eps)
    return wanted, measure(load_shipped(name), images, ball, count, devices=devices)
