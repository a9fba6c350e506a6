"""The written-out convolution and pooling gradients against lax's own."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxclus.models import _ops

NHWC = ("NHWC", "HWIO", "NHWC")
CASES = [
    # size, window, strides, padding, channels
    ((8, 8), (3, 3), (1, 1), ((1, 1), (1, 1)), (3, 8)),  # summed over the kernel's entries
    ((9, 7), (3, 3), (2, 2), ((1, 1), (1, 1)), (1, 9)),
    ((8, 8), (3, 3), (2, 2), ((1, 1), (1, 1)), (3, 4)),  # in blocks of columns
    ((11, 10), (5, 3), (3, 2), ((0, 2), (1, 0)), (3, 4)),
    ((9, 9), (7, 7), (2, 2), ((3, 3), (3, 3)), (2, 20)),  # as it is
    ((8, 6), (1, 1), (2, 2), ((0, 0), (0, 0)), (3, 4)),
    ((6, 5), (3, 3), (1, 2), "SAME", (3, 4)),
    ((6, 5), (3, 3), (2, 2), "VALID", (3, 4)),
    ((5, 5), (5, 5), (1, 1), ((0, 0), (0, 0)), (3, 4)),
    ((8, 8), (2, 2), (3, 3), ((0, 0), (0, 0)), (3, 4)),
    ((8, 8), (3, 3), (1, 1), ((1, 1), (1, 1)), (3, 4)),
    ((9, 7), (3, 3), (2, 2), ((1, 1), (1, 1)), (3, 4)),
    ((9, 9), (7, 7), (2, 2), ((3, 3), (3, 3)), (3, 4)),
]


def random(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("size, window, strides, padding, channels", CASES)
def test_convolution_has_the_derivatives_of_lax(size, window, strides, padding, channels):
    x, kernel = random(0, 2, *size, channels[0]), random(1, *window, *channels)
    dx, dkernel = random(2, *x.shape), random(3, *kernel.shape)

    def derivatives(conv):
        def f(x, kernel):
            return conv(x, kernel, strides, padding, dimension_numbers=NHWC)

        def loss(x, kernel):
            return jnp.sum(jnp.sin(f(x, kernel)))

        def penalty(x, kernel):  # second order: the input gradient's own gradient
            return jnp.sum(jax.grad(loss)(x, kernel) ** 2)

        return {
            "value": f(x, kernel),
            "jvp": jax.jvp(f, (x, kernel), (dx, dkernel))[1],
            "gradient": jax.grad(loss, (0, 1))(x, kernel),
            "second order": jax.grad(penalty, (0, 1))(x, kernel),
            "vmap over images": jax.vmap(lambda x: f(x[None], kernel))(x),
            "vmap over kernels": jax.vmap(jax.grad(loss), (None, 0))(x, jnp.stack([kernel] * 2)),
            "in a loop": lax.fori_loop(0, 2, lambda _, x: x + 0.1 * jax.grad(loss)(x, kernel), x),
        }

    ours = jax.jit(lambda: derivatives(_ops.conv_general_dilated))()
    theirs = jax.jit(lambda: derivatives(lax.conv_general_dilated))()
    for name in theirs:
        for a, b in zip(jax.tree.leaves(ours[name]), jax.tree.leaves(theirs[name]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5 * jnp.abs(b).max(), err_msg=name)


@pytest.mark.parametrize("channels", [(1, 16), (8, 8), (16, 2), (16, 16), (64, 3), (3, 64)])
@pytest.mark.parametrize(
    "window, strides, padding",
    [((4, 4), (2, 2), ((1, 1), (1, 1))), ((3, 5), (1, 3), ((0, 2), (-1, 2)))],
)
def test_convolution_with_few_and_many_channels(channels, window, strides, padding):
    """Few of them are summed over entries or computed as blocks of columns, many as they are."""
    x, kernel = random(0, 2, 9, 19, channels[0]), random(1, *window, *channels)

    def both(conv):
        def loss(x):
            out = conv(x, kernel, strides, padding, dimension_numbers=NHWC)
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(x)

    (_, out), gradient = both(_ops.conv_general_dilated)
    (_, expected), expected_gradient = both(lax.conv_general_dilated)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-4)


def test_convolution_without_output():
    for width in (1, 2, 3):
        x, kernel = random(0, 2, 4, width, 3), random(1, 3, 4, 3, 4)
        out = _ops.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=NHWC)
        assert out.shape == (2, 2, 0, 4)


def test_convolution_in_bfloat16():
    x, kernel = (jnp.bfloat16(a) for a in (random(0, 2, 6, 9, 3), random(1, 3, 3, 3, 4)))
    arguments = dict(window_strides=(2, 2), padding="SAME", dimension_numbers=NHWC)
    out = _ops.conv_general_dilated(x, kernel, **arguments)
    assert out.dtype == jnp.bfloat16
    expected = lax.conv_general_dilated(x, kernel, **arguments)
    np.testing.assert_allclose(np.float32(out), np.float32(expected), rtol=2e-2, atol=5e-2)


def test_convolution_hands_other_forms_to_lax():
    x, kernel = random(0, 2, 8, 8, 4), random(1, 3, 3, 2, 4)
    arguments = dict(
        window_strides=(1, 1), padding="SAME", dimension_numbers=NHWC, feature_group_count=2
    )
    np.testing.assert_array_equal(
        _ops.conv_general_dilated(x, kernel, **arguments),
        lax.conv_general_dilated(x, kernel, **arguments),
    )


POOLS = [
    ((8, 8), (2, 2), (2, 2), ((0, 0), (0, 0))),
    ((9, 7), (3, 3), (2, 2), ((1, 1), (1, 1))),
    ((7, 7), (2, 2), (2, 2), ((0, 0), (0, 0))),
    ((5, 6), (3, 2), (1, 1), ((0, 1), (1, 0))),
]


@pytest.mark.parametrize("size, window, strides, padding", POOLS)
def test_max_pool_has_the_derivatives_of_lax(size, window, strides, padding):
    x, dx = random(0, 2, *size, 3), random(1, 2, *size, 3)

    def plain(x):
        return lax.reduce_window(
            x, -jnp.inf, lax.max, (1, *window, 1), (1, *strides, 1), ((0, 0), *padding, (0, 0))
        )

    def ours(x):
        return _ops.max_pool(x, window, strides, padding)

    def loss(pool):
        return lambda x: jnp.sum(jnp.sin(pool(x)))

    np.testing.assert_array_equal(ours(x), plain(x))
    np.testing.assert_allclose(
        jax.jit(jax.grad(loss(ours)))(x), jax.jit(jax.grad(loss(plain)))(x), atol=1e-6
    )
    tangent, transposed = jax.jvp(ours, (x,), (dx,))[1], jax.vjp(ours, x)[1](ours(x))[0]
    np.testing.assert_allclose(jnp.vdot(tangent, ours(x)), jnp.vdot(dx, transposed), rtol=1e-5)
    np.testing.assert_allclose(
        jax.vmap(jax.grad(loss(ours)))(x[:, None])[:, 0], jax.grad(loss(ours))(x), atol=1e-6
    )


def test_max_pool_shares_the_gradient_between_ties():
    x = jnp.array([[3.0, 3.0], [1.0, 3.0]]).reshape(1, 2, 2, 1)
    gradient = jax.grad(lambda x: _ops.max_pool(x, (2, 2), (2, 2), ((0, 0), (0, 0))).sum())(x)
    np.testing.assert_allclose(gradient[0, ..., 0], [[1 / 3, 1 / 3], [0, 1 / 3]], rtol=1e-6)


@pytest.mark.parametrize("rows, cols", list(itertools.product((4, 5), (4, 5))))
def test_max_pool_never_routes_gradient_into_padding(rows, cols):
    x = -jnp.ones((1, rows, cols, 1))
    out, pullback = jax.vjp(lambda x: _ops.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1))), x)
    np.testing.assert_allclose(pullback(jnp.ones_like(out))[0].sum(), out.size, rtol=1e-6)
