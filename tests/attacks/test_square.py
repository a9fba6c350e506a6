"""The Square attack against NumPy float64 code that slices windows one image at a time."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from jaxclus import compose
from jaxclus.attacks import _square
from jaxclus.attacks._base import Images
from jaxclus.attacks._square import Schedule, Square
from jaxclus.threat import L1, L2, Linf, image_keys

KEY = jax.random.key(0)
BALLS = {"linf": Linf(0.05), "l2": L2(0.5), "l1": L1(3.0)}
LIMITS = [10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000]


def predict(params, x):
    """Logits (0, <w, x> + bias): for label 0 minus the margin is <w, x> + bias itself."""
    score = x.reshape(x.shape[0], -1) @ params["w"].reshape(-1) + params["bias"]
    return jnp.stack([jnp.zeros_like(score), score], axis=-1)


def images(shape, size=5, low=0.0, high=1.0, seed=0):
    x = np.random.default_rng(seed).uniform(low, high, (size, *shape))
    return jnp.asarray(x, jnp.float32)


def keys(size, number=0):
    return compose.split(image_keys(KEY, jnp.arange(size)), number)


def words(of, *shape):
    return np.asarray(jax.vmap(lambda key: jax.random.bits(key, shape))(of))


def sign(word):
    return np.where(word < 2**31, 1.0, -1.0)


def assert_inside(ball, x_adv, x):
    x_adv, x = np.float64(x_adv), np.float64(x)
    assert np.all((x_adv >= 0) & (x_adv <= 1))
    order = {"linf": np.inf, "l2": 2, "l1": 1}[ball.name]
    norm = np.linalg.norm((x_adv - x).reshape(len(x), -1), order, axis=1)
    assert np.all(norm <= (ball.eps + 1e-6 if ball.name == "linf" else ball.eps * (1 + 1e-5)))
    return norm


# The reference: windows and patterns by slices.


def bump(rows, columns, power):
    """Rectangles around the middle, one in the other, added up."""
    out = np.zeros((rows, columns))
    for k in range(max(rows, columns) // 2 + 1):
        top, left = max(rows // 2 - k, 0), max(columns // 2 - k, 0)
        out[top : rows // 2 + k + 1, left : columns // 2 + k + 1] += 1 / (k + 1) ** power
    return out


def eta(side, norm):
    power, order = {"l2": (2, 2), "l1": (4, 1)}[norm]
    halves = [bump(rows, side, power) for rows in (side // 2, side - side // 2)]
    unit = [half / max(np.linalg.norm(half.ravel(), order), 1e-30) for half in halves]
    out = np.concatenate([unit[0], -unit[1]])
    return out / np.linalg.norm(out.ravel(), order)


def project_l1(z, x, eps):
    """Bisection in float64."""
    delta = z - x
    bound = np.where(delta < 0, x, 1 - x)

    def shrunk(t):
        return np.clip(np.abs(delta) - t, 0, bound)

    low, high = 0.0, np.abs(delta).max()
    if shrunk(0.0).sum() <= eps:
        return x + np.sign(delta) * shrunk(0.0)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if shrunk(middle).sum() > eps else (low, middle)
    return x + np.sign(delta) * shrunk(high)


def onto_ball(delta, x, ball):
    if ball.name == "l1":
        return project_l1(x + delta, x, ball.eps)
    return np.clip(x + delta * ball.eps / np.linalg.norm(delta), 0, 1)


def start(word, x, ball):
    """The start of one image from its words."""
    h, w, c = x.shape
    if ball.name == "linf":
        return np.clip(x + ball.eps * sign(word), 0, 1)
    side = max(h // 5, 1)
    margin = max((h - 5 * side) // 2, 0)
    delta, tile = np.zeros_like(x), eta(side, ball.name)
    for i in range(h // side):
        for j in range(w // side):
            turned = tile.T if word[i, j, 0] >= 2**31 else tile
            place = delta[margin + i * side :, margin + j * side :][:side, :side]
            place += (turned[:, :, None] * sign(word[i, j, 1:]))[: place.shape[0], : place.shape[1]]
    return onto_ball(delta, x, ball)


def propose(word, x, x_adv, side, ball):
    """The proposal for one image from its words."""
    h, w, c = x.shape
    corner = [
        int((word[i] >> 8) * 2.0**-24 * (room - side))
        for i, room in enumerate((h, w, h, w)[: len(word) - c])
    ]
    first = (slice(corner[0], corner[0] + side), slice(corner[1], corner[1] + side))
    if ball.name == "linf":
        out = x_adv.copy()
        out[first] += 2 * ball.eps * sign(word[2:])
        return np.clip(np.clip(out, x - ball.eps, x + ball.eps), 0, 1)
    order = 2 if ball.name == "l2" else 1

    def norms(values):
        return np.linalg.norm(values.reshape(-1, c), order, axis=0)

    second = (slice(corner[2], corner[2] + side), slice(corner[3], corner[3] + side))
    delta = x_adv - x
    both = np.zeros((h, w, 1))
    both[first], both[second] = 1, 1
    room = max(ball.eps**order - np.sum(np.abs(delta) ** order), 0)
    pattern = eta(side, ball.name)
    pattern = pattern.T if word[4] >= 2**31 else pattern
    new = pattern[:, :, None] * sign(word[5:]) + delta[first] / (1e-12 + norms(delta[first]))
    new = new / (1e-12 + norms(new))
    left = room / c + norms(delta * both) ** order
    delta[second] = 0
    delta[first] = new * (np.sqrt(left) if order == 2 else c * left)
    return onto_ball(delta, x, ball)


# What is drawn, and when.


@pytest.mark.parametrize(
    "ball, sides",
    [
        (Linf(0.1), [29, 20, 14, 10, 7, 5, 4, 3, 2, 1]),
        (L2(0.1), [29, 21, 15, 11, 7, 5, 5, 3, 3, 3]),
        (L1(0.1), [29, 21, 15, 11, 7, 5, 5, 3, 3, 3]),
    ],
    ids=BALLS,
)
def test_sides_of_32_pixels(ball, sides):
    schedule = Schedule.create(Square(ball), 32, 32)
    np.testing.assert_array_equal(schedule.sides, sides)
    last = jnp.array([0, *LIMITS])  # proposals 0 to 10 have the first side, 11 to 50 the second
    np.testing.assert_array_equal(schedule.sides[_square._level(last)], [sides[0], *sides[:-1]])
    np.testing.assert_array_equal(schedule.sides[_square._level(jnp.array(LIMITS) + 1)], sides[1:])


@pytest.mark.parametrize(
    "ball, size, first, last",
    [
        (Linf(0.1), (28, 28), 25, 1),
        (Linf(0.1), (4, 100), 4, 1),
        (L2(0.1), (4, 4), 4, 3),
        (L2(0.1), (2, 5), 2, 2),
        (L1(0.1), (1, 1), 1, 1),
    ],
)
def test_sides_of_other_sizes(ball, size, first, last):
    sides = Schedule.create(Square(ball), *size).sides
    assert sides[0] == first and sides[-1] == last and np.all(np.diff(sides) <= 0)


def test_p_init():
    sides = Schedule.create(Square(Linf(0.1), p_init=0.05), 32, 32).sides
    np.testing.assert_array_equal(sides[:4], [7, 5, 4, 3])


def test_offsets():
    """Uniform in [0, room - 1], so that the last row and column stay free; 0 without room."""
    for room in (1, 3, 7, 200, 2**16 + 1):
        ends = _square._offset(jnp.array([0, 2**32 - 1], jnp.uint32), jnp.full(2, room))
        np.testing.assert_array_equal(ends, [0, room - 1])
    assert _square._offset(jnp.array([2**32 - 1], jnp.uint32), jnp.array([0])) == 0
    draws = _square._offset(jax.random.bits(KEY, (20000,)), jnp.full(20000, 5))
    counts = np.bincount(draws, minlength=5)
    assert len(counts) == 5
    assert np.all(np.abs(counts - 4000) < 5 * math.sqrt(20000 * 0.2 * 0.8))


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("side", [1, 2, 3, 4, 5, 12, 29])
def test_eta(side, norm):
    amplitude, along, across = _square.eta_profiles(side, norm).T
    pattern = amplitude[:, None] * np.minimum(along[:, None], across[None])
    np.testing.assert_allclose(pattern, eta(side, norm), rtol=1e-12, atol=0)
    assert np.linalg.norm(pattern.ravel(), {"l2": 2, "l1": 1}[norm]) == pytest.approx(1)


def test_eta_by_hand():
    """Rows of a 3 x 3 pattern: a bump of one row, then one of two rows around the second."""
    upper = np.array([1 / 4, 1 + 1 / 4, 1 / 4])
    lower = np.array([[1 / 4] * 3, [1 / 4, 1 + 1 / 4, 1 / 4]])
    expected = np.stack([upper / np.linalg.norm(upper), *(-lower / np.linalg.norm(lower))])
    amplitude, along, across = _square.eta_profiles(3, "l2").T
    pattern = amplitude[:, None] * np.minimum(along[:, None], across[None])
    np.testing.assert_allclose(pattern, expected / math.sqrt(2), rtol=1e-12)


def test_stripes():
    x = images((6, 8, 3), low=0.2, high=0.8)
    delta = np.asarray(_square._stripes(BALLS["linf"], keys(5), x) - x)
    np.testing.assert_allclose(np.abs(delta), 0.05, atol=1e-6)
    signs = np.sign(delta)
    assert np.all(signs == signs[:, :1])  # constant over the height
    assert 0.3 < np.mean(signs == 1) < 0.7
    assert not np.all(signs == signs[:, :, :1]) and not np.all(signs == signs[..., :1])
    assert not np.all(signs == signs[:1])


@pytest.mark.parametrize("shape", [(7, 12, 2), (14, 9, 1), (4, 5, 2), (1, 1, 1)])
@pytest.mark.parametrize("norm", BALLS)
def test_start(norm, shape):
    ball, x = BALLS[norm], images(shape)
    begin = _square._stripes if norm == "linf" else _square._tiles
    x_adv = jax.jit(begin)(ball, keys(5), x)
    h, w, c = shape
    side = max(h // 5, 1)
    grid = (1, w, c) if norm == "linf" else (h // side, w // side, 1 + c)
    drawn = words(keys(5), *grid)
    expected = [start(drawn[j], np.asarray(x[j], float), ball) for j in range(len(x))]
    np.testing.assert_allclose(x_adv, np.stack(expected), rtol=0, atol=2e-6)
    assert np.all(assert_inside(ball, x_adv, x) > 0)


@pytest.mark.parametrize("shape", [(7, 12, 3), (4, 3, 1)])
@pytest.mark.parametrize("norm", BALLS)
def test_proposals(norm, shape):
    """Every window size, image by image at another one, from a point inside the ball."""
    ball, size = BALLS[norm], 20
    x = images(shape, size)
    x_adv = jax.jit(ball.random_start)(jax.random.key(1), x)
    schedule = Schedule.create(Square(ball), *shape[:2])
    level = np.arange(size) % len(schedule.sides)
    method = _square._propose_signs if norm == "linf" else _square._propose_pattern
    run = jax.jit(lambda keys, x, x_adv, level: method(ball, keys, x, x_adv, schedule, level))
    proposals = run(keys(size, 7), x, x_adv, level)
    drawn, sides = words(keys(size, 7), (2 if norm == "linf" else 5) + shape[2]), schedule.sides
    expected = [
        propose(drawn[j], *np.asarray([x[j], x_adv[j]], float), sides[level[j]], ball)
        for j in range(size)
    ]
    np.testing.assert_allclose(proposals, expected, rtol=0, atol=3e-6)
    assert_inside(ball, proposals, x)
    moved = np.any(np.asarray(proposals != x_adv), axis=(1, 2, 3))
    assert np.mean(moved) > 0.8  # for L1 in ball and box, few are as they were


def test_windows_are_drawn_for_every_image():
    """From the image's key and its number of steps, whatever the batch."""
    schedule = Schedule.create(Square(Linf(0.1)), 16, 16)

    @jax.jit
    def windows(keys):
        x, level = jnp.full((len(keys), 16, 16, 1), 0.5), jnp.full(len(keys), 3)
        return _square._propose_signs(Linf(0.1), keys, x, x, schedule, level) != x

    first, second = np.asarray(windows(keys(6, 1))), np.asarray(windows(keys(6, 2)))
    assert np.all(first.sum((1, 2, 3)) == schedule.sides[3] ** 2)
    assert not np.any(first[:, -1]) and not np.any(first[:, :, -1])
    assert len({window.tobytes() for window in np.concatenate([first, second])}) > 8
    np.testing.assert_array_equal(windows(keys(6, 1)[2:4]), first[2:4])


