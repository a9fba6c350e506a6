"""Upper bounds of the Lipschitz constants of networks, layer by layer, in float64 on the host."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxclus import _checks
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
from jaxclus.models._rescaled import GroupSort, RescaledConv, RescaledLinear, SpaceToDepth
from jaxclus.models._steps import Sum, steps_of

# Far more than float64 leaves uncertain in Fourier transforms, singular values and products.
_MARGIN = 1e-9


def lipschitz_bound(model: Classifier, input_shape: Sequence[int]) -> float:
    """A number L with |features(x) - features(y)|_2 <= L |x - y|_2 for all images x and y.

    On pixel scale: the model's normalisation is included. The product of the layers' constants,

        L = prod_l L_l,  with  L_branch + L_shortcut  for a residual block,

    where L_l is

    - of a dense layer the largest singular value;
    - of a convolution the largest one of the circular convolution of the same stride on the padded
      map, over the frequencies of the two-dimensional Fourier transform: zero padding and its
      borders only take rows and columns away;
    - of a BatchNorm (in eval mode) max_c |scale_c| / sqrt(var_c + eps); one that follows a
      convolution is first multiplied into the kernel;
    - of an activation its steepest slope: GELU 1.1290, SiLU 1.0999, 1 for the others;
    - of pooling sqrt(windows that a pixel is in), divided by sqrt(pixels of a window) for means;
    - of a `LipschitzResNet`'s layers that of the rescaled kernel: at most 1, up to its rounding.

    Bounds of trained networks of other families are often far above the true constant, since the
    layers' worst directions hardly ever meet. The bound holds of exact arithmetic; the features'
    own float32 rounding is not in it.

    Args:
        model: a float32 CNN, ResNet, PreActResNet (hence WideResNet) or LipschitzResNet.
        input_shape: (h, w, c) of the images.

    Returns:
        The bound, rounded up.

    Raises:
        TypeError: for a model of another family or dtype, or one with unknown activations.
        ValueError: if the model does not take images of that shape.

    References:
        Szegedy et al.: Intriguing properties of neural networks, 2013, arXiv:1312.6199, section
        4.3, for the product; Sedghi, Gupta, Long: The Singular Values of Convolutional Layers,
        2018, arXiv:1805.10408, Theorem 6, for circular convolutions.
    """
    steps = steps_of(model)
    shape = tuple(input_shape) if isinstance(input_shape, Sequence) else ()
    if len(shape) != 3:
        raise ValueError(f"`input_shape` must be (h, w, c), got {input_shape!r}")
    for size in shape:
        _checks.at_least("input_shape", size, 1)
    if shape[-1] != model.channels or shape[:2] != getattr(model, "image_size", shape[:2]):
        wanted = (*getattr(model, "image_size", ("h", "w")), model.channels)
        raise ValueError(f"`input_shape` must be {wanted}, as the model takes, got {shape}")
    return float(np.nextafter(_product(steps, shape)[0] * (1 + _MARGIN), np.inf))


def _product(steps: Sequence[Any], shape: tuple[int, ...]) -> tuple[float, tuple[int, ...]]:
    """The constant of the steps one after the other, and the shape of the last one's output."""
    product, rest = 1.0, list(steps)
    while rest:
        step = rest.pop(0)
        if isinstance(step, Sum):
            constant, after = _product(step.branch, shape)
            constant += _product(step.shortcut, shape)[0]
        else:
            after = _shape_after(step, shape)
            if type(step) is Conv and rest and isinstance(rest[0], BatchNorm):
                constant = _norm_of_conv(step, shape, _scale(rest.pop(0)))
            else:
                constant = _constant(step, shape)
        product, shape = product * constant, after
    return product, shape


