"""HopSkipJump: linear models, every query of a search looked at, nothing but predictions used."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import jaxclus as jc
from jaxclus.attacks._base import Images
from jaxclus.attacks._hop_skip_jump import _DRAW, _PROBE, _RETURN, _STRIDE, HopSkipJump
from jaxclus.attacks._search import select
from jaxclus.threat import L1, L2, image_keys

KEY = jax.random.key(0)
ORDER = {"l2": 2, "linf": np.inf}
DUAL = {"l2": 2, "linf": 1}


def predict(params, x):
    """Logits (0, <w, x> + b)."""
    score = x.reshape(x.shape[0], -1) @ params["w"] + params["b"]
    return jnp.stack([jnp.zeros_like(score), score], axis=-1)


def problem(shape=(4, 4, 1), size=6, distance=0.3, seed=0):
    """A linear model, images of class 0 around that L2 distance from the boundary, and (w, b)."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=int(np.prod(shape)))
    x = rng.uniform(0.45, 0.55, size=(size, *shape))
    b = -(x.reshape(size, -1) @ w).mean() - distance * np.linalg.norm(w)
    model = Partial(predict, {"w": jnp.float32(w), "b": jnp.float32(b)})
    return model, jnp.float32(x), jnp.zeros(size, jnp.int32), (w, b)


def least_norms(x, w, b, norm):
    return -(np.float64(x).reshape(len(x), -1) @ w + b) / np.linalg.norm(w, DUAL[norm])


@pytest.mark.parametrize(
    "norm, shape, tolerance", [("l2", (5, 3, 2), 0.03), ("linf", (4, 4, 1), 0.1)]
)
def test_smallest_norm(norm, shape, tolerance):
    """After 10 iterations within 3 % of the closest point in L2 and 10 % in Linf, never closer."""
    model, x, y, plane = problem(shape)
    result = HopSkipJump(norm, steps=10).run(KEY, model, x, y)
    least = least_norms(x, *plane, norm)
    assert np.all(result.success) and np.all(result.norm >= least * (1 - 1e-4))
    assert np.all(result.norm <= (1 + tolerance) * least)
    # Beyond the boundary by more than rounding: so they are for any other program.
    w, b = plane
    assert np.all(np.float64(result.x_adv).reshape(6, -1) @ np.float32(w) + np.float32(b) > 1e-6)


def test_only_predictions_are_used():
    """A model that answers with the predicted class alone is attacked bit for bit the same."""
    model, x, y, _ = problem()
    hard = Partial(lambda model, x: jax.nn.one_hot(jnp.argmax(model(x), axis=-1), 2), model)
    attack = HopSkipJump("linf", steps=3, initial_evals=20)
    soft, blind = attack.run(KEY, model, x, y), attack.run(KEY, hard, x, y)
    np.testing.assert_array_equal(soft.x_adv, blind.x_adv)
    assert np.all(soft.success) and np.all(soft.norm < 1)


def history(attack, model, x, y):
    """The states of the search before and after every step, [steps + 1, b, ...]."""
    keys = image_keys(KEY, jnp.arange(len(x)))
    batch = Images(keys, keys, x, y, jnp.argsort(-model(x)), jnp.zeros_like(y))

    @jax.jit
    def run():
        def body(state, i):
            state = attack.step(model, batch, jnp.full_like(y, i), state)
            return state, state

        start = attack.start(batch)
        states = jax.lax.scan(body, start, jnp.arange(attack.steps_per_round))[1]
        return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), start, states)

    return batch, jax.tree.map(np.asarray, run())


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_every_query(norm):
    """The phases follow each other as written, each with its number of queries and its point."""
    model, x, y, plane = problem(size=3)
    attack, d = HopSkipJump(norm, steps=4, initial_evals=30, max_evals=45), 16
    _, states = history(attack, model, x, y)
    memory = states.memory
    for i in range(3):
        of = jax.tree.map(lambda leaf: leaf[:, i], memory)  # noqa: B023
        runs = [0, *(np.flatnonzero(np.diff(of.phase)) + 1), len(of.phase)]
        phases = of.phase[runs[:-1]].tolist()
        cycle = [_RETURN, _PROBE, _STRIDE]
        assert phases == ([_DRAW] + cycle * len(phases))[: len(phases)] and len(phases) >= 14
        for start, end in zip(runs[1:-2], runs[2:-1], strict=True):
            phase, t = of.phase[start], of.iteration[start]
            if phase == _RETURN:
                assert end - start == 24
                before = of.low[start], of.high[start]
                assert before == (0, 1)
                gap = of.high[end] - of.low[end]
                assert gap <= 2.0**-23
            if phase == _PROBE:
                assert end - start == min(math.floor(30 * math.sqrt(t)), 45)
                # The probes' mean displacement is at most their length.
                distance = np.linalg.norm((of.far[start] - x[i]).ravel(), ORDER[norm])
                length = 0.1 if t == 1 else max(distance / d, 4 * 2.0**-22)
                asked = of.total[start + 1] * length
                np.testing.assert_allclose(np.linalg.norm(asked), length, rtol=0.02)
                votes = of.votes[end]
                assert abs(votes) <= end - start and (votes + end - start) % 2 == 0
            if phase == _STRIDE:
                distance = np.linalg.norm((of.edge[start] - x[i]).ravel(), ORDER[norm])
                np.testing.assert_allclose(of.stride[start], distance / math.sqrt(t), rtol=1e-5)
                halved = of.stride[start + 1 : end] / of.stride[start]
                np.testing.assert_allclose(halved, 0.5 ** np.arange(1, end - start))
        assert of.iteration[-1] >= 4
        found = of.phase != _DRAW
        scores = np.float64(of.edge[found]).reshape(-1, d) @ plane[0] + plane[1]
        assert np.all(scores > -1e-5)  # misclassified, but for rounding
    norms = -states.value
    assert np.all(norms[1:] <= norms[:-1])  # the closest so far is kept


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_direction(norm):
    """Many probes point along the normal, or have its signs."""
    model, x, y, (w, _) = problem(size=4)
    attack = HopSkipJump(norm, steps=1, initial_evals=2000)
    _, states = history(attack, model, x, y)
    for i in range(4):
        first = np.flatnonzero(states.memory.phase[:, i] == _STRIDE)[0]
        direction = states.memory.direction[first, i].ravel()
        if norm == "l2":
            np.testing.assert_allclose(np.linalg.norm(direction), 1, rtol=1e-5)
            assert direction @ w / np.linalg.norm(w) > 0.97
        else:
            clear = np.abs(w) > 0.3
            np.testing.assert_array_equal(direction[clear], np.sign(w)[clear])