# The search.


@pytest.mark.parametrize("norm", BALLS)
def test_every_step_is_inside_and_none_is_worse(norm):
    ball, x = BALLS[norm], images((8, 8, 2), 4)
    params = {"w": jnp.float32(np.random.default_rng(1).normal(size=(8, 8, 2))), "bias": -1e3}
    model, attack = Partial(predict, params), Square(ball, queries=60)
    none = jnp.zeros(4, int)
    batch = Images(keys(4), keys(4), x, none, jnp.zeros((4, 2), int), none)

    @jax.jit
    def run(model, batch):
        def step(state, i):
            state = attack.step(model, batch, jnp.full(4, i), state)
            return state, state

        return jax.lax.scan(step, attack.start(batch), jnp.arange(61))[1], attack.start(batch)

    states, first = run(model, batch)
    np.testing.assert_array_equal(states.x_adv[0], first.x_adv)
    for x_adv in states.x_adv:
        assert_inside(ball, x_adv, x)
    assert not np.any(states.success)
    np.testing.assert_array_equal(states.value, np.maximum.accumulate(states.loss))
    assert np.all(np.sum(np.diff(states.value, axis=0) > 0, axis=0) > 2)
    margins = np.stack([predict(params, x_adv)[:, 1] for x_adv in states.x_adv])
    np.testing.assert_allclose(states.value, margins, atol=1e-3)  # of numbers around 1e3


