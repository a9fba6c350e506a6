"""Certificates of a dense head, z = W^T h + b."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Of a sum of n products in float32 the error stays below 8 sqrt(n) 2^-24 times the sum of their
# sizes, as in jc.models.interval_bounds. It happens twice: in the network and in its certificate.
_ROUNDING = 2 * 8 * 2.0**-24


def radius(
    kernel: Float[Array, "d k"],
    bias: Float[Array, " k"],
    embeddings: Float[Array, "b d"],
    predicted: Int[Array, " b"],
    lipschitz: jax.Array | float,
) -> Float[Array, " b"]:
    """The radius around each image within which the class y cannot change.

    min_c (z_y - z_c) / (Lip |w_y - w_c|_2), lowered by the rounding of logits in float32.

    Args:
        kernel: W, float32 [d, k].
        bias: b, float32 [k].
        embeddings: h(x), float32 [b, d].
        predicted: y, the class whose hold is certified.
        lipschitz: |h(x + d) - h(x)|_2 <= Lip |d|_p for all d.

    Returns:
        Radii [b] in the norm p, at least 0.
    """
    share = _share(embeddings)

    def reach(own: jax.Array, rival: jax.Array, lead: jax.Array, sizes: jax.Array) -> jax.Array:
        least = jnp.maximum(lead - share * (jnp.abs(embeddings) * sizes).sum(axis=1), 0)
        # The embedding's move adds to the rounding as well.
        slope = _length(own - rival) + share * _length(sizes)
        # Equal weights of two classes: a lead that nothing changes.
        never = jnp.where(least > 0, jnp.inf, 0)
        return jnp.where(slope > 0, least / jnp.where(slope > 0, slope, 1), never)

    return _least(kernel, bias, embeddings, predicted, embeddings, reach) / lipschitz


def margin(
    kernel: Float[Array, "d k"],
    bias: Float[Array, " k"],
    embeddings: Float[Array, "b d"],
    predicted: Int[Array, " b"],
    low: Float[Array, "b d"],
    high: Float[Array, "b d"],
) -> Float[Array, " b"]:
    """The least of z_y - z_c for h in a box.

    min_c (w_y - w_c) . m + b_y - b_c - |w_y - w_c| . r for the box's centre m and radius r, which
    is exact for each c, lowered by the rounding of logits in float32.

    Args:
        kernel: W, float32 [d, k].
        bias: b, float32 [k].
        embeddings: h(x), float32 [b, d].
        predicted: y, the class whose lead is asked about.
        low, high: ends of the boxes, float32 [b, d].
    """
    centre, reach = (low + high) / 2, (high - low) / 2
    share = _share(embeddings)

    def least(own: jax.Array, rival: jax.Array, lead: jax.Array, sizes: jax.Array) -> jax.Array:
        rounding = share * (jnp.abs(centre) + reach) * sizes
        return lead - (jnp.abs(own - rival) * reach + rounding).sum(axis=1)

    return _least(kernel, bias, embeddings, predicted, centre, least)


def _least(
    kernel: jax.Array,
    bias: jax.Array,
    embeddings: jax.Array,
    predicted: jax.Array,
    centre: jax.Array,
    of: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """The least of `of` over the classes c other than y [b].

    `of` is given w_y [b, d], w_c [1, d], the lead z_y - z_c at the centre [b] less the rounding of
    the bias, and |w_y| + |w_c| [b, d].
    """
    own = kernel.T[predicted]

    def against(c: jax.Array) -> jax.Array:
        rival = kernel[:, c][None]
        size = jnp.abs(bias[predicted]) + jnp.abs(bias[c])
        lead = ((own - rival) * centre).sum(axis=1) + bias[predicted] - bias[c]
        found = of(own, rival, lead - _share(embeddings) * size, jnp.abs(own) + jnp.abs(rival))
        return jnp.where(predicted == c, jnp.inf, found)

    # One class after the other: [b, k, d] could take gigabytes.
    return jax.lax.map(against, jnp.arange(kernel.shape[1])).min(axis=0)


def _share(embeddings: jax.Array) -> float:
    return _ROUNDING * embeddings.shape[1] ** 0.5


def _length(vectors: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.square(vectors).sum(axis=1))