def test_unanimous_probes():
    """Where all probes agree, the direction is their mean, or its opposite."""
    model, x, y, _ = problem(size=2)
    attack = HopSkipJump("l2")
    keys = image_keys(KEY, jnp.arange(2))
    memory = attack.start(Images(keys, keys, x, y, jnp.argsort(-model(x)), y)).memory
    total = jnp.float32(np.random.default_rng(0).normal(size=x.shape))
    sign = jnp.array([1.0, -1.0])
    memory = memory._replace(
        count=jnp.array([5, 5]),
        votes=5 * sign,
        total=total,
        weighted=sign[:, None, None, None] * total,
    )
    direction = np.asarray(attack._direction(memory)).reshape(2, -1)
    flat = np.asarray(total).reshape(2, -1)
    unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    np.testing.assert_allclose(direction, sign[:, None] * unit, atol=1e-6)


def test_no_start():
    """If noise is never misclassified, the budget goes into looking for it."""
    _, x, y, _ = problem(size=2)
    always = Partial(lambda b, x: jnp.zeros((x.shape[0], 2)) + b, jnp.array([[1.0, 0.0]]))
    attack = HopSkipJump("l2", steps=1, initial_evals=10)
    result = attack.run(KEY, always, x, y)
    np.testing.assert_array_equal(result.x_adv, x)
    assert not np.any(result.success)
    assert attack.steps_per_round == 1 + 24 + 10 + 48
    np.testing.assert_array_equal(result.queries.forward, 83 + 2)
    np.testing.assert_array_equal(result.queries.gradient, 0)


def test_threat_ends_the_search():
    model, x, y, plane = problem()
    eps = float(1.2 * np.median(least_norms(x, *plane, "l2")))
    result = HopSkipJump("l2", L2(eps), steps=10).run(KEY, model, x, y)
    assert np.all(result.success) and np.all(result.norm <= eps * (1 + 1e-5))
    assert np.all(result.queries.forward < HopSkipJump("l2", steps=10).steps_per_round / 2)


def test_images_in_different_phases_share_a_batch():
    model, x, y, _ = problem(size=4)
    attack = HopSkipJump("l2", steps=2, initial_evals=10)
    batch, states = history(attack, model, x, y)
    states = jax.tree.map(jnp.asarray, states)
    at = lambda i: jax.tree.map(lambda leaf: leaf[i], states)  # noqa: E731
    first = jnp.array([True, False, True, False])
    step = jax.jit(lambda i, state: attack.step(model, batch, i, state))
    for i, j in ((0, 30), (24, 36), (35, 70)):
        mixed = step(jnp.where(first, i, j), select(first, at(i), at(j)))
        expected = select(first, at(i + 1), at(j + 1))
        for a, b in zip(jax.tree.leaves(mixed), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_stochastic():
    """Predictions of single passes, here with noise far smaller than the distance."""
    model, x, y, _ = problem()
    noisy = jc.Stochastic(lambda key, x: model(x + 0.001 * jax.random.normal(key, x.shape)))
    result = HopSkipJump("l2", L2(0.6), steps=4, initial_evals=30).run(KEY, noisy, x, y)
    assert np.all(result.success)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("norm", "l1", "must be one of l2, linf; got 'l1'"),
        ("threat", L1(0.1), "must be of the attack's norm l2, got L1"),
        ("steps", 0, "must be at least 1, got 0"),
        ("max_evals", 0, "must be at least 1, got 0"),
        ("initial_evals", 0, "must be at least 1, got 0"),
    ],
)
def test_bad_hyper_parameters(name, value, message):
    with pytest.raises(ValueError, match=f"^`{name}` {message}"):
        HopSkipJump(**{"norm": "l2", name: value})


def test_published_budget():
    """50 iterations: 25,000 queries in the paper's figures, less than a tenth more here."""
    assert 25_000 < HopSkipJump("linf").steps_per_round < 27_000
