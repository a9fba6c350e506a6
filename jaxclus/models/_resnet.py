"""Residual networks after He et al. (2015), "Deep Residual Learning", arXiv 1512.03385.

With the ImageNet stem, layers and parameters are torchvision's (bottlenecks stride in their 3x3
convolution); with the CIFAR stem they are those of the usual CIFAR ResNets in PyTorch.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxclus import _checks
from jaxclus.models._classifier import Classifier
from jaxclus.models._layers import (
    Activation,
    BatchNorm,
    Conv,
    GlobalAvgPool,
    Identity,
    MaxPool,
)


class Shortcut(nnx.Module):
    """1x1 convolution and BatchNorm, where a block changes the shape of its input."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        strides: int,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.conv = Conv(in_features, out_features, 1, strides, dtype=dtype, rngs=rngs)
        self.norm = BatchNorm(out_features, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The input in the shape of the block's output."""
        return self.norm(self.conv(x))


class ResidualBlock(nnx.Module):
    """`activation(layers(x) + shortcut(x))`: convolutions with BatchNorms and activations between.

    A basic block has two 3x3 convolutions of `width` channels, the first with the stride. A
    bottleneck has 1x1, 3x3 (with the stride) and 1x1 convolutions, the last of 4 `width` channels.

    Args:
        in_features: channels of the input.
        width: channels of the inner convolutions.
        strides: 1, or 2 to halve height and width.
        bottleneck: which of the two kinds.
        activation: relu, leaky_relu, gelu, silu, softplus, tanh or linbp.
        dtype: type of the computation.
        rngs: source of the initial values.
    """

    def __init__(
        self,
        in_features: int,
        width: int,
        strides: int,
        *,
        bottleneck: bool,
        activation: str,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        if bottleneck:
            plan = [(width, 1, 1), (width, 3, strides), (4 * width, 1, 1)]
        else:
            plan = [(width, 3, strides), (width, 3, 1)]
        self.convs, self.norms, self.activations = nnx.List(), nnx.List(), nnx.List()
        features = in_features
        for out_features, kernel_size, stride in plan:
            self.convs.append(
                Conv(features, out_features, kernel_size, stride, dtype=dtype, rngs=rngs)
            )
            self.norms.append(BatchNorm(out_features, dtype=dtype, rngs=rngs))
            self.activations.append(Activation.named(activation))
            features = out_features
        self.out_features = features
        if strides == 1 and in_features == features:
            self.shortcut = Identity()
        else:
            self.shortcut = Shortcut(in_features, features, strides, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, h, w, in_features] -> [b, ceil(h / strides), ceil(w / strides), out_features]."""
        *inner, last = zip(self.convs, self.norms, self.activations, strict=True)
        y = x
        for conv, norm, activation in inner:
            y = activation(norm(conv(y)))
        conv, norm, activation = last
        return activation(norm(conv(y)) + self.shortcut(x))


class ResNet(Classifier):
    """Stem, stages of residual blocks, global average pool, head.

    Args:
        num_classes: k, the number of logits.
        input_shape: (h, w, c) of the images; other heights and widths work as well.
        blocks: number of blocks in each stage; every stage but the first halves height and width.
        width: channels of the first stage; each further one has twice as many.
        bottleneck: whether blocks are bottlenecks, whose output has 4 times as many channels.
        stem: "cifar", a 3x3 convolution, or "imagenet", a 7x7 convolution of stride 2 and a 3x3
            max-pool of stride 2.
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
        blocks: Sequence[int],
        width: int = 64,
        bottleneck: bool = False,
        stem: str = "cifar",
        activation: str = "relu",
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        _checks.at_least("width", width, 1)
        _checks.one_of("stem", stem, ("cifar", "imagenet"))
        channels = input_shape[-1]
        cifar = stem == "cifar"
        self.conv = Conv(
            channels, width, 3 if cifar else 7, 1 if cifar else 2, dtype=dtype, rngs=rngs
        )
        self.norm = BatchNorm(width, dtype=dtype, rngs=rngs)
        self.activation = Activation.named(activation)
        self.stem_pool = Identity() if cifar else MaxPool(3, 2, 1)
        self.blocks = nnx.List()
        features = width
        for stage, count in enumerate(blocks):
            for number in range(count):
                block = ResidualBlock(
                    features,
                    width * 2**stage,
                    2 if stage > 0 and number == 0 else 1,
                    bottleneck=bottleneck,
                    activation=activation,
                    dtype=dtype,
                    rngs=rngs,
                )
                self.blocks.append(block)
                features = block.out_features
        self.pool = GlobalAvgPool()
        super().__init__(
            features, num_classes, channels, mean=mean, std=std, dtype=dtype, rngs=rngs
        )

    def body(self, x: jax.Array) -> jax.Array:
        """[b, h, w, c] -> [b, d]."""
        x = self.stem_pool(self.activation(self.norm(self.conv(x))))
        for block in self.blocks:
            x = block(x)
        return self.pool(x)
