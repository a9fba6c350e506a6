"""APGD, targeted APGD and L1-APGD against NumPy float64 code that keeps whole histories."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from test_square import project_l1

from jaxclus import compose, losses
from jaxclus.attacks import _apgd_l1, _search
from jaxclus.attacks._apgd import APGD, TargetedAPGD, checkpoints, targets
from jaxclus.attacks._base import Images
from jaxclus.attacks._gradient import Evaluation
from jaxclus.threat import L1, L2, Linf, create, image_keys

KEY = jax.random.key(0)
EPS = {"linf": 0.05, "l2": 0.3, "l1": 1.0}
ORDER = {"linf": np.inf, "l2": 2, "l1": 1}
# 64 pixels: with a power of 2, the rounding of a share does not decide which pixels it holds.
SHAPE, CLASSES = (4, 8, 2), 5


def norm(delta, name):
    return np.linalg.norm(np.float64(delta).reshape(len(delta), -1), ORDER[name], axis=1)


# The reference.


def reference_windows(steps):
    """{checkpoint: length of the window before it}, by counting steps one at a time."""
    window, found, since = max(int(0.22 * steps), 1), {}, 0
    for step in range(1, steps + 1):
        since += 1
        if since == window:
            found[step], since = window, 0
            window = max(window - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
    return found


def onto(z, x, name, eps):
    """Linf and L2: scaled into the ball, then clipped to the box; L1: the closest point of both."""
    delta = z - x
    if name == "linf":
        return np.clip(x + np.clip(delta, -eps, eps), 0, 1)
    if name == "l2":
        return np.clip(x + delta * min(1, eps / max(np.linalg.norm(delta), 1e-12)), 0, 1)
    return project_l1(z, x, eps)


def direction(gradient, name):
    if name == "linf":
        return np.sign(gradient)
    return gradient / max(np.linalg.norm(gradient), 1e-300)


def reference_apgd(x, start, name, eps, steps, evaluate, rho=0.75):
    """Iterates and step sizes of one image; `evaluate(t, x_t)` gives the loss and its gradient."""
    windows, history = reference_windows(steps), np.zeros(steps)
    now = previous = best = start
    loss, gradient = evaluate(0, start)
    best_gradient, best_loss, loss_at_check = gradient, loss, loss
    step_size, was_halved = 2 * eps, True
    iterates, step_sizes = [now], []
    for i in range(steps):
        a = 0.75 if i else 1.0
        z = onto(now + step_size * direction(gradient, name), x, name, eps)
        following = onto(now + a * (z - now) + (1 - a) * (now - previous), x, name, eps)
        now, previous = following, now
        iterates.append(now)
        step_sizes.append(step_size)
        loss, gradient = evaluate(i + 1, now)
        history[i] = loss  # and history[-1], which history[0] is compared with, still is 0
        if loss > best_loss:
            best, best_gradient, best_loss = now, gradient, loss
        if i + 1 in windows:
            k = windows[i + 1]
            rises = sum(history[j] > history[j - 1] for j in range(i - k + 1, i + 1))
            stalled = not was_halved and loss_at_check >= best_loss
            was_halved, loss_at_check = rises <= rho * k or stalled, best_loss
            if was_halved:
                step_size /= 2
                now, gradient = best, best_gradient
    return np.array(iterates), np.array(step_sizes)


def reference_l1(x, start, eps, steps, evaluate):
    """All iterates of one image in three phases, and how many come before the last phase."""
    n, iterates, point, before = x.size, [], start, 0
    for radius, length in zip((3, 2, 1), lengths(steps), strict=True):
        before = len(iterates)
        ball = radius * eps
        now = best = onto(point, x, "l1", ball)
        iterates.append(now)
        loss, gradient = evaluate(0, now)
        best_gradient, best_loss = gradient, loss
        step_size, moved = ball, np.sum(best != x)
        share = moved / n / 1.5
        for j in range(1, length + 1):
            sizes = np.abs(gradient)
            smallest = np.sort(sizes.ravel())[min(int((1 - share) * n), n - 1)]
            signs = np.sign(gradient) * (sizes >= smallest)
            now = onto(now + step_size * signs / np.abs(signs).sum(), x, "l1", ball)
            iterates.append(now)
            loss, gradient = evaluate(0, now)
            if loss > best_loss:
                best, best_gradient, best_loss = now, gradient, loss
            if j % max(int(0.04 * length), 1) == 0:
                sparse = np.sum(best != x)
                if sparse / moved < 0.95:
                    step_size, now, gradient = ball, best, best_gradient
                else:
                    step_size = min(max(step_size / 1.5, ball / 10), ball)
                share, moved = sparse / n / 1.5, sparse
        point = best
    return np.array(iterates), before


def lengths(steps):
    early = math.ceil(0.3 * steps)
    return early, early, steps - 2 * early


# Two models, in JAX and, with gradients by hand, in NumPy.


def linear(params, x):
    return x.reshape(x.shape[0], -1) @ params["w"]


def quadratic(params, x):
    """-|x - c_k|^2 for centres c_k."""
    return -4 * jnp.square(x.reshape(x.shape[0], -1, 1) - params["w"][None]).sum(axis=1)


def two_slopes(params, x):
    """Logits (1 - s, 1 / 2, 4 s, -5, -5) of s = sum(x - 1/2)."""
    return linear(params, x - 0.5) + jnp.array([[1.0, 0.5, 0.0, -5.0, -5.0]])


def weights(model, seed=0, classes=CLASSES):
    rng = np.random.default_rng(seed)
    if model is linear:
        return rng.normal(size=(math.prod(SHAPE), classes)) / 2
    return rng.uniform(size=(math.prod(SHAPE), classes))


def logits_and_jacobian(model, w, x):
    """z [k] and dz/dx [n, k] at one image."""
    if model is linear:
        return x.ravel() @ w, w
    delta = x.reshape(-1, 1) - w
    return -4 * np.square(delta).sum(axis=0), -8 * delta


def loss_and_slope(loss, z, y):
    """The loss and dloss/dz [k] of one image."""
    if loss == "cross_entropy":
        p = np.exp(z - z.max())
        p /= p.sum()
        return -np.log(p[y]), p - np.eye(len(z))[y]
    down = np.argsort(-z)
    other = down[1] if down[0] == y else down[0]
    top, bottom = z[other] - z[y], z[down[0]] - z[down[2]] + 1e-12
    unit = np.eye(len(z))
    dtop, dbottom = unit[other] - unit[y], unit[down[0]] - unit[down[2]]
    return top / bottom, (dtop * bottom - top * dbottom) / bottom**2


def evaluation(model, w, loss, y):
    def evaluate(_, x):
        z, jacobian = logits_and_jacobian(model, w, x)
        value, slope = loss_and_slope(loss, z, y)
        return value, (jacobian @ slope).reshape(SHAPE)

    return evaluate


def setting(model, seed=0, size=8):
    """float64 images with the labels of the model, some of their pixels at the box's edge."""
    w = weights(model, seed)
    x = np.random.default_rng(seed + 1).uniform(size=(size, *SHAPE))
    x[:, :2, :, 0] = x[:, :2, :, 0].round()
    z = np.array([logits_and_jacobian(model, w, image)[0] for image in x])
    return w, x, z.argmax(axis=1), np.argsort(-z, axis=1)


