import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxclus.clustering import correlation, filter_correlation


def cosines(rows):
    rows = np.asarray(rows, np.float64)
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return rows @ rows.T


@pytest.fixture
def weights():
    return np.random.default_rng(0).standard_normal((4, 3, 3, 2)).astype(np.float32)


def test_rows_at_known_angles():
    W = np.array([[2.0, 0.0], [0.0, 5.0], [-3.0, 0.0], [1.0, 1.0]], np.float32)
    r = np.sqrt(0.5)
    expected = [[1, 0, -1, r], [0, 1, 0, r], [-1, 0, 1, -r], [r, r, -r, 1]]
    np.testing.assert_allclose(correlation(W), expected, atol=2e-7)


def test_orthogonal_rows_give_the_identity():
    np.testing.assert_array_equal(correlation(7 * np.eye(5, 9, dtype=np.float32)), np.eye(5))


def test_equals_numpy_in_float64(weights):
    C = correlation(weights)
    assert C.dtype == jnp.float32
    np.testing.assert_allclose(C, cosines(weights.reshape(4, -1)), atol=5e-7)
    np.testing.assert_allclose(correlation(weights.astype(np.float64)), C, rtol=0)


def test_long_rows_lose_no_accuracy():
    rows = np.random.default_rng(1).standard_normal((3, 150_528)).astype(np.float32) + 1
    C = correlation(rows)
    np.testing.assert_allclose(C, cosines(rows), atol=1e-6)
    np.testing.assert_allclose(np.diagonal(C), 1, atol=3e-7)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_of_rows_does_not_matter(weights, scale):
    scales = np.array([1, scale, 1, 1 / scale], np.float32).reshape(4, 1, 1, 1)
    np.testing.assert_allclose(correlation(weights * scales), correlation(weights), atol=1e-6)


def test_one_class(weights):
    np.testing.assert_allclose(correlation(weights[:1]), [[1]], atol=2e-7)


def test_jit_vmap_and_grad_agree(weights):
    batch = jnp.stack([weights, 2 * weights[::-1], weights**2])
    single = jnp.stack([correlation(w) for w in batch])
    np.testing.assert_allclose(jax.vmap(correlation)(batch), single, atol=2e-7)
    np.testing.assert_allclose(jax.jit(correlation)(weights), correlation(weights), atol=2e-7)
    check_grads(correlation, (jnp.asarray(weights),), order=1, modes=("fwd", "rev"), rtol=2e-2)


def test_gradient_in_closed_form(weights):
    # d cos(a, b) / da = (b/|b| - cos(a, b) a/|a|) / |a|
    rows = weights.reshape(4, -1).astype(np.float64)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    expected = np.zeros_like(rows)
    for i, j in ((0, 2), (2, 0)):
        expected[i] = unit[j] - (unit[i] @ unit[j]) * unit[i]
        expected[i] /= np.linalg.norm(rows[i])
    gradient = jax.grad(lambda w: correlation(w)[0, 2])(jnp.asarray(weights))
    np.testing.assert_allclose(gradient.reshape(4, -1), expected, atol=1e-6)


def test_zero_row_raises_on_the_host_and_gives_nan_under_tracing(weights):
    weights[2] = 0
    with pytest.raises(ValueError, match="`weights` must not be zero .* class 2 is"):
        correlation(weights)
    nan = np.isnan(jax.jit(correlation)(weights))
    expected = np.zeros((4, 4), bool)
    expected[2], expected[:, 2] = True, True
    np.testing.assert_array_equal(nan, expected)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (np.ones((3, 2), np.int32), TypeError, "`weights` must be floating point, got dtype int32"),
        (np.ones(3, np.float32), ValueError, r"\[k, ...\], got \(3,\)"),
        (np.ones((3, 0), np.float32), ValueError, r"must not be empty, got the shape \(3, 0\)"),
        (np.float32([[1, 2], [3, np.inf]]), ValueError, "class 1 holds NaN or infinity"),
        (np.float32([[np.nan, 2], [3, 1]]), ValueError, "class 0 holds NaN or infinity"),
        (np.float32([[1, 1], [1e-39, 0]]), ValueError, "class 1 is"),
    ],
)
def test_bad_weights(bad, error, message):
    with pytest.raises(error, match=message):
        correlation(bad)


def test_filters_of_a_convolution_as_rows_of_the_torch_layout():
    kernel = np.random.default_rng(2).standard_normal((3, 3, 2, 4)).astype(np.float32)
    rows = kernel.transpose(3, 2, 0, 1).reshape(4, -1)  # OIHW, as the published code reshapes
    expected = np.abs(cosines(rows) - np.eye(4))
    np.testing.assert_allclose(filter_correlation(kernel), expected, atol=5e-7)
    np.testing.assert_allclose(jax.jit(filter_correlation)(kernel), expected, atol=5e-7)


def test_filters_of_a_dense_layer():
    kernel = np.float32([[3, 0, -1], [0, 2, 0]])  # the columns are the filters
    expected = [[0, 0, 1], [0, 0, 0], [1, 0, 0]]
    np.testing.assert_array_equal(filter_correlation(kernel), expected)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (np.ones((2, 3), np.int32), TypeError, "`kernel` must be floating point"),
        (
            np.ones((3, 2, 4), np.float32),
            ValueError,
            r"\[h, w, i, o\] or \[i, o\], got \(3, 2, 4\)",
        ),
        (np.float32([[1, 0], [2, 0]]), ValueError, "whole filter, but filter 1 is"),
        (np.float32([[1, np.nan], [2, 0]]), ValueError, "filter 1 holds NaN"),
        (np.ones((3, 0), np.float32), ValueError, "`kernel` must not be empty"),
    ],
)
def test_bad_kernels(bad, error, message):
    with pytest.raises(error, match=message):
        filter_correlation(bad)