@pytest.mark.parametrize(
    "ball, dual, effort",
    [(Linf(0.04), 1, 1.1), (L2(0.15), 2, 2.0), (L1(0.15), np.inf, 2.5)],
    ids=BALLS,
)
def test_linear_models(ball, dual, effort):
    """The margin is lost at eps |w|_dual: not with 2 % less, and always with some more.

    How much more the norm's windows cost. The slopes are a bump, whose square windows can reach it.
    """
    x = images((8, 8, 1), 6, 0.48, 0.52)
    rows, columns = np.mgrid[:8, :8]
    w = jnp.float32(np.exp(-((rows - 3) ** 2 + (columns - 3) ** 2) / 4))[..., None]
    score = x.reshape(6, -1) @ w.ravel()
    x -= (score - score.mean())[:, None, None, None] * w[None] / jnp.sum(w**2)
    bias = -score.mean() - ball.eps * np.linalg.norm(w.ravel(), dual)
    model, y = Partial(predict, {"w": w, "bias": bias}), jnp.zeros(6, int)
    broken = []
    for factor in (0.98, effort):
        attack = Square(type(ball)(factor * ball.eps), queries=300)
        result = attack.run(KEY, model, x, y)
        assert_inside(attack.threat, result.x_adv, x)
        broken.append(int(result.success.sum()))
    assert broken == [0, 6]


