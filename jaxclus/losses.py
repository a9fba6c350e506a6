"""Losses per example, as attacks maximise them: (logits [b, k], labels [b]) -> losses [b]."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxclus import _checks

Loss = Callable[[jax.Array, jax.Array], jax.Array]


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


LOSSES: dict[str, Loss] = {"cross_entropy": cross_entropy, "margin": margin}


def get(loss: str | Loss) -> Loss:
    """The loss of a name, or the callable itself; raises for unknown names."""
    if callable(loss):
        return loss
    _checks.one_of("loss", loss, LOSSES)
    return LOSSES[loss]
