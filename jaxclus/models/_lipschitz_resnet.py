"""Residual networks whose features are 1-Lipschitz in the L2 norm, whatever their parameters."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxclus import _checks
from jaxclus.models._classifier import Classifier
from jaxclus.models._layers import Activation, Flatten
from jaxclus.models._rescaled import (
    GroupSort,
    RescaledConv,
    RescaledLinear,
    SpaceToDepth,
)


class ConvexPotentialBlock(nnx.Module):
    """`x - 2 B^T relu(B x + bias)`, where B is a 3x3 convolution with a rescaled kernel.

    Its derivative is I - 2 B^T S B with the activation's slopes S in [0, 1], hence, as |B| <= 1,
    symmetric with eigenvalues in [-1, 1]. They are near 1 in size where B is nearly orthogonal (the
    block reflects) and where it hardly sees a direction (the block is the identity), so that
    neither signals nor gradients fade with depth; a convex combination of shortcut and branch
    shrinks all that the two do not agree on.

    Args:
        features: channels of input and output.
        dtype: type of the computation; parameters and rescaling are in float32.
        rngs: source of the initial values.

    References:
        Meunier, Delattre, Araujo, Allauzen: A Dynamical System Perspective for Lipschitz Neural
        Networks, 2022, arXiv:2110.12690, which have |B| from power iteration. With rescaled
        kernels it is Araujo, Havens, Delattre, Allauzen, Hu: A Unified Algebraic Perspective on
        Lipschitz Neural Networks, 2023, arXiv:2303.03169, their residual layer with all
        q_i = 1, whose T^(-1) = T^(-1/2) T^(-1/2) goes half through the ReLU.
    """

    def __init__(self, features: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv = RescaledConv(features, features, 3, noise=0.3, dtype=dtype, rngs=rngs)
        self.activation = Activation.named("relu")

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """The maps, of x's shape."""
        kernel = self.conv.rescaled_kernel()
        hidden = self.activation(self.conv.convolve(x, kernel))
        return x - 2 * self.conv.transpose(hidden, kernel)


class Halving(nnx.Module):
    """Space to depth, a rescaled 1x1 convolution to half of the channels, GroupSort."""

    def __init__(self, features: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.rearrange = SpaceToDepth()
        self.conv = RescaledConv(4 * features, 2 * features, 1, dtype=dtype, rngs=rngs)
        self.activation = GroupSort()

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        """[b, h, w, features] -> [b, ceil(h / 2), ceil(w / 2), 2 features]."""
        return self.activation(self.conv(self.rearrange(x)))


class LipschitzResNet(Classifier):
    """A residual network with |features(x) - features(y)|_2 <= |x - y|_2 / min(std).

    Rescaled 3x3 convolution and GroupSort; stages of convex potential blocks, each after the first
    halving height and width by a norm-keeping rearrangement; rescaled dense layer and GroupSort;
    head. Every layer before the head is 1-Lipschitz in the L2 norm by construction, whatever the
    parameters, so the bound needs no estimate, at no time of training; float32 rounding adds
    less than 1e-5 of it (bfloat16 up to a few percent). Kernels start close to isometries.

    A dense layer ends it, and no average over the pixels, which would divide a change of few pixels
    by the root of their number. So it takes images of one size only. The head is an ordinary dense
    layer: its own norm enters margins of logits, not distances of embeddings. With `embedding_size`
    (see `jc.models.create`) a rescaled dense layer without GroupSort follows, and the bound holds.

    Args:
        num_classes: k, the number of logits.
        input_shape: (h, w, c) of the images.
        blocks: number of blocks in each stage; every stage but the first halves height and width
            (rounded up). A block has two convolutions, with one kernel.
        width: channels of the first stage, an even number; each further one has twice as many.
        hidden: d, the size of the features, an even number; default the last stage's channels.
        mean: subtracted per channel, or None for 0.
        std: divided by per channel, or None for 1.
        dtype: type of the computation.
        rngs: source of the initial values.

    Raises:
        ValueError: if `width` or `hidden` is odd or below 2; in the call, if the images have
            another size.
    """

    EMBEDDING = RescaledLinear

    def __init__(
        self,
        num_classes: int,
        input_shape: Sequence[int],
        *,
        blocks: Sequence[int],
        width: int = 64,
        hidden: int | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        height, breadth, channels = input_shape
        last = width * 2 ** (len(blocks) - 1)
        features = last if hidden is None else hidden
        for name, size in (("width", width), ("hidden", features)):
            _checks.at_least(name, size, 2)
            if size % 2:
                raise ValueError(f"`{name}` must be even, as GroupSort takes pairs, got {size}")
        self.image_size = (height, breadth)
        self.conv = RescaledConv(channels, width, 3, noise=1.0, dtype=dtype, rngs=rngs)
        self.activation = GroupSort()
        self.blocks = nnx.List()
        for stage, count in enumerate(blocks):
            if stage > 0:
                self.blocks.append(Halving(width * 2 ** (stage - 1), dtype=dtype, rngs=rngs))
            for _ in range(count):
                self.blocks.append(ConvexPotentialBlock(width * 2**stage, dtype=dtype, rngs=rngs))
        positions = math.prod(math.ceil(n / 2 ** (len(blocks) - 1)) for n in self.image_size)
        self.flatten = Flatten()
        self.dense = RescaledLinear(positions * last, features, dtype=dtype, rngs=rngs)
        self.dense_activation = GroupSort()
        super().__init__(
            features, num_classes, channels, mean=mean, std=std, dtype=dtype, rngs=rngs
        )

    def body(self, x: jax.Array) -> jax.Array:
        """[b, h, w, c] -> [b, hidden]."""
        if x.shape[1:3] != self.image_size:
            raise ValueError(f"`x` must be images of {self.image_size} pixels, got {x.shape[1:3]}")
        x = self.activation(self.conv(x))
        for block in self.blocks:
            x = block(x)
        return self.dense_activation(self.dense(self.flatten(x)))