def test_restarts():
    """Each draws other numbers, and the best one is kept."""
    x = images((6, 6, 1))
    model = Partial(predict, {"w": jnp.ones((6, 6, 1)), "bias": jnp.float32(-1e3)})
    result = Square(BALLS["linf"], queries=8, restarts=3).run(
        KEY, model, x, jnp.zeros(5, int), trace=True
    )
    assert result.trace.shape == (3, 9, 5)
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert not np.any(result.trace[one, 0] == result.trace[other, 0])
    kept = predict(model.args[0], result.x_adv)[:, 1]
    np.testing.assert_allclose(kept, result.trace.max(axis=(0, 1)), rtol=1e-6)
    np.testing.assert_array_equal(result.queries.forward, 1 + 3 * 9 + 1)
    np.testing.assert_array_equal(result.queries.gradient, 0)


def test_queries():
    """Clean verdict, start, proposals until the image is broken, final verdict.

    The first image is misclassified from the start, the second one where each of its two columns
    is raised, as by a quarter of the starts, and the third never.
    """
    x = jnp.stack([jnp.full((2, 2, 1), value) for value in (0.9, 0.5, 0.0)])
    model = Partial(predict, {"w": jnp.ones((2, 2, 1)), "bias": jnp.float32(-2.3)})
    keys = [jax.random.key(seed) for seed in range(12)]
    attack = Square(Linf(0.1), queries=5)

    @jax.jit
    def begin(key):
        own = compose.split(image_keys(key, jnp.arange(3)), 0)
        none = jnp.zeros(3, int)
        return attack.start(Images(own, own, x, none, jnp.zeros((3, 2), int), none)).x_adv

    forward = []
    for key in keys:
        forward.append(np.asarray(attack.run(key, model, x, jnp.zeros(3, int)).queries.forward))
        assert forward[-1][0] == 1 and forward[-1][2] == 1 + 6 + 1
        assert (forward[-1][1] == 3) == (begin(key)[1].sum() > 2.3)
    assert {3, 4, 5} <= set(np.stack(forward)[:, 1])


