"""Losses against NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxclus import losses

NAMES = sorted(losses.LOSSES)


def reference(name, logits, labels):
    z = np.float64(logits)
    rows = np.arange(len(z))
    own = z[rows, labels]
    if name == "margin":
        others = z.copy()
        others[rows, labels] = -np.inf
        return others.max(axis=1) - own
    shift = z.max(axis=1, keepdims=True)
    return np.log(np.exp(z - shift).sum(axis=1)) + shift[:, 0] - own


def batch(seed=0, b=50, k=7, size=3.0):
    rng = np.random.default_rng(seed)
    logits = (size * rng.normal(size=(b, k))).astype(np.float32)
    return jnp.asarray(logits), jnp.asarray(rng.integers(k, size=b), jnp.int32)


def test_by_hand():
    logits, labels = jnp.array([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0]]), jnp.array([1, 0])
    np.testing.assert_array_equal(losses.margin(logits, labels), [-1, 2])
    total = np.log(np.exp([1, 2, 3]).sum())
    expected = [total - 3, total - 1]
    np.testing.assert_allclose(losses.cross_entropy(logits, labels), expected, rtol=1e-6)


@pytest.mark.parametrize("size", [1e-3, 3.0, 100.0])
@pytest.mark.parametrize("name", NAMES)
def test_against_reference(name, size):
    for k in (2, 7):
        logits, labels = batch(k=k, size=size)
        expected = reference(name, logits, labels)
        out = losses.LOSSES[name](logits, labels)
        assert out.dtype == jnp.float32 and out.shape == labels.shape
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(jax.jit(losses.LOSSES[name])(logits, labels), out, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_vmap(name):
    logits, labels = batch()
    loss = losses.LOSSES[name]
    stacked = jax.vmap(loss)(logits.reshape(5, 10, 7), labels.reshape(5, 10))
    np.testing.assert_allclose(stacked.reshape(-1), loss(logits, labels), rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name):
    logits, labels = batch(b=10)
    grad = jax.grad(lambda z: losses.LOSSES[name](z, labels).sum())(logits)
    h = 1e-6
    for i in range(logits.shape[1]):
        change = np.zeros(logits.shape)
        change[:, i] = h
        plus = reference(name, np.float64(logits) + change, labels)
        minus = reference(name, np.float64(logits) - change, labels)
        np.testing.assert_allclose(grad[:, i], (plus - minus) / (2 * h), atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_each_example_stands_alone(name):
    logits, labels = batch(b=4)
    jacobian = jax.jacobian(losses.LOSSES[name])(logits, labels)  # [b, b, k]
    for i, row in enumerate(jacobian):
        assert np.any(row[i] != 0)
        np.testing.assert_array_equal(np.delete(row, i, axis=0), 0)


def test_margin_tells_wrong_predictions():
    logits, labels = batch(b=2000, k=3)
    wrong = np.argmax(logits, axis=1) != labels
    assert 0 < wrong.sum() < 2000
    np.testing.assert_array_equal(losses.margin(logits, labels) > 0, wrong)


def test_margin_of_ties():
    logits, labels = jnp.array([[2.0, 2.0, 1.0], [2.0, 2.0, 1.0], [2.0, 2.0, 1.0]]), jnp.arange(3)
    np.testing.assert_array_equal(losses.margin(logits, labels), [0, 0, 1])
    grad = jax.grad(lambda z: losses.margin(z, labels).sum())(logits)
    np.testing.assert_array_equal(grad, [[-1, 1, 0], [1, -1, 0], [0.5, 0.5, -1]])


@pytest.mark.parametrize("name", NAMES)
def test_large_logits_stay_finite(name):
    logits, labels = jnp.array([[1e30, -1e30, 0.0], [1e4, 0.0, -1e4]]), jnp.array([1, 2])
    out, grad = jax.jit(
        lambda z: (
            losses.LOSSES[name](z, labels),
            jax.grad(lambda z: losses.LOSSES[name](z, labels).sum())(z),
        )
    )(logits)
    np.testing.assert_allclose(out, reference(name, logits, labels), rtol=1e-6)
    np.testing.assert_array_equal(grad, [[1, -1, 0], [1, 0, -1]])


@pytest.mark.parametrize("name", NAMES)
def test_an_excluded_class_does_not_matter(name):
    logits, labels = batch(b=6, k=4)
    labels = labels % 3
    excluded = logits.at[:, 3].set(-jnp.inf)
    loss = losses.LOSSES[name]
    np.testing.assert_allclose(loss(excluded, labels), loss(logits[:, :3], labels), rtol=1e-6)
    grad = jax.grad(lambda z: loss(z, labels).sum())(excluded)
    assert np.all(np.isfinite(grad))
    np.testing.assert_array_equal(grad[:, 3], 0)


@pytest.mark.parametrize("name", NAMES)
def test_an_excluded_label_is_infinitely_wrong(name):
    logits = jnp.array([[-jnp.inf, 1.0, 2.0]])
    np.testing.assert_array_equal(losses.LOSSES[name](logits, jnp.array([0])), [np.inf])


def test_get():
    assert losses.get("margin") is losses.margin
    assert losses.get("cross_entropy") is losses.cross_entropy
    assert losses.get(abs) is abs
    with pytest.raises(
        ValueError, match="^`loss` must be one of cross_entropy, margin; got 'hinge'$"
    ):
        losses.get("hinge")
