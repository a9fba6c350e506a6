import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.special import logsumexp

import jaxclus as jc
from jaxclus.clustr import ClusterClassifier, certified_radius

RULES = ("soft", "hard")


def problem(seed=0, per_class=2, classes=4, dim=6, variance=0.7):
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((classes * per_class, dim)).astype(np.float32) * 2
    h = (centres[rng.integers(0, len(centres), 50)] + rng.standard_normal((50, dim))).astype("f4")
    classes = tuple(int(j) // per_class for j in range(len(centres)))
    return ClusterClassifier(jnp.asarray(centres), classes, variance), h


def predicted(head, h, rule):
    if rule == "soft":
        return np.asarray(head(h)).argmax(axis=1)
    squares = np.sum((np.asarray(h)[:, None] - np.asarray(head.centres)[None]) ** 2, axis=2)
    return np.asarray(head.centre_classes)[squares.argmin(axis=1)]


def reference(head, h, rule):
    """The radii among embeddings [n], from the formulas, in float64."""
    centres, classes = np.asarray(head.centres, np.float64), np.asarray(head.centre_classes)
    variance, radii = float(head.variance), []
    gaps = np.linalg.norm(centres[:, None] - centres[None], axis=2)
    for point, y in zip(h.astype(float), predicted(head, h, rule), strict=True):
        u = -np.sum((point - centres) ** 2, axis=1) / (2 * variance)
        found = []
        if rule == "hard":
            for j in np.flatnonzero(classes != y):
                own = np.flatnonzero(classes == y)
                found.append(max(variance * (u[k] - u[j]) / gaps[k, j] for k in own))
        for c in set(classes.tolist()) - {y} if rule == "soft" else ():

            def lead(t, own=classes == y, rival=classes == c, u=u):
                pairs = u[own][:, None] - u[rival][None]
                pairs = pairs - t * gaps[own][:, rival] / variance
                return -logsumexp(-logsumexp(pairs, axis=0))

            found.append(brentq(lead, 0, 1000))
        radii.append(min(found))
    return np.array(radii)


@pytest.mark.parametrize("per_class", [1, 2, 3])
@pytest.mark.parametrize("rule", RULES)
def test_equals_the_formula(rule, per_class):
    head, h = problem(per_class=per_class)
    wanted = reference(head, h, rule)
    assert np.ptp(wanted) > 0.1
    found = certified_radius(head, h, 2.5, rule)
    np.testing.assert_allclose(found, wanted / 2.5, rtol=1e-4, atol=2e-5)
    assert (found <= wanted / 2.5 + 1e-6).all()


def test_classes_of_unequal_sizes():
    rng = np.random.default_rng(3)
    centres = jnp.asarray(rng.standard_normal((6, 4)), jnp.float32)
    head = ClusterClassifier(centres, (0, 1, 1, 2, 2, 2), 0.5)
    h = rng.standard_normal((30, 4)).astype("f4")
    np.testing.assert_allclose(
        certified_radius(head, h, 1.0), reference(head, h, "soft"), rtol=1e-4, atol=1e-5
    )


def test_both_rules_agree_with_one_cluster_for_each_class():
    head, h = problem(per_class=1)
    soft, hard = (certified_radius(head, h, 1.0, rule) for rule in RULES)
    np.testing.assert_allclose(soft, hard, rtol=1e-4, atol=1e-5)


def test_soft_is_not_below_the_simple_bound():
    head, h = problem(per_class=3)
    logits, y = np.asarray(head(h), np.float64), predicted(head, h, "soft")
    centres = np.asarray(head.centres, np.float64).reshape(4, 3, -1)
    simple = []
    for row, own in zip(logits, y, strict=True):
        widest = [
            max(np.linalg.norm(a - b) for a in centres[own] for b in centres[c]) for c in range(4)
        ]
        simple.append(min(0.7 * (row[own] - row[c]) / widest[c] for c in range(4) if c != own))
    found = np.asarray(certified_radius(head, h, 1.0))
    assert (found >= np.array(simple) - 1e-4).all()
    assert (found > np.array(simple) * 1.1).mean() > 0.5


@pytest.mark.parametrize("rule", RULES)
def test_ten_thousand_attacks_never_beat_it(rule):
    head, h = problem(1, per_class=3)
    y, radii = predicted(head, h, rule), np.asarray(certified_radius(head, h, 1.0, rule))
    rng = np.random.default_rng(0)
    for size in (0.5, 0.999999):
        steps = rng.standard_normal((100, *h.shape))
        steps *= size * radii[None, :, None] / np.linalg.norm(steps, axis=2, keepdims=True)
        moved = (h[None] + steps).reshape(-1, h.shape[1]).astype(np.float32)
        assert (predicted(head, moved, rule) == np.tile(y, 100)).all()
    # And along the lines to all centres, where the class is lost first.
    for centre in np.asarray(head.centres):
        towards = centre - h
        moved = h + 0.9999 * radii[:, None] * towards / np.linalg.norm(towards, axis=1)[:, None]
        assert (predicted(head, moved, rule) == y).all()


def test_hard_is_tight_for_an_isometry():
    # h(x) = 3 Q x: the class changes at the radius, along the line between the two centres.
    q = np.linalg.qr(np.random.default_rng(0).standard_normal((6, 6)))[0]
    head, h = problem(2, per_class=1)
    x = h @ np.linalg.inv(3 * q)
    y, radii = predicted(head, h, "hard"), np.asarray(certified_radius(head, h, 3.0, "hard"))
    centres, classes = np.asarray(head.centres), np.asarray(head.centre_classes)
    own = np.sum((h[:, None] - centres) ** 2, axis=2).argmin(axis=1)
    for n in range(len(h)):
        changed = []
        for j in np.flatnonzero(classes != y[n]):
            step = (centres[j] - centres[own[n]]) @ np.linalg.inv(3 * q)
            step /= np.linalg.norm(step)
            # Rounding is allowed for: so little beyond the radius.
            for size, seen in ((0.999 * radii[n], False), (1.001 * radii[n] + 1e-4, True)):
                moved = ((x[n] + size * step) @ (3 * q))[None].astype(np.float32)
                if seen:
                    changed.append(predicted(head, moved, "hard")[0] != y[n])
                else:
                    assert predicted(head, moved, "hard")[0] == y[n]
        assert any(changed)


def test_soft_is_tight_for_two_clusters():
    head = ClusterClassifier(jnp.array([[-1.0], [1.0]]), (0, 1), 0.5)
    radius = float(certified_radius(head, jnp.array([[-0.25]]), 1.0)[0])
    np.testing.assert_allclose(radius, 0.25, rtol=1e-4)


def test_ties_and_common_centres_have_no_radius():
    head = ClusterClassifier(jnp.array([[-1.0], [1.0]]), (0, 1), 0.5)
    same = ClusterClassifier(jnp.array([[1.0], [1.0]]), (0, 1), 0.5)
    for rule in RULES:
        assert certified_radius(head, jnp.array([[0.0]]), 1.0, rule)[0] == 0
        assert certified_radius(same, jnp.array([[3.0]]), 1.0, rule)[0] == 0
        alone = ClusterClassifier(jnp.array([[1.0], [2.0]]), (0, 0), 0.5)
        assert certified_radius(alone, jnp.array([[3.0]]), 1.0, rule)[0] == np.inf


def test_jit_agrees():
    head, h = problem()
    for rule in RULES:
        found = jax.jit(certified_radius, static_argnames="rule")(head, h, 2.0, rule=rule)
        np.testing.assert_allclose(found, certified_radius(head, h, 2.0, rule), rtol=1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rule": "both"}, "`rule` must be one of hard, soft"),
        ({"lipschitz": 0.0}, "`lipschitz` must be a finite number above 0"),
        ({"embeddings": jnp.zeros((2, 5))}, "`embeddings` must have the centres' size 6"),
        ({"embeddings": jnp.full((2, 6), jnp.nan)}, "`embeddings` must be finite"),
    ],
)
def test_bad_input_is_refused(change, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    head, h = problem()
    with pytest.raises(ValueError, match=message):
        certified_radius(**({"head": head, "embeddings": h, "lipschitz": 1.0} | change))


def test_public():
    assert jc.clustr.certified_radius is certified_radius