@pytest.mark.parametrize("label, success", [(0, False), (1, True)])
def test_ties_are_what_the_predicted_class_says(label, success):
    """Two equal logits everywhere but at x itself; class 0 is predicted."""

    def tied(x):
        moved = jnp.abs(x - 0.5).max(axis=(1, 2, 3)) > 1e-3
        own = jnp.where(moved, 0.0, 1.0)
        return jnp.where(jnp.arange(2)[None] == label, own[:, None], 0.0)

    x = jnp.full((2, 4, 4, 1), 0.5)
    result = Square(Linf(0.1), queries=4).run(KEY, tied, x, jnp.full(2, label))
    np.testing.assert_array_equal(result.success, success)
    np.testing.assert_array_equal(result.queries.forward, 3 if success else 7)


def test_stochastic_models_have_keys_of_their_own():
    """A model that draws numbers but ignores them meets the same proposals."""
    x = images((6, 6, 1))
    params = {"w": images((6, 6, 1), 1, -1, 1, 2)[0], "bias": jnp.float32(-9.0)}
    y = jnp.zeros(5, int)
    attack = Square(BALLS["linf"], queries=10)
    expected = attack.run(KEY, Partial(predict, params), x, y)

    def draw(params, key, x):
        return predict(params, x + 0 * jax.random.normal(key, x.shape))

    drawing = compose.Stochastic(Partial(draw, params), passes=2)
    result = attack.run(KEY, drawing, x, y)
    np.testing.assert_allclose(result.x_adv, expected.x_adv, atol=1e-6)


def test_another_eps_is_the_same_program():
    count = []

    def counted(params, x):
        count.append(x.shape)
        return predict(params, x)

    x = images((6, 6, 1))
    model = Partial(counted, {"w": jnp.ones((6, 6, 1)), "bias": jnp.float32(-1e3)})
    first = Square(Linf(0.05), queries=8).run(KEY, model, x, jnp.zeros(5, int))
    before = len(count)
    second = Square(Linf(0.1), queries=8).run(KEY, model, x, jnp.zeros(5, int))
    assert len(count) == before
    np.testing.assert_allclose(first.norm, 0.05, rtol=1e-5)
    np.testing.assert_allclose(second.norm, 0.1, rtol=1e-5)


@pytest.mark.parametrize(
    "name, value, error, message",
    [
        ("threat", 0.1, TypeError, "must be one as Linf"),
        ("queries", 0, ValueError, "must be at least 1, got 0"),
        ("queries", 2.5, TypeError, "must be an integer of at least 1"),
        ("restarts", 0, ValueError, "must be at least 1, got 0"),
        ("p_init", 0.0, ValueError, "must be a finite number above 0"),
        ("p_init", 1.5, ValueError, r"must be in \[0, 1\], got 1.5"),
    ],
)
def test_bad_hyper_parameters(name, value, error, message):
    attack = object.__new__(Square)
    fields = {"threat": Linf(0.1), "queries": 5, "restarts": 1, "p_init": 0.8, name: value}
    for field, given in fields.items():
        object.__setattr__(attack, field, given)
    with pytest.raises(error, match=f"^`{name}` {message}") as raised:
        attack.__post_init__()
    assert "\n" not in str(raised.value)
