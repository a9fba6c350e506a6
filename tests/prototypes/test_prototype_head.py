import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import jaxclus as jc
from jaxclus.prototypes import PrototypeHead, repulsive, separation, simplex
from jaxclus.prototypes._head import RULES

RNG = np.random.default_rng(0)
P = RNG.standard_normal((4, 6)).astype(np.float32) * 2
Z = RNG.standard_normal((30, 6)).astype(np.float32) * 2


def scores(rule, z, p):
    z, p = z[:, None].astype(np.float64), p[None].astype(np.float64)
    if rule == "inner_product":
        return (z * p).sum(axis=2)
    if rule == "cosine":
        return (z * p).sum(axis=2) / np.linalg.norm(z, axis=2) / np.linalg.norm(p, axis=2)
    return -np.linalg.norm(z - p, axis=2, ord=np.inf if rule == "linf" else 2)


@pytest.mark.parametrize("rule", RULES)
def test_logits_equal_the_specification(rule):
    head = PrototypeHead(jnp.asarray(P), rule, 3.0)
    np.testing.assert_allclose(head.scores(Z), scores(rule, Z, P), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(head(Z), scores(rule, Z, P) / 3, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.jit(lambda head, z: head(z))(head, Z), head(Z), rtol=1e-5)
    one_by_one = jax.vmap(lambda z: head(z[None])[0])(Z)
    np.testing.assert_allclose(one_by_one, head(Z), rtol=1e-5, atol=1e-6)
    assert head.num_classes == 4


@pytest.mark.parametrize("rule", RULES)
def test_gradients_equal_finite_differences(rule):
    head, weights, step = PrototypeHead(jnp.asarray(P), rule), RNG.standard_normal((30, 4)), 1e-5
    slope = jax.grad(lambda z: (head(z) * weights).sum())(jnp.asarray(Z))
    for i in range(6):
        move = step * np.eye(6)[i]
        ends = [scores(rule, Z.astype(np.float64) + s * move, P) for s in (1, -1)]
        wanted = ((ends[0] - ends[1]) * weights).sum(axis=1) / (2 * step)
        np.testing.assert_allclose(slope[:, i], wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_gradients_are_finite_at_zero_and_at_a_prototype(rule):
    head = PrototypeHead(jnp.asarray(P), rule)
    z = jnp.stack([jnp.zeros(6), jnp.asarray(P[2])])
    assert np.isfinite(head(z)).all()
    slope = jax.grad(lambda z: head(z)[:, 2].sum())(z)
    assert np.isfinite(slope).all()
    if rule == "cosine":
        assert not head(z)[0].any()
        np.testing.assert_allclose(slope[0], P[2] / np.linalg.norm(P[2]), rtol=1e-6)
    if rule == "l2":
        assert not slope[1].any()
    assert head(z)[1].argmax() == 2 or rule == "inner_product"


def test_calibration_changes_the_scale_alone():
    head = PrototypeHead(repulsive(jax.random.key(0), 10, 100))
    z = head.prototypes[jnp.arange(40) % 10] * 0.9
    labels = jnp.asarray(np.argmax(head(z), axis=1))

    def slopes(head):
        return jax.grad(lambda z: jc.losses.cross_entropy(head(z), labels).sum())(z)

    assert not np.any(slopes(head))
    calibrated = head.calibrated(z)
    np.testing.assert_array_equal(calibrated(z).argmax(axis=1), labels)
    ranked = np.sort(np.asarray(calibrated(z)), axis=1)
    lead = np.quantile(ranked[:, -1] - ranked[:, -2], 0.95)
    assert lead == pytest.approx(np.log(81), rel=1e-5)
    assert np.abs(slopes(calibrated)).max(axis=1).min() > 1e-4
    inside = jax.jit(lambda z: head.calibrated(z)(z))(z)
    np.testing.assert_allclose(inside, calibrated(z), rtol=1e-4, atol=1e-4)


def test_calibration_of_embeddings_that_tie_leaves_one():
    head = PrototypeHead(jnp.asarray(P), temperature=5.0)
    assert head.calibrated(np.zeros_like(Z)).temperature == 1
    assert head.calibrated(np.full_like(Z, 3e38)).temperature == 1  # scores overflow


def test_a_head_is_a_pytree_for_a_chain():
    head = PrototypeHead(jnp.asarray(P), "l2", 2.0)
    assert len(jax.tree.leaves(head)) == 2
    doubled = jax.tree.map(lambda leaf: 2 * leaf, head)
    np.testing.assert_allclose(doubled(2 * Z), head(Z), rtol=1e-5)
    model = jc.Chain(jax.tree_util.Partial(lambda x: x.reshape(len(x), -1)), head)
    assert model(jnp.ones((3, 1, 6, 1))).shape == (3, 4)


def test_separation_in_closed_form():
    found = separation(5 * simplex(4, 3))
    edge = 5 * np.sqrt(2 + 2 / 3)
    assert found.min_l2 == pytest.approx(edge, rel=1e-6)
    assert found.mean_l2 == pytest.approx(edge, rel=1e-6)
    assert found.min_angle == pytest.approx(np.arccos(-1 / 3), rel=1e-6)
    assert found.mean_angle == pytest.approx(np.arccos(-1 / 3), rel=1e-6)
    assert found.self_classified == dict.fromkeys(RULES, 1.0)
    found = separation(np.array([[1.0, 0.0], [0.0, 3.0], [4.0, 3.0]], np.float32))
    assert (found.min_linf, found.mean_linf) == pytest.approx((3, 10 / 3))
    l2 = np.sqrt([10, 18, 16])
    assert (found.min_l2, found.mean_l2) == pytest.approx((l2.min(), l2.mean()))
    angles = np.arccos([0, 0.8, 0.6])
    assert (found.min_angle, found.mean_angle) == pytest.approx((angles.min(), angles.mean()))
    # <p_0, p_2> = 4 and <p_1, p_2> = 9 = <p_1, p_1>, a tie.
    assert found.self_classified["inner_product"] == pytest.approx(1 / 3)
    assert found.self_classified["cosine"] == 1
    # Two that coincide are classified as neither.
    found = separation(np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], np.float32))
    assert found.self_classified == dict.fromkeys(RULES, pytest.approx(1 / 3))
    assert found.min_linf == found.min_l2 == found.min_angle == 0


