"""Convolution and max-pooling with written-out gradients, fast inside compiled loops.

XLA's CPU backend runs the input gradient of a convolution 3 to 18 times slower inside a loop than
outside (jax-ml/jax#12868): it does not fold the reversed, transposed kernel into the convolution
there. Iterative attacks are such loops. Writing that kernel out, behind a barrier that keeps it a
plain array, gives the fast kernel inside loops too. Both functions keep forward mode, reverse
mode, `vmap` and second derivatives.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Pairs = tuple[tuple[int, int], ...]
_NHWC = ("NHWC", "HWIO", "NHWC")

# So many entries of a kernel for each output channel are summed one by one (by measurement).
_ENTRIES = 48


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    *,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: lax.ConvGeneralDilatedDimensionNumbers = None,
    feature_group_count: int = 1,
    precision: lax.PrecisionLike = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """`lax.conv_general_dilated` with a written-out input gradient.

    Args:
        lhs: images [b, h, w, i].
        rhs: kernel [kh, kw, i, o].
        window_strides: step of the window in rows and columns.
        padding: rows and columns of zeros around the image, or "SAME" or "VALID".

    The remaining arguments are lax's. Whatever is no plain two-dimensional NHWC convolution
    (other layouts, groups, dilation) goes to lax as it is.
    """
    plain = (
        lhs.ndim == 4
        and dimension_numbers is not None
        and lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
        == lax.conv_dimension_numbers(lhs.shape, rhs.shape, _NHWC)
        and feature_group_count == 1
        and all(d == 1 for d in (*(lhs_dilation or ()), *(rhs_dilation or ())))
        and preferred_element_type is None
    )
    if not plain:
        return lax.conv_general_dilated(
            lhs, rhs, window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers,
            feature_group_count, precision=precision,
            preferred_element_type=preferred_element_type,
        )  # fmt: skip
    strides = tuple(window_strides)
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], strides, padding)
    if rhs.shape[:2] == (1, 1) and not any(map(any, padding)):
        lhs, strides = lhs[:, :: strides[0], :: strides[1]], (1, 1)
    return _conv(lhs, rhs, strides, tuple(map(tuple, padding)), precision, True)


def _forward(x, kernel, strides, padding, precision, by_entries):
    """The convolution; `by_entries`: whether it may be a sum over the entries of the kernel."""
    height, width, i, o = kernel.shape
    sizes = [n + sum(pads) for n, pads in zip(x.shape[1:3], padding, strict=True)]
    some = sizes[0] >= height and sizes[1] >= width
    if jax.default_backend() == "cpu" and some:
        if by_entries and height * width * i <= _ENTRIES and o >= 8 and x.dtype == jnp.float32:
            return _sum_over_entries(x, kernel, strides, padding)
        # Eigen's convolutions fill vector registers with channels: few of them leave those empty.
        if o <= 4 or max(i, o) <= 16:
            return _in_column_blocks(x, kernel, strides, padding, precision)
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=_NHWC, precision=precision
    )


def _sum_over_entries(x, kernel, strides, padding):
    """The convolution as a sum of shifted images, each times one entry of the kernel.

    XLA's CPU backend makes one vectorised loop over pixels and channels of it, and of the bias and
    activation that follow, where a convolution copies every window first. A network that reads its
    first layer twice, as a residual one does, has the sum computed twice.
    """
    (height, width, channels, _), (sh, sw) = kernel.shape, strides
    x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *((*p, 0) for p in padding), (0, 0, 0)))
    rows, columns = (x.shape[1] - height) // sh * sh + 1, (x.shape[2] - width) // sw * sw + 1

    def entry(i, j, c):
        shifted = x[:, i : i + rows : sh, j : j + columns : sw, c : c + 1]
        return shifted * kernel[i, j, c][None, None, None]

    # A sum for each row of the kernel: in one long chain, every addition waits for the one before.
    total = functools.partial(functools.reduce, jnp.add)
    return total(
        [total([entry(i, j, c) for j, c in np.ndindex(width, channels)]) for i in range(height)]
    )


def _in_column_blocks(x, kernel, strides, padding, precision):
    """The convolution that computes several neighbouring columns of its output as channels.

    So that there are 8 or more input channels, neighbouring columns of the input become channels
    too, and the kernel [kh, kw, i, o] one [kh, groups, group * i, block * o], padded with zeros.
    On a CPU the first layer of a small net and its gradient take a third to two thirds of their
    time so (sizes by measurement).
    """
    (kh, kw, i, o), (sh, sw), (rows, (left, right)) = kernel.shape, strides, padding
    b, h, w, _ = x.shape
    width = (w + left + right - kw) // sw + 1
    block = min(width, 8, max(1, (32 if i <= 4 else 16) // o))
    group = min(
        (g for g in range(1, block * sw + 1) if block * sw % g == 0 and g * i >= 8),
        default=block * sw,
    )
    groups, count = -(-((block - 1) * sw + kw) // group), -(-width // block)
    place = np.zeros((groups * group, block, kw), np.float32)
    for column, tap in np.ndindex(block, kw):
        place[column * sw + tap, column, tap] = 1
    place = jnp.asarray(place, kernel.dtype)
    wide = jnp.einsum("xct,htio->hxico", place, kernel, precision="highest")
    wide = wide.reshape(kh, groups, group * i, block * o)
    # Padded here and not by the convolution, so that every window starts with a group.
    held = (count - 1) * block * sw + groups * group
    x = lax.pad(
        x, jnp.zeros((), x.dtype), ((0, 0, 0), (*rows, 0), (left, held - left - w, 0), (0, 0, 0))
    )
    x = x.reshape(b, x.shape[1], held // group, group * i)
    out = lax.conv_general_dilated(
        x, wide, (sh, block * sw // group), "VALID", dimension_numbers=_NHWC, precision=precision
    )
    return out.reshape(b, out.shape[1], count * block, o)[:, :, :width]


_conv = jax.custom_jvp(_forward, nondiff_argnums=(2, 3, 4, 5))


@_conv.defjvp
def _conv_jvp(strides, padding, precision, by_entries, primals, tangents):
    (x, kernel), (dx, dkernel) = primals, tangents
    out = _conv(x, kernel, strides, padding, precision, by_entries)
    # The tangent map in x is stated as the transpose of the written-out gradient, so that reverse
    # mode, which transposes it again, runs exactly that gradient.
    back = functools.partial(
        _input_gradient, kernel=kernel, size=x.shape[1:3], strides=strides, padding=padding,
        precision=precision,
    )  # fmt: skip
    (dout,) = jax.linear_transpose(back, out)(dx)
    # Transposed, a sum over entries would be as many passes over the images.
    return out, dout + _conv(x, dkernel, strides, padding, precision, False)


def _input_gradient(cotangent, kernel, size, strides, padding, precision):
    """Transpose of the convolution in its input: [b, h', w', o] -> [b, h, w, i].

    The gradient at pixel q * stride + phase - shift takes the cotangents at q + offset, each with
    one tap of the kernel. So one convolution of stride 1, with an output channel for each phase and
    input channel, gives it all. (Spacing the cotangent out with zeros, as the textbook has it,
    costs stride^2 times the multiplications.)
    """
    axes = [
        _taps(k, s, low) for k, s, (low, _) in zip(kernel.shape[:2], strides, padding, strict=True)
    ]
    (rows, _, top), (cols, _, left) = axes
    (sh, sw), (i, o) = strides, kernel.shape[2:]
    padded = jnp.pad(kernel, ((0, 1), (0, 1), (0, 0), (0, 0)))  # the last tap is the missing one
    taps = padded[rows[:, :, None, None], cols[None, None]]  # [offset, phase, offset, phase, i, o]
    taps = taps.transpose(0, 2, 5, 1, 3, 4).reshape(len(rows), len(cols), o, sh * sw * i)
    pads, count = [], []
    for (table, first, shift), n, m, s in zip(
        axes, size, cotangent.shape[1:3], strides, strict=True
    ):
        count.append(-(-(n + shift) // s))
        pads.append((-first, count[-1] - m + first + len(table) - 1))
    out = _forward(cotangent, lax.optimization_barrier(taps), (1, 1), tuple(pads), precision, False)
    out = out.reshape(-1, *count, sh, sw, i).transpose(0, 1, 3, 2, 4, 5)
    out = out.reshape(-1, count[0] * sh, count[1] * sw, i)
    return out[:, top : top + size[0], left : left + size[1]]


def _taps(window: int, stride: int, low: int) -> tuple[np.ndarray, int, int]:
    """Which tap of the kernel meets which cotangent, along one axis.

    Returns:
        The tap [offset, phase], `window` where there is none; the first offset; the shift of the
        pixels against the phases, the one with which the offsets are fewest.
    """
    tables = []
    for shift in range(stride):
        places = {
            ((phase - shift + low - tap) // stride, phase): tap
            for phase in range(stride)
            for tap in range(window)
            if (phase - shift + low - tap) % stride == 0
        }
        first, last = min(places)[0], max(places)[0]
        table = np.full((last - first + 1, stride), window)
        for (offset, phase), tap in places.items():
            table[offset - first, phase] = tap
        tables.append((table, first, shift))
    return min(tables, key=lambda entry: len(entry[0]))


def max_pool(
    x: jax.Array, window: tuple[int, int], strides: tuple[int, int], padding: Pairs
) -> jax.Array:
    """Largest value of each window; padding counts as minus infinity.

    The derivative shares equally between ties, where lax routes it to the first one.

    Args:
        x: floating-point images [b, h, w, c].
        window: rows and columns of a window.
        strides: step of the window in rows and columns.
        padding: rows and columns added around the image.
    """
    return _max_pool(x, tuple(window), tuple(strides), tuple(map(tuple, padding)))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _max_pool(x, window, strides, padding):
    return lax.reduce_window(
        x, -jnp.inf, lax.max, (1, *window, 1), (1, *strides, 1), ((0, 0), *padding, (0, 0))
    )


@_max_pool.defjvp
def _max_pool_jvp(window, strides, padding, primals, tangents):
    (x,), (dx,) = primals, tangents
    out: jax.Array = _max_pool(x, window, strides, padding)  # pyright: ignore[reportAssignmentType]
    cells = functools.partial(
        _window_cells, window=window, strides=strides, padding=padding, size=out.shape[1:3]
    )
    hits = [jnp.equal(cell, out).astype(x.dtype) for cell in cells(x, fill=-jnp.inf)]
    ties = functools.reduce(jnp.add, hits)
    dout = functools.reduce(jnp.add, [h * d for h, d in zip(hits, cells(dx, fill=0), strict=True)])
    return out, dout / ties


def _window_cells(x, fill, window, strides, padding, size) -> list[jax.Array]:
    """The images of the first, second, ... cell of every window: kh * kw arrays [b, h', w', c]."""
    x = lax.pad(x, jnp.array(fill, x.dtype), ((0, 0, 0), *((*p, 0) for p in padding), (0, 0, 0)))
    (rows, cols), (sr, sc) = size, strides
    return [
        x[:, i : i + (rows - 1) * sr + 1 : sr, j : j + (cols - 1) * sc + 1 : sc]
        for i in range(window[0])
        for j in range(window[1])
    ]
