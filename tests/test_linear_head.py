"""Certificates of dense heads against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxclus import _linear_head


@pytest.fixture(scope="module")
def problem():
    """A head with a bias, embeddings, and the margins z_y - z_c [n, k, d], [n, k] in float64."""
    rng = np.random.default_rng(0)
    kernel, bias = (rng.normal(size=shape).astype(np.float32) for shape in ((7, 5), (5,)))
    head = jnp.asarray(kernel), jnp.asarray(bias)
    h = rng.normal(size=(200, 7)).astype(np.float32)
    kernel, bias = kernel.astype(np.float64), bias.astype(np.float64)
    y = (h @ kernel + bias).argmax(axis=1)
    apart = kernel.T[y][:, None] - kernel.T[None]
    return head, h, y, apart, bias[y][:, None] - bias[None]


def least(values, y):
    """The least over the classes other than y."""
    return np.where(np.arange(values.shape[1])[None] == y[:, None], np.inf, values).min(axis=1)


def test_radii(problem):
    head, h, y, apart, bias = problem
    lengths = np.linalg.norm(apart, axis=2)
    lengths[lengths == 0] = 1
    wanted = least(((apart @ h[:, :, None].astype(float))[..., 0] + bias) / lengths, y) / 2.5
    found = jax.jit(_linear_head.radius)(*head, h, y, 2.5)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    assert (found <= wanted).all() and (found > 0).mean() > 0.9


def test_margins(problem):
    head, h, y, apart, bias = problem
    rng = np.random.default_rng(1)
    low = h - 0.3 * rng.uniform(size=h.shape).astype(np.float32)
    high = h + 0.2 * rng.uniform(size=h.shape).astype(np.float32)
    ends = (apart * end[:, None].astype(float) for end in (low, high))
    wanted = least(np.minimum(*ends).sum(axis=2) + bias, y)
    assert 0.1 < (wanted > 0).mean() < 0.9
    found = jax.jit(_linear_head.margin)(*head, h, y, low, high)
    np.testing.assert_allclose(found, wanted, atol=2e-4)
    assert (found <= wanted).all()