def test_cosines_of_very_long_and_very_short_embeddings():
    head = PrototypeHead(jnp.asarray(P), "cosine")
    for scale in (1e-30, 1e-10, 1e10, 1e30):
        np.testing.assert_allclose(head(np.float32(scale) * Z), head(Z), atol=1e-6)
        slope = jax.grad(lambda z: head(z)[:, 0].sum())
        longer = scale * slope(np.float32(scale) * Z)
        np.testing.assert_allclose(longer, slope(jnp.asarray(Z)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: PrototypeHead(jnp.ones((1, 3))), ValueError, "`prototypes` must have the shape"),
        (lambda: PrototypeHead(jnp.full((2, 3), jnp.nan)), ValueError, "`prototypes` must be fin"),
        (lambda: PrototypeHead(jnp.asarray(P), temperature=0.0), ValueError, "`temperature` must"),
        (lambda: PrototypeHead(jnp.asarray(P))(Z[:, :5]), ValueError, "size 6, got .30, 5."),
        (lambda: separation(np.zeros((3, 2), np.float32)), ValueError, "`prototypes` must not be"),
        (lambda: separation(np.float32([[1, 0], [0, 0]])), ValueError, "must not be.* number 1 is"),
        (lambda: separation(np.ones((1, 3), np.float32)), ValueError, "n at least 2, got .1, 3."),
        (lambda: separation(np.eye(3, dtype=int)), TypeError, "`prototypes` must be floating po"),
        (lambda: separation(np.full((2, 2), np.inf)), ValueError, "`prototypes` must be finite"),
        (lambda: separation(np.ones(3, np.float32)), ValueError, "`prototypes` must have the sh"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_an_unknown_rule():
    with pytest.raises((ValueError, jaxtyping.TypeCheckError), match="rule"):
        PrototypeHead(jnp.asarray(P), "dot")
