"""Layers with PyTorch's conventions: symmetric padding, initial values, BatchNorm statistics.

Images are [b, h, w, c]. Every step of a network is a module, activations and pooling included, so
that model surgery finds them by type. Hyper-parameters are static and hashable: two models of one
architecture run the same compiled code.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxclus import _checks
from jaxclus.models import _ops
from jaxclus.models._activations import ACTIVATIONS


def uniform_bound(kernel_shape: Sequence[int]) -> float:
    """1 / sqrt(fan_in): weights start uniform within +- this, PyTorch's kaiming_uniform(sqrt(5)).

    Args:
        kernel_shape: [h, w, in, out] or [in, out].
    """
    return math.prod(kernel_shape[:-1]) ** -0.5


# Gain of He et al. (2015), arXiv 1502.01852, eq. 10: through a layer followed by ReLU the second
# moment stays what it is; with a gain of 1 each such layer divides it by six, which deep networks
# without BatchNorm do not survive.
HE_GAIN = math.sqrt(6.0)


def _uniform(bound: float) -> nnx.Initializer:
    def init(key: jax.Array, shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, tuple(shape), dtype, minval=-bound, maxval=bound)

    return init


def _convolve(*operands: Any, out_sharding: None = None, **arguments: Any) -> jax.Array:
    # nnx.Conv always passes `out_sharding`; it has a meaning on meshes of explicit axes only,
    # which this library does not use.
    assert out_sharding is None
    return _ops.conv_general_dilated(*operands, **arguments)


class Conv(nnx.Conv):
    """Square convolution, padded alike on all sides.

    The kernel starts as U(+-gain / sqrt(fan_in)), the bias as U(+-1 / sqrt(fan_in)).

    Args:
        in_features: channels of the input.
        out_features: channels of the output.
        kernel_size: height and width of the kernel, in pixels.
        strides: step in both directions, in pixels.
        padding: zeros on each side, in pixels; default `kernel_size // 2`.
        use_bias: whether each output channel has a bias.
        gain: of the initial kernel, above 0; 1 is PyTorch's.
        dtype: type of the computation; the parameters are float32.
        rngs: source of the initial values.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int,
        strides: int = 1,
        *,
        padding: int | None = None,
        use_bias: bool = False,
        gain: float = 1.0,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        pad = kernel_size // 2 if padding is None else padding
        self.gain = gain
        bound = uniform_bound((kernel_size, kernel_size, in_features, out_features))
        super().__init__(
            in_features,
            out_features,
            (kernel_size, kernel_size),
            strides,
            padding=((pad, pad), (pad, pad)),
            use_bias=use_bias,
            dtype=dtype,
            kernel_init=_uniform(gain * bound),
            bias_init=_uniform(bound),
            conv_general_dilated=_convolve,
            rngs=rngs,
        )


class Linear(nnx.Linear):
    """`x @ kernel + bias` over the last axis.

    The kernel starts as U(+-gain / sqrt(in_features)), the bias as U(+-1 / sqrt(in_features)).

    Args:
        in_features: size of the input's last axis.
        out_features: size of the output's last axis.
        gain: of the initial kernel, above 0; 1 is PyTorch's.
        dtype: type of the computation; the parameters are float32.
        rngs: source of the initial values.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        gain: float = 1.0,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.gain = gain
        bound = uniform_bound((in_features, out_features))
        super().__init__(
            in_features,
            out_features,
            dtype=dtype,
            kernel_init=_uniform(gain * bound),
            bias_init=_uniform(bound),
            rngs=rngs,
        )


class BatchNorm(nnx.BatchNorm):
    """Batch normalisation that keeps PyTorch's running statistics. Starts in eval mode.

    Train mode, per channel over the batch and all pixels (n values, mean m, biased variance v):
    `y = (x - m) / sqrt(v + 1e-5) * scale + bias`, and the running statistics become
    `mean <- 0.9 mean + 0.1 m`, `var <- 0.9 var + 0.1 v n / (n - 1)`. Eval mode normalises with the
    running statistics and leaves them alone. `nnx.view(model, use_running_average=False)` is the
    model in train mode.

    Args:
        num_features: channels of the input.
        dtype: type of the result; parameters and statistics are float32.
        rngs: not drawn from (scale starts at 1, bias at 0), but asked for by nnx.
    """

    def __init__(self, num_features: int, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        super().__init__(
            num_features,
            use_running_average=True,
            momentum=0.9,
            epsilon=1e-5,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalised x, of x's shape [..., c]; train mode also updates the statistics."""
        if self.use_running_average:
            return super().__call__(x)
        before = self.var[...]
        y = super().__call__(x)
        # nnx has added 0.1 v; the unbiased v n / (n - 1) is v / (n - 1) more.
        values = x.size // x.shape[-1]
        added = self.var[...] - self.momentum * before
        self.var[...] = self.var[...] + added / max(values - 1, 1)
        return y


