"""DeepFool: closed forms on linear models, and a run against NumPy in float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from jaxclus.attacks._deepfool import DeepFool
from jaxclus.threat import create

KEY = jax.random.key(0)
NORMS = ("linf", "l2")
DUAL = {"linf": 1, "l2": 2}
SHAPE, SIZE = (3, 2, 2), 12


def linear(params, x):
    return x.reshape(x.shape[0], -1) @ params["w"] + params["bias"][None]


def network(params, x):
    return jnp.tanh(x.reshape(x.shape[0], -1) @ params["in"]) @ params["out"]


def linear_model(w, bias):
    return Partial(linear, {"w": jnp.float32(w), "bias": jnp.float32(bias)})


def labels(model, x):
    return jnp.argmax(model(x), axis=-1).astype(jnp.int32)


def grey(size=5, spread=0.1, seed=1):
    x = np.random.default_rng(seed).uniform(0.5 - spread, 0.5 + spread, size=(size, *SHAPE))
    return jnp.asarray(x, jnp.float32)


def step_onto(norm, gap, w):
    """The shortest step r with <w, r> = -gap, without a box."""
    size = abs(gap) / np.linalg.norm(w, DUAL[norm])
    return size * (np.sign(w) if norm == "linf" else w / np.linalg.norm(w))


@pytest.mark.parametrize("classes", [2, 3, 6])
@pytest.mark.parametrize("norm", NORMS)
def test_one_step_on_linear_models(norm, classes):
    """x + (1 + overshoot) r, with r the shortest step onto the closest boundary."""
    rng = np.random.default_rng(classes)
    w = np.float32(rng.normal(size=(SIZE, classes)))
    x = grey()
    model = linear_model(w, -0.5 * w.sum(axis=0))  # at x = 0.5 all classes are equal
    y = labels(model, x)
    result = DeepFool(norm).run(KEY, model, x, y)
    assert np.all(result.success)
    logits, slopes = np.float64(model(x)), np.float64(w)
    for j in range(len(x)):
        steps = [
            step_onto(norm, logits[j, t] - logits[j, y[j]], slopes[:, t] - slopes[:, y[j]])
            for t in set(range(classes)) - {int(y[j])}
        ]
        expected = min(steps, key=lambda r: np.linalg.norm(r, {"linf": np.inf, "l2": 2}[norm]))
        delta = np.reshape(result.x_adv[j] - x[j], -1)
        np.testing.assert_allclose(delta, 1.02 * expected, rtol=1e-3, atol=2e-6)
    # A step, the look at what it led to, the clean verdict and the final one.
    np.testing.assert_array_equal(result.queries.gradient, 2)
    np.testing.assert_array_equal(result.queries.forward, 4)


def reference(attack, params, x, y, others):
    """The published loop, in float64; the iterate and the number of steps."""
    first, second = (np.float64(params[name]) for name in ("in", "out"))
    x_adv, total = x, np.zeros_like(x)
    for count in range(attack.steps):
        hidden = np.tanh(x_adv @ first)
        logits = hidden @ second
        if np.argmax(logits) != y:
            return x_adv, count
        steps = []
        for t in others:
            w = first @ ((1 - hidden**2) * (second[:, t] - second[:, y]))
            gap = logits[t] - logits[y]
            r = step_onto(attack.norm, gap, w)
            steps.append((abs(gap) / np.linalg.norm(w, DUAL[attack.norm]), r))
        total = total + min(steps, key=lambda step: step[0])[1]
        x_adv = np.clip(x + (1 + attack.overshoot) * total, 0, 1)
    return x_adv, attack.steps


@pytest.mark.parametrize("norm", NORMS)
def test_run_of_the_published_algorithm(norm):
    """13 classes, of which the top 10 are looked at; images at the edge of the box."""
    rng = np.random.default_rng(7)
    params = {
        "in": jnp.float32(rng.normal(size=(SIZE, 20))),
        "out": jnp.float32(rng.normal(size=(20, 13))),
    }
    model = Partial(network, params)
    x = grey(size=8, spread=0.5, seed=3)
    y = labels(model, x)
    attack = DeepFool(norm, overshoot=0.1)
    result = attack.run(KEY, model, x, y)
    assert np.all(result.success)
    counts = []
    for j in range(len(x)):
        others = np.argsort(-np.asarray(model(x))[j])[1:10]
        flat = np.float64(x[j]).reshape(-1)
        expected, count = reference(attack, params, flat, int(y[j]), others)
        counts.append(count)
        np.testing.assert_allclose(np.reshape(result.x_adv[j], -1), expected, rtol=0, atol=1e-4)
    assert max(counts) > 1
    np.testing.assert_array_equal(result.queries.gradient, np.array(counts) + 1)


def test_only_the_top_ten():
    """The closest boundary is that of the eleventh class, which is not looked at."""
    w, bias = np.zeros((SIZE, 11)), -np.arange(11.0)
    for t in range(1, 11):
        w[t, t] = 2.0 if t < 10 else 1000.0
    model, x = linear_model(w, bias), jnp.zeros((1, *SHAPE))
    result = DeepFool("l2").run(KEY, model, x, labels(model, x))
    delta = np.reshape(result.x_adv, -1)
    np.testing.assert_allclose(delta[1], 0.51, rtol=1e-5)
    assert delta[10] == 0 and result.success[0]


def test_overshoot_and_steps():
    w = np.zeros((SIZE, 2))
    w[0] = [0.0, 1.0]
    x = jnp.full((1, *SHAPE), 0.25)
    model, y = linear_model(w, [0.5, 0.0]), jnp.array([0])
    for overshoot in (0.02, 0.5):
        result = DeepFool("l2", overshoot=overshoot).run(KEY, model, x, y)
        np.testing.assert_allclose(result.norm, 0.25 * (1 + overshoot), rtol=1e-5)
    # Out of the box's reach: every step of 0.75 and more is cut at 1.
    model = linear_model(w, [1.5, 0.0])
    result = DeepFool("l2", steps=3).run(KEY, model, x, y)
    assert not result.success[0]
    np.testing.assert_array_equal(result.x_adv, x.at[0, 0, 0, 0].set(1.0))  # the last iterate
    np.testing.assert_array_equal(result.queries.gradient, 3)
    np.testing.assert_array_equal(result.queries.forward, 3 + 1 + 2)


@pytest.mark.parametrize("norm", NORMS)
def test_success_is_judged_by_the_threat(norm):
    """An iterate outside the threat is no success, and the search is over."""
    w = np.random.default_rng(0).normal(size=(SIZE, 3))
    x = grey()
    model = linear_model(w, -0.5 * w.sum(axis=0))
    y = labels(model, x)
    norms = np.asarray(DeepFool(norm).run(KEY, model, x, y).norm)
    eps = float(np.median(norms))
    result = DeepFool(norm, create(norm, eps)).run(KEY, model, x, y)
    far = norms > 1.05 * eps  # beyond the overshoot
    assert np.all(result.success[norms <= eps]) and np.any(far)
    assert not np.any(result.success[far])


def test_no_slope():
    """A constant model cannot be attacked, and gives no NaN."""
    model, x = linear_model(np.zeros((SIZE, 3)), np.zeros(3)), grey()
    for norm in NORMS:
        result = DeepFool(norm, steps=3).run(KEY, model, x, labels(model, x))
        assert not np.any(result.success)
        np.testing.assert_array_equal(result.x_adv, x)


BAD = {
    "norm": ({"norm": "l1"}, ValueError, "`norm` must be one of l2, linf; got 'l1'"),
    "threat": ({"threat": create("linf", 1.0)}, ValueError, "`threat` must be of the attack's nor"),
    "steps": ({"steps": 0}, ValueError, "`steps` must be at least 1, got 0"),
    "overshoot": ({"overshoot": -0.1}, ValueError, "`overshoot` must be a finite number of at lea"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    settings, error, message = BAD[case]
    with pytest.raises(error, match="^" + re.escape(message)):
        DeepFool(**{"norm": "l2", **settings})