def _shape_after(layer: nnx.Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    x = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    return jax.eval_shape(lambda layer, x: layer(x), layer, x).shape[1:]


def _scale(norm: BatchNorm) -> np.ndarray:
    """What each channel is multiplied with in eval mode."""
    assert norm.scale is not None
    var = np.asarray(norm.var[...], np.float64)
    return np.asarray(norm.scale[...], np.float64) / np.sqrt(var + norm.epsilon)


def _norm_of_conv(layer: Conv, shape: tuple[int, ...], scale: Any = 1.0) -> float:
    padding: Any = layer.padding
    kernel = layer.rescaled_kernel() if isinstance(layer, RescaledConv) else layer.kernel[...]
    step: Any = layer.strides
    stride = step if isinstance(step, int) else step[0]
    sizes = [n + sum(pads) for n, pads in zip(shape, padding, strict=False)]
    return circular_norm(np.asarray(kernel, np.float64) * scale, sizes, stride)


def circular_norm(kernel: np.ndarray, sizes: Sequence[int], stride: int) -> float:
    """Largest singular value of a circular convolution with a stride.

    At a stride s the frequencies q + t n of each axis, for t = 0, ..., s - 1, fall on the one q
    of the n = sizes / s outputs: the singular values are those of the matrices that hold the s^2
    transforms side by side, divided by s.

    Args:
        kernel: float64 [kh, kw, i, o].
        sizes: rows and columns of the map; if need be made larger, to hold the kernel and to be
            multiples of the stride.
        stride: step of the window, in pixels.
    """
    if kernel.shape[:2] == (1, 1):  # alike at all frequencies
        sizes = (stride, stride)
    grid = np.maximum(sizes, kernel.shape[:2])
    rows, columns = (math.ceil(n / stride) for n in grid)
    # Columns are transformed for some rows at a time, as all together may take gigabytes. A real
    # kernel has the conjugate matrices, of the same singular values, at the opposite frequencies.
    by_row = np.fft.fft(kernel, rows * stride, axis=0)
    largest = 0.0
    for row in range(rows // 2 + 1):
        both = np.fft.fft(by_row[row::rows], columns * stride, axis=1)
        folded = both.reshape(stride, stride, columns, *kernel.shape[2:])
        matrices = folded.transpose(2, 4, 0, 1, 3).reshape(columns, kernel.shape[3], -1)
        largest = max(largest, np.linalg.svd(matrices, compute_uv=False).max())
    return largest / stride


@functools.singledispatch
def _constant(layer: Any, shape: tuple[int, ...]) -> float:
    """The Lipschitz constant of a layer, or a bound of it, on inputs of the shape."""
    raise TypeError(f"`model` must have known layers only, got a {type(layer).__name__}")


@_constant.register(Identity | Flatten | GroupSort | SpaceToDepth)
def _(layer: Any, shape: tuple[int, ...]) -> float:
    return 1.0


@_constant.register
def _(layer: Normalize, shape: tuple[int, ...]) -> float:
    return 1 / min(layer.std)


@_constant.register
def _(layer: Conv, shape: tuple[int, ...]) -> float:
    return _norm_of_conv(layer, shape)


@_constant.register
def _(layer: RescaledConv, shape: tuple[int, ...]) -> float:
    return _norm_of_conv(layer, shape)


@_constant.register
def _(layer: Linear, shape: tuple[int, ...]) -> float:
    return float(np.linalg.norm(np.asarray(layer.kernel[...], np.float64), 2))


@_constant.register
def _(layer: RescaledLinear, shape: tuple[int, ...]) -> float:
    return float(np.linalg.norm(np.asarray(layer.rescaled_kernel(), np.float64), 2))


@_constant.register
def _(layer: BatchNorm, shape: tuple[int, ...]) -> float:
    return float(np.abs(_scale(layer)).max())


@_constant.register
def _(layer: Activation, shape: tuple[int, ...]) -> float:
    return max(map(abs, slopes(layer.function)))


@_constant.register
def _(block: ConvexPotentialBlock, shape: tuple[int, ...]) -> float:
    # The eigenvalues of I - 2 B^T S B, for slopes S that may have been changed by surgery.
    low, high = slopes(block.activation.function)
    square = _constant(block.conv, shape) ** 2
    return max(1 - 2 * min(low, 0) * square, 2 * high * square - 1)


@_constant.register
def _(layer: GlobalAvgPool, shape: tuple[int, ...]) -> float:
    return math.prod(shape[:2]) ** -0.5


@_constant.register
def _(layer: MaxPool, shape: tuple[int, ...]) -> float:
    return _windows_over_a_pixel(layer) ** 0.5


@_constant.register
def _(layer: AvgPool, shape: tuple[int, ...]) -> float:
    return (_windows_over_a_pixel(layer) / math.prod(layer.window)) ** 0.5


def _windows_over_a_pixel(layer: MaxPool | AvgPool) -> int:
    pairs = zip(layer.window, layer.strides, strict=True)
    return math.prod(math.ceil(window / stride) for window, stride in pairs)
