"""The matrix that a linear sub-network multiplies images with."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxclus import _checks, _classifier, _jaxpr
from jaxclus._classifier import Classifier
from jaxclus.linear._linearize import apply_arrays

# One pass back holds the feature maps of an image for each class: so many of 224x224 fit.
# Not fewer at once than fit: on CPUs, derivatives of convolutions' kernels are slow inside loops.
_PIXELS_AT_ONCE = 64 * 224 * 224
_POINTS = 4
_TOLERANCE = 1e-4


class ImplicitWeight(NamedTuple):
    """Weight and bias of an affine classifier: logits = sum_hwc weight * image + bias.

    Attributes:
        weight: float32 [k, h, w, c], one image for each class.
        bias: float32 [k].
    """

    weight: Float[Array, "k h w c"]
    bias: Float[Array, " k"]


def implicit_weight(linear: Classifier, input_shape: Sequence[int]) -> ImplicitWeight:
    """Weight W and bias b of an affine classifier f(x) = W x + b.

    W_j = d f_j / d x is pulled back for all classes in one vectorised reverse pass (64 classes at a
    time for images 224x224, 3136 for 32x32), and b = f(0); the classifier is evaluated under matmul
    precision "highest". That it is affine is verified at 4 random points x in [0, 1] with a fixed
    key: max |f(x) - (W x + b)| <= 1e-4 max |f(x)|.

    Compiled once for each structure of the classifier and input shape: new weights in a pytree
    reuse the program. A classifier without array leaves, such as a plain function, is traced anew
    at every call. Inside a transformation (`jax.jit`, `jax.grad` with respect to the weights) the
    verification is left out, since it needs values.

    Args:
        linear: affine callable from float32 images [b, h, w, c] to logits [b, k], such as
            `linearize(model)`.
        input_shape: (h, w, c) of one image.

    Returns:
        `ImplicitWeight(weight, bias)`, float32 [k, h, w, c] and [k].

    Raises:
        TypeError: if `linear` cannot be called, or `input_shape` is not made of integers.
        ValueError: if `input_shape` is not three positive integers, the output is not [b, k], or
            the classifier is not affine; names the primitives in the way.

    References:
        Bai, Yan, Jiang, Xia, Wang: Clustering Effect of (Linearized) Adversarial Robust Models,
        2021, arXiv:2111.12922. Their code runs one backward pass for each image and class.
    """
    shape = _input_shape(linear, input_shape)
    weight, bias, deviation, largest = _pull_back(linear)(shape=shape)
    if _checks.is_concrete(deviation) and not deviation <= _TOLERANCE * largest:
        names = ", ".join(nonlinear_primitives(linear, shape))
        raise ValueError(
            f"`linear` must be affine in the images, but differs from W x + b by "
            f"{float(deviation):.2g} where its largest output is {float(largest):.2g}; in the way: "
            f"{names or 'no primitive, so it must be rounding or overflow'}"
        )
    return ImplicitWeight(weight, bias)


def nonlinear_primitives(model: Classifier, input_shape: Sequence[int]) -> tuple[str, ...]:
    """Names of the primitives that keep a classifier from being affine in its images.

    A static analysis of the traced program: primitives that act in no affine way on values that
    depend on the images. Empty for an affine classifier; of `linearize(model)` it gives what the
    linear sub-network could not remove, such as ("div", "exp") for softmax attention. A program can
    be affine in spite of them, where non-linear parts cancel.

    Args:
        model: callable from images [b, h, w, c] to logits [b, k].
        input_shape: (h, w, c) of one image.

    Returns:
        Sorted names, as in `jax.make_jaxpr`.

    Raises:
        TypeError: if `model` cannot be called, or `input_shape` is not made of integers.
        ValueError: if `input_shape` is not three positive integers.
    """
    shape = _input_shape(model, input_shape)
    apply, arrays = apply_arrays(model)
    images = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    return _jaxpr.nonlinear_primitives(apply, arrays, images)


def _input_shape(model, input_shape) -> tuple[int, int, int]:
    if not callable(model):
        raise TypeError(f"the classifier must be a callable from images to logits, got {model!r}")
    shape = tuple(input_shape)
    if len(shape) != 3:
        raise ValueError(f"`input_shape` must be (h, w, c), got {shape}")
    for size in shape:
        _checks.at_least("input_shape", size, 1)
    return shape


@partial(_classifier.jit_over_model, static_argnames=("shape",))
def _pull_back(model: Classifier, shape: tuple[int, int, int]):
    """Weight [k, h, w, c], bias [k], largest deviation from them and largest output."""
    with jax.default_matmul_precision("highest"):
        logits, pull = jax.vjp(model, jnp.zeros((1, *shape), jnp.float32))
        if logits.ndim != 2:
            raise ValueError(f"the output of `linear` must be logits [b, k], got {logits.shape}")

        def row(one_hot):
            return pull(one_hot[None])[0][0]

        one_hots = jnp.eye(logits.shape[1], dtype=logits.dtype)
        at_once = max(1, _PIXELS_AT_ONCE // (shape[0] * shape[1]))
        if len(one_hots) <= at_once:
            weight = jax.vmap(row)(one_hots)
        else:
            weight = jax.lax.map(row, one_hots, batch_size=at_once)
        bias = logits[0].astype(jnp.float32)
        points = jax.random.uniform(jax.random.key(0), (_POINTS, *shape))
        output = model(points)
        affine = jnp.tensordot(points, weight, ((1, 2, 3), (1, 2, 3))) + bias[None]
        return weight, bias, jnp.max(jnp.abs(output - affine)), jnp.max(jnp.abs(output))
