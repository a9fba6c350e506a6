"""Certificates of prototype heads: closed forms, tightness, and moves that try to beat them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxclus.prototypes import PrototypeHead, certified_margin, certified_radius
from jaxclus.prototypes._head import RULES

RNG = np.random.default_rng(0)
P = RNG.normal(size=(5, 6)).astype(np.float32)
H = RNG.normal(size=(40, 6)).astype(np.float32)


def predicted(head, h):
    return np.asarray(head(jnp.asarray(h, jnp.float32))).argmax(axis=1)


def reference(rule, h, y):
    """The radius in float64, class by class."""
    p, best = np.float64(P), np.inf
    if rule == "cosine":
        p = p / np.linalg.norm(p, axis=1, keepdims=True)
    for rival in set(range(5)) - {y}:
        gap = np.linalg.norm(p[y] - p[rival])
        if rule == "l2":
            lead = (np.square(h - p[rival]).sum() - np.square(h - p[y]).sum()) / 2
        elif rule == "linf":
            lead, gap = (np.abs(h - p[rival]).max() - np.abs(h - p[y]).max()) / 2, 1
        else:
            lead = h @ (p[y] - p[rival])
        best = min(best, lead / gap)
    return best


@pytest.mark.parametrize("rule", RULES)
def test_radii(rule):
    head = PrototypeHead(jnp.asarray(P), rule, 3.0)
    y = predicted(head, H)
    wanted = np.array([reference(rule, np.float64(h), c) for h, c in zip(H, y, strict=True)])
    found = np.asarray(certified_radius(head, H, 2.5))
    np.testing.assert_allclose(found, wanted / 2.5, rtol=1e-3, atol=1e-5)
    assert (found <= wanted / 2.5).all() and (found > 0).all()
    mapped = jax.jit(jax.vmap(lambda h: certified_radius(head, h[None], 2.5)[0]))(jnp.asarray(H))
    np.testing.assert_allclose(mapped, found, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_ten_thousand_moves_stay_in_the_class(rule):
    """Of an isometry's embeddings, by as much as is proved; half of them towards other ones."""
    head = PrototypeHead(jnp.asarray(P), rule)
    y, radius = predicted(head, H), np.asarray(certified_radius(head, H, 1.0))
    towards = P[RNG.integers(5, size=(40, 125))] - H[:, None]
    moves = np.concatenate([towards + 0.1 * RNG.normal(size=towards.shape),
                            RNG.normal(size=towards.shape)], axis=1)  # fmt: skip
    moves *= (radius / 1.00001)[:, None, None] / np.linalg.norm(moves, axis=2, keepdims=True)
    after = predicted(head, (H[:, None] + moves).reshape(-1, 6)).reshape(40, -1)
    np.testing.assert_array_equal(after, np.broadcast_to(y[:, None], after.shape))
    assert after.size == 10_000


@pytest.mark.parametrize("rule", ["inner_product", "cosine", "l2"])
def test_tight_for_an_isometry(rule):
    """One move, longer by 0.1 % and by what rounding takes, turns the class of every embedding."""
    head = PrototypeHead(jnp.asarray(P), rule)
    y, radius = predicted(head, H), np.asarray(certified_radius(head, H, 1.0))
    p = P / np.linalg.norm(P, axis=1, keepdims=True) if rule == "cosine" else P
    ways = p[None] - p[y][:, None]
    length = np.linalg.norm(ways, axis=2, keepdims=True)
    moves = (1.001 * radius + 1e-4)[:, None, None] * ways / np.where(length > 0, length, 1)
    after = predicted(head, (H[:, None] + moves).reshape(-1, 6)).reshape(40, 5)
    assert (after != y[:, None]).any(axis=1).all()


