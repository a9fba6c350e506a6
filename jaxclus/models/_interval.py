"""Interval bounds of a network's features over the images of an Linf ball."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxclus import _checks
from jaxclus.models import _ops
from jaxclus.models._activations import slopes
from jaxclus.models._classifier import Classifier
from jaxclus.models._layers import (
    Activation,
    AvgPool,
    BatchNorm,
    Conv,
    Flatten,
    GlobalAvgPool,
    Identity,
    Linear,
    MaxPool,
    Normalize,
)
from jaxclus.models._lipschitz_resnet import ConvexPotentialBlock
from jaxclus.models._rescaled import (
    GroupSort,
    RescaledConv,
    RescaledLinear,
    SpaceToDepth,
    adjoint,
)
from jaxclus.models._steps import Sum, steps_of

# Of a sum of n products in float32, in any order, the error stays below 8 sqrt(n) 2^-24 times the
# sum of the products' sizes, unless all n errors conspire (probability 2 n exp(-32) for independent
# ones: Higham and Mary, "A New Approach to Probabilistic Rounding Error Analysis", SIAM J. Sci.
# Comput. 41, 2019, with their lambda = 8).
_ROUNDING = 8 * 2.0**-24


class _Box(NamedTuple):
    """Arrays of one shape: `low <= values <= high`, entry by entry."""

    low: jax.Array
    high: jax.Array


def interval_bounds(
    model: Classifier, x: Float[Array, "b h w c"], eps: float | Float[Array, ""]
) -> tuple[Float[Array, "b d"], Float[Array, "b d"]]:
    """Lower and upper bounds of the features of all images within eps of each image, in [0, 1].

    Interval bound propagation: the box max(x - eps, 0) <= x' <= min(x + eps, 1) goes through the
    layers of the model in eval mode. An affine layer W x + b turns centre m and radius r into

        m' = W m + b,    r' = |W| r,

    which is exact for each output alone; monotone layers (activations, max-pooling, GroupSort) are
    applied to both ends; the two paths of a residual block are bounded apart and added.

    The arithmetic is float32. Each affine layer's radius is widened by what the rounding of its
    sums comes to, in the network and in the bounds: |W| (|m| + r) times 8 sqrt(n) 2^-24 for sums of
    n products (from 1e-6 to 3e-5 of the terms). That allows for independent rounding errors, not
    for an adversary's choice of them, nor for a network run in a lower precision than float32.

    Each layer forgets how its inputs go together, so the bounds of networks that were not trained
    for it widen fast with depth; those of a `LipschitzResNet` too, as the layers bound the L2 norm.

    Compile it for repeated use: `jax.jit(jc.models.interval_bounds)(model, x, eps)`.

    Args:
        model: a float32 CNN, ResNet, PreActResNet or LipschitzResNet.
        x: float32 images [b, h, w, c] in [0, 1].
        eps: radius of the Linf ball on the pixel scale, at least 0.

    Returns:
        low, high: float32 [b, d], low <= features(x') <= high.

    Raises:
        TypeError: for a model of another family or dtype, or one with unknown activations.
        ValueError: if the activations are not monotone (GELU, SiLU), or x or eps are not as said.

    References:
        Gowal et al.: On the Effectiveness of Interval Bound Propagation for Training Verifiably
        Robust Models, 2018, arXiv:1810.12715, section 3.
    """
    steps = steps_of(model)
    x = _checks.images("x", x)
    _checks.not_negative("eps", eps)
    jax.eval_shape(lambda model, x: model.features(x), model, x)  # checks the images' shape
    box = _Box(jnp.maximum(x - eps, 0), jnp.minimum(x + eps, 1))
    with jax.default_matmul_precision("highest"):
        low, high = _through(steps, box)
    return low - _ROUNDING * jnp.abs(low), high + _ROUNDING * jnp.abs(high)


def _through(steps: Any, box: _Box) -> _Box:
    """The box of what the steps make of the values in a box."""
    for step in steps:
        if isinstance(step, Sum):
            box = _added(_through(step.branch, box), _through(step.shortcut, box))
        else:
            box = _image(step, box)
    return box


def _added(first: _Box, second: _Box) -> _Box:
    return _Box(first.low + second.low, first.high + second.high)


def _affine(
    box: _Box,
    linear: Callable[[jax.Array], jax.Array],
    absolute: Callable[[jax.Array], jax.Array],
    terms: int,
    bias: jax.Array | float = 0.0,
    added: jax.Array | float = 0.0,
) -> _Box:
    """The box of `linear(x) + bias`.

    Args:
        box: of x.
        linear: x -> W x.
        absolute: x -> |W| x.
        terms: number of products that are summed for one output.
        bias: added to each output.
        added: sizes of the numbers added on the way to it, in which rounding happens.
    """
    centre, radius = (box.high + box.low) / 2, (box.high - box.low) / 2
    slack = _ROUNDING * terms**0.5 * (jnp.abs(centre) + radius)
    middle, spread = linear(centre) + bias, absolute(radius + slack) + _ROUNDING * added
    return _Box(middle - spread, middle + spread)


def _convolved(box: _Box, layer: Conv, kernel: jax.Array, bias: nnx.Param | None) -> _Box:
    """The box of the layer's convolution, with the kernel instead of its own."""
    strides: Any = layer.strides
    pair = (strides, strides) if isinstance(strides, int) else tuple(strides)

    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        padding: Any = layer.padding
        return _ops.conv_general_dilated(
            x, kernel, pair, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    shift = 0.0 if bias is None else bias[...][None, None, None]
    return _affine(
        box,
        lambda x: convolve(x, kernel),
        lambda x: convolve(x, jnp.abs(kernel)),
        int(np.prod(kernel.shape[:3])),
        shift,
        jnp.abs(shift),
    )


def _scaled(box: _Box, scale: jax.Array, bias: jax.Array, added: jax.Array) -> _Box:
    """The box of `scale * x + bias`, channel by channel."""
    shape = (1,) * (box.low.ndim - 1) + (-1,)
    scale, bias, added = (value.reshape(shape) for value in (scale, bias, added))
    return _affine(box, lambda x: x * scale, lambda x: x * jnp.abs(scale), 1, bias, added)


@functools.singledispatch
def _image(layer: Any, box: _Box) -> _Box:
    """The box of what the layer makes of the values in a box."""
    raise TypeError(f"`model` must have known layers only, got a {type(layer).__name__}")


@_image.register(Identity | Flatten | GroupSort | SpaceToDepth | MaxPool)
def _(layer: Any, box: _Box) -> _Box:
    return _Box(layer(box.low), layer(box.high))


@_image.register
def _(layer: Activation, box: _Box) -> _Box:
    if slopes(layer.function)[0] < 0:
        raise ValueError(
            "`model` must have monotone activations (relu, leaky_relu, softplus, tanh, linbp), "
            "got gelu or silu, which decrease below zero"
        )
    return _Box(layer(box.low), layer(box.high))


@_image.register
def _(layer: Normalize, box: _Box) -> _Box:
    mean, scale = jnp.asarray(layer.mean), 1 / jnp.asarray(layer.std)
    return _scaled(box, scale, -mean * scale, jnp.abs(mean * scale))


@_image.register
def _(layer: BatchNorm, box: _Box) -> _Box:
    assert layer.scale is not None and layer.bias is not None
    scale = layer.scale[...] * jax.lax.rsqrt(layer.var[...] + layer.epsilon)
    bias, shift = layer.bias[...], layer.mean[...] * scale
    return _scaled(box, scale, bias - shift, jnp.abs(bias) + jnp.abs(shift))


@_image.register
def _(layer: Conv, box: _Box) -> _Box:
    return _convolved(box, layer, layer.kernel[...], layer.bias)


@_image.register
def _(layer: RescaledConv, box: _Box) -> _Box:
    return _convolved(box, layer, layer.rescaled_kernel(), layer.bias)


@_image.register
def _(block: ConvexPotentialBlock, box: _Box) -> _Box:
    kernel = block.conv.rescaled_kernel()
    hidden = _image(block.activation, _convolved(box, block.conv, kernel, block.conv.bias))
    return _added(box, _convolved(hidden, block.conv, -2 * adjoint(kernel), None))


@_image.register
def _(layer: Linear, box: _Box) -> _Box:
    return _projected(box, layer, layer.kernel[...])


@_image.register
def _(layer: RescaledLinear, box: _Box) -> _Box:
    return _projected(box, layer, layer.rescaled_kernel())


def _projected(box: _Box, layer: Linear, kernel: jax.Array) -> _Box:
    assert layer.bias is not None
    bias = layer.bias[...][None]
    size = jnp.abs(kernel)
    return _affine(box, lambda x: x @ kernel, lambda x: x @ size, len(kernel), bias, jnp.abs(bias))


@_image.register
def _(layer: GlobalAvgPool, box: _Box) -> _Box:
    return _affine(box, layer, layer, int(np.prod(box.low.shape[1:3])))


@_image.register
def _(layer: AvgPool, box: _Box) -> _Box:
    return _affine(box, layer, layer, int(np.prod(layer.window)))
