"""Residual networks with activations before convolutions, and wide ones.

He et al. (2016), "Identity Mappings in Deep Residual Networks", arXiv 1603.05027; Zagoruyko and
Komodakis (2016), "Wide Residual Networks", arXiv 1605.07146 (without dropout). Layers and
parameters are those of the usual CIFAR versions in PyTorch.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxclus import _checks
from jaxclus.models._classifier import Classifier
from jaxclus.models._layers import Activation, BatchNorm, Conv, GlobalAvgPool, Identity


class PreActBlock(nnx.Module):
    """Two times BatchNorm, activation, 3x3 convolution; the sum with the shortcut ends it.

    The shortcut is the input itself, or a convolution where the block changes the shape.

    Args:
        in_features: channels of the input.
        out_features: channels of the output.
        strides: 1, or 2 to halve height and width.
        shortcut_input: what a shortcut's convolution sees, "activated" or "raw".
        shortcut_size: its height and width, in pixels.
        stride_padding: where 3x3 convolutions of stride 2 have their zeros, "both" or "after".
        activation: relu, leaky_relu, gelu, silu, softplus, tanh or linbp.
        dtype: type of the computation.
        rngs: source of the initial values.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        strides: int,
        *,
        shortcut_input: str,
        shortcut_size: int,
        stride_padding: str,
        activation: str,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        def entry(size: int) -> Conv:
            conv = Conv(in_features, out_features, size, strides, dtype=dtype, rngs=rngs)
            if stride_padding == "after" and strides == 2 and size == 3:
                conv.padding = ((0, 1), (0, 1))
            return conv

        self.norm1 = BatchNorm(in_features, dtype=dtype, rngs=rngs)
        self.activation1 = Activation.named(activation)
        self.conv1 = entry(3)
        self.norm2 = BatchNorm(out_features, dtype=dtype, rngs=rngs)
        self.activation2 = Activation.named(activation)
        self.conv2 = Conv(out_features, out_features, 3, dtype=dtype, rngs=rngs)
        projects = strides != 1 or in_features != out_features
        self.shortcut = entry(shortcut_size) if projects else Identity()
        self.activates_shortcut = projects and shortcut_input == "activated"

    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, h, w, in_features] -> [b, ceil(h / strides), ceil(w / strides), out_features]."""
        activated = self.activation1(self.norm1(x))
        y = self.conv2(self.activation2(self.norm2(self.conv1(activated))))
        return y + self.shortcut(activated if self.activates_shortcut else x)


class PreActResNet(Classifier):
    """3x3 convolution, stages of pre-activation blocks, global average pool, head.

    Args:
        num_classes: k, the number of logits.
        input_shape: (h, w, c) of the images; other heights and widths work as well.
        blocks: number of blocks in each stage; every stage but the first halves height and width.
        width: channels of the first stage; each further one has twice as many.
        stem_width: channels of the first convolution; default `width`.
        final_norm: whether BatchNorm and activation follow the last block, as in the papers. The
            usual PyTorch PreActResNet-18 leaves them out; its features may then be negative.
        shortcut_input: what the shortcuts' convolutions see: the block's input after BatchNorm and
            activation ("activated", as in the papers) or as it is ("raw").
        shortcut_size: height and width of the shortcuts' convolutions, 1 or 3 pixels.
        stride_padding: where 3x3 convolutions of stride 2 have their zeros: on all sides ("both"),
            or below and on the right only ("after", as DeepMind's networks, whose heights and
            widths must halve evenly).
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
        stem_width: int | None = None,
        final_norm: bool = False,
        shortcut_input: str = "activated",
        shortcut_size: int = 1,
        stride_padding: str = "both",
        activation: str = "relu",
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        channels = input_shape[-1]
        features = width if stem_width is None else stem_width
        _checks.at_least("width", width, 1)
        _checks.at_least("stem_width", features, 1)
        _checks.one_of("shortcut_input", shortcut_input, ("activated", "raw"))
        if shortcut_size not in (1, 3):
            raise ValueError(f"`shortcut_size` must be 1 or 3, got {shortcut_size!r}")
        _checks.one_of("stride_padding", stride_padding, ("both", "after"))
        self.conv = Conv(channels, features, 3, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List()
        for stage, count in enumerate(blocks):
            for number in range(count):
                out_features = width * 2**stage
                strides = 2 if stage > 0 and number == 0 else 1
                self.blocks.append(
                    PreActBlock(
                        features,
                        out_features,
                        strides,
                        shortcut_input=shortcut_input,
                        shortcut_size=shortcut_size,
                        stride_padding=stride_padding,
                        activation=activation,
                        dtype=dtype,
                        rngs=rngs,
                    )
                )
                features = out_features
        self.norm = BatchNorm(features, dtype=dtype, rngs=rngs) if final_norm else Identity()
        self.activation = Activation.named(activation) if final_norm else Identity()
        self.pool = GlobalAvgPool()
        super().__init__(
            features, num_classes, channels, mean=mean, std=std, dtype=dtype, rngs=rngs
        )

    def body(self, x: jax.Array) -> jax.Array:
        """[b, h, w, c] -> [b, d]."""
        x = self.conv(x)
        for block in self.blocks:
            x = block(x)
        return self.pool(self.activation(self.norm(x)))
