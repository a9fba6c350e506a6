"""The signs of gradient masking that need a model to be run: limits, severities, what to try next.

Every check gives a figure and is a finding where the figure is above its limit.
"""

from typing import NamedTuple

import numpy as np

from jaxclus.attacks import Finding
from jaxclus.attacks._lint import Severity


class Sign(NamedTuple):
    """What a check looks for.

    Attributes:
        limit: the largest figure that is no finding.
        unit: what the figure is, for a page that shows it.
        severity: of the finding.
        advice: what to try next.
    """

    limit: float
    unit: str
    severity: Severity
    advice: str


class Checked(NamedTuple):
    """Outcome of one check.

    Attributes:
        name: the sign's.
        figure: to compare with the sign's limit.
        finding: None where the figure is not above it.
    """

    name: str
    figure: float
    finding: Finding | None


_SHARE = "share of the images"
_MORE = "Attack with more steps and restarts"

#: The signs by name. A share counts images, all of which the model classifies correctly.
SIGNS: dict[str, Sign] = {
    "randomised": Sign(
        1e-4, "largest distance between the normalised logits of two passes", "certain",
        "Wrap the classifier in jc.Stochastic, so that every pass draws anew, and attack the mean "
        "over draws (jc.attacks.EOT, and on it AutoAttack's version rand). If nothing is random in "
        "it, an image's logits depend on its place in the batch: switch it to inference mode.",
    ),
    "softmax output": Sign(
        0.5, "1 if all rows are probabilities", "certain",
        "Attack the classifier without its softmax, on the logits.",
    ),
    "zero gradient": Sign(
        0.0, _SHARE, "certain",
        "Attack with a loss that keeps its gradient (margin or DLR where the cross-entropy "
        "saturates), scale the logits down (jc.attacks.adaptive.Temperature), take a smooth "
        "stand-in where the classifier is flat (BPDA), and compare with Square.",
    ),
    "Square wins": Sign(
        0.2, "percentage points", "certain",
        "White-box attacks should not lose to one without gradients. " + _MORE + ", Square with "
        "more queries, images transferred from another model, and an attack made for the defence.",
    ),
    "dynamic": Sign(
        0.5, "1 if the program has such a part", "suspected",
        "Attack through all steps of the optimisation at test time, with a fixed number of them, "
        "and compare with attacks on the bare classifier and with Square.",
    ),
    "classes": Sign(
        0.5, "1 if there are fewer than 10", "information",
        "Nothing is wrong: say which attacks were run when you report robust accuracy, and add "
        "APGD on the margin loss in place of those left out.",
    ),
    "unavailable gradients": Sign(
        0.0, _SHARE, "certain",
        "Give the step that has no gradient a smooth stand-in (jc.attacks.adaptive.BPDA), or "
        "attack with another loss; else use Square and transferred images.",
    ),
    "unstable predictions": Sign(
        0.1, "mean relative change of the margin", "suspected",
        "Average gradients over random points around each iterate (jc.attacks.EOT of a "
        "jc.Stochastic that adds noise), take a smooth stand-in (BPDA), and compare with Square.",
    ),
    "silent success": Sign(
        0.0, _SHARE, "certain",
        "Return the adversarial iterate, not the last one, as the attacks of jc.attacks do. For a "
        "stochastic classifier, let most of many passes decide: jc.attacks.EOT with more samples.",
    ),
    "incomplete optimisation": Sign(
        0.1, _SHARE, "suspected",
        "The attack has not converged: use more steps, a larger step size, or APGD, until more "
        "steps do not lower robust accuracy.",
    ),
    "transfer failure": Sign(
        0.1, "share of the adversarial images of the surrogate", "information",
        "The surrogate is a poor stand-in: do not take robustness to its images for robustness. "
        "Attack the classifier itself, or bring the surrogate closer to it.",
    ),
    "transfer wins": Sign(
        0.2, "percentage points", "certain",
        "An attack on the classifier itself should not lose to a transferred one: its gradient "
        "misleads. Take the surrogate's gradient for it (BPDA), and start from transferred images.",
    ),
    "unconstrained attack failure": Sign(
        0.0, _SHARE, "certain",
        "Nothing but a broken attack stands between an image and any other image: look for a "
        "gradient that is zero, wrong or random, and try another loss (DLR, margin), more steps, "
        "BPDA and Square before believing smaller radii.",
    ),
    "loss does not rise": Sign(
        0.1, _SHARE, "suspected",
        "The gradient does not point uphill, or the steps are too large: try a smaller step size "
        "(APGD chooses by itself), another loss, BPDA, and compare with Square.",
    ),
    "noisy loss": Sign(
        0.1, _SHARE, "suspected",
        "The loss jumps from step to step: try a smaller step size (APGD chooses by itself); if it "
        "still does, the gradient is random or shattered: use jc.attacks.EOT or BPDA.",
    ),
    "accuracy rises with eps": Sign(
        0.02, "share of the images", "suspected",
        "The larger ball holds the smaller one, so the attack missed what it found before: "
        + _MORE.lower() + ", and count an image as broken if any radius up to eps breaks it.",
    ),
}  # fmt: skip


def checked(name: str, figure: float | np.floating, detail: str, found: bool = False) -> Checked:
    """The outcome of the check of a name, with what was seen.

    Args:
        name: the sign's.
        figure: to compare with its limit.
        detail: what a finding says.
        found: whether it is a finding whatever the figure.
    """
    sign = SIGNS[name]
    finding = Finding(name, sign.severity, detail, sign.advice)
    return Checked(name, float(figure), finding if found or figure > sign.limit else None)


def checked_share(name: str, which: np.ndarray, detail: str) -> Checked:
    """`checked` for the share of images that are marked, bool [n]; the detail follows the count."""
    return checked(name, which.mean(), f"{which.sum()} of {len(which)} images: {detail}")
