"""VGG networks after Simonyan and Zisserman (2014), "Very Deep Convolutional Networks for
Large-Scale Image Recognition", arXiv 1409.1556, with the BatchNorm of Ioffe and Szegedy (2015),
arXiv 1502.03167.

Layers and parameters are those of the usual CIFAR versions in PyTorch: one dense layer instead of
three, no dropout, and biases in the convolutions also where a BatchNorm follows.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxclus import _checks
from jaxclus.models._classifier import Classifier
from jaxclus.models._layers import (
    HE_GAIN,
    Activation,
    BatchNorm,
    Conv,
    FittingMaxPool,
    GlobalAvgPool,
    Identity,
)


class VGGBlock(nnx.Module):
    """3x3 convolution with bias, BatchNorm or none, activation; the last of a stage also pools.

    Args:
        in_features: channels of the input.
        out_features: channels of the output.
        pool: whether a 2x2 max-pool ends the block.
        batch_norm: whether a BatchNorm follows the convolution.
        activation: relu, leaky_relu, gelu, silu, softplus, tanh or linbp.
        dtype: type of the computation.
        rngs: source of the initial values.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        pool: bool,
        batch_norm: bool,
        activation: str,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        gain = 1.0 if batch_norm else HE_GAIN
        self.conv = Conv(
            in_features, out_features, 3, use_bias=True, gain=gain, dtype=dtype, rngs=rngs
        )
        self.norm = BatchNorm(out_features, dtype=dtype, rngs=rngs) if batch_norm else Identity()
        self.activation = Activation.named(activation)
        self.pool = FittingMaxPool(2) if pool else Identity()

    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, h, w, in_features] -> [b, h, w, out_features], pooled [b, h // 2, w // 2, ...]."""
        return self.pool(self.activation(self.norm(self.conv(x))))


class VGG(Classifier):
    """Stages of 3x3 convolutions, each ended by a 2x2 max-pool; global average pool, head.

    Images of 32x32 pixels leave one pixel after five stages, so that the average is that pixel, as
    in the usual network. On smaller ones, a stage whose maps are a single pixel high or wide is
    not pooled; on larger ones, the average is one.

    Args:
        num_classes: k, the number of logits.
        input_shape: (h, w, c) of the images; other heights and widths work as well.
        blocks: number of convolutions in each stage, each at least 1.
        width: channels of the first stage; each further one has twice as many, up to 8 `width`.
        batch_norm: whether a BatchNorm follows each convolution.
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
        batch_norm: bool = True,
        activation: str = "relu",
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        _checks.at_least("width", width, 1)
        channels = features = input_shape[-1]
        self.blocks = nnx.List()
        for stage, count in enumerate(blocks):
            _checks.at_least("blocks", count, 1)
            for number in range(count):
                out_features = width * min(2**stage, 8)
                self.blocks.append(
                    VGGBlock(
                        features,
                        out_features,
                        pool=number == count - 1,
                        batch_norm=batch_norm,
                        activation=activation,
                        dtype=dtype,
                        rngs=rngs,
                    )
                )
                features = out_features
        self.pool = GlobalAvgPool()
        super().__init__(
            features, num_classes, channels, mean=mean, std=std, dtype=dtype, rngs=rngs
        )

    def body(self, x: jax.Array) -> jax.Array:
        """[b, h, w, c] -> [b, d]."""
        for block in self.blocks:
            x = block(x)
        return self.pool(x)
