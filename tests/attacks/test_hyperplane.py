"""Projections onto hyperplanes inside the box, against linear and quadratic programmes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from jaxclus.attacks import _hyperplane

NORMS = ("linf", "l2", "l1")
ORDER = {"linf": np.inf, "l2": 2, "l1": 1}
project = jax.jit(_hyperplane.project, static_argnames="norm")


def problems(seed=0, b=24, n=7):
    """Points, normals and offsets of planes through the box, a corner case in each of the first."""
    rng = np.random.default_rng(seed)
    t, w = rng.uniform(size=(b, n)), rng.normal(size=(b, n))
    t[0], t[1], t[2] = 0, 1, rng.integers(0, 2, size=n)
    w[3, ::2], w[4, 1:] = 0, 0
    w[5] = rng.choice([-1, 1], size=n)
    w[6] = np.where(rng.uniform(size=n) < 0.5, 0.3, -0.8)
    w[7] *= 1e-9
    w[8] *= 1e9
    w[9] *= 10.0 ** np.arange(0, -n, -1)
    t, w = np.float32(t), np.float32(w)
    z = rng.uniform(size=(b, n))
    z[10] = t[10]
    offset = (np.float64(w) * z).sum(axis=1)
    return t, w, offset


def excess_of(t, w, offset):
    return np.float32((np.float64(w) * t).sum(axis=1) - offset)


def steps(norm, t, w, offset):
    d = project(norm, jnp.asarray(t), jnp.asarray(w), jnp.asarray(excess_of(t, w, offset)))
    assert d.dtype == jnp.float32
    return np.float64(d)


def shortest(norm, t, w, offset):
    """The length of the shortest step, as a programme in float64."""
    t, w = np.float64(t), np.float64(w)
    scale = np.abs(w).max()
    w, excess = w / scale, (w @ t - offset) / scale
    n = len(t)
    bounds = list(zip(-t, 1 - t, strict=True))
    if norm == "l2":
        # The dual's only variable is the multiplier of a monotone equation.
        def size(m):
            return np.clip(-m * w, -t, 1 - t)

        found = optimize.brentq(lambda m: w @ size(m) + excess, -1e12, 1e12, xtol=1e-14)
        return np.linalg.norm(size(found))
    cost = np.concatenate([np.zeros(n), np.ones(n if norm == "l1" else 1)])
    bound = np.eye(n) if norm == "l1" else np.ones((n, 1))
    result = optimize.linprog(
        cost,
        A_ub=np.block([[np.eye(n), -bound], [-np.eye(n), -bound]]),
        b_ub=np.zeros(2 * n),
        A_eq=np.concatenate([w, np.zeros(bound.shape[1])])[None],
        b_eq=[-excess],
        bounds=bounds + [(0, None)] * bound.shape[1],
    )
    assert result.success
    return result.fun


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_shortest_step(norm, seed):
    t, w, offset = problems(seed)
    d = steps(norm, t, w, offset)
    assert np.all(t + d >= -1e-6) and np.all(t + d <= 1 + 1e-6)
    scale = np.abs(np.float64(w)).max(axis=1)
    on_plane = ((np.float64(w) * (t + d)).sum(axis=1) - offset) / scale
    np.testing.assert_allclose(on_plane, 0, atol=2e-6)
    length = np.linalg.norm(d, ORDER[norm], axis=1)
    expected = [shortest(norm, *row) for row in zip(t, w, offset, strict=True)]
    np.testing.assert_allclose(length, expected, rtol=2e-5, atol=2e-6)
    assert length[10] < 1e-6 and np.all(length[11:] > 1e-4)
    np.testing.assert_array_equal(d[w == 0], 0)


def test_l2_is_the_nearest_point():
    """Against a general solver, which knows nothing of multipliers."""
    t, w, offset = problems(2, b=14, n=5)
    d = steps("l2", t, w, offset)
    for i in (0, 2, 3, 5, 6, 11, 12, 13):
        normal = np.float64(w[i])
        result = optimize.minimize(
            lambda z, i=i: ((z - t[i]) ** 2).sum(),
            np.full(5, 0.5),
            bounds=[(0, 1)] * 5,
            constraints={"type": "eq", "fun": lambda z, i=i, w=normal: w @ z - offset[i]},
            options={"ftol": 1e-14, "maxiter": 500},
        )
        np.testing.assert_allclose(t[i] + d[i], result.x, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("side", [1, -1])
def test_planes_that_miss_the_box(norm, side):
    """The corner closest to the plane; coordinates that do not matter stay."""
    t, w, _ = problems(3)
    far = np.where(side * w > 0, 1.0, 0.0)
    offset = (np.float64(w) * far).sum(axis=1) + side * np.abs(w).max(axis=1)
    d = steps(norm, t, w, offset)
    expected = np.where(w != 0, far - t, 0)
    np.testing.assert_allclose(d, expected, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_degenerate_planes(norm):
    t, w, offset = problems(4)
    no_slope = project(norm, jnp.asarray(t), jnp.zeros_like(w), jnp.ones(len(t)))
    np.testing.assert_array_equal(no_slope, 0)
    on_plane = project(norm, jnp.asarray(t), jnp.asarray(w), jnp.zeros(len(t)))
    np.testing.assert_array_equal(on_plane, 0)
    # A NaN stays in its row, and the loop ends.
    broken = steps(norm, t, np.where(np.arange(len(t))[:, None] == 5, np.nan, w), offset)
    others = np.arange(len(t)) != 5
    np.testing.assert_array_equal(broken[others], steps(norm, t, w, offset)[others])


def test_l1_by_hand():
    """Steepest slope first, up to the edge of the box; what is left on the next."""
    t, w = np.float32([[0.5, 0.2, 0.9]]), np.float32([[1.0, -3.0, 2.0]])
    # <w, t> = 1.7; the second coordinate can add 0.8 * 3 = 2.4, the third 0.9 * 2 = 1.8.
    np.testing.assert_allclose(steps("l1", t, w, np.array([1.1])), [[0, 0.2, 0]], atol=1e-6)
    np.testing.assert_allclose(steps("l1", t, w, np.array([-1.3])), [[0, 0.8, -0.3]], atol=1e-6)
    np.testing.assert_allclose(steps("l1", t, w, np.array([-2.7])), [[-0.2, 0.8, -0.9]], atol=1e-6)


def test_linf_and_l2_by_hand():
    """One multiplier for all, until the second coordinate is at the edge of the box."""
    t, w = np.float32([[0.5, 0.9]]), np.float32([[1.0, 2.0]])
    np.testing.assert_allclose(steps("linf", t, w, np.array([1.7])), [[-0.2, -0.2]], atol=1e-6)
    np.testing.assert_allclose(steps("linf", t, w, np.array([2.8])), [[0.3, 0.1]], atol=1e-6)
    np.testing.assert_allclose(steps("l2", t, w, np.array([1.8])), [[-0.1, -0.2]], atol=1e-6)
    np.testing.assert_allclose(steps("l2", t, w, np.array([2.8])), [[0.3, 0.1]], atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_slopes_of_all_sizes(norm):
    """Slopes over 20 binary orders that fill one after the other: the worst case for Newton."""
    n = 64
    w = np.float32(2.0 ** -np.linspace(0, 20, n))[None]
    t = np.float32(np.linspace(0.001, 1, n))[None]
    offset = (np.float64(w) * t).sum(axis=1) * np.float64(1e-4)
    d = steps(norm, t, w, offset)
    on_plane = (np.float64(w) * (t + d)).sum(axis=1) - offset
    np.testing.assert_allclose(on_plane, 0, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_rows_do_not_mix(norm):
    t, w, offset = problems(5)
    together = steps(norm, t, w, offset)
    alone = np.concatenate(
        [steps(norm, *(a[i : i + 1] for a in (t, w, offset))) for i in (0, 6, 11)]
    )
    np.testing.assert_allclose(together[[0, 6, 11]], alone, atol=1e-6)
