"""Training onto prototypes: losses, gradients and adversaries against NumPy."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxclus as jc
from jaxclus.prototypes import (
    AdversarialPrototypes,
    Generator,
    PrototypeHead,
    PrototypeTRADES,
    PrototypeTraining,
)
from jaxclus.prototypes._head import RULES
from jaxclus.training.objectives import TrainingModel

ONE = jax.devices()[:1]
BALL = jc.Linf(0.1)
KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((8, 5)).astype(np.float32)
P = RNG.standard_normal((4, 5)).astype(np.float32)
X = RNG.uniform(size=(12, 2, 4, 1)).astype(np.float32)
X_ADV = np.clip(X + RNG.uniform(-0.1, 0.1, X.shape), 0, 1).astype(np.float32)
Y = (np.arange(12) % 4).astype(np.int32)


class Embedding(jc.models.Classifier):
    """h(x) = x W."""

    def __init__(self):
        super().__init__(5, 4, 1, mean=None, std=None, dtype=jnp.float32, rngs=nnx.Rngs(0))
        self.weight = nnx.Param(jnp.asarray(WEIGHT))

    def body(self, x):
        return x.reshape(len(x), -1) @ self.weight[...]


def embed(x, weight):
    return np.asarray(x, np.float64).reshape(len(x), -1) @ np.asarray(weight, np.float64)


def cosine_distances(a, b):
    return 1 - (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


# (embeddings [b, d], targets [b, d]) -> the loss.
REFERENCES = {
    ("linf", False): lambda h, p: np.abs(h - p).max(axis=1).mean(),
    ("linf_sum", False): lambda h, p: np.abs(h - p).max(axis=1).sum(),
    ("linf", True): lambda h, p: np.abs(h - p + 1e-6).max(axis=1).mean(),
    ("linf_sum", True): lambda h, p: np.abs(h - p + 1e-6).max(axis=1).sum(),
    ("cosine", False): lambda h, p: cosine_distances(h, p).mean(),
    ("cosine_squared", False): lambda h, p: (cosine_distances(h, p) ** 2).sum(),
    ("cosine", True): lambda h, p: cosine_distances(h.T, p.T).mean(),
    ("cosine_squared", True): lambda h, p: (cosine_distances(h.T, p.T) ** 2).sum(),
    ("l2", False): lambda h, p: ((h - p) ** 2).sum(axis=1).mean() / 2,
}


def temperature():
    """At the prototypes the inner products lead so that the largest probability is 0.9."""
    ranked = np.sort(P @ P.T.astype(np.float64), axis=1)
    return np.quantile(ranked[:, -1] - ranked[:, -2], 0.95) / np.log(27)


def divergence(h, h_adv):
    def log_softmax(h):
        z = h @ P.T.astype(np.float64) / temperature()
        return z - np.log(np.exp(z).sum(axis=1, keepdims=True))

    clean, attacked = log_softmax(h), log_softmax(h_adv)
    return (np.exp(clean) * (clean - attacked)).sum(axis=1).mean()


def loss_and_gradient(objective):
    graph, params, stats = nnx.split(Embedding(), nnx.Param, nnx.BatchStat)

    def loss(params):
        model = TrainingModel(graph, params, nnx.to_pure_dict(stats))
        images = jnp.asarray(X), jnp.asarray(X_ADV), jnp.asarray(Y)
        keys = jax.random.split(KEY, len(X))
        found = objective.loss(model, *images, keys, PrototypeHead(jnp.asarray(P)))
        return found.loss, found

    gradient, found = jax.grad(loss, has_aux=True)(nnx.to_pure_dict(params))
    return found, np.asarray(gradient["weight"])


def assert_gradient(found, reference):
    wanted, step = np.zeros(WEIGHT.shape), 1e-6
    for place in np.ndindex(WEIGHT.shape):
        move = np.zeros(WEIGHT.shape)
        move[place] = step
        wanted[place] = (reference(WEIGHT + move) - reference(WEIGHT - move)) / (2 * step)
    np.testing.assert_allclose(found, wanted, atol=2e-3 * np.abs(wanted).max())


@pytest.mark.parametrize("distance, as_published", REFERENCES)
def test_the_loss_is_that_of_the_specification(distance, as_published):
    objective = PrototypeTraining(distance=distance, as_published=as_published)
    found, gradient = loss_and_gradient(objective)
    reference = REFERENCES[distance, as_published]
    assert found.loss == pytest.approx(reference(embed(X_ADV, WEIGHT), P[Y]), rel=1e-4)
    assert_gradient(gradient, lambda weight: reference(embed(X_ADV, weight), P[Y]))
    scores = embed(X_ADV, WEIGHT) @ P.T
    np.testing.assert_allclose(found.logits, scores, rtol=1e-4, atol=1e-4)
    assert found.metrics["accuracy"] == pytest.approx((scores.argmax(axis=1) == Y).mean())


@pytest.mark.parametrize(
    "distance, as_published",
    [("l2", False), ("linf_sum", False), ("cosine_squared", False), ("cosine", True)],
)
def test_trades_adds_the_divergence(distance, as_published):
    objective = PrototypeTRADES(distance=distance, as_published=as_published, beta=3.0)
    found, gradient = loss_and_gradient(objective)
    natural = REFERENCES[distance, as_published]
    count = len(X) if distance in ("linf_sum", "cosine_squared") else 1  # sums for means

    def reference(weight):
        h, h_adv = embed(X, weight), embed(X_ADV, weight)
        return natural(h, P[Y]) + 3 * count * divergence(h, h_adv)

    assert found.loss == pytest.approx(reference(WEIGHT), rel=1e-4)
    assert_gradient(gradient, reference)
    assert found.metrics["natural_loss"] == pytest.approx(natural(embed(X, WEIGHT), P[Y]), rel=1e-4)
    scores = embed(X_ADV, WEIGHT) @ P.T / temperature()
    np.testing.assert_allclose(found.logits, scores, rtol=1e-3, atol=1e-4)


def perturbed(objective):
    keys = jax.random.split(KEY, len(X))
    head = PrototypeHead(jnp.asarray(P))
    x, y = jnp.asarray(X), jnp.asarray(Y)
    return np.asarray(objective.perturb(keys, Embedding(), x, y, head))


@pytest.mark.parametrize("distance", ["linf", "linf_sum", "cosine", "cosine_squared", "l2"])
def test_the_adversary_moves_away_from_the_prototype(distance):
    x_adv = perturbed(AdversarialPrototypes(distance=distance, threat=BALL, steps=5))
    assert np.abs(x_adv - X).max() <= 0.1 + 1e-6 and 0 <= x_adv.min() and x_adv.max() <= 1
    one = "linf" if distance == "linf_sum" else distance
    losses = [
        np.array([REFERENCES[one, False](h[None], p[None]) for h, p in zip(hs, P[Y], strict=True)])
        for hs in (embed(X, WEIGHT), embed(x_adv, WEIGHT))
    ]
    assert np.all(losses[1] > losses[0])
    if distance == "l2":  # a convex function of x: the best corner is known
        best = max_l2(X, 0.1)
        assert np.median(losses[1] / best) > 0.95


def max_l2(x, eps):
    """The largest |h - p|^2 / 2 of all corners of the box around each image."""
    low, high = (np.clip(x + s * eps, 0, 1).reshape(len(x), -1) for s in (-1, 1))
    signs = np.array(list(np.ndindex((2,) * 8)), bool)
    corners = np.where(signs[None], high[:, None], low[:, None]).astype(np.float64)
    h = corners @ WEIGHT.astype(np.float64)
    return ((h - P[Y][:, None]) ** 2).sum(axis=2).max(axis=1) / 2


def test_the_adversary_of_trades_raises_the_divergence():
    x_adv = perturbed(PrototypeTRADES(threat=BALL, steps=5))
    assert np.abs(x_adv - X).max() <= 0.1 + 1e-6
    h = embed(X, WEIGHT)
    gaps = [divergence(h, embed(moved, WEIGHT)) for moved in (X_ADV, x_adv)]
    assert gaps[1] > 2 * gaps[0] > 0


def test_the_adversaries_move_in_l2_balls():
    away = np.random.default_rng(1).standard_normal((2000, *X.shape))
    away *= 0.2 / np.linalg.norm(away.reshape(2000, 12, -1), axis=2)[:, :, None, None, None]
    random, h = np.clip(X + away, 0, 1), embed(X, WEIGHT)

    def distances(x):
        return ((embed(x, WEIGHT) - P[Y]) ** 2).sum(axis=1)

    def divergences(x):
        h_adv = embed(x, WEIGHT)
        return np.array([divergence(h[[i]], h_adv[[i]]) for i in range(12)])

    # The divergence has several maxima, of which the adversary climbs one.
    trials = ((AdversarialPrototypes, distances, 1.0), (PrototypeTRADES, divergences, 0.9))
    for kind, gain, share in trials:
        x_adv = perturbed(kind(distance="l2", threat=jc.L2(0.2), steps=20))
        norms = np.linalg.norm((x_adv - X).reshape(12, -1), axis=1)
        assert norms.max() <= 0.2 + 1e-6 and 0 <= x_adv.min() and x_adv.max() <= 1
        assert np.all(gain(x_adv) > np.quantile([gain(x) for x in random], share, axis=0))


@pytest.mark.parametrize("rule", RULES)
def test_the_divergence_is_at_a_temperature_that_the_prototypes_set(rule):
    """One of them is long, and by inner products others are taken for it."""
    prototypes = np.where(np.arange(4)[:, None] == 3, 5, 1) * np.abs(P)
    head = PrototypeHead(jnp.asarray(prototypes), rule)
    assert rule != "inner_product" or (prototypes @ prototypes.T).argmax(axis=1)[0] == 3

    def scores(z):
        z, p = np.float64(z)[:, None], np.float64(prototypes)[None]
        if rule == "linf":
            return -np.abs(z - p).max(axis=2)
        if rule == "l2":
            return -np.linalg.norm(z - p, axis=2)
        found = (z * p).sum(axis=2)
        lengths = np.linalg.norm(z, axis=2) * np.linalg.norm(p, axis=2)
        return found / lengths if rule == "cosine" else found

    ranked = np.sort(scores(prototypes), axis=1)
    wanted = np.quantile(ranked[:, -1] - ranked[:, -2], 0.95) / np.log(27)
    graph, params, stats = nnx.split(Embedding(), nnx.Param, nnx.BatchStat)
    model = TrainingModel(graph, nnx.to_pure_dict(params), nnx.to_pure_dict(stats))
    images = jnp.asarray(X), jnp.asarray(X_ADV), jnp.asarray(Y)
    found = PrototypeTRADES(rule=rule).loss(model, *images, jax.random.split(KEY, len(X)), head)
    logits = scores(embed(X_ADV, WEIGHT)) / wanted
    np.testing.assert_allclose(found.logits, logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("generator", get_args(Generator))
def test_the_first_state_is_a_calibrated_head_of_the_generator(generator):
    steps = {} if generator in ("uniform", "simplex", "hadamard") else {"generator_steps": 30}
    objective = PrototypeTraining(generator, **steps, rule="cosine", scale=2.0)
    model = jc.models.create("cnn", 4, (8, 8, 1), KEY, widths=(4,), hidden=8, embedding_size=6)
    images = jnp.asarray(RNG.integers(0, 256, (20, 8, 8, 1), np.uint8))
    labels = jnp.arange(20, dtype=jnp.int32) % 4
    head = objective.init(KEY, model, images, labels, 10)
    make = getattr(jc.prototypes, generator.removesuffix("_mean"), None)
    wanted = {
        "repulsive": lambda: make(KEY, 4, 6, 30),
        "repulsive_mean": lambda: make(KEY, 4, 6, 30, "mean"),
        "uniform": lambda: jc.prototypes.repulsive(KEY, 4, 6, 0),
        "hyperspherical": lambda: make(KEY, 4, 6, 30),
        "simplex": lambda: make(4, 6),
        "hadamard": lambda: make(4, 6),
    }[generator]()
    np.testing.assert_allclose(head.prototypes, 2 * wanted, rtol=1e-6)
    assert head.rule == "cosine"
    ranked = np.sort(head(model.features(jc.data.to_float(images))), axis=1)
    lead = np.quantile(ranked[:, -1] - ranked[:, -2], 0.95)
    assert lead == pytest.approx(np.log(27), rel=1e-3)


def test_bad_arguments():
    with pytest.raises(ValueError, match="`generator_steps` must be at least 0, got -1"):
        PrototypeTraining(generator_steps=-1)
    with pytest.raises(ValueError, match="`generator_steps` must be None for simplex, .* got 5"):
        PrototypeTraining("simplex", generator_steps=5)
    for kind in (PrototypeTraining, PrototypeTRADES):
        with pytest.raises(ValueError, match="`as_published` must be False for l2"):
            kind(distance="l2", as_published=True)
    with pytest.raises(ValueError, match="`labels` must be of at least 2 classes, got 1"):
        net = jc.models.create("cnn", 4, (8, 8, 1), KEY, widths=(4,), embedding_size=5)
        net.head = None
        images = jnp.zeros((4, 8, 8, 1), jnp.uint8)
        PrototypeTraining().init(KEY, net, images, jnp.zeros(4, jnp.int32), 2)
    with pytest.raises(ValueError, match="`scale` must be a finite number above 0, got 0"):
        PrototypeTraining(scale=0.0)
    with pytest.raises(ValueError, match="`steps` must be at least 1, got 0"):
        AdversarialPrototypes(steps=0)
    with pytest.raises(ValueError, match="`beta` must be a finite number of at least 0, got -1"):
        PrototypeTRADES(beta=-1.0)
    with pytest.raises(ValueError, match="`model` must have features .* got 20 of them: `dim` "):
        objective = PrototypeTraining("simplex")
        images = jnp.zeros((4, 8, 8, 1), jnp.uint8)
        labels = jnp.array([0, 1, 2, 29], jnp.int32)
        model = jc.models.create("cnn", 30, (8, 8, 1), KEY, widths=(4,), embedding_size=20)
        objective.init(KEY, model, images, labels, 2)
    with pytest.warns(UserWarning, match="features of at least 0 only"):
        model = jc.models.create("cnn", 4, (8, 8, 1), KEY, widths=(4,), hidden=8)
        PrototypeTraining("simplex").init(
            KEY, model, jnp.zeros((4, 8, 8, 1), jnp.uint8), jnp.arange(4, dtype=jnp.int32), 2
        )