def images_of(x, y=None, ranking=None, rounds=0):
    b = len(x)
    y = np.zeros(b, int) if y is None else y
    ranking = np.tile(np.arange(CLASSES), (b, 1)) if ranking is None else ranking
    keys = image_keys(KEY, jnp.arange(b))
    count = jnp.full(b, rounds, jnp.int32)
    return Images(keys, keys, jnp.asarray(x), jnp.asarray(y), jnp.asarray(ranking), count)


@pytest.mark.parametrize(
    "steps, expected",
    [
        (100, (22, 41, 57, 70, 80, 87, 93, 99)),
        (50, (11, 21, 30, 38, 45)),
        (1, (1,)),
        (2, (1, 2)),
    ],
)
def test_checkpoints(steps, expected):
    assert checkpoints(steps) == expected
    assert tuple(reference_windows(steps)) == expected


def test_checkpoints_of_other_numbers():
    for steps in (3, 7, 10, 20, 33, 40, 67, 200, 1000):
        found = checkpoints(steps)
        assert found == tuple(reference_windows(steps))
        assert steps - max(0.06 * steps, 1) < found[-1] <= steps


# The bookkeeping, with losses and gradients that are prescribed.

STEPS, SCRIPTS = 100, 64


@jax.jit
def scripted(attack, images, start, loss, gradient):
    """The memory before each of the moves [steps + 1, b, ...], given losses [steps + 1, b]."""

    def body(memory, at):
        i, loss, gradient = at
        evaluated = Evaluation(loss, loss > jnp.inf, gradient)
        return attack._move(images, jnp.full_like(images.y, i), evaluated, memory), memory

    memory = attack._start(images)._replace(iterate=start, previous=start)
    last, before = jax.lax.scan(body, memory, (jnp.arange(STEPS), loss[:-1], gradient[:-1]))
    return jax.tree.map(lambda each, end: jnp.concatenate([each, end[None]]), before, last)


