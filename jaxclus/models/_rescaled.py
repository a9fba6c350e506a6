"""Layers that are 1-Lipschitz in the L2 norm for any value of their parameters.

A matrix P has the norm |P D| <= 1 for the diagonal D_i = (sum_j |P^T P|_ij)^(-1/2), as D^-2 - P^T P
is diagonally dominant: "almost-orthogonal layers", Prach and Lampert (2022), arXiv 2208.03160. The
same holds of P^T, that is of D P with D_i = (sum_j |P P^T|_ij)^(-1/2). That is in exact arithmetic:
with the kernels' float32 rounding the norm may be 1 + 1e-6. Nothing is iterated and there is no
state, so the bound holds at every step of training.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxclus.models import _ops
from jaxclus.models._layers import Conv, Linear

# Below these a kernel's largest entry (of any size) and a sum (of a kernel of largest entry 1) no
# longer divide: gradients stay finite, and a kernel that is smaller comes out smaller still.
_SMALLEST_ENTRY, _SMALLEST_SUM = 1e-6, 1e-12


def rescale(kernel: Float[Array, "kh kw i o"]) -> Float[Array, "kh kw i o"]:
    """The kernel with rescaled channels, so that its convolution has a norm of at most 1.

    The channels are those of the side that has fewer, here the input's:

        d_i = (sum_j sum_t |(P^T * P)_ij(t)|)^(-1/2),

    where P^T * P [2 kh - 1, 2 kw - 1, i, i] is the kernel's correlation with itself: the matrix
    P^T P of the convolution on an infinite grid, which zero padding and strides only cut rows and
    columns from. An orthogonal kernel stays what it is; the kernel's scale has no influence.

    Args:
        kernel: float32, of a convolution, or [1, 1, in, out] of a dense layer.

    Returns:
        The rescaled kernel. Zeros stay zeros, with a finite gradient.

    References:
        Prach, Lampert: Almost-Orthogonal Layers for Efficient General-Purpose Lipschitz Networks,
        2022, arXiv:2208.03160, for convolutions; on the output's side, the transpose's.
    """
    kh, kw, i, o = kernel.shape
    # The result does not depend on the scale, so neither does its derivative.
    largest = lax.stop_gradient(jnp.abs(kernel).max())
    kernel = kernel / jnp.maximum(largest, _SMALLEST_ENTRY)
    rows = kernel.transpose(2, 0, 1, 3) if i <= o else kernel.transpose(3, 0, 1, 2)
    if kh == kw == 1:
        rows = rows.reshape(len(rows), -1)
        sums = jnp.abs(jnp.matmul(rows, rows.T, precision="highest")).sum(1)
    else:
        products = lax.conv_general_dilated(
            rows, rows.transpose(1, 2, 3, 0), (1, 1), ((kh - 1, kh - 1), (kw - 1, kw - 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest",
        )  # fmt: skip
        sums = jnp.abs(products).sum((1, 2, 3))
    scale = lax.rsqrt(jnp.maximum(sums, _SMALLEST_SUM))
    return kernel * (scale[None, None, :, None] if i <= o else scale[None, None, None, :])


def near_isometry(draws: Float[Array, "kh kw i o"], noise: float) -> Float[Array, "kh kw i o"]:
    """An initial kernel: an orthogonal matrix at its centre, plus noise at every tap.

    Args:
        draws: uniform in [-1, 1].
        noise: root mean square of the noise's norm, against that of the matrix.

    Returns:
        The kernel. Without noise its convolution keeps norms where it has at least as many output
        as input channels.
    """
    kh, kw, i, o = draws.shape
    centre = draws[kh // 2, kw // 2]
    matrix = jnp.linalg.qr(centre if i >= o else centre.T)[0]
    kernel = draws * (noise * (3 / (kh * kw * max(i, o))) ** 0.5)
    return kernel.at[kh // 2, kw // 2].add(matrix if i >= o else matrix.T)


def same_convolution(
    x: Float[Array, "b h w i"], kernel: Float[Array, "kh kw i o"], dtype: DTypeLike
) -> Float[Array, "b h w o"]:
    """The convolution of stride 1, with zeros around the images so that they keep their size."""
    pads = [(size // 2, size // 2) for size in kernel.shape[:2]]
    return _ops.conv_general_dilated(
        x.astype(dtype), kernel.astype(dtype), (1, 1), pads,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip


def adjoint(kernel: Float[Array, "kh kw i o"]) -> Float[Array, "kh kw o i"]:
    """The kernel of the transposed `same_convolution`."""
    # Behind a barrier: what XLA folds into a convolution is slow in loops on CPUs, see `_ops`.
    return lax.optimization_barrier(kernel[::-1, ::-1].swapaxes(2, 3))


class RescaledConv(Conv):
    """Convolution of stride 1 with `rescale(kernel)`, zero-padded: |Bx - By|_2 <= |x - y|_2.

    Args:
        in_features: channels of the input.
        out_features: channels of the output.
        kernel_size: height and width of the kernel, an odd number of pixels.
        noise: of the initial kernel, see `near_isometry`.
        dtype: type of the computation; parameters and rescaling are in float32.
        rngs: source of the initial values.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int,
        *,
        noise: float = 0.0,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.noise = noise
        super().__init__(
            in_features, out_features, kernel_size, use_bias=True, dtype=dtype, rngs=rngs
        )

    def initial_kernel(self, draws: jax.Array) -> jax.Array:
        """The kernel to start with, from uniform draws in [-1, 1] of its shape."""
        return near_isometry(draws, self.noise)

    def rescaled_kernel(self) -> Float[Array, "kh kw i o"]:
        """The float32 kernel that the layer convolves with."""
        return rescale(jnp.asarray(self.kernel[...]))

    def convolve(self, x: jax.Array, kernel: jax.Array) -> Float[Array, "b h w o"]:
        """The convolution with `kernel`, the rescaled one, plus the bias."""
        assert self.bias is not None
        dtype: Any = self.dtype  # never None, which nnx allows for
        return same_convolution(x, kernel, dtype) + self.bias[...].astype(dtype)[None, None, None]

    def transpose(self, y: jax.Array, kernel: jax.Array) -> Float[Array, "b h w i"]:
        """The transposed convolution with `kernel`, the rescaled one, without a bias."""
        dtype: Any = self.dtype
        return same_convolution(y, adjoint(kernel), dtype)

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h w o"]:
        """The convolved maps."""
        return self.convolve(x, self.rescaled_kernel())


