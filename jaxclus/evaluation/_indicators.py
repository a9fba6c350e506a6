"""Six indicators of attack failure, and what loss and accuracy curves tell, from arrays.

Pintor et al., "Indicators of Attack Failure: Debugging and Improving Optimization of Adversarial
Examples", NeurIPS 2022, arXiv:2106.09947; formulas and constants are those of the authors' code
(pralab/IndicatorsOfAttackFailure, `src/indicators/indicators.py`), differences are named. Losses
are maximised here. n images, all of which the model classifies correctly; t = 0 ... T iterates.
"""

import math

import numpy as np

from jaxclus.evaluation._signs import Checked, checked, checked_share

#: Iterates at the end of an attack in which the loss should not rise any more: so many, but no more
#: than this share of all, and at least 2.
LAST, LAST_SHARE = 10, 0.2
#: The share of its whole range by which it may.
RISE = 0.05
#: The share of its whole range by which the loss may fall in a step, on average, late.
NOISE = 0.075


def last(iterates: int) -> int:
    """How many of an attack's iterates count as its end."""
    return max(2, min(LAST, math.ceil(LAST_SHARE * iterates)))


def unavailable_gradients(norms: np.ndarray, loss: str) -> Checked:
    """Share of images at which the gradient of the attack's loss is zero or not finite.

    The code fires for one such image, as this does.

    Args:
        norms: the gradient's norm at each image [n].
        loss: the loss's name.
    """
    bad = ~(np.isfinite(norms) & (norms > 0))
    return checked_share(
        "unavailable gradients", bad, f"the gradient of {loss} is zero or not finite"
    )


def gradient_raises(error: str) -> Checked:
    """`unavailable_gradients` for a model that JAX cannot differentiate, with what JAX says."""
    return checked("unavailable gradients", 1.0, f"no gradient can be taken: {error}")


def unstable_predictions(margins: np.ndarray, noisy: np.ndarray) -> Checked:
    """Mean over images and noise of min(|m(x + u) - m(x)| / |m(x)|, 1).

    m is the margin, the largest other logit less that of the label, and u uniform noise. The code
    takes the attack's loss, which for the cross-entropy of confident images changes by whole orders
    of magnitude in plain networks too, and caps the mean over the noise in place of each summand.

    Args:
        margins: m(x) [n], not 0.
        noisy: m(x + u) [draws, n].
    """
    size = np.maximum(np.abs(margins), 1e-12)
    change = np.minimum(np.abs(noisy - margins) / size, 1).mean()
    detail = (
        f"small uniform noise changes the margin by {change:.0%} on average, over {len(noisy)} "
        f"draws for {len(margins)} images"
    )
    return checked("unstable predictions", change, detail)


def silent_success(passed: np.ndarray, success: np.ndarray) -> Checked:
    """Share of images with a misclassified iterate whose final image is classified correctly.

    Args:
        passed: whether the search went through a misclassified iterate, bool [n].
        success: whether the final image is misclassified, inside the threat model, bool [n].
    """
    return checked_share(
        "silent success",
        passed & ~success,
        "the search met an adversarial iterate, but what it returned is classified correctly",
    )


def incomplete_optimisation(losses: np.ndarray, standing: np.ndarray) -> Checked:
    """Share of images that stand while the best loss still rises at the attack's end.

    With L_t the highest loss up to iterate t, scaled so that the losses' range is [0, 1]:
    L_T - L_{T-9} > 0.05. The code looks at all images, while those that were broken do not matter,
    and at the last 10 iterates of short attacks too, where this looks at the last fifth.

    Args:
        losses: the loss at each iterate [T + 1, n].
        standing: whether the attack failed, bool [n].
    """
    low, high = losses.min(axis=0), losses.max(axis=0)
    best = np.maximum.accumulate(losses, axis=0)
    end = last(len(losses))
    rise = (best[-1] - best[-end]) / np.where(high > low, high - low, 1)
    return checked_share(
        "incomplete optimisation",
        standing & (rise > RISE),
        f"not broken, and the loss rises by more than {RISE:.0%} of its range in the last {end} "
        f"of {len(losses)} iterates",
    )


