"""AlexNet after Krizhevsky, Sutskever and Hinton (2012), "ImageNet Classification with Deep
Convolutional Neural Networks", in the version of Krizhevsky (2014), "One weird trick for
parallelizing convolutional neural networks", arXiv 1404.5997, which is torchvision's.

There is no BatchNorm, as in the papers. There is no dropout either: it is off in the linear
sub-network and in eval mode, and networks here have no source of random numbers in training.
Initial values are He's: with PyTorch's, which torchvision's has, signals fade from layer to layer,
and small networks do not train against an adversary.
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
    Conv,
    FittingMaxPool,
    Flatten,
    Identity,
    Linear,
)

_CONVOLUTIONS = 5
_POOLED = (0, 1, 4)  # the convolutions that a max-pool follows


class AlexNet(Classifier):
    """Five convolutions with biases, max-pools after 1, 2 and 5, dense layers, head.

    It takes images of one size only, as its first dense layer sees every position. A max-pool whose
    window is higher or wider than its maps is left out, so that small images work.

    Args:
        num_classes: k, the number of logits.
        input_shape: (h, w, c) of the images; with the ImageNet stem of 7 pixels and more.
        widths: channels of the five convolutions.
        hidden: widths of the dense layers before the head, the last of which is d; () for none.
        stem: "cifar", a first convolution of 3x3 and stride 2, a second of 3x3 and 2x2 max-pools;
            or "imagenet", 11x11 and stride 4, 5x5, and 3x3 max-pools of stride 2.
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
        widths: Sequence[int] = (64, 192, 384, 256, 256),
        hidden: Sequence[int] = (4096, 4096),
        stem: str = "cifar",
        activation: str = "relu",
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if len(widths) != _CONVOLUTIONS:
            raise ValueError(f"`widths` must be {_CONVOLUTIONS} numbers, got {widths!r}")
        for name, numbers in (("widths", widths), ("hidden", hidden)):
            for number in numbers:
                _checks.at_least(name, number, 1)
        _checks.one_of("stem", stem, ("cifar", "imagenet"))
        cifar = stem == "cifar"
        height, width, channels = input_shape
        self.image_size = (height, width)
        # Kernel size, strides and padding.
        first, second = ((3, 2, 1), (3, 1, 1)) if cifar else ((11, 4, 2), (5, 1, 2))
        plan = (first, second, *[(3, 1, 1)] * (_CONVOLUTIONS - 2))
        self.convs, self.activations, self.pools = nnx.List(), nnx.List(), nnx.List()
        features = channels
        for number, (out_features, (size, strides, padding)) in enumerate(
            zip(widths, plan, strict=True)
        ):
            conv = Conv(
                features,
                out_features,
                size,
                strides,
                padding=padding,
                use_bias=True,
                gain=HE_GAIN,
                dtype=dtype,
                rngs=rngs,
            )
            self.convs.append(conv)
            self.activations.append(Activation.named(activation))
            pool = FittingMaxPool(2 if cifar else 3, 2)
            self.pools.append(pool if number in _POOLED else Identity())
            features = out_features
        # PyTorch's order, in which the rows of its first dense layer are.
        self.flatten = Flatten(channels_first=True)
        features = self._flat_features(input_shape)
        self.dense, self.dense_activations = nnx.List(), nnx.List()
        for out_features in hidden:
            self.dense.append(Linear(features, out_features, gain=HE_GAIN, dtype=dtype, rngs=rngs))
            self.dense_activations.append(Activation.named(activation))
            features = out_features
        super().__init__(
            features, num_classes, channels, mean=mean, std=std, dtype=dtype, rngs=rngs
        )

    def body(self, x: jax.Array) -> jax.Array:
        """[b, h, w, c] -> [b, d]."""
        if x.shape[1:3] != self.image_size:
            raise ValueError(f"`x` must be images of {self.image_size} pixels, got {x.shape[1:3]}")
        x = self._flat(x)
        for dense, activation in zip(self.dense, self.dense_activations, strict=True):
            x = activation(dense(x))
        return x

    def _flat(self, x: jax.Array) -> jax.Array:
        """What the convolutions leave of images, in one axis."""
        for conv, activation, pool in zip(self.convs, self.activations, self.pools, strict=True):
            x = pool(activation(conv(x)))
        return self.flatten(x)

    def _flat_features(self, input_shape: Sequence[int]) -> int:
        images = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
        features = jax.eval_shape(self._flat, images).shape[-1]
        if features == 0:
            raise ValueError(
                "`input_shape` must be images of at least 7 pixels in height and width, got "
                f"{self.image_size}"
            )
        return features