class RescaledLinear(Linear):
    """`x @ rescale(kernel) + bias` over the last axis: |Bx - By|_2 <= |x - y|_2.

    Arguments as for `Linear`; the kernel starts as an orthogonal matrix.
    """

    def initial_kernel(self, draws: jax.Array) -> jax.Array:
        """The kernel to start with, from uniform draws in [-1, 1] of its shape."""
        return near_isometry(draws[None, None], 0.0)[0, 0]

    def rescaled_kernel(self) -> Float[Array, "i o"]:
        """The float32 matrix that the layer multiplies with."""
        return rescale(jnp.asarray(self.kernel[...])[None, None])[0, 0]

    def __call__(self, x: Float[Array, "b i"]) -> Float[Array, "b o"]:
        """The vectors' images."""
        assert self.bias is not None
        y = x.astype(self.dtype) @ self.rescaled_kernel().astype(self.dtype)
        return y + self.bias[...].astype(y.dtype)[None]


class GroupSort(nnx.Module):
    """Sorts the pairs of channels (i, i + c / 2): the first half gets the larger of the two values.

    A permutation of each point's channels, so that it keeps norms, of signals and of gradients,
    where a ReLU takes a part of them away. With groups of two it is also called MaxMin.

    References:
        Anil, Lucas, Grosse: Sorting Out Lipschitz Function Approximation, 2018, arXiv:1811.05381.
    """

    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c"]:
        """The sorted channels; of an even number."""
        # Halves and not neighbours, as strided slices are slow.
        first, second = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([jnp.maximum(first, second), jnp.minimum(first, second)], axis=-1)


class SpaceToDepth(nnx.Module):
    """Every 2x2 pixels become one of four times as many channels; odd sizes get zeros at the end.

    It only moves values, so it keeps norms.
    """

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c4"]:
        """The maps of ceil(h / 2) x ceil(w / 2) pixels and 4 c channels."""
        b, h, w, c = x.shape
        x = jnp.pad(x, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)))
        rows, columns = x.shape[1] // 2, x.shape[2] // 2
        x = x.reshape(b, rows, 2, columns, 2, c).transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(b, rows, columns, 4 * c)
