"""Metrics as sums and counts over batches, so that uneven and padded batches stay exact."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def correct(logits: Float[Array, "b k"], labels: Int[Array, " b"]) -> Bool[Array, " b"]:
    """Whether each prediction, the first index of the largest logit, is the label."""
    return jnp.argmax(logits, axis=-1) == labels


def count(hits: Bool[Array, " b"], valid: Bool[Array, " b"]) -> jax.Array:
    """Number of hits among the valid entries, int32; padding is not valid."""
    return (hits & valid).sum(dtype=jnp.int32)
