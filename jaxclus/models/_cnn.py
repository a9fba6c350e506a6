"""A small convolutional network for small grey or colour images."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxclus import _checks
from jaxclus.models._classifier import Classifier
from jaxclus.models._layers import Activation, BatchNorm, Conv, Flatten, Identity, Linear


class ConvBlock(nnx.Module):
    """3x3 convolution of stride 2, BatchNorm (or a bias instead), activation."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        batch_norm: bool,
        activation: str,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.conv = Conv(
            in_features, out_features, 3, 2, use_bias=not batch_norm, dtype=dtype, rngs=rngs
        )
        self.norm = BatchNorm(out_features, dtype=dtype, rngs=rngs) if batch_norm else Identity()
        self.activation = Activation.named(activation)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, h, w, in_features] -> [b, ceil(h / 2), ceil(w / 2), out_features]."""
        return self.activation(self.norm(self.conv(x)))


class CNN(Classifier):
    """Stride-2 convolutions, one dense layer, head; 89,946 parameters for 32x32x3 and 10 classes.

    Unlike the ResNets it takes images of one size only, as its dense layer sees every position.

    Args:
        num_classes: k, the number of logits.
        input_shape: (h, w, c) of the images.
        widths: channels of the convolutions, each of which halves height and width (rounded up);
            () leaves a perceptron with one hidden layer.
        hidden: d, the width of the dense layer.
        batch_norm: whether a BatchNorm follows each convolution; without, convolutions have a bias.
        activation: relu, leaky_relu, gelu, silu, softplus, tanh or linbp.
        mean: subtracted per channel, or None for 0.
        std: divided by per channel, or None for 1.
        dtype: type of the computation.
        rngs: source of the initial values.
    """

    def __init__(
        self,
        num_classes: int,
        input_shape: Sequence[int],
        *,
        widths: Sequence[int] = (16, 32, 64),
        hidden: int = 64,
        batch_norm: bool = True,
        activation: str = "relu",
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        for number in widths:
            _checks.at_least("widths", number, 1)
        _checks.at_least("hidden", hidden, 1)
        height, width, channels = input_shape
        self.image_size = (height, width)
        self.blocks = nnx.List()
        for before, after in zip((channels, *widths), widths, strict=False):
            self.blocks.append(
                ConvBlock(
                    before,
                    after,
                    batch_norm=batch_norm,
                    activation=activation,
                    dtype=dtype,
                    rngs=rngs,
                )
            )
        positions = math.prod(math.ceil(n / 2 ** len(widths)) for n in self.image_size)
        self.flatten = Flatten()
        last = widths[-1] if widths else channels
        self.dense = Linear(positions * last, hidden, dtype=dtype, rngs=rngs)
        self.activation = Activation.named(activation)
        super().__init__(hidden, num_classes, channels, mean=mean, std=std, dtype=dtype, rngs=rngs)

    def body(self, x: jax.Array) -> jax.Array:
        """[b, h, w, c] -> [b, hidden]."""
        if x.shape[1:3] != self.image_size:
            raise ValueError(f"`x` must be images of {self.image_size} pixels, got {x.shape[1:3]}")
        for block in self.blocks:
            x = block(x)
        return self.activation(self.dense(self.flatten(x)))