def scripts(seed=0):
    """Losses in eighths, which float32 holds and which often are equal, around 0."""
    rng = np.random.default_rng(seed)
    t = np.arange(STEPS + 1)[:, None]
    share = rng.uniform(0.6, 1.0, size=SCRIPTS)  # of steps that rise, around rho
    walk = np.where(rng.uniform(size=(STEPS + 1, SCRIPTS)) < share, 1, -3).cumsum(axis=0)
    noise = rng.integers(-8, 9, size=(STEPS + 1, SCRIPTS))
    flat = np.minimum(t, rng.integers(100, size=SCRIPTS)) + 0 * noise
    loss = np.choose(np.arange(SCRIPTS) % 4, [walk, noise, flat, walk // 5])
    return (loss + rng.integers(-30, 30, size=SCRIPTS)) / 8


def script_inputs(seed=0):
    rng = np.random.default_rng(seed + 1)
    x = rng.uniform(size=(SCRIPTS, 2, 2, 1)).astype(np.float32)
    gradient = rng.normal(size=(STEPS + 1, *x.shape)).astype(np.float32)
    return x, gradient


def play(name, loss, rho=0.75):
    """The outcome of scripts, and of the reference for each of them."""
    threat, (x, gradient) = create(name, EPS[name]), script_inputs()
    start = np.stack([onto(image + 0.1, image, name, threat.eps) for image in x])
    start = start.astype(np.float32)
    attack = APGD(threat, steps=STEPS, rho=rho)
    images = images_of(x)
    memory = scripted(attack, images, start, np.float32(loss), gradient)
    expected = [
        reference_apgd(
            np.float64(x[j]),
            np.float64(start[j]),
            name,
            threat.eps,
            STEPS,
            lambda t, _, j=j: (loss[t, j], np.float64(gradient[t, j])),
            rho,
        )
        for j in range(SCRIPTS)
    ]
    return attack, images, gradient, memory, expected


@pytest.mark.parametrize("name, rho", [("linf", 0.75), ("l2", 0.75), ("linf", 0.5)])
def test_bookkeeping(name, rho):
    loss = scripts()
    _, _, _, memory, expected = play(name, loss, rho)
    halvings = set()
    for j, (iterates, step_sizes) in enumerate(expected):
        np.testing.assert_allclose(memory.step_size[1:, j], step_sizes, rtol=1e-6)
        np.testing.assert_allclose(memory.iterate[:, j], iterates, atol=2e-6)
        halvings.add(round(math.log2(step_sizes[0] / step_sizes[-1])))
    best = np.maximum.accumulate(loss, axis=0)[:-1]
    np.testing.assert_array_equal(memory.best_loss[1:], best)
    assert halvings >= set(range(1, 9))  # the scripts reach all of it


def test_images_at_different_steps_share_a_batch():
    loss = scripts()
    attack, images, gradient, memory, _ = play("linf", loss)
    at, place = np.random.default_rng(0).integers(STEPS, size=SCRIPTS), np.arange(SCRIPTS)
    gathered = jax.tree.map(lambda leaf: leaf[at, place], memory)
    evaluated = Evaluation(
        jnp.float32(loss[at, place]), jnp.zeros(SCRIPTS, bool), jnp.asarray(gradient[at, place])
    )
    moved = jax.jit(attack._move)(images, jnp.asarray(at, jnp.int32), evaluated, gathered)
    for new, expected in zip(moved, memory, strict=True):
        np.testing.assert_allclose(new, expected[at + 1, place], rtol=1e-6, atol=1e-7)


def step_sizes_by_hand(halved_at):
    """In units of the first one, for the steps 0 to 99; a review at x_i halves the i-th step."""
    return [0.5 ** sum(i >= checkpoint for checkpoint in halved_at) for i in range(STEPS)]


def test_step_sizes_by_hand():
    t = np.arange(STEPS + 1.0)
    every = (22, 41, 57, 70, 80, 87, 93, 99)
    # Rising at x_1 .. x_16, then falling: with x_1, which is compared with 0, 16 or 15 of 22.
    sixteen = np.where(t <= 16, t, 33 - t)
    seventeen = np.where(t <= 17, t, 34 - t)
    cases = [
        (t, ()),  # always rising
        (-t, every),
        (0 * t, every),
        # Rising to the end, but never again as high as at the start: nothing to see at the first
        # review; later ones halve, since the best loss has not risen, but no two in a row.
        (np.where(t == 0, 1e3, t), (41, 70, 87, 99)),
        # 16 of 22 are too few, 17 are enough; thereafter the loss falls.
        (sixteen, every),
        (seventeen, every[1:]),
        # The same below 0: x_1 does not rise, and 17 become 16.
        (seventeen - 1e3, every),
        # x_1 falls, to a loss above 0: it counts as rising.
        (np.where(t == 0, 50, seventeen), every[1:]),
    ]
    loss = np.tile(cases[0][0][:, None], (1, SCRIPTS))
    for j, (script, _) in enumerate(cases):
        loss[:, j] = script
    memory = play("linf", loss)[3]
    for j, (_, halved_at) in enumerate(cases):
        expected = 2 * EPS["linf"] * np.array(step_sizes_by_hand(halved_at))
        np.testing.assert_allclose(memory.step_size[1:, j], expected, rtol=1e-6)


# Whole searches, in float64.


@jax.jit
def iterates_of(attack, model, images):
    """All iterates of a round."""

    def body(state, i):
        new = attack.step(model, images, jnp.full_like(images.y, i), state)
        return new, state.memory.iterate

    return jax.lax.scan(body, attack.start(images), jnp.arange(attack.steps_per_round))[1]


def reference_iterates(name, model, w, loss, x, y, start, steps):
    """Those of the reference [iterates, b, ...], and the number of the first one that counts."""
    found, first = [], 0
    for image, label, begin in zip(x, y, start, strict=True):
        evaluate = evaluation(model, w, loss, label)
        if name == "l1":
            each, first = reference_l1(image, begin, EPS[name], steps, evaluate)
        else:
            each, _ = reference_apgd(image, begin, name, EPS[name], steps, evaluate)
        found.append(each)
    return np.stack(found, axis=1), first


@pytest.mark.parametrize(
    "model, loss",
    [(linear, "cross_entropy"), (quadratic, "dlr")],
    ids=["linear, cross-entropy", "quadratic, DLR"],
)
@pytest.mark.parametrize("name", EPS)
def test_against_reference(name, model, loss):
    steps = 30
    w, x, y, ranking = setting(model)
    with jax.enable_x64(True):
        attack = APGD(create(name, EPS[name]), loss=loss, steps=steps)
        images = images_of(x, y, ranking)
        iterates = iterates_of(attack, Partial(model, {"w": jnp.asarray(w)}), images)
    iterates = np.asarray(iterates)
    assert iterates.dtype == np.float64
    expected, first = reference_iterates(name, model, w, loss, x, y, iterates[0], steps)
    z = np.array([[logits_and_jacobian(model, w, each)[0] for each in row] for row in expected])
    wrong = z.argmax(axis=-1) != y
    # Beyond the first success, where a search ends, DLR can be constant, and its slope rounding.
    ended = np.cumsum(wrong & (np.arange(len(wrong)) >= first)[:, None], axis=0) - wrong > 0
    assert 0 < ended.any(axis=0).sum() < len(x)
    where = ended[:, :, None, None, None]
    np.testing.assert_allclose(
        np.where(where, 0, iterates), np.where(where, 0, expected), atol=1e-7
    )


@pytest.mark.parametrize("name", ["linf", "l1"])
def test_candidates_and_queries(name):
    """The first misclassified iterate or, if there is none, the one of highest loss."""
    steps = 10
    w, x, y, _ = setting(linear, seed=3, size=16)
    w, x = np.float32(w), np.float32(x)
    attack = APGD(create(name, EPS[name]), steps=steps)
    model, images = Partial(linear, {"w": jnp.asarray(w)}), images_of(x, y)
    active = jnp.arange(len(x)) != 2
    found, trace = (
        jax.jit(_search.search, static_argnames="trace")(
            attack, images.keys, model, images.x, images.y, model(images.x), active, trace=trace
        )
        for trace in (False, True)
    )
    # The driver splits the keys by the number of the round.
    keys = compose.split(images.keys, 0)
    expected = np.float64(iterates_of(attack, model, images._replace(keys=keys)))
    w, first = np.float64(w), sum(lengths(steps)[:2]) + 2 if name == "l1" else 0
    z = np.einsum("tbn,nk->tbk", expected.reshape(*expected.shape[:2], -1), w)
    each = np.log(np.exp(z).sum(-1)) - z[:, np.arange(len(x)), y]
    np.testing.assert_allclose(trace.trace[0][:, active], each[:, active], atol=1e-5)
    counts = (np.arange(len(z)) >= first)[:, None]
    wrong = (z.argmax(axis=-1) != y) & counts & np.asarray(active)
    np.testing.assert_array_equal(found.success, wrong.any(axis=0))
    assert 0 < wrong.any(axis=0).sum() < active.sum()
    # At different steps, if not in L1, where the last phase starts from the results of the others.
    assert name == "l1" or len(set(wrong.argmax(axis=0)[wrong.any(axis=0)])) > 1
    best = np.where(counts, each, -np.inf).argmax(axis=0)
    chosen = expected[np.where(wrong.any(axis=0), wrong.argmax(axis=0), best), np.arange(len(x))]
    chosen[2] = x[2]
    np.testing.assert_allclose(found.x_adv, chosen, atol=1e-6)
    np.testing.assert_allclose(trace.x_adv, chosen, atol=1e-6)
    seen = np.where(wrong.any(axis=0), wrong.argmax(axis=0) + 1, len(z)) * np.asarray(active)
    for result in (found, trace):
        np.testing.assert_array_equal(result.queries.forward, seen)
        np.testing.assert_array_equal(result.queries.gradient, seen)


# Starts.


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.4)], ids=["linf", "l2"])
def test_starts_are_on_the_surface_of_the_ball(threat):
    x = np.full((50, *SHAPE), 0.5, np.float32)
    state = jax.jit(APGD(threat).start)(images_of(x))
    delta = np.asarray(state.memory.iterate) - x
    np.testing.assert_allclose(norm(delta, threat.name), threat.eps, rtol=1e-5)
    assert np.all(np.abs(delta.mean(axis=0)) < 5 * delta.std() / np.sqrt(50))  # no pixel is biased
    assert len(np.unique(delta.reshape(50, -1), axis=0)) == 50
    np.testing.assert_allclose(state.memory.step_size, 2 * threat.eps, rtol=1e-6)
    # One pixel touches the Linf ball; the others are anywhere inside.
    touching = np.sum(np.abs(delta) > 0.999 * threat.eps, axis=(1, 2, 3))
    assert threat.name != "linf" or np.median(touching) == 1

    edge = np.random.default_rng(0).integers(2, size=x.shape).astype(np.float32)
    clipped = np.asarray(jax.jit(APGD(threat).start)(images_of(edge)).memory.iterate)
    np.testing.assert_allclose(clipped, np.clip(edge + delta, 0, 1), atol=1e-6)


