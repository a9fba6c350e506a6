"""ClusTR's objectives on a linear embedding, and references in float64."""

import jax
import jax.numpy as jnp
import numpy as np
from clustr_problems import scores
from flax import nnx

import jaxclus as jc
from jaxclus.clustr import QTRADES, ClusTR, ClusTRTRADES, FreeClusTR
from jaxclus.training.objectives import TrainingModel

ONE = jax.devices()[:1]
BALL = jc.Linf(0.1)
CLASSES, PER_CLASS, SHAPE, DIM = 4, 2, (2, 4, 1), 5
N, B, M = 96, 24, 4
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (N, *SHAPE), np.uint8)
LABELS = (np.arange(N) % CLASSES).astype(np.int32)
WEIGHT = RNG.normal(size=(8, DIM)).astype(np.float32)
X = RNG.uniform(size=(B, *SHAPE)).astype(np.float32)
X_ADV = np.clip(X + RNG.uniform(-0.1, 0.1, X.shape), 0, 1).astype(np.float32)
IDS = np.repeat(np.arange(M), B // M)
Y = np.array([2, 0, 3, 1])[IDS].astype(np.int32)
CLEAN, TO = jnp.asarray(X), jnp.asarray(Y)
KEYS = jax.random.split(jax.random.key(1), B)
KEY = jax.random.key(0)
SETTINGS = {"clusters_per_class": PER_CLASS, "clusters_per_batch": M, "alpha": 1.0}
KINDS = {
    "clustr": ClusTR(**SETTINGS),
    "qtrades": QTRADES(**SETTINGS, threat=BALL, beta=2.0),
    "trades": ClusTRTRADES(**SETTINGS, threat=BALL, beta=2.0, steps=3),
    "free": FreeClusTR(**SETTINGS, threat=BALL, replays=2),
}


class Embedding(jc.models.Classifier):
    """h(x) = x W."""

    def __init__(self, weight=WEIGHT):
        super().__init__(DIM, CLASSES, 1, mean=None, std=None, dtype=jnp.float32, rngs=nnx.Rngs(0))
        self.weight = nnx.Param(jnp.asarray(weight, jnp.float32))

    def body(self, x):
        return x.reshape(len(x), -1) @ self.weight[...]


def state_of(objective):
    return objective.init(KEY, Embedding(), jnp.asarray(IMAGES), jnp.asarray(LABELS), B)


STATE = state_of(KINDS["clustr"])
CENTRES, VARIANCE = np.asarray(STATE.head.centres, np.float64), float(STATE.head.variance)


def embed(x, weight=WEIGHT):
    return np.asarray(x, np.float64).reshape(len(x), -1) @ np.asarray(weight, np.float64)


def scores_of(x, weight=WEIGHT):
    return scores(embed(x, weight), CENTRES, STATE.head.centre_classes, VARIANCE, 8)


def log_softmax(z):
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def gap(x, z, weight=WEIGHT):
    """H(p(x), softmax(z)) [b]."""
    target = scores_of(x, weight)
    return -(target / target.sum(axis=1, keepdims=True) * log_softmax(z)).sum(axis=1)


def loss_and_gradient(objective, state=None, x_adv=X_ADV):
    network = Embedding()
    graph, params, stats = nnx.split(network, nnx.Param, nnx.BatchStat)
    state = state or STATE

    def loss(params):
        model = TrainingModel(graph, params, nnx.to_pure_dict(stats))
        found = objective.loss(model, CLEAN, jnp.asarray(x_adv), TO, KEYS, state)
        return found.loss, found

    gradient, found = jax.grad(loss, has_aux=True)(nnx.to_pure_dict(params))
    return found, np.asarray(gradient["weight"])


def numeric(function, at=WEIGHT, h=1e-5):
    at, found = np.asarray(at, np.float64), np.zeros(np.shape(at))
    for place in np.ndindex(at.shape):
        moved = np.zeros(at.shape)
        moved[place] = h
        found[place] = (function(at + moved) - function(at - moved)) / (2 * h)
    return found


def assert_gradient(found, reference, share=2e-3):
    wanted = numeric(reference)
    assert np.abs(wanted).max() > 5e-4
    np.testing.assert_allclose(found, wanted, atol=share * np.abs(wanted).max())
