"""Carlini-Wagner on linear models: the published loop in NumPy, and the known closest images."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import jaxclus as jc
from jaxclus.attacks._base import Images
from jaxclus.attacks._carlini_wagner import CarliniWagner
from jaxclus.attacks._search import select
from jaxclus.threat import L2, Linf, image_keys

KEY = jax.random.key(0)


def predict(params, x):
    return (x.reshape(x.shape[0], -1) - 0.5) @ params["w"]


def linear(shape, classes, seed=0):
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(int(np.prod(shape)), classes))
    return Partial(predict, {"w": jnp.float32(w)}), w


def images(model, shape, size=5, low=0.3, high=0.7, seed=1):
    x = jnp.float32(np.random.default_rng(seed).uniform(low, high, size=(size, *shape)))
    return x, jnp.argmax(model(x), axis=-1).astype(jnp.int32)


def least_norms(w, x, y):
    """Distance to the closest of the k - 1 hyperplanes; right where that point is in the box."""
    x, out = np.float64(x).reshape(len(x), -1) - 0.5, []
    for image, label in zip(x, np.asarray(y), strict=True):
        gaps = image @ (w[:, [label]] - w)
        lengths = np.linalg.norm(w - w[:, [label]], axis=0)
        out.append(min(gap / n for gap, n in zip(gaps, lengths, strict=True) if n > 0))
    return np.array(out)


def published(x, y, w, *, searches, steps, rate, const, confidence):
    """The published loop for one image, in float64, with Adam written out."""
    x, margins = np.float64(x).ravel(), []
    start = np.arctanh((2 * x - 1) * 0.999999)
    origin = (np.tanh(start) + 1) / 2
    best, best_norm, lower, upper = x, np.inf, 0.0, 1e10
    for _ in range(searches):
        z, m, v, found = start.copy(), 0.0, 0.0, False
        for t in range(1, steps + 1):
            image = (np.tanh(z) + 1) / 2
            logits = (image - 0.5) @ w
            rival = np.argmax(np.where(np.arange(w.shape[1]) == y, -np.inf, logits))
            margins.append(logits[rival] - logits[y])
            if margins[-1] >= confidence and logits.argmax() != y:
                found = True
                if np.linalg.norm(image - x) < best_norm:
                    best, best_norm = image, np.linalg.norm(image - x)
            push = w[:, rival] - w[:, y] if margins[-1] < confidence else 0.0
            g = (2 * (image - origin) - const * push) * (1 - np.tanh(z) ** 2) / 2
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            z = z - rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        if found:
            upper = min(upper, const)
        else:
            lower = max(lower, const)
        const = (lower + upper) / 2 if upper < 1e9 else 10 * const
    return best, margins


@pytest.mark.parametrize("confidence", [0.0, 0.3])
def test_published_loop(confidence):
    """Every margin on the way, and the image at the end; Adam's signs are chaotic near zero."""
    shape = (3, 2, 1)
    model, w = linear(shape, 3)
    x, y = images(model, shape)
    attack = CarliniWagner("l2", steps=15, learning_rate=0.02, confidence=confidence)
    result = attack.run(KEY, model, x, y, trace=True)
    assert result.trace.shape == (1, 9 * 15, 5)
    for i in range(5):
        image, margins = published(
            x[i], y[i], w, searches=9, steps=15, rate=0.02, const=0.001, confidence=confidence
        )
        np.testing.assert_allclose(result.trace[0, :, i], margins, rtol=0, atol=1e-4)
        np.testing.assert_allclose(result.x_adv[i].ravel(), image, rtol=0, atol=1e-4)
    assert result.success.any()


@pytest.mark.parametrize("shape, classes, excess", [((4, 4, 1), 2, 0.01), ((5, 3, 2), 4, 0.08)])
def test_smallest_norm(shape, classes, excess):
    """Within 1 % of the closest point (and 5e-4, a tenth of Adam's first step), never closer.

    Of several classes it is the one with the highest logit that is gone for, not the closest one.
    """
    model, w = linear(shape, classes)
    x, y = images(model, shape)
    result = CarliniWagner("l2", steps=300, learning_rate=0.005).run(KEY, model, x, y)
    least = least_norms(w, x, y)
    assert np.all(result.success) and np.all(result.norm >= least * (1 - 1e-4))
    assert np.all(result.norm <= (1 + excess) * least + 5e-4)
    np.testing.assert_array_equal(result.queries.forward, 1 + 9 * 300 + 1)
    np.testing.assert_array_equal(result.queries.gradient, 9 * 300)