def test_linf_is_tight_for_two_prototypes_that_differ_in_one_entry():
    head = PrototypeHead(jnp.array([[0.0, 0.0], [2.0, 0.0]]), "linf")
    h = np.float32([[0.25, 0.0], [1.0, 0.0]])
    np.testing.assert_allclose(certified_radius(head, h, 1.0), [0.75, 0.0], atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_margins_hold_in_the_box(rule):
    """At its corners and inside; where it is a point, the margin is the lead itself."""
    head = PrototypeHead(jnp.asarray(P), rule)
    low, high = H - RNG.uniform(0, 0.3, H.shape), H + RNG.uniform(0, 0.2, H.shape)
    low, high = low.astype(np.float32), high.astype(np.float32)
    margin = np.asarray(certified_margin(head, H, low, high))
    y, holds = predicted(head, H), margin > 0
    assert 5 < holds.sum() < 38
    share = RNG.uniform(size=(500, 1, 6))
    share[:250] = np.round(share[:250])
    for each in share:
        point = low + each * (high - low)
        np.testing.assert_array_equal(predicted(head, point)[holds], y[holds])
    wanted = np.array([least_lead(rule, *each) for each in zip(y, low, high, strict=True)])
    np.testing.assert_allclose(margin, wanted, rtol=1e-4, atol=5e-5)
    assert (margin <= wanted).all()
    lead = np.array([least_lead(rule, c, h, h) for c, h in zip(y, H, strict=True)])
    exact = np.asarray(certified_margin(head, H, H, H))
    np.testing.assert_allclose(exact, lead, rtol=1e-4, atol=5e-5)
    # The embeddings' own points are in the boxes.
    assert (exact > 0).all() and (exact >= margin).all()
    one_by_one = jax.jit(jax.vmap(lambda *of: certified_margin(head, *(v[None] for v in of))[0]))
    np.testing.assert_allclose(one_by_one(H, low, high), margin, rtol=1e-4, atol=1e-5)


def least_lead(rule, y, low, high):
    """The least lead of class y at the box's corners, or for Linf its bound, in float64."""
    p, low, high = np.float64(P), np.float64(low), np.float64(high)
    if rule == "linf":
        centre, reach = (low + high) / 2, (high - low) / 2
        apart = np.abs(centre - p)
        nearest = np.maximum(apart - reach, 0).max(axis=1)
        return np.delete(nearest, y).min() - (apart[y] + reach).max()
    if rule == "cosine":
        p = p / np.linalg.norm(p, axis=1, keepdims=True)
    corners = np.where(np.array(list(np.ndindex((2,) * 6)), bool), high, low)
    if rule == "l2":
        scores = -np.square(corners[:, None] - p).sum(axis=2) / 2
    else:
        scores = corners @ p.T
    return (scores[:, [y]] - np.delete(scores, y, axis=1)).min()


def test_linf_radii_are_at_least_those_of_half_the_distance_between_prototypes():
    near = P[np.arange(40) % 5] + RNG.uniform(-0.3, 0.3, H.shape).astype(np.float32)
    head = PrototypeHead(jnp.asarray(P), "linf")
    y = predicted(head, near)
    apart = np.abs(P[y][:, None] - P[None]).max(axis=2)
    apart[np.arange(40), y] = np.inf
    simple = (apart.min(axis=1) / 2 - np.abs(near - P[y]).max(axis=1)) / 2.5
    assert (simple > 0).sum() > 30
    assert (certified_radius(head, near, 2.5) >= simple - 1e-5).all()


def test_nothing_is_proved_of_a_cosine_of_zero():
    assert certified_radius(PrototypeHead(jnp.asarray(P), "cosine"), H[:1] * 0, 1.0) == 0


def test_cosines_next_to_zero():
    """Embeddings far outside the span of the prototypes: the leads are 1e-8 of their length."""
    head = PrototypeHead(jnp.array([[0.0, 1, 0], [0, 0, 1]]), "cosine")
    h = jnp.float32([[1e8, 2, 2.9], [1e6, 0.02, 0.029]])
    assert (predicted(head, h) == 1).all()
    radius = np.asarray(certified_radius(head, h, 1.0))
    np.testing.assert_allclose(radius, np.array([0.9, 0.009]) / np.sqrt(2), rtol=1e-3)
    back = h - jnp.float32([[0, 0, 1], [0, 0, 1]]) * 0.99 * radius[:, None]
    assert (predicted(head, back) == 1).all()


def test_linf_margins_are_near_the_truth_in_boxes_at_one_side():
    head = PrototypeHead(jnp.array([[0.0, 0.0], [1.0, 0.0]]), "linf")
    h = np.float32([[0.45, 0.0]])
    found = certified_margin(head, h, np.float32([[0.0, 0.0]]), h)
    np.testing.assert_allclose(found, 0.1, atol=1e-5)


def test_prototypes_that_coincide_leave_nothing():
    for rule in RULES:
        head = PrototypeHead(jnp.asarray(np.stack([P[0], P[0], P[1]])), rule)
        assert certified_radius(head, P[:1], 1.0)[0] == 0
        assert certified_margin(head, P[:1], P[:1], P[:1])[0] <= 0


def test_bad_arguments():
    head = PrototypeHead(jnp.asarray(P))
    with pytest.raises(ValueError, match="^`lipschitz` must be"):
        certified_radius(head, H, 0.0)
    with pytest.raises(ValueError, match="^`embeddings` must have the prototypes' size 6, got"):
        certified_radius(head, H[:, :4], 1.0)
    with pytest.raises(ValueError, match="^`low` must have the prototypes' size 6, got"):
        certified_margin(head, H, H[:, :4], H)
    with pytest.raises(ValueError, match="^`low` and `high` must have the embeddings' shape"):
        certified_margin(head, H, H[:3], H[:3])
    for rule in RULES:
        with pytest.raises(ValueError, match="^`low` must be at most `high`"):
            certified_margin(PrototypeHead(jnp.asarray(P), rule), H, H + 0.9, H - 0.9)
