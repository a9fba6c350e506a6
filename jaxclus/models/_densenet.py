"""Densely connected networks after Huang et al. (2016), "Densely Connected Convolutional Networks",
arXiv 1608.06993: DenseNet-BC, with bottlenecks of 4 growth channels and a compression of 0.5.

With the ImageNet stem, layers and parameters are torchvision's; with the CIFAR stem they are those
of the usual CIFAR DenseNet in PyTorch, but for the order in which maps are joined: the older ones
come first, as in the paper and in torchvision.
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
    AvgPool,
    BatchNorm,
    Conv,
    GlobalAvgPool,
    Identity,
    MaxPool,
)


class DenseLayer(nnx.Module):
    """Adds `growth` channels to its input: y = [x, conv3x3(f2(conv1x1(f1(x))))].

    f1 and f2 are BatchNorm and activation; the 1x1 convolution has 4 `growth` channels.

    Args:
        in_features: channels of the input.
        growth: number of channels added.
        activation: relu, leaky_relu, gelu, silu, softplus, tanh or linbp.
        dtype: type of the computation.
        rngs: source of the initial values.
    """

    def __init__(
        self, in_features: int, growth: int, *, activation: str, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        self.norm1 = BatchNorm(in_features, dtype=dtype, rngs=rngs)
        self.activation1 = Activation.named(activation)
        self.conv1 = Conv(in_features, 4 * growth, 1, dtype=dtype, rngs=rngs)
        self.norm2 = BatchNorm(4 * growth, dtype=dtype, rngs=rngs)
        self.activation2 = Activation.named(activation)
        self.conv2 = Conv(4 * growth, growth, 3, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, h, w, in_features] -> [b, h, w, in_features + growth]."""
        y = self.conv1(self.activation1(self.norm1(x)))
        y = self.conv2(self.activation2(self.norm2(y)))
        return jnp.concatenate([x, y], axis=-1)


class Transition(nnx.Module):
    """BatchNorm, activation, 1x1 convolution to half as many channels, 2x2 average pool.

    Args:
        in_features: channels of the input.
        activation: relu, leaky_relu, gelu, silu, softplus, tanh or linbp.
        dtype: type of the computation.
        rngs: source of the initial values.
    """

    def __init__(self, in_features: int, *, activation: str, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm = BatchNorm(in_features, dtype=dtype, rngs=rngs)
        self.activation = Activation.named(activation)
        self.conv = Conv(in_features, in_features // 2, 1, dtype=dtype, rngs=rngs)
        self.pool = AvgPool(2)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, h, w, in_features] -> [b, h // 2, w // 2, in_features // 2]."""
        return self.pool(self.conv(self.activation(self.norm(x))))


class DenseNet(Classifier):
    """Stem, stages of dense layers with transitions between, BatchNorm, activation, pool, head.

    Args:
        num_classes: k, the number of logits.
        input_shape: (h, w, c) of the images; other heights and widths work as well, from
            2 ** (stages - 1) pixels on, with the ImageNet stem from 4 times as many less 3.
        blocks: number of dense layers in each stage; a transition halves height and width between
            two stages.
        growth: channels that each dense layer adds; the stem has twice as many.
        stem: "cifar", a 3x3 convolution, or "imagenet", a 7x7 convolution of stride 2, BatchNorm,
            activation, and a 3x3 max-pool of stride 2.
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
        growth: int = 32,
        stem: str = "cifar",
        activation: str = "relu",
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        _checks.at_least("growth", growth, 1)
        _checks.one_of("stem", stem, ("cifar", "imagenet"))
        cifar = stem == "cifar"
        least = 2 ** (len(blocks) - 1)
        self.least_size = least if cifar else 4 * least - 3
        self._check_size("input_shape", input_shape[:2])
        *_, channels = input_shape
        features = 2 * growth
        self.conv = Conv(
            channels, features, 3 if cifar else 7, 1 if cifar else 2, dtype=dtype, rngs=rngs
        )
        # The first dense layer begins with BatchNorm and activation anyway; on CIFAR these suffice.
        self.norm = Identity() if cifar else BatchNorm(features, dtype=dtype, rngs=rngs)
        self.activation = Identity() if cifar else Activation.named(activation)
        self.stem_pool = Identity() if cifar else MaxPool(3, 2, 1)
        self.blocks, self.transitions = nnx.List(), nnx.List()
        self.counts = tuple(blocks)
        for stage, count in enumerate(blocks):
            if stage > 0:
                self.transitions.append(
                    Transition(features, activation=activation, dtype=dtype, rngs=rngs)
                )
                features //= 2
            for _ in range(count):
                self.blocks.append(
                    DenseLayer(features, growth, activation=activation, dtype=dtype, rngs=rngs)
                )
                features += growth
        self.last_norm = BatchNorm(features, dtype=dtype, rngs=rngs)
        self.last_activation = Activation.named(activation)
        self.pool = GlobalAvgPool()
        super().__init__(
            features, num_classes, channels, mean=mean, std=std, dtype=dtype, rngs=rngs
        )

    def body(self, x: jax.Array) -> jax.Array:
        """[b, h, w, c] -> [b, d]."""
        self._check_size("x", x.shape[1:3])
        x = self.stem_pool(self.activation(self.norm(self.conv(x))))
        layers = iter(self.blocks)
        for stage, count in enumerate(self.counts):
            if stage > 0:
                x = self.transitions[stage - 1](x)
            for _ in range(count):
                x = next(layers)(x)
        return self.pool(self.last_activation(self.last_norm(x)))

    def _check_size(self, name: str, size: Sequence[int]) -> None:
        """Raises where a transition would find a single pixel, and leave none."""
        if min(size) < self.least_size:
            raise ValueError(
                f"`{name}` must be images of at least {self.least_size} pixels in height and "
                f"width, got {tuple(size)}"
            )