def test_confidence():
    """The image has the margin that was asked for, and needs to go further by margin / |w|."""
    model, w = linear((4, 4, 1), 2)
    x, y = images(model, (4, 4, 1))
    attack = CarliniWagner("l2", steps=300, learning_rate=0.005, confidence=0.5)
    result = attack.run(KEY, model, x, y)
    assert np.all(jc.losses.margin(model(result.x_adv), y) >= 0.5 - 1e-5)
    least = least_norms(w, x, y) + 0.5 / np.linalg.norm(w[:, 0] - w[:, 1])
    assert np.all(result.norm >= least * (1 - 1e-4)) and np.all(result.norm <= 1.01 * least)


def test_threat():
    """Inside the ball an image's search ends at once; without an image there, x is returned."""
    model, w = linear((4, 4, 1), 2)
    x, y = images(model, (4, 4, 1))
    least = np.sort(least_norms(w, x, y))
    eps = (least[2] + least[3]) / 2
    free = CarliniWagner("l2", steps=100)
    bound = dataclasses.replace(free, threat=L2(float(eps))).run(KEY, model, x, y)
    inside = least_norms(w, x, y) < eps
    np.testing.assert_array_equal(bound.success, inside)
    assert np.all(bound.queries.gradient[inside] < 900)
    assert np.all(bound.queries.gradient[~inside] == 900)
    np.testing.assert_array_equal(bound.x_adv[~inside], x[~inside])
    assert np.all(bound.norm[inside] <= eps * (1 + 1e-5)) and np.all(free(KEY, model, x, y) != x)


def test_black_and_white_pixels():
    """The change of variables is singular there: all stays finite and inside."""
    model, _ = linear((4, 4, 1), 2)
    x = jnp.round(images(model, (4, 4, 1), low=0.0, high=1.0)[0])
    y = jnp.argmax(model(x), axis=-1).astype(jnp.int32)
    result = CarliniWagner("l2", steps=100, learning_rate=0.1, initial_const=1.0).run(
        KEY, model, x, y
    )
    assert np.all(np.isfinite(result.x_adv)) and np.all(result.success)
    assert result.x_adv.min() >= 0 and result.x_adv.max() <= 1 and np.all(result.norm > 0.01)


def test_images_at_different_steps_share_a_batch():
    model, _ = linear((3, 2, 1), 3)
    x, y = images(model, (3, 2, 1), size=4)
    attack = CarliniWagner("l2", binary_search_steps=3, steps=4, learning_rate=0.1)
    keys, count = image_keys(KEY, jnp.arange(4)), jnp.zeros(4, jnp.int32)
    batch = Images(keys, keys, x, y, jnp.argsort(-model(x), axis=-1), count)
    step = jax.jit(lambda i, state: attack.step(model, batch, i, state))
    states = [jax.jit(attack.start)(batch)]
    for i in range(12):
        states.append(step(count + i, states[-1]))
    first = jnp.array([True, False, True, False])
    for i, j in ((0, 4), (3, 8), (4, 5)):
        mixed = step(jnp.where(first, i, j), select(first, states[i], states[j]))
        expected = select(first, states[i + 1], states[j + 1])
        for a, b in zip(jax.tree.leaves(mixed), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(a, b)


def test_stochastic():
    """An EOT's mean margin has to reach 0, so most verdicts over fresh passes are wrong."""
    model, _ = linear((4, 4, 1), 2)
    x, y = images(model, (4, 4, 1))
    noisy = jc.Stochastic(lambda key, x: model(x + 0.01 * jax.random.normal(key, x.shape)))
    attack = CarliniWagner("l2", steps=60, learning_rate=0.03, confidence=0.5)
    result = attack.run(KEY, jc.attacks.EOT(noisy, samples=4), x, y)
    assert np.all(result.success)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("norm", "linf", "must be one of l2; got 'linf'"),
        ("threat", Linf(0.1), "must be of the attack's norm l2, got Linf"),
        ("binary_search_steps", 0, "must be at least 1, got 0"),
        ("steps", 0, "must be at least 1, got 0"),
        ("learning_rate", 0.0, "must be a finite number above 0, got 0.0"),
        ("initial_const", -1.0, "must be a finite number above 0, got -1.0"),
        ("confidence", -0.1, "must be a finite number of at least 0, got -0.1"),
    ],
)
def test_bad_hyper_parameters(name, value, message):
    with pytest.raises(ValueError, match=f"^`{name}` {message}"):
        CarliniWagner(**{"norm": "l2", name: value})