def test_start_in_l1():
    x, eps = np.random.default_rng(0).uniform(size=(20, *SHAPE)).astype(np.float32), 1.5
    memory = jax.jit(APGD(L1(eps)).start)(images_of(x)).memory
    noise = jax.vmap(lambda key: jax.random.normal(key, SHAPE))(image_keys(KEY, jnp.arange(20)))
    expected = [
        onto(np.float64(a + b), np.float64(a), "l1", 3 * eps) for a, b in zip(x, noise, strict=True)
    ]
    np.testing.assert_allclose(memory.iterate, expected, atol=1e-5)
    np.testing.assert_allclose(norm(memory.iterate - x, "l1"), 3 * eps, rtol=1e-5)


# L1.


def test_phases():
    assert _apgd_l1.Schedule(100).lengths == (30, 30, 40)
    assert _apgd_l1.Schedule(1).lengths == (0, 0, 1)
    for steps in range(2, 60):
        assert _apgd_l1.Schedule(steps).lengths == lengths(steps)
        assert min(_apgd_l1.Schedule(steps).lengths) >= 0


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 10, 100, 200])
def test_schedule(steps):
    schedule = _apgd_l1.Schedule(steps)
    rows = []
    for radius, length in zip((3, 2, 1), schedule.lengths, strict=True):
        every = max(int(0.04 * length), 1)
        rows += [
            (radius, radius == 1, j == 0, j == length, j > 0 and j % every == 0)
            for j in range(length + 1)
        ]
    assert schedule.evaluations == len(rows) == steps + 3
    assert APGD(L1(1.0), steps=steps).steps_per_round == steps + 3
    i = jnp.arange(schedule.evaluations)
    found = schedule.radius(i), schedule.inside(i), schedule.first(i), schedule.last(i)
    columns = list(zip(*rows, strict=True))
    for column, expected in zip((*found, schedule.review(i)), columns, strict=True):
        np.testing.assert_array_equal(column, expected)


