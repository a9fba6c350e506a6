"""Margins over boxes of embeddings: by hand, against float64, and against points of the box."""

import itertools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from scipy.special import logsumexp
from test_certificate import predicted, problem

import jaxclus as jc
from jaxclus.clustr import ClusterClassifier, certified_margin, certified_radius


def boxes(h, seed=0, size=0.5):
    rng = np.random.default_rng(seed)
    low, high = (rng.uniform(0, size, (len(h), 1)) * rng.uniform(0, 1, h.shape) for _ in range(2))
    return (h - low).astype(np.float32), (h + high).astype(np.float32)


def reference(head, h, low, high):
    """The margins among boxes [n], from the formula, in float64."""
    centres, classes = np.asarray(head.centres, np.float64), np.asarray(head.centre_classes)
    found = []
    for y, a, b in zip(
        predicted(head, h, "soft"), low.astype(float), high.astype(float), strict=True
    ):
        u = -np.sum(((a + b) / 2 - centres) ** 2, axis=1) / (2 * float(head.variance))
        size = np.abs(centres[:, None] - centres[None]) @ (b - a) / 2 / float(head.variance)
        least, own = u[:, None] - u[None] - size, classes == y
        found.append(
            min(
                -logsumexp(-logsumexp(least[own][:, classes == c], axis=0))
                for c in set(classes.tolist()) - {y}
            )
        )
    return np.array(found)


@pytest.mark.parametrize("per_class", [1, 3])
def test_equals_the_formula_and_is_never_above_it(per_class):
    head, h = problem(per_class=per_class)
    low, high = boxes(h)
    wanted = reference(head, h, low, high)
    assert (wanted > 0).any() and (wanted < 0).any()
    found = np.asarray(certified_margin(head, h, low, high))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=3e-4)
    assert (found <= wanted).all()


def test_holds_at_all_corners_and_at_random_points():
    head, h = problem(1, per_class=3)
    low, high = boxes(h, 1)
    margin, y = np.asarray(certified_margin(head, h, low, high)), predicted(head, h, "soft")
    corners = np.array(list(itertools.product([0, 1], repeat=h.shape[1])))
    inside = np.random.default_rng(0).uniform(0, 1, (400, h.shape[1]))
    for part in np.concatenate([corners, inside]).astype(np.float32):
        logits = np.asarray(head(low + (high - low) * part), np.float64)
        mine = np.take_along_axis(logits, y[:, None], axis=1)[:, 0]
        logits[np.arange(len(h)), y] = -np.inf
        assert (mine - logits.max(axis=1) >= margin).all()


def test_is_exact_for_two_clusters_and_at_a_point():
    head = ClusterClassifier(jnp.array([[-1.0], [1.0]]), (0, 1), 0.5)
    # u_0 - u_1 = -4 h: least at the upper end.
    margin = certified_margin(head, jnp.array([[-0.5]]), jnp.array([[-0.6]]), jnp.array([[-0.2]]))
    np.testing.assert_allclose(margin, [0.8], rtol=1e-4)
    head, h = problem(per_class=3)
    ranked = np.sort(np.asarray(head(h)), axis=1)
    np.testing.assert_allclose(
        certified_margin(head, h, h, h), ranked[:, -1] - ranked[:, -2], atol=3e-4
    )


def test_a_box_inside_the_certified_ball_has_the_certificate_with_one_cluster_each():
    # Along no direction does the box reach as far as the ball that holds it.
    head, h = problem(2, per_class=1)
    radius = np.asarray(certified_radius(head, h, 1.0))[:, None] / np.sqrt(h.shape[1])
    assert (certified_margin(head, h, h - 0.999 * radius, h + 0.999 * radius) > -1e-4).all()


def test_the_class_asked_about_is_that_of_the_embedding():
    head = ClusterClassifier(jnp.array([[-1.0], [1.0]]), (0, 1), 0.5)
    low, high = jnp.array([[0.2]]), jnp.array([[0.4]])
    assert certified_margin(head, jnp.array([[0.3]]), low, high)[0] > 0
    assert certified_margin(head, jnp.array([[-0.3]]), low, high)[0] < 0


def test_far_boxes_one_class_and_common_centres():
    alone = ClusterClassifier(jnp.array([[1.0], [2.0]]), (0, 0), 0.5)
    one = jnp.array([[3.0]])
    assert certified_margin(alone, one, one, one)[0] == np.inf
    same = ClusterClassifier(jnp.array([[1.0], [1.0]]), (0, 1), 0.5)
    assert certified_margin(same, one, one, one)[0] <= 0
    # Centre and radius are rounded by more than the box is wide.
    head = ClusterClassifier(jnp.array([[-1.0], [1.0]]), (0, 1), 0.5)
    far = jnp.array([[1e4]])
    assert certified_margin(head, far, far, far)[0] < 4e4


def test_jit_agrees():
    head, h = problem()
    low, high = boxes(h)
    found = jax.jit(certified_margin)(head, h, low, high)
    np.testing.assert_allclose(found, certified_margin(head, h, low, high), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"low": jnp.zeros((2, 5))}, "`low` must have the centres' size 6"),
        ({"low": jnp.zeros((3, 6))}, r"`low` and `high` must have the embeddings' shape \(50, 6\)"),
        ({"high": jnp.full((50, 6), jnp.inf)}, "`high` must be finite"),
        ({"low": jnp.full((50, 6), 99.0)}, "`low` must be at most `high`"),
    ],
)
def test_bad_input_is_refused(change, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    head, h = problem()
    given = {"embeddings": h, "low": h, "high": h} | change
    with pytest.raises(ValueError, match=message):
        certified_margin(head, **given)


def test_public():
    assert jc.clustr.certified_margin is certified_margin
