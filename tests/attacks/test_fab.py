"""FAB and targeted FAB: closed forms, and steps against NumPy in float64."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from jaxclus import compose
from jaxclus.attacks._base import Images
from jaxclus.attacks._fab import FAB, TargetedFAB
from jaxclus.threat import create, image_keys

KEY = jax.random.key(0)
NORMS = ("linf", "l2", "l1")
ORDER = {"linf": np.inf, "l2": 2, "l1": 1}
DUAL = {"linf": 1, "l2": 2, "l1": np.inf}
SHAPE, CLASSES, BATCH = (3, 4, 1), 4, 6


def network(params, x):
    return jnp.tanh(x.reshape(x.shape[0], -1) @ params["in"]) @ params["out"]


def linear(params, x):
    return x.reshape(x.shape[0], -1) @ params["w"] + params["bias"][None]


def weights(seed=0, classes=CLASSES):
    rng = np.random.default_rng(seed)
    sizes = {"in": (12, 10), "out": (10, classes)}
    return {name: jnp.float32(rng.normal(size=size) / 2) for name, size in sizes.items()}


def batch(model, low=0.0, high=1.0, size=BATCH, seed=1):
    x = np.random.default_rng(seed).uniform(low, high, size=(size, *SHAPE))
    x = jnp.asarray(x, jnp.float32)
    return x, jnp.argmax(model(x), axis=-1).astype(jnp.int32)


@jax.jit
def prepare(model, x, y, rounds):
    """What the driver tells an attack."""
    ranking = jnp.argsort(-model(x), axis=-1)
    keys = image_keys(KEY, jnp.arange(len(x)))
    return Images(keys, keys, x, y, ranking, rounds)


def attacks(norm, threat=None, **settings):
    return [FAB(norm, threat, **settings), TargetedFAB(norm, threat, **settings)]


@jax.jit
def begin(attack, images):
    return attack.start(images)


@jax.jit
def linearise(attack, model, images):
    return attack._linearise(model, images.keys, images, images.x)


@jax.jit
def one_step(attack, model, images, i, state):
    return attack.step(model, images, i, state)


def take_steps(attack, model, images, count, start=None):
    state = begin(attack, images)
    if start is not None:
        memory = state.memory._replace(point=start.reshape(len(start), -1))
        state = state._replace(memory=memory)
    for i in range(count):
        state = one_step(attack, model, images, jnp.full_like(images.y, i), state)
    return state


# The same in NumPy, image by image, in float64.


def reference_projection(norm, t, w, b):
    """The step onto <w, z> = b in the box: one multiplier by bisection, L1 in order of slope."""
    excess = w @ t - b
    direction = -np.sign(excess) * np.sign(w)
    room = np.where(direction > 0, 1 - t, np.where(direction < 0, t, 0))
    slope, left = np.abs(w), abs(excess)
    size = np.zeros_like(t)
    if norm == "l1":
        for i in np.argsort(-slope):
            if slope[i] > 0:
                size[i] = min(room[i], left / slope[i])
                left -= slope[i] * size[i]
        return direction * size
    speed = slope if norm == "l2" else np.ones_like(t)
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        full = slope @ np.minimum(middle * speed, room) < left
        low, high = (middle, high) if full else (low, middle)
    return direction * np.minimum(high * speed, room)


def reference_step(attack, params, origin, point, y, targets):
    """The next iterate before and after the backward step, and whether it is misclassified."""
    first, second = (np.float64(params[name]) for name in ("in", "out"))
    hidden = np.tanh(point @ first)
    logits = hidden @ second
    candidates = []
    for t in targets:
        w = first @ ((1 - hidden**2) * (second[:, t] - second[:, y]))
        gap = logits[t] - logits[y]
        candidates.append((abs(gap) / np.linalg.norm(w, DUAL[attack.norm]), gap, w))
    _, gap, w = min(candidates, key=lambda candidate: candidate[0])
    b = w @ point - gap
    d = reference_projection(attack.norm, point, w, b)
    d_origin = reference_projection(attack.norm, origin, w, b)
    a, a_origin = (np.linalg.norm(step, ORDER[attack.norm]) for step in (d, d_origin))
    alpha = min(a / (a + a_origin), attack.alpha_max)
    moved = (1 - alpha) * (point + attack.eta * d) + alpha * (origin + attack.eta * d_origin)
    moved = np.clip(moved, 0, 1)
    wrong = np.argmax(np.tanh(moved @ first) @ second) != y
    return moved, origin + attack.beta * (moved - origin) if wrong else moved, wrong


@pytest.mark.parametrize("number", [0, 1], ids=["untargeted", "targeted"])
@pytest.mark.parametrize("norm", NORMS)
def test_steps_of_the_published_algorithm(norm, number):
    """From one start, with images at different rounds in the batch."""
    attack = attacks(norm, alpha_max=0.15, eta=1.2, beta=0.7)[number]
    params = weights()
    model = Partial(network, params)
    x, y = batch(model)
    images = prepare(model, x, y, jnp.arange(BATCH) % (CLASSES - 1))
    noise = np.random.default_rng(2).uniform(-0.1, 0.1, size=x.shape)
    start = jnp.clip(x + jnp.float32(noise), min=0.0, max=1.0)

    points, smallest, seen = np.float64(start).reshape(BATCH, -1), np.full(BATCH, np.inf), 0
    origins, best = np.float64(x).reshape(BATCH, -1), np.float64(x).reshape(BATCH, -1).copy()
    for count in range(1, 4):
        for j in range(BATCH):
            order = np.argsort(-np.float64(model(x))[j])
            rank = 1 + int(images.round[j])
            targets = [order[rank]] if number else order[1:]
            moved, points[j], wrong = reference_step(
                attack, params, origins[j], points[j], int(y[j]), targets
            )
            length = np.linalg.norm(moved - origins[j], ORDER[norm])
            if wrong and length < smallest[j]:
                smallest[j], best[j], seen = length, moved, seen + 1
        state = take_steps(attack, model, images, count, start)
        np.testing.assert_allclose(state.memory.point, points, rtol=0, atol=2e-5)
        np.testing.assert_allclose(np.reshape(state.x_adv, (BATCH, -1)), best, rtol=0, atol=2e-5)
        np.testing.assert_allclose(-state.value, smallest, rtol=1e-4)
        assert not np.any(state.success)
    assert seen >= 3  # the backward step took place


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("norm", NORMS)
def test_smallest_norm_on_linear_models(norm, classes):
    """min over classes of |gap| / ||slope||_dual, where the box is out of reach."""
    w = np.float32(np.random.default_rng(classes).normal(size=(12, classes)))
    bias = -0.5 * w.sum(axis=0)  # at x = 0.5 all classes are equal
    model = Partial(linear, {"w": jnp.asarray(w), "bias": jnp.asarray(bias)})
    x, y = batch(model, 0.45, 0.55)
    logits, slopes = np.float64(model(x)), np.float64(w)
    expected = [
        min(
            (logits[j, y[j]] - logits[j, t])
            / np.linalg.norm(slopes[:, t] - slopes[:, y[j]], DUAL[norm])
            for t in set(range(classes)) - {int(y[j])}
        )
        for j in range(BATCH)
    ]
    for attack in attacks(norm, steps=20):
        result = attack.run(KEY, model, x, y)
        assert np.all(result.success)
        np.testing.assert_allclose(result.norm, np.array(expected) * 1.005, rtol=0.006)


@pytest.mark.parametrize("norm", NORMS)
def test_success_is_a_norm_of_at_most_eps(norm):
    """Exactly: eps the norm itself is success, the float below is none."""
    model = Partial(network, weights())
    x, y = batch(model, size=1)
    images = prepare(model, x, y, jnp.zeros_like(y))
    for attack in attacks(norm, create(norm, 1e-6)):
        unbroken = take_steps(attack, model, images, 6)
        smallest = -unbroken.value[0]
        assert np.isfinite(smallest) and not unbroken.success[0]
        for eps, success in ((smallest, True), (np.nextafter(smallest, np.float32(0)), False)):
            bounded = dataclasses.replace(attack, threat=create(norm, float(eps)))
            assert take_steps(bounded, model, images, 6).success[0] == success


def test_targets_and_restarts():
    """Each target has its restarts, only those after the first start at random."""
    x = jnp.full((6, *SHAPE), 0.5)
    ranking = jnp.asarray([[2, 0, 3, 1]] * 6)
    keys = image_keys(KEY, jnp.arange(6))
    images = Images(keys, keys, x, ranking[:, 0], ranking, jnp.arange(6))
    attack = TargetedFAB("l2", restarts=2)
    assert [attack.rounds(k) for k in (2, 4, 10, 100)] == [2, 6, 18, 18]
    assert dataclasses.replace(attack, targets=5).rounds(100) == 10
    memory = begin(attack, images).memory
    moved = attack.ball.norm(memory.point - memory.origin) > 0
    np.testing.assert_array_equal(moved, [False, True] * 3)

    # The logit of class t is pixel t.
    model = Partial(linear, {"w": jnp.eye(12, 4), "bias": jnp.zeros(4)})
    gap, normal = linearise(attack, model, images)
    np.testing.assert_array_equal(gap, 0)
    target = np.argmax(np.asarray(normal).reshape(6, -1), axis=1)
    np.testing.assert_array_equal(target, [0, 0, 3, 3, 1, 1])


@pytest.mark.parametrize(
    "norm, published, size", [("linf", 0.3, 0.15), ("l2", 1.0, 0.5), ("l1", 5.0, 2.5)]
)
def test_random_starts(norm, published, size):
    """At half of eps, or of the published radius without a threat."""
    x = jnp.full((4, *SHAPE), 0.5)
    ranking = jnp.asarray([[0, 1]] * 4)
    keys = image_keys(KEY, jnp.arange(4))
    images = Images(keys, keys, x, ranking[:, 0], ranking, jnp.arange(4))
    starts = []
    for threat, expected in ((None, size), (create(norm, 0.1 * published), 0.1 * size)):
        attack = FAB(norm, threat, restarts=4)
        start = begin(attack, images)
        np.testing.assert_array_equal(start.x_adv, x)
        points, origins = start.memory
        np.testing.assert_array_equal(origins, 0.5)
        moved = attack.ball.norm(points - origins)
        np.testing.assert_allclose(moved, [0] + [expected] * 3, rtol=1e-5)
        starts.append(points)
    assert len(np.unique(np.asarray(starts[0]), axis=0)) == 4
    np.testing.assert_allclose(starts[1] - 0.5, 0.1 * (starts[0] - 0.5), atol=1e-6)
    # At the edge of the box, starts stay in it.
    corner = begin(attack, images._replace(x=jnp.zeros_like(x))).memory.point
    assert np.min(corner) == 0 and np.max(corner) > 0


def test_restarts_help():
    """Their candidates count where they are closer; the first run alone gives no less."""
    model = Partial(network, weights(4))
    x, y = batch(model, size=16, seed=5)
    once = FAB("l1", steps=2, restarts=1, eta=1.5).run(KEY, model, x, y)
    often = FAB("l1", steps=2, restarts=6, eta=1.5).run(KEY, model, x, y)
    found = np.asarray(once.success)
    assert np.all(often.success[found]) and np.all(often.norm[found] <= once.norm[found] + 1e-6)
    assert np.any(often.norm[found] < 0.99 * once.norm[found])
    other = FAB("l1", steps=2, restarts=6, eta=1.5).run(jax.random.key(1), model, x, y)
    assert not np.array_equal(other.x_adv, often.x_adv)


@jax.jit
def jacobians(model, x):
    return jax.vmap(jax.jacrev(lambda image: model(image[None])[0]))(x)


@pytest.mark.parametrize("norm", NORMS)
def test_gradients_of_all_classes(norm):
    """More classes than fit one pass: the closest of all linearised boundaries."""
    params = weights(3, classes=13)
    model = Partial(network, params)
    x, y = batch(model)
    gap, normal = linearise(FAB(norm), model, prepare(model, x, y, jnp.zeros_like(y)))
    jacobian = np.float64(jacobians(model, x))
    logits = np.float64(model(x))
    for j in range(BATCH):
        w = jacobian[j] - jacobian[j, y[j]]
        gaps = logits[j] - logits[j, y[j]]
        slopes = np.linalg.norm(w.reshape(13, -1), DUAL[norm], axis=1)
        slopes[y[j]] = 1e-30
        gaps[y[j]] = 1
        t = np.argmin(np.abs(gaps) / slopes)
        np.testing.assert_allclose(gap[j], gaps[t], rtol=1e-4)
        np.testing.assert_allclose(normal[j], w[t], rtol=1e-4, atol=1e-5)


def test_queries():
    """Two forward passes and one gradient per step, until success."""
    model = Partial(network, weights())
    x, y = batch(model)
    for attack, rounds in zip(attacks("linf", create("linf", 1e-4), steps=3), (1, 3), strict=True):
        result = attack.run(KEY, model, x, y)
        assert not np.any(result.success)
        np.testing.assert_array_equal(result.queries.gradient, 3 * rounds)
        np.testing.assert_array_equal(result.queries.forward, 2 + 6 * rounds)
        easy = dataclasses.replace(attack, threat=create("linf", 0.9)).run(KEY, model, x, y)
        assert np.all(easy.success) and np.all(easy.queries.gradient < 3 * rounds)


def noisy(params, key, x):
    return linear(params, x + params["scale"] * jax.random.normal(key, x.shape))


def test_stochastic_classifiers():
    """The gradients of an EOT wrapper are averaged; without noise it changes nothing."""
    w = jnp.float32(np.random.default_rng(0).normal(size=(12, 3)))
    params = {"w": w, "bias": -0.5 * w.sum(axis=0)}
    model = Partial(linear, params)
    x, y = batch(model, 0.4, 0.6)
    attack = FAB("l2", steps=4)
    expected = attack.run(KEY, model, x, y)
    for scale, tolerance in ((0.0, 1e-4), (1e-4, 0.1)):
        fn = Partial(noisy, {**params, "scale": jnp.float32(scale)})
        wrapped = compose.EOT(compose.Stochastic(fn, passes=3), samples=2)
        result = attack.run(KEY, wrapped, x, y)
        np.testing.assert_allclose(result.norm, expected.norm, rtol=tolerance)
        assert scale == 0 or not np.array_equal(result.x_adv, expected.x_adv)


BAD = {
    "norm": ({"norm": "l3"}, ValueError, "`norm` must be one of l1, l2, linf; got 'l3'"),
    "other": ({"threat": create("l2", 1.0)}, ValueError, "`threat` must be of the attack's norm "),
    "steps": ({"steps": 0}, ValueError, "`steps` must be at least 1, got 0"),
    "restarts": ({"restarts": 0}, ValueError, "`restarts` must be at least 1, got 0"),
    "targets": ({"targets": 0}, ValueError, "`targets` must be at least 1, got 0"),
    "alpha_max": ({"alpha_max": -0.1}, ValueError, "`alpha_max` must be a finite number of at "),
    "eta": ({"eta": 0.0}, ValueError, "`eta` must be a finite number above 0, got 0.0"),
    "beta": ({"beta": np.nan}, ValueError, "`beta` must be a finite number of at least 0, got nan"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    settings, error, message = BAD[case]
    for cls in (FAB, TargetedFAB):
        if settings.keys() <= {field.name for field in dataclasses.fields(cls)}:
            with pytest.raises(error, match="^" + re.escape(message)):
                cls(**{"norm": "linf", **settings})
