"""Threat models against references in NumPy float64 that share no code or method with them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxclus import threat
from jaxclus.threat import L1, L2, Linf

THREATS = [Linf, L2, L1]
SHAPE = (6, 3, 4, 2)

project = jax.jit(lambda t, z, x: t.project(z, x))
project_grads = jax.jit(
    jax.grad(lambda t, z, x, weight: (t.project(z, x) * weight).sum(), argnums=(1, 2))
)
shrink_and_clip = jax.jit(lambda t, z, x: t.shrink_and_clip(z, x))
step = jax.jit(lambda t, grad, x=None: t.step(grad, x))
random_start = jax.jit(lambda t, key, x: t.random_start(key, x))


def norm(t, delta):
    """The norms [b] in float64."""
    order = {"linf": np.inf, "l2": 2, "l1": 1}[t.name]
    return np.linalg.norm(np.float64(delta).reshape(len(delta), -1), order, axis=1)


def reference(t, z, x):
    """Projection by bisection for the multiplier of the norm constraint (KKT conditions).

    min |p - d|^2 over the box with |p| <= eps: stationarity gives p = clip(d / (1 + m)) for L2 and
    p = clip(soft threshold of d by m) for L1, with m = 0 or |p| = eps.
    """
    z, x = np.float64(z), np.float64(x)
    d = z - x
    if t.name == "linf":
        return x + np.clip(np.clip(d, -t.eps, t.eps), -x, 1 - x)

    def solution(m):
        m = m[:, None, None, None]
        p = d / (1 + m) if t.name == "l2" else np.sign(d) * np.maximum(np.abs(d) - m, 0)
        return np.clip(p, -x, 1 - x)

    def outside(m):
        return norm(t, solution(m)) > t.eps

    low, high = np.zeros(len(x)), np.ones(len(x))
    active = outside(low)
    while np.any(outside(high)):
        high = np.where(outside(high), 2 * high, high)
    for _ in range(60):
        middle = (low + high) / 2
        too_far = outside(middle)
        low, high = np.where(too_far, middle, low), np.where(too_far, high, middle)
    return x + solution(np.where(active, high, 0))


def points(name):
    """(z, x) of one family of cases."""
    rng = np.random.default_rng(len(name))
    x = rng.uniform(size=SHAPE)
    noise = rng.normal(size=SHAPE)
    if name == "near":
        z = x + 0.05 * noise
    elif name == "outside":
        z = x + noise
    elif name == "far outside":
        z = x + 100 * noise
    elif name == "at the box":
        x = np.round(x)
        z = x + 0.5 * noise
    elif name == "partly at the box":
        x = np.where(noise > 0, np.round(x), x)
        z = x + rng.normal(size=SHAPE)
    elif name == "zero":
        z = x.copy()
    elif name == "ties":
        x = np.full(SHAPE, 0.7)
        z = x + 0.2 * np.sign(noise) * (rng.uniform(size=SHAPE) < 0.7)
    elif name == "flat":
        x, z = np.full(SHAPE, 0.7), np.full(SHAPE, 1.0)
    elif name == "outlier":
        z = x + 0.05 * noise
        z[:, 1, 2, 0] += 1000.0
    elif name == "one pixel":
        x, z = x[:, :1, :1, :1], (x + noise)[:, :1, :1, :1]
    else:
        raise KeyError(name)
    return jnp.float32(z), jnp.float32(x)


FAMILIES = [
    *("near", "outside", "far outside", "at the box", "partly at the box"),
    *("zero", "ties", "flat", "outlier", "one pixel"),
]
RADII = [1e-6, 1e-3, 0.03, 0.5, 3.0, 1e4]


def assert_inside(t, z, x):
    z = np.asarray(z)
    assert z.dtype == np.float32
    assert z.min() >= 0 and z.max() <= 1
    limit = t.eps + 1e-6 if t.name == "linf" else t.eps * (1 + 1e-5)
    assert np.all(norm(t, np.float64(z) - np.float64(x)) <= limit)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", THREATS)
def test_projection_is_the_closest_point_of_ball_and_box(kind, family):
    z, x = points(family)
    rng = np.random.default_rng(0)
    # Float32 holds the distance |z - x| no finer than this.
    coarse = 1e-6 + 1.2e-7 * np.abs(z - x).max()
    for eps in RADII:
        t = kind(eps)
        out = project(t, z, x)
        assert_inside(t, out, x)
        expected = reference(t, z, x)
        np.testing.assert_allclose(out, expected, rtol=0, atol=coarse)
        # The defining property: no feasible point lies on the far side towards z.
        others = reference(t, x + rng.normal(size=x.shape) * min(eps, 1.0), x)
        gain = ((np.float64(z) - out) * (others - out)).reshape(len(x), -1).sum(axis=1)
        assert np.all(gain <= coarse * (1 + np.abs(z - x).reshape(len(x), -1).sum(axis=1)))
        np.testing.assert_allclose(project(t, out, x), out, rtol=0, atol=2e-7)


@pytest.mark.parametrize("kind", THREATS)
def test_projection_of_feasible_points_is_the_point_itself(kind):
    _, x = points("outside")
    x = np.where(x < 0.1, 0.0, x).astype(np.float32)
    inside = np.clip(x + np.float32(1e-4) * np.sign(x - 0.5), 0, 1)
    np.testing.assert_allclose(project(kind(0.1), inside, x), inside, rtol=0, atol=6e-8)
    np.testing.assert_array_equal(project(kind(0.1), x, x), x)


@pytest.mark.parametrize("size", [1e6, 1e15, 1e25, 1e35])
@pytest.mark.parametrize("kind", THREATS)
def test_projection_stays_inside_from_any_distance(kind, size):
    z, x = points("outside")
    t = kind(0.5)
    out = project(t, np.float32(size) * (z - x), x)
    assert_inside(t, out, x)
    if kind is not L1:  # whose threshold drowns in the rounding of z
        expected = reference(t, np.float32(size) * (z - x), x)
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", THREATS)
def test_projection_of_a_large_image_stays_inside(kind):
    rng = np.random.default_rng(5)
    x = rng.uniform(size=(2, 32, 32, 3)).astype(np.float32)
    for eps, size in [(12.0, 1.0), (0.5, 1.0), (0.05, 0.01), (12.0, 1e3)]:
        t = kind(eps)
        assert_inside(t, project(t, np.float32(x + size * rng.normal(size=x.shape)), x), x)
        flat = np.full_like(x, 0.7)
        assert_inside(t, project(t, flat + np.float32(0.1), flat), flat)


def test_projections_by_hand():
    x = jnp.array([[0.5, 0.5], [0.9, 0.5], [0.5, 0.5]])
    z = jnp.array([[0.8, 0.9], [1.7, 0.9], [0.6, 0.5]])
    expected = {
        Linf(0.2): [[0.7, 0.7], [1.0, 0.7], [0.6, 0.5]],
        # 0.25 (0.6, 0.8); the box takes 0.1, sqrt(0.25^2 - 0.1^2) is left.
        L2(0.25): [[0.65, 0.7], [1.0, 0.5 + math.sqrt(0.0525)], [0.6, 0.5]],
        # (0.3, 0.4) - 0.2; the box takes 0.1, 0.2 is left; inside.
        L1(0.3): [[0.6, 0.7], [1.0, 0.7], [0.6, 0.5]],
    }
    for t, rows in expected.items():
        np.testing.assert_allclose(project(t, z, x), rows, rtol=0, atol=2e-7)


@pytest.mark.parametrize("kind", THREATS)
def test_projection_under_vmap(kind):
    z, x = points("partly at the box")
    z, x = z.reshape(3, 2, *SHAPE[1:]), x.reshape(3, 2, *SHAPE[1:])
    t = kind(0.4)
    together = jax.jit(jax.vmap(t.project))(z, x)
    apart = np.stack([project(t, z_i, x_i) for z_i, x_i in zip(z, x, strict=True)])
    np.testing.assert_allclose(together, apart, rtol=0, atol=1.2e-7)


@pytest.mark.parametrize("eps", [0.03, 0.4, 2.0])
@pytest.mark.parametrize("kind", THREATS)
def test_gradient_of_projection(kind, eps):
    rng = np.random.default_rng(7)
    shape = (8, 2, 3, 1)
    x = rng.uniform(0.1, 0.9, size=shape).astype(np.float32)
    z = (x + 0.5 * rng.normal(size=shape)).astype(np.float32)
    weight = rng.normal(size=shape).astype(np.float32)
    t = kind(eps)

    grads = project_grads(t, z, x, weight)
    h = 1e-6
    for which, grad in enumerate(grads):
        slopes = np.zeros(shape)
        for pixel in np.ndindex(shape[1:]):
            change = np.zeros(shape)
            change[(slice(None), *pixel)] = h
            plus, minus = [np.float64(z), np.float64(x)], [np.float64(z), np.float64(x)]
            plus[which] = plus[which] + change
            minus[which] = minus[which] - change
            difference = (reference(t, *plus) - reference(t, *minus)) * weight
            slopes[(slice(None), *pixel)] = difference.sum(axis=(1, 2, 3)) / (2 * h)
        np.testing.assert_allclose(grad, slopes, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", THREATS)
def test_gradient_of_projection_with_respect_to_the_radius(kind):
    z, x = points("outside")

    slope = (reference(kind(0.3001), z, x).sum() - reference(kind(0.2999), z, x).sum()) / 2e-4
    grad = jax.grad(lambda t: project(t, z, x).sum())(kind(0.3))
    assert isinstance(grad, kind)
    np.testing.assert_allclose(grad.eps, slope, rtol=1e-3)


@pytest.mark.parametrize("kind", THREATS)
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    z=hnp.arrays(np.float32, (2, 2, 3, 1), elements=st.floats(-50, 50, width=32)),
    x=hnp.arrays(np.float32, (2, 2, 3, 1), elements=st.floats(0, 1, width=32)),
    eps=st.floats(1e-4, 20),
)
def test_projection_invariants(kind, z, x, eps):
    t = kind(eps)
    once = project(t, z, x)
    assert_inside(t, once, x)
    np.testing.assert_allclose(project(t, once, x), once, rtol=0, atol=2e-7)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", THREATS)
def test_shrink_and_clip(kind, family):
    z, x = points(family)
    for eps in RADII:
        t = kind(eps)
        out = shrink_and_clip(t, z, x)
        assert_inside(t, out, x)
        if kind is L2:
            delta = np.float64(z) - x
            scale = np.minimum(1, eps / np.maximum(norm(t, delta), 1e-300))
            expected = np.clip(x + scale[:, None, None, None] * delta, 0, 1)
            np.testing.assert_allclose(out, expected, rtol=0, atol=2e-7)
        else:
            np.testing.assert_array_equal(out, project(t, z, x))


@pytest.mark.parametrize("kind", THREATS)
def test_norm(kind):
    t = kind(0.1)
    delta = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
    delta[0] = 0
    for size in (1.0, 1e-30, 1e30):
        scaled = jnp.float32(size) * delta
        np.testing.assert_allclose(t.norm(scaled), norm(t, scaled), rtol=1e-6)


def dual_norm(t, grad):
    return norm({"linf": L1(1.0), "l2": L2(1.0), "l1": Linf(1.0)}[t.name], grad)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("kind", THREATS)
def test_step_is_the_steepest_unit_ascent(kind, size):
    t = kind(0.1)
    grad = np.float32(size) * np.random.default_rng(2).normal(size=SHAPE).astype(np.float32)
    direction = np.float64(step(t, grad))
    np.testing.assert_allclose(norm(t, direction), 1, rtol=1e-5)
    rise = (direction * grad).reshape(len(grad), -1).sum(axis=1)
    np.testing.assert_allclose(rise, dual_norm(t, grad), rtol=1e-5)  # 24 pixels: L1 moves one


@pytest.mark.parametrize("kind", THREATS)
def test_zero_gradient_gives_no_step(kind):
    grad = np.random.default_rng(2).normal(size=SHAPE).astype(np.float32)
    grad[3] = 0
    direction = step(kind(0.1), grad)
    np.testing.assert_array_equal(direction[3], np.zeros(SHAPE[1:]))
    np.testing.assert_allclose(norm(kind(0.1), np.delete(direction, 3, axis=0)), 1, rtol=1e-5)


def test_l1_step_shares_among_the_largest_percent():
    grad = np.random.default_rng(3).normal(size=(2, 10, 10, 4)).astype(np.float32)
    direction = np.asarray(step(L1(1.0), grad))
    for g, s in zip(grad.reshape(2, -1), direction.reshape(2, -1), strict=True):
        largest = np.argsort(-np.abs(g))[:4]
        expected = np.zeros(400)
        expected[largest] = np.sign(g[largest]) / 4
        np.testing.assert_allclose(s, expected, atol=1e-7)


def test_l1_step_with_fewer_slopes_than_its_share_uses_those():
    grad = jnp.zeros((1, 400)).at[0, 7].set(-2.0)
    np.testing.assert_array_equal(step(L1(1.0), grad), jnp.zeros((1, 400)).at[0, 7].set(-1.0))


def test_l1_step_shares_ties():
    direction = step(L1(1.0), jnp.array([[2.0, -2.0, 1.0, 0.0]]))
    np.testing.assert_array_equal(direction, [[0.5, -0.5, 0.0, 0.0]])


def test_l1_step_leaves_out_pixels_that_would_leave_the_box():
    grad = jnp.array([[3.0, -2.0, 1.0], [-3.0, 2.0, 1.0], [3.0, -2.0, 1.0], [3.0, -2.0, 1.0]])
    x = jnp.array([[1.0, 0.5, 0.5], [0.0, 1.0, 0.5], [0.0, 0.5, 0.5], [1.0, 0.0, 1.0]])
    expected = [[0.0, -1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    np.testing.assert_array_equal(step(L1(1.0), grad, x), expected)
    np.testing.assert_array_equal(step(L1(1.0), grad)[0], [1.0, 0.0, 0.0])


@pytest.mark.parametrize("kind", [Linf, L2])
def test_other_steps_do_not_look_at_the_image(kind):
    grad = jnp.array([[3.0, -2.0, 1.0]])
    at_edge = step(kind(0.1), grad, jnp.array([[1.0, 0.0, 0.5]]))
    np.testing.assert_array_equal(at_edge, step(kind(0.1), grad))


@pytest.mark.parametrize("kind", THREATS)
def test_random_start_is_uniform_in_the_ball(kind):
    t, d, n = kind(0.4), 3, 4000
    x = jnp.full((n, d), 0.5)
    delta = np.float64(random_start(t, jax.random.key(0), x) - x)
    radius = norm(t, delta) / t.eps
    assert scipy.stats.kstest(radius**d, "uniform").pvalue > 0.01
    # Every coordinate, and a direction across them, against points drawn by rejection.
    cube = np.random.default_rng(0).uniform(-t.eps, t.eps, size=(40 * n, d))
    ball = cube[norm(t, cube) <= t.eps][:n]
    assert len(ball) == n
    for direction in [*np.eye(d), np.array([1.0, -2.0, 0.5])]:
        assert scipy.stats.ks_2samp(delta @ direction, ball @ direction).pvalue > 0.01


@pytest.mark.parametrize("kind", THREATS)
def test_random_start_is_inside(kind):
    for family in ("outside", "at the box"):
        _, x = points(family)
        for eps in RADII:
            t = kind(eps)
            assert_inside(t, random_start(t, jax.random.key(1), x), x)


@pytest.mark.parametrize("kind", THREATS)
def test_random_start_of_an_image_depends_on_its_own_key_alone(kind):
    t, key = kind(0.3), jax.random.key(2)
    _, x = points("outside")
    together = random_start(t, key, x)
    keys = threat.image_keys(key, jnp.arange(len(x)))
    np.testing.assert_array_equal(random_start(t, keys, x), together)
    order = np.random.default_rng(0).permutation(len(x))
    np.testing.assert_array_equal(random_start(t, keys[order], x[order]), together[order])
    assert not np.array_equal(random_start(t, jax.random.key(3), x), together)


def test_image_keys():
    key, index = jax.random.key(0), jnp.array([4, 0, 4, 70000])
    data = jax.random.key_data(threat.image_keys(key, index))
    for row, number in zip(data, index, strict=True):
        np.testing.assert_array_equal(row, jax.random.key_data(jax.random.fold_in(key, number)))


@pytest.mark.parametrize("kind", THREATS)
def test_threats_are_values(kind):
    assert kind(0.1) == kind(0.1) and hash(kind(0.1)) == hash(kind(0.1))
    assert kind(0.1) != kind(0.2)
    assert len({other(0.1) for other in THREATS}) == 3
    with pytest.raises(AttributeError):
        kind(0.1).eps = 0.2
    assert repr(kind(0.1)) == f"{kind.__name__}(eps=0.1)"


@pytest.mark.parametrize("kind", THREATS)
def test_threats_are_pytrees(kind):
    t = kind(0.1)
    assert jax.tree.leaves(t) == [0.1]
    assert jax.tree.map(lambda eps: 2 * eps, t) == kind(0.2)
    traces = []

    @jax.jit
    def f(t, z, x):
        traces.append(t)
        return t.project(z, x)

    z, x = points("outside")
    for eps in (0.1, 0.2, 5.0):
        np.testing.assert_allclose(f(kind(eps), z, x), reference(kind(eps), z, x), atol=1e-6)
    assert len(traces) == 1


def validated(cls, *leaves):
    """An object that passed only the checks of `cls`; in tests its annotations come before them."""
    value = jax.tree.unflatten(jax.tree.structure(cls(0.5)), leaves)
    value.__post_init__()
    return value


@pytest.mark.parametrize("kind", THREATS)
@pytest.mark.parametrize(
    "eps, error",
    [
        *[(value, ValueError) for value in (0, 0.0, -0.1, math.nan, math.inf, np.float32(-1))],
        *[(value, TypeError) for value in (True, np.True_, "0.1", None, [0.1], 1j)],
        (np.array([0.1, 0.2]), TypeError),
    ],
)
def test_bad_radius(kind, eps, error):
    with pytest.raises(error, match=r"^`eps` must be a (finite )?number above 0, got .*$"):
        validated(kind, eps)
    with pytest.raises((error, TypeError), match="eps"):
        kind(eps)


@pytest.mark.parametrize("eps", [1, 0.5, np.float32(0.5), np.int32(1), np.array(0.5)])
def test_good_radius(eps):
    assert validated(Linf, eps).eps == eps
    assert validated(Linf, jnp.float32(0.5)).eps == 0.5


@pytest.mark.parametrize("kind", THREATS)
def test_transformations_may_put_anything_for_the_radius(kind):
    z, x = points("outside")
    stacked = jax.tree.map(lambda *eps: jnp.stack(eps), kind(0.1), kind(0.3))
    both = jax.vmap(project, (0, None, None))(stacked, z, x)
    np.testing.assert_allclose(both[1], project(kind(0.3), z, x), rtol=0, atol=1.2e-7)
    assert jax.tree.map(lambda _: None, kind(0.1)).eps is None


def test_create():
    assert threat.create("linf", 0.1) == Linf(0.1)
    assert threat.create("l2", 0.1) == L2(0.1)
    assert threat.create("l1", 0.1) == L1(0.1)
    assert [threat.create(name, 1.0).name for name in threat.THREATS] == list(threat.THREATS)
    with pytest.raises(ValueError, match="`norm` must be one of l1, l2, linf; got 'l0'"):
        threat.create("l0", 0.1)


def test_largest_entry_of_each_image():
    """max |v|, whatever its sign, with NaN passed on and the derivative of the plain formula."""
    v = jnp.array([[[1.0, -3.0], [2.0, 0.0]], [[0.5, 0.25], [-0.5, 0.0]], [[0.0] * 2] * 2])

    def plain(v):
        return jnp.abs(v).reshape(v.shape[0], -1).max(axis=1)

    np.testing.assert_array_equal(threat._largest(v), [3.0, 0.5, 0.0])
    assert np.isnan(threat._largest(v.at[1, 0, 1].set(jnp.nan))).tolist() == [False, True, False]
    np.testing.assert_array_equal(jax.vmap(threat._largest)(v[:, None])[:, 0], plain(v))
    for transform in (jax.jacfwd, jax.jacrev):
        np.testing.assert_array_equal(transform(threat._largest)(v[:2]), transform(plain)(v[:2]))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_kth_largest_is_that_of_sorting(dtype):
    rng = np.random.default_rng(0)
    values = np.abs(rng.normal(size=(6, 5, 4, 3))).astype(dtype)
    values[1] = values[1].round(1)  # ties
    values[2, :4] = 0.0
    values[3] *= np.finfo(dtype).tiny / 100  # below the normal numbers
    values[4, 0, 0, 0] = np.inf
    values[5] = 0.0
    ordered = -np.sort(-values.reshape(6, -1), axis=1)
    for k in ([1] * 6, [60] * 6, [7, 8, 9, 1, 2, 30], [59, 31, 12, 45, 60, 1]):
        with jax.enable_x64(dtype == np.float64):
            found = jax.jit(threat.kth_largest)(values, jnp.array(k))
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, ordered[np.arange(6), np.array(k) - 1])
