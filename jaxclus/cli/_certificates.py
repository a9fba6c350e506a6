"""The part of `jaxclus evaluate` that certifies."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxclus import evaluation, runs
from jaxclus._classifier import Classifier
from jaxclus.data import Dataset
from jaxclus.evaluation import Bracket, Certificates, Robustness
from jaxclus.threat import Threat


def certify(
    path: Path,
    model: Classifier,
    images: Dataset,
    ball: Threat,
    attacked: Sequence[Robustness],
    microbatch: int | None,
) -> None:
    """Prints all certificates there are and the brackets with each attack, and writes them.

    Args:
        path: of certificates.json, which is written where there is a certificate.
        model: a classifier.
        images: the images that were attacked.
        ball: the threat model.
        attacked: what the same attack found with each seed, at least one.
        microbatch: images in one physical batch on each device.

    Raises:
        ValueError: if an image is certified and broken.
    """
    found, reasons = [], {}
    for method in ("lipschitz", "interval") if ball.name == "linf" else ("lipschitz",):
        try:
            found.append(
                evaluation.certify(model, images, ball, method=method, microbatch=microbatch)
            )
        except (TypeError, ValueError) as error:  # as for a family without bounds
            reasons.setdefault(str(error), []).append(method)
    for reason, methods in reasons.items():
        print(f"no {' or '.join(methods)} certificate: {reason}")
    if not found:
        return
    for certificates in found:
        _print_certificates(certificates)
    brackets = [evaluation.bracket(found, result) for result in attacked]
    for bracket in brackets:
        _print_bracket(bracket)
    record = {
        "certificates": [each.to_json() for each in found],
        "brackets": [each.to_json() for each in brackets],
        "not_certified": {name: text for text, names in reasons.items() for name in names},
        **runs.environment(),
    }
    runs.write_json(path, record)


def _print_certificates(found: Certificates) -> None:
    eps = float(found.threat.eps)
    line = (
        f"certified accuracy {found.certified_accuracy:.4f}  {found.method}, "
        f"{found.threat.name} eps {eps:.4g} ({eps * 255:.4g}/255)"
    )
    if found.lipschitz is not None and found.radius is not None:
        median = float(np.median(found.radius))
        line += f", Lipschitz bound {found.lipschitz:.4g} (l2), "
        line += f"median {found.threat.name} radius {median:.3g}"
    print(line)


def _print_bracket(found: Bracket) -> None:
    attacked = found.attacked
    ball, name = attacked.attack.ball, type(attacked.attack).__name__.lower()
    print(
        f"certified {found.certified_accuracy:.1%} <= true robust accuracy <= "
        f"{found.robust_accuracy:.1%} ({name}, {ball.name}, eps {float(ball.eps):.4g}, "
        f"{len(attacked.clean)} images)".replace("%", " %")
    )