def test_sparse_sign():
    rng = np.random.default_rng(0)
    gradient = rng.normal(size=(9, *SHAPE)).astype(np.float32)
    gradient[7] = np.sign(gradient[7])  # all as large as each other
    gradient[8] = 0
    share = np.array([0.0, 0.001, 0.1, 0.25, 0.5, 0.66, 1.0, 0.1, 0.5], np.float32)
    count = [1, 1, 7, 16, 32, 43, 64, 64, 0]  # ceil(64 share), at least 1
    out = np.asarray(jax.jit(_apgd_l1._sparse_sign)(gradient, share))
    for each, row, number in zip(out, gradient, count, strict=True):
        largest = np.argsort(-np.abs(row).ravel(), kind="stable")[:number]
        expected = np.zeros(row.size)
        expected[largest] = np.sign(row.ravel()[largest])
        np.testing.assert_array_equal(each.ravel(), expected)


def two_classes(params, x):
    """Logits (0, <w, x> + bias): for label 0 the margin loss is <w, x> + bias itself."""
    score = x.reshape(x.shape[0], -1) @ params["w"] + params["bias"]
    return jnp.stack([jnp.zeros_like(score), score], axis=-1)


def highest_gain(w, x, eps):
    """max <w, delta> over the L1 ball and the box: the pixels of largest |w| first, to the edge."""
    room = np.where(w > 0, 1 - x, x)
    order = np.argsort(-np.abs(w))
    room = room[order]
    spent = np.clip(eps - (np.cumsum(room) - room), 0, room)
    return spent @ np.abs(w)[order]


