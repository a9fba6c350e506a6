"""Cosines between the weights of classes, and between the filters of a layer."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jaxclus import _checks


def correlation(weights: ArrayLike) -> Float[Array, "k k"]:
    """Cosine of the angle between the weights of each two classes.

    C_ij = <W_i, W_j> / (|W_i| |W_j|), without an epsilon. Each row may be of any scale: rows are
    divided by their largest entry before anything is squared.

    Args:
        weights: W [k, ...], floating point, finite, no row all zero; for the paper's matrix the
            implicit weight [k, h, w, c] of the linear sub-network.

    Returns:
        C [k, k], float32 in [-1, 1] up to rounding, with a diagonal of 1. Under tracing (`jit`,
        `vmap`, `grad`) values cannot be checked: there a zero row gives NaN in its row and column.

    Raises:
        TypeError: `weights` is not floating point.
        ValueError: `weights` has fewer than two axes, no entries, entries that are not finite, or
            a row that is zero (below float32's smallest normal number, 1.2e-38).

    Bai et al., NeurIPS 2021, arXiv 2111.12922: the correlation matrix of the implicit weights.
    """
    weights = _checked("weights", weights)
    if weights.ndim < 2:
        raise ValueError(f"`weights` must have the shape [k, ...], got {weights.shape}")
    return _cosines(_checked_rows("weights", weights.reshape(weights.shape[0], -1), "class"))


def filter_correlation(kernel: ArrayLike) -> Float[Array, "o o"]:
    """How far the filters of a layer are from being orthogonal.

    |V V^T - I|, entry by entry, with the l2-normalised filters as the rows of V [o, kh*kw*i].

    Args:
        kernel: HWIO kernel [kh, kw, i, o] of a convolution or [i, o] of a dense layer, floating
            point, finite, no filter all zero.

    Returns:
        Deviations [o, o], float32 in [0, 1], with a diagonal of 0, both up to rounding. Under
        tracing a zero filter gives NaN in its row and column.

    Raises:
        TypeError: `kernel` is not floating point.
        ValueError: `kernel` is of another shape, not finite, or has a filter that is zero.

    Bai et al., NeurIPS 2021, arXiv 2111.12922: the layer variant in the published code.
    """
    kernel = _checked("kernel", kernel)
    if kernel.ndim not in (2, 4):
        raise ValueError(f"`kernel` must have the shape [h, w, i, o] or [i, o], got {kernel.shape}")
    filters = _checked_rows("kernel", kernel.reshape(-1, kernel.shape[-1]).T, "filter")
    return jnp.abs(_cosines(filters) - jnp.eye(len(filters)))


@jax.jit
def _cosines(rows):
    # Gradients of nets without batch norm reach 1e30 and 1e-30: their squares leave float32's
    # range. The result does not depend on the scale, hence neither does its derivative.
    largest = jax.lax.stop_gradient(jnp.abs(rows).max(axis=1, keepdims=True))
    rows = rows / largest
    products = jnp.matmul(rows, rows.T, precision="highest")
    # Norms from the same sums as the products: their rounding errors then cancel.
    norms = jnp.sqrt(jnp.diagonal(products))
    return products / norms[:, None] / norms[None, :]


def _checked(name, value):
    """The value as a float32 array with entries."""
    dtype = jnp.result_type(value)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"`{name}` must be floating point, got dtype {dtype}")
    value = jnp.asarray(value, jnp.float32)
    if not value.size:
        raise ValueError(f"`{name}` must not be empty, got the shape {value.shape}")
    return value


def _checked_rows(name, rows, what):
    """The rows, on the host none of them zero or with values that are not finite."""
    if _checks.is_concrete(rows):
        largest = np.abs(np.asarray(rows)).max(axis=1)
        if not np.isfinite(largest).all():
            bad = int(np.argmin(np.isfinite(largest)))
            raise ValueError(f"`{name}` must be finite, but {what} {bad} holds NaN or infinity")
        if (largest < np.finfo(np.float32).tiny).any():
            zero = int(np.argmin(largest))
            raise ValueError(
                f"`{name}` must not be zero for a whole {what}, but {what} {zero} is: "
                "it has no direction"
            )
    return rows