def transfer_failure(surrogate: np.ndarray, transferred: np.ndarray) -> Checked:
    """Share of the images broken on a surrogate whose adversarial images fail on the model.

    Above 0.1 it is information about the surrogate, no sign of masking: images made on another
    network seldom all fool a plain one. The code has a yes or no for each image.

    Args:
        surrogate: whether the attack on the surrogate succeeded, bool [n].
        transferred: whether the model misclassifies what came out, bool [n].
    """
    failed, broken = int((surrogate & ~transferred).sum()), int(surrogate.sum())
    detail = f"{failed} of {broken} adversarial images of the surrogate do not fool the classifier"
    return checked("transfer failure", failed / max(broken, 1), detail)


def transfer_wins(transferred: np.ndarray, success: np.ndarray) -> Checked:
    """Percentage points by which transferred images lower the accuracy that the attack left.

    Not among the six; Carlini et al., "On Evaluating Adversarial Robustness", arXiv:1902.06705,
    section 4.

    Args:
        transferred: whether the model misclassifies the surrogate's adversarial image, bool [n].
        success: whether the attack on the model itself succeeded, bool [n].
    """
    only = transferred & ~success
    detail = f"{only.sum()} of {len(only)} images: only the transferred attack succeeds"
    return checked("transfer wins", 100 * int(only.sum()) / len(only), detail)


def unconstrained_attack_failure(standing: np.ndarray) -> Checked:
    """Share of images that stand although the attack may go anywhere in the pixel box.

    The code lifts the bound, and with it the box.

    Args:
        standing: whether that attack failed, bool [n].
    """
    return checked_share(
        "unconstrained attack failure", standing, "not broken within the whole pixel box"
    )


def loss_does_not_rise(losses: np.ndarray, standing: np.ndarray) -> Checked:
    """Share of images that stand while the mean of the last losses is not above the first one.

    The last ones as in `incomplete_optimisation`.

    Args:
        losses: the loss at each iterate [T + 1, n].
        standing: whether the attack failed, bool [n].
    """
    end = last(len(losses))
    flat = losses[-end:].mean(axis=0) <= losses[0]
    return checked_share(
        "loss does not rise",
        standing & flat,
        f"not broken, and the loss is no higher in the last {end} iterates than at the start",
    )


def noisy_loss(losses: np.ndarray, standing: np.ndarray) -> Checked:
    """Share of images that stand while the loss jumps: mean late max(l_t - l_{t+1}, 0) > 0.075.

    Losses are scaled so that their range is [0, 1]; the mean is over the second half of the
    iterates. White noise has 1/8 to 1/6, an ascent 0.

    Args:
        losses: the loss at each iterate [T + 1, n].
        standing: whether the attack failed, bool [n].
    """
    spread = losses.max(axis=0) - losses.min(axis=0)
    falls = np.maximum(-np.diff(losses[len(losses) // 2 :], axis=0), 0).mean(axis=0)
    noisy = falls / np.where(spread > 0, spread, 1) > NOISE
    return checked_share(
        "noisy loss",
        standing & noisy,
        f"not broken, and the loss falls by more than {NOISE:.1%} of its range in a step on "
        f"average, in the second half of {len(losses)} iterates",
    )


def accuracy_rises(eps: np.ndarray, accuracy: np.ndarray) -> Checked:
    """The largest rise of robust accuracy from one radius to the next.

    Args:
        eps: the radii, ascending [m].
        accuracy: robust accuracy at each, in [0, 1] [m].
    """
    rises = np.diff(accuracy)
    if not len(rises):
        return checked("accuracy rises with eps", 0.0, "")
    at = int(rises.argmax())
    detail = (
        f"robust accuracy is {accuracy[at]:.0%} at eps {eps[at]:.4g} and {accuracy[at + 1]:.0%} "
        f"at eps {eps[at + 1]:.4g}"
    )
    return checked("accuracy rises with eps", max(0.0, rises[at]), detail)
