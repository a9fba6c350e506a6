import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from clustr_problems import scores
from scipy.special import logsumexp, softmax

import jaxclus as jc
from jaxclus.clustr import ClusterClassifier

CLASSES = (0, 0, 1, 1, 2, 2, 2)
_RNG = np.random.default_rng(0)
CENTRES = _RNG.standard_normal((7, 5)).astype(np.float32) * 2
H = _RNG.standard_normal((40, 5)).astype(np.float32) * 2


def head(variance=1.5, nearest=None):
    return ClusterClassifier(jnp.asarray(CENTRES), CLASSES, variance, nearest)


def log_sums(h, variance):
    squares = np.sum((h[:, None].astype(float) - CENTRES[None]) ** 2, axis=2)
    return np.stack(
        [logsumexp(-squares[:, np.equal(CLASSES, c)] / (2 * variance), axis=1) for c in range(3)], 1
    )


@pytest.mark.parametrize("variance", [0.3, 1.5, 20.0])
def test_logits_are_the_logarithms_of_the_sums(variance):
    np.testing.assert_allclose(head(variance)(H), log_sums(H, variance), rtol=2e-5)


@pytest.mark.parametrize("nearest", [1, 3, 7, None])
def test_scores_equal_the_specification(nearest):
    found = head(nearest=nearest)
    wanted = scores(H, CENTRES, CLASSES, 1.5, nearest or 7)
    np.testing.assert_allclose(found.scores(H), wanted, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(found.score_classifier(H), wanted, rtol=1e-4, atol=1e-7)
    shares = wanted / wanted.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found.probabilities(H), shares, rtol=1e-4, atol=1e-6)


def test_scores_saturate_far_away_and_logits_do_not():
    far = jnp.asarray(H[:4] * 200)
    assert not np.asarray(head().scores(far)).any()
    wanted = softmax(log_sums(np.asarray(far), 1.5), axis=1)
    np.testing.assert_allclose(head().probabilities(far), wanted, atol=2e-2)
    slope = jax.grad(lambda h: head(nearest=2).probabilities(h)[:, 0].sum())(far)
    assert np.isfinite(slope).all()
    np.testing.assert_array_equal(head()(far).argmax(1), log_sums(np.asarray(far), 1.5).argmax(1))

    def loss(logits_of, h):
        return jc.losses.cross_entropy(logits_of(h), jnp.argmin(head()(far), axis=1)).sum()

    gone = jax.grad(lambda h: loss(head().score_classifier, h))(far)
    left = jax.grad(lambda h: loss(head(), h))(far)
    assert not np.asarray(gone).any()
    assert np.isfinite(left).all() and np.abs(left).max(axis=1).min() > 0.1


def test_ties_count_as_many_clusters_as_asked_for():
    tied = ClusterClassifier(jnp.ones((4, 2)), (0, 1, 2, 3), 1.0, nearest=2)
    np.testing.assert_allclose(tied.scores(jnp.ones((1, 2))), [[1, 1, 0, 0]], atol=1e-6)


def test_a_pytree_that_shares_programs():
    traces = []

    @jax.jit
    def logits(model, h):
        traces.append(h.shape)
        return model(h)

    logits(head(1.0), H)
    logits(ClusterClassifier(jnp.asarray(CENTRES + 1), CLASSES, 2.0), H)
    assert len(traces) == 1
    assert len(jax.tree.leaves(head())) == 2


def test_in_a_chain_with_a_network():
    network = jc.models.create("cnn", 3, (8, 8, 1), jax.random.key(0), hidden=5)
    x = jax.random.uniform(jax.random.key(1), (6, 8, 8, 1))
    model = jc.Chain(jc.models.features(network), head())
    np.testing.assert_allclose(model(x), head()(network.features(x)), rtol=1e-6)
    x_adv = jc.attacks.PGD(jc.Linf(0.1), steps=3)(jax.random.key(2), model, x, model(x).argmax(1))
    assert np.abs(x_adv - x).max() > 0.05


@pytest.mark.parametrize(
    "change, message",
    [
        ({"centres": np.zeros(3, np.float32)}, "`centres` must have the shape"),
        ({"centres": np.full((7, 5), np.nan, np.float32)}, "`centres` must be finite"),
        ({"centre_classes": (0, 1)}, r"`centre_classes` must have the shape \(7,\)"),
        ({"centre_classes": (0, 0, 1, 1, 3, 3, 3)}, r"`centre_classes` .* \[2\] have no centre"),
        ({"variance": 0.0}, "`variance` must be a finite number above 0"),
        ({"nearest": 0}, "`nearest` must be at least 1"),
        ({"nearest": 8}, r"`nearest` must be in \[1, 7\]"),
    ],
)
def test_bad_heads_are_refused(change, message, monkeypatch):
    good = {"centres": CENTRES, "centre_classes": CLASSES, "variance": 1.0, "nearest": None}
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises((TypeError, ValueError), match=message):
        ClusterClassifier(**(good | change))


@pytest.mark.parametrize(
    "h, message",
    [
        (np.zeros((2, 4), np.float32), "`embeddings` must have the centres' size 5"),
        (np.zeros((2, 5), int), "`embeddings` must be floating point"),
        (np.full((2, 5), np.nan, np.float32), "`embeddings` must be finite"),
    ],
)
def test_bad_embeddings_are_refused(h, message):
    with pytest.raises((TypeError, ValueError), match=message):
        head()(h)