class Activation(nnx.Module):
    """An elementwise function as a module, so that surgery can swap it by type.

    Args:
        function: array -> array of the same shape.
    """

    def __init__(self, function: Callable[[jax.Array], jax.Array]):
        self.function = function

    def __call__(self, x: jax.Array) -> jax.Array:
        """`function(x)`."""
        return self.function(x)

    @classmethod
    def named(cls, name: str) -> "Activation":
        """The activation of that name.

        Args:
            name: relu, leaky_relu (0.01), gelu (exact), silu, softplus, tanh or linbp.

        Raises:
            ValueError: if the name is not known.
        """
        _checks.one_of("activation", name, ACTIVATIONS)
        return cls(ACTIVATIONS[name])


class _Pool(nnx.Module):
    """The window, strides and padding of a pooling layer, in pixels, alike in both directions.

    Args:
        window: height and width of the window.
        strides: step from window to window; default `window`.
        padding: pixels added on each side.
    """

    def __init__(self, window: int, strides: int | None = None, padding: int = 0):
        step = window if strides is None else strides
        self.window = (window, window)
        self.strides = (step, step)
        self.padding = ((padding, padding), (padding, padding))


class MaxPool(_Pool):
    """Largest value of each window; padding never wins."""

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        """The pooled maps."""
        return _ops.max_pool(x, self.window, self.strides, self.padding)


class FittingMaxPool(MaxPool):
    """Max-pool that leaves maps lower or narrower than its window as they are.

    So networks made for larger images work on small ones, where a plain pool would leave no pixel.
    """

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        """The pooled maps, or x itself."""
        fits = all(n >= size for n, size in zip(x.shape[1:3], self.window, strict=True))
        return super().__call__(x) if fits else x


class AvgPool(_Pool):
    """Sum of each window divided by the window's size; padding counts as zeros, as in PyTorch."""

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        """The pooled maps."""
        padding: Any = self.padding  # nnx declares a string, but documents pairs as well
        return nnx.avg_pool(x, self.window, strides=self.strides, padding=padding)


class GlobalAvgPool(nnx.Module):
    """Mean over all pixels, summed and returned in float32."""

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b c"]:
        """One vector for each image."""
        return x.mean(axis=(1, 2), dtype=jnp.float32)


class Flatten(nnx.Module):
    """All pixels and channels of an image in one axis.

    Args:
        channels_first: whether to run through channels, rows, columns, as PyTorch does, instead of
            rows, columns, channels; a dense layer that follows then has the rows of PyTorch's.
    """

    def __init__(self, channels_first: bool = False):
        self.channels_first = channels_first

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b d"]:
        """One vector for each image."""
        if self.channels_first:
            x = x.transpose(0, 3, 1, 2)
        return x.reshape(x.shape[0], -1)


class Identity(nnx.Module):
    """Returns its input; stands where a layer was taken out."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """x itself."""
        return x


class Normalize(nnx.Module):
    """`(x - mean) / std` per channel, with constants that are never trained.

    Args:
        mean: one number for each channel, on the [0, 1] pixel scale.
        std: one number above 0 for each channel, on the same scale.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        self.mean = tuple(float(value) for value in mean)
        self.std = tuple(float(value) for value in std)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """The normalised images."""
        # For every pixel: XLA's CPU backend is slow with patterns that repeat after 3 numbers.
        shape = x.shape[1:]
        mean = jnp.asarray(np.broadcast_to(np.asarray(self.mean, x.dtype), shape))[None]
        std = jnp.asarray(np.broadcast_to(np.asarray(self.std, x.dtype), shape))[None]
        return (x - mean) / std
