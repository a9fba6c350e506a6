"""Losses per example, as attacks maximise them: (logits [b, k], labels [b]) -> losses [b]."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxclus import _checks

Loss = Callable[[jax.Array, jax.Array], jax.Array]
#: (logits [b, k], labels [b], targets [b]) -> losses [b], larger the closer the target is.
TargetedLoss = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def cross_entropy(logits: Float[Array, "b k"], labels: Int[Array, " b"]) -> Float[Array, " b"]:
    """-log softmax(z)_y for each example.

    Args:
        logits: z, floating point [b, k].
        labels: y, integers in [0, k).
    """
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def margin(logits: Float[Array, "b k"], labels: Int[Array, " b"]) -> Float[Array, " b"]:
    """max_{i != y} z_i - z_y for each example: above 0 where the prediction is wrong, 0 for ties.

    The loss of Carlini and Wagner (arXiv:1608.04644, section V-B, f_6 with kappa = infinity).

    Args:
        logits: z, floating point [b, k].
        labels: y, integers in [0, k).
    """
    own = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    others = jnp.where(own, -jnp.inf, logits).max(axis=-1)
    return others - jnp.where(own, logits, 0.0).sum(axis=-1)


def dlr(logits: Float[Array, "b k"], labels: Int[Array, " b"]) -> Float[Array, " b"]:
    """The difference of logits ratio, -(z_y - max_{i != y} z_i) / (z_p1 - z_p3), for k >= 3.

    p sorts the logits downwards; 1e-12 is added to the denominator. Neither shifts nor scaling of
    the logits change the loss. Croce and Hein, arXiv:2003.01690, equation 6.

    Args:
        logits: z, floating point [b, k].
        labels: y, integers in [0, k).
    """
    highest = jax.lax.top_k(logits, 3)[0]
    return margin(logits, labels) / (highest[:, 0] - highest[:, 2] + 1e-12)


def targeted_dlr(
    logits: Float[Array, "b k"], labels: Int[Array, " b"], targets: Int[Array, " b"]
) -> Float[Array, " b"]:
    """-(z_y - z_t) / (z_p1 - (z_p3 + z_p4) / 2) for k >= 4, where p sorts the logits downwards.

    1e-12 is added to the denominator. Croce and Hein, arXiv:2003.01690, equation 7.

    Args:
        logits: z, floating point [b, k].
        labels: y, integers in [0, k).
        targets: t, integers in [0, k).
    """
    highest = jax.lax.top_k(logits, 4)[0]
    spread = highest[:, 0] - (highest[:, 2] + highest[:, 3]) / 2
    return logit_difference(logits, labels, targets) / (spread + 1e-12)


def logit_difference(
    logits: Float[Array, "b k"], labels: Int[Array, " b"], targets: Int[Array, " b"]
) -> Float[Array, " b"]:
    """z_t - z_y for each example: above 0 where the target has overtaken the label.

    Args:
        logits: z, floating point [b, k].
        labels: y, integers in [0, k).
        targets: t, integers in [0, k).
    """
    k = logits.shape[-1]
    sign = jax.nn.one_hot(targets, k, dtype=logits.dtype)
    sign -= jax.nn.one_hot(labels, k, dtype=logits.dtype)
    return (sign * logits).sum(axis=-1)


def target_logit(
    logits: Float[Array, "b k"], labels: Int[Array, " b"], targets: Int[Array, " b"]
) -> Float[Array, " b"]:
    """z_t for each example, whatever the label's logit is.

    Args:
        logits: z, floating point [b, k].
        labels: y, integers in [0, k); not used.
        targets: t, integers in [0, k).
    """
    return (jax.nn.one_hot(targets, logits.shape[-1], dtype=logits.dtype) * logits).sum(axis=-1)


LOSSES: dict[str, Loss] = {"cross_entropy": cross_entropy, "margin": margin, "dlr": dlr}
TARGETED_LOSSES: dict[str, TargetedLoss] = {
    "dlr": targeted_dlr,
    "difference": logit_difference,
    "target": target_logit,
}


def check_classes(loss: str | Loss, classes: int) -> None:
    """Raises ValueError if the named loss needs more classes."""
    if loss in ("dlr", dlr) and classes < 3:
        raise ValueError(f"`loss` dlr needs at least 3 classes, got a model of {classes}")


def get(loss: str | Loss) -> Loss:
    """The loss of a name, or the callable itself; raises for unknown names."""
    if callable(loss):
        return loss
    _checks.one_of("loss", loss, LOSSES)
    return LOSSES[loss]


def get_targeted(loss: str | TargetedLoss) -> TargetedLoss:
    """The targeted loss of a name, or the callable itself; raises for unknown names."""
    if callable(loss):
        return loss
    _checks.one_of("loss", loss, TARGETED_LOSSES)
    return TARGETED_LOSSES[loss]