@pytest.mark.parametrize("loss", ["margin", "cross_entropy"])
def test_l1_on_a_linear_model(loss):
    rng = np.random.default_rng(0)
    w = rng.normal(size=math.prod(SHAPE))
    x = rng.uniform(size=(12, *SHAPE)).astype(np.float32)
    gain = np.array([highest_gain(w, np.float64(image).ravel(), 2.5) for image in x])
    clean = x.reshape(12, -1) @ w
    bias = -np.max(clean + gain) - 0.1  # none can be broken
    model = Partial(two_classes, {"w": jnp.float32(w), "bias": jnp.float32(bias)})
    result = APGD(L1(2.5), loss=loss).run(KEY, model, x, np.zeros(12, int), trace=True)
    assert not result.success.any()
    assert np.all(norm(np.float64(result.x_adv) - x, "l1") <= 2.5 * (1 + 1e-5))
    reached = np.asarray(result.x_adv).reshape(12, -1) @ w - clean
    assert np.all(reached >= 0.99 * gain) and np.all(reached <= gain * (1 + 1e-5))
    if loss == "margin":
        trace = np.asarray(result.trace[0])
        assert trace.shape == (103, 12)
        # Three radii; the last phase begins where the one before ended, pulled into the ball.
        highest = [phase.max(axis=0) - clean - bias for phase in np.split(trace, [31, 62])]
        assert np.all(highest[0] > highest[1]) and np.all(highest[1] > highest[2])
        np.testing.assert_allclose(highest[2], reached, rtol=1e-4)


