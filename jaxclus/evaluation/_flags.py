"""The six flags that the reference implementation of AutoAttack raises, as functions of arrays.

fra31/auto-attack, revision a392200, `checks.py` and `flags_doc.md`.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from jaxclus.attacks import AutoAttack, Finding
from jaxclus.evaluation._result import Robustness
from jaxclus.evaluation._signs import Checked, checked, checked_share
from jaxclus.threat import Threat

# Entries and sums of rows of probabilities may be off by so much.
_ROUNDING = 1e-5

#: Fewer classes than this leave targeted attacks fewer targets than the nine they have by default.
_CLASSES = 10


def randomised(logits: np.ndarray, labels: np.ndarray) -> Checked:
    """Whether passes over the same images differ: the largest |u_p - u_q|_2 of any image.

    u are an image's logits over their L2 norm, p and q two passes. Fires above 1e-4, or if the
    number of correct predictions changes.

    Args:
        logits: float [passes, n, k].
        labels: integers [n].
    """
    units = logits / np.maximum(np.linalg.norm(logits, axis=-1, keepdims=True), 1e-10)
    distance = max(np.linalg.norm(units - unit, axis=-1).max() for unit in units)
    counts = (logits.argmax(axis=-1) == labels).sum(axis=-1)
    detail = (
        f"normalised logits of {len(logits)} passes over the same images are up to {distance:.2g} "
        f"apart, and {counts.min()} to {counts.max()} of {len(labels)} images are classified "
        "correctly"
    )
    return checked("randomised", distance, detail, found=bool(np.ptp(counts)))


def softmax_output(logits: np.ndarray) -> Checked:
    """Whether the logits [n, k] are probabilities: in [0, 1] and summing to 1, to within 1e-5."""
    low, high, sums = logits.min(), logits.max(), logits.sum(axis=-1)
    inside = low > -_ROUNDING and high < 1 + _ROUNDING
    probabilities = inside and bool((np.abs(sums - 1) < _ROUNDING).all())
    detail = (
        f"the outputs for all {len(logits)} images are in [{low:.3g}, {high:.3g}] and sum to 1: "
        "probabilities in place of logits"
    )
    return checked("softmax output", float(probabilities), detail)


def zero_gradient(norms: Mapping[str, np.ndarray], right: np.ndarray) -> Checked:
    """Whether a loss has an all-zero gradient at an attack's random start, for any image.

    The reference looks at the DLR loss alone, and at images too that the random start has broken
    already: there, that loss is constant where the label has the third highest logit.

    Args:
        norms: the gradient's norm for each image [n], by the loss's name.
        right: whether the random start is classified correctly, bool [n].
    """
    zero = {name: right & (norm == 0) for name, norm in norms.items()}
    each = ", ".join(f"{which.sum()} with {name}" for name, which in zero.items())
    either = np.any(list(zero.values()), axis=0)
    return checked_share("zero gradient", either, f"zero gradient at a random start: {each}")


def square_wins(found: Robustness) -> Checked | None:
    """By how many points Square lowers the accuracy that the attacks before it left.

    The reference compares with the attacks after it too, which start from fewer images: where there
    are any, as in AutoAttack's version plus, its flag is never raised.

    Returns:
        None if Square is not among the attacks, or comes first.
    """
    names = [member.name.lower() for member in found.members]
    if "square" not in names[1:]:
        return None
    number = names.index("square", 1)
    before, after = found.members[number - 1].robust, found.members[number].robust
    broken = int(before.sum()) - int(after.sum())
    detail = (
        f"Square breaks {broken} of {len(after)} images that {', '.join(names[:number])} did not: "
        f"robust accuracy {before.mean():.2%} before it, {after.mean():.2%} after"
    )
    return checked("Square wins", 100 * broken / len(after), detail)


def dynamic(lint: Sequence[Finding]) -> Checked:
    """Whether the classifier optimises at test time: its program's inner gradients and loops."""
    parts = [each.name for each in lint if each.name in ("inner gradient", "data-dependent loop")]
    detail = f"the classifier seems to optimise at test time: {', '.join(parts)}"
    return checked("dynamic", float(bool(parts)), detail)


def classes(number: int, threat: Threat) -> Checked:
    """What a small number of classes does to AutoAttack; no sign of masking."""
    plus = AutoAttack(threat, version="plus")
    left_out = list(plus.skipped(number))
    effect = (
        f"too few for {' and '.join(left_out)}, which AutoAttack leaves out"
        if left_out
        else f"targeted attacks have {number - 1} targets in place of 9"
    )
    return checked("classes", float(number < _CLASSES), f"{number} classes: {effect}")