def test_l1_success_counts_in_the_last_phase_alone():
    """An image that is misclassified within 2 eps, not within eps, is not broken."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=math.prod(SHAPE))
    x = np.tile(rng.uniform(0.2, 0.8, size=(1, *SHAPE)), (2, 1, 1, 1)).astype(np.float32)
    flat = np.float64(x[0]).ravel()
    small, large = (flat @ w + highest_gain(w, flat, eps) for eps in (1.0, 2.0))
    params = {"w": jnp.float32(w), "bias": jnp.float32(-(small + large) / 2)}
    model, y = Partial(two_classes, params), np.zeros(2, int)
    attacks = [APGD(L1(eps), loss="margin", steps=50) for eps in (1.0, 2.0)]
    near, far = (attack.run(KEY, model, x, y, trace=True) for attack in attacks)
    assert not near.success.any() and far.success.all()
    assert np.all(norm(np.float64(near.x_adv) - x, "l1") <= 1 + 1e-5)
    np.testing.assert_array_equal(near.queries.gradient, 53)
    assert np.all(near.trace[0].max(axis=0) > 0)


# Targets.


@pytest.mark.parametrize("restarts", [1, 3])
def test_targets(restarts):
    ranking = np.array([np.random.default_rng(i).permutation(6) for i in range(4)])
    for number in range(5 * restarts):
        images = images_of(np.zeros((4, 1, 1, 1)), ranking[:, 0], ranking, number)
        rank = number // restarts + 1
        np.testing.assert_array_equal(targets(images, restarts), ranking[:, rank])
    # Images in different rounds.
    mixed = images._replace(round=jnp.array([0, 1, 3, 4]) * restarts)
    expected = ranking[np.arange(4), [1, 2, 4, 5]]
    np.testing.assert_array_equal(targets(mixed, restarts), expected)


@pytest.mark.parametrize(
    "given, restarts, classes, rounds",
    [(9, 1, 10, 9), (9, 1, 4, 3), (9, 1, 100, 9), (5, 2, 10, 10), (9, 3, 5, 12), (1, 1, 10, 1)],
)
def test_rounds(given, restarts, classes, rounds):
    attack = TargetedAPGD(Linf(0.1), targets=given, restarts=restarts)
    assert attack.rounds(classes) == rounds
    assert APGD(Linf(0.1), restarts=restarts).rounds(classes) == restarts


@pytest.mark.parametrize(
    "threat, loss",
    [(Linf(0.01), "dlr"), (L1(0.2), "dlr"), (Linf(0.01), "difference"), (Linf(0.01), "target")],
    ids=["linf", "l1", "difference", "target"],
)
def test_what_targeted_apgd_maximises(threat, loss):
    """In the order of the clean logits, each target as often as there are restarts."""
    w, x, y, ranking = setting(linear)
    x, model = np.float32(x), Partial(linear, {"w": jnp.float32(w)})
    attack = TargetedAPGD(threat, loss, steps=3, restarts=2)
    trace = attack.run(KEY, model, x, y, trace=True).trace
    assert trace.shape == (2 * (CLASSES - 1), 4 if threat.name == "linf" else 6, len(x))
    images = images_of(x, y)

    @jax.jit
    def first_loss(number, target):
        keys = compose.split(images.keys, number)
        start = attack.start(images._replace(keys=keys)).memory.iterate
        return losses.TARGETED_LOSSES[loss](model(start), images.y, target)

    for number, losses_at in enumerate(trace):
        expected = first_loss(number, ranking[:, 1 + number // 2])
        np.testing.assert_allclose(losses_at[0], expected, rtol=1e-4, atol=1e-5)


def test_any_misclassification_counts():
    """Towards the second class, which is constant, the third overtakes the first earlier."""
    w = np.zeros((5, math.prod(SHAPE)))
    w[0], w[2] = -1, 4
    model = Partial(two_slopes, {"w": jnp.float32(w.T)})
    x, y = np.full((2, *SHAPE), 0.5, np.float32), np.zeros(2, int)
    np.testing.assert_array_equal(np.argsort(-model(jnp.asarray(x))[0], stable=True)[:3], [0, 1, 2])
    result = TargetedAPGD(Linf(0.005), steps=20, targets=1).run(KEY, model, x, y)
    assert result.success.all()
    np.testing.assert_array_equal(np.argmax(model(result.x_adv), axis=1), [2, 2])


# Errors.


def test_too_few_classes():
    x, y = np.zeros((2, *SHAPE), np.float32), np.zeros(2, int)
    models = {k: Partial(linear, {"w": jnp.zeros((64, k))}) for k in (2, 3)}
    with pytest.raises(ValueError, match="^`loss` dlr needs at least 3 classes, got a model of 2$"):
        APGD(Linf(0.1), loss="dlr").run(KEY, models[2], x, y)
    for k, model in models.items():
        message = f"^`model` must have at least 4 classes for the targeted DLR loss, got {k}$"
        with pytest.raises(ValueError, match=message):
            TargetedAPGD(Linf(0.1)).run(KEY, model, x, y)
    APGD(Linf(0.1), loss="dlr").check_classes(3)
    TargetedAPGD(Linf(0.1)).check_classes(4)
    TargetedAPGD(Linf(0.1), "difference").check_classes(2)


@pytest.mark.parametrize("cls", [APGD, TargetedAPGD])
@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"steps": 0}, ValueError, "`steps` must be at least 1, got 0"),
        ({"restarts": 0}, ValueError, "`restarts` must be at least 1, got 0"),
        ({"rho": 1.5}, ValueError, r"`rho` must be in \[0, 1\], got 1.5"),
        ({"rho": -0.1}, ValueError, r"`rho` must be in \[0, 1\], got -0.1"),
    ],
)
def test_bad_settings(cls, settings, error, message):
    with pytest.raises(error, match="^" + message):
        cls(Linf(0.1), **settings)


def test_bad_loss_and_targets():
    with pytest.raises(ValueError, match="^`loss` must be one of .*dlr.*; got 'hinge'$"):
        APGD(Linf(0.1), loss="hinge")
    with pytest.raises(ValueError, match="^`loss` must be one of .*difference.*; got 'margin'$"):
        TargetedAPGD(Linf(0.1), "margin")
    with pytest.raises(ValueError, match="^`targets` must be at least 1, got 0$"):
        TargetedAPGD(Linf(0.1), targets=0)
