"""The published mistakes of QTRADES, and BatchNorm in its passes, against NumPy in float64."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from clustr_problems import nearest_own, scores
from flax import nnx
from objective_problem import (
    BALL,
    CLASSES,
    CLEAN,
    DIM,
    IMAGES,
    KEY,
    KEYS,
    KINDS,
    LABELS,
    STATE,
    TO,
    B,
    Embedding,
    N,
    X,
    assert_gradient,
    embed,
    log_softmax,
    loss_and_gradient,
    numeric,
    scores_of,
)

import jaxclus as jc
from jaxclus.training.objectives import TrainingModel


def test_the_published_target_is_0_where_all_scores_underflow():
    head = dataclasses.replace(STATE.head, variance=jnp.float32(1e-4))
    assert (np.asarray(head.scores(embed(X).astype("f4"))) == 0).all()
    state = dataclasses.replace(STATE, head=head)
    for as_published, wanted in ((False, np.log(CLASSES)), (True, 0)):
        objective = dataclasses.replace(KINDS["qtrades"], as_published=as_published)
        found, _ = loss_and_gradient(objective, state)
        assert found.metrics["consistency"] == pytest.approx(wanted, rel=1e-5)


def test_the_published_qtrades_leaks_the_adversarys_gradient():
    published = dataclasses.replace(KINDS["qtrades"], as_published=True)
    assert published.perturb(KEYS, Embedding(), CLEAN, TO, STATE) is CLEAN
    found, gradient = loss_and_gradient(published)
    # A network without BatchNorm: its adversary in train mode is the one in eval mode.
    x_adv = np.asarray(KINDS["qtrades"].perturb(KEYS, Embedding(), CLEAN, TO, STATE))
    right, without = loss_and_gradient(KINDS["qtrades"], x_adv=x_adv)
    assert found.loss == pytest.approx(float(right.loss), rel=1e-5)
    start, target = np.asarray(BALL.random_start(KEYS, CLEAN)), scores_of(X)
    target = target / target.sum(axis=1, keepdims=True)

    def leak(w):
        return -(target * log_softmax(scores_of(start, w))).sum(axis=1).mean()

    assert_gradient(gradient - without, leak, share=0.02)


class Normed(Embedding):
    """An embedding with BatchNorm."""

    def __init__(self):
        super().__init__()
        self.norm = jc.models.BatchNorm(DIM, rngs=nnx.Rngs(0))

    def body(self, x):
        return self.norm(super().body(x))


@pytest.mark.parametrize("as_published, passes", [(False, 2), (True, 3)])
def test_passes_through_batch_norm(as_published, passes):
    """The adversary in eval mode leaves the statistics alone; the published one moves them."""
    network = Normed()
    objective = dataclasses.replace(KINDS["qtrades"], as_published=as_published)
    state = objective.init(KEY, network, jnp.asarray(IMAGES), jnp.asarray(LABELS), B)
    assert network.norm.mean[...].tolist() == [0] * DIM  # clusters are found in eval mode
    np.testing.assert_allclose(
        state.head.centres[0], embed(IMAGES / 255)[np.asarray(state.members.cluster) == 0].mean(0),
        rtol=1e-3, atol=1e-4,
    )  # fmt: skip
    h = embed(IMAGES / 255)
    assert N <= 256  # one batch: in train mode it has mean 0 and deviation 1
    seen = (h - h.mean(axis=0)) / np.sqrt(h.var(axis=0) + 1e-5) if as_published else h
    own = nearest_own(seen, LABELS, np.asarray(state.head.centres), state.head.centre_classes)
    assert float(state.head.variance) == pytest.approx(own.sum() / (N - 1), rel=0.02)
    train = nnx.view(network, use_running_average=False, raise_if_not_found=False)
    graph, params, stats = nnx.split(train, nnx.Param, nnx.BatchStat)
    model = TrainingModel(graph, nnx.to_pure_dict(params), nnx.to_pure_dict(stats))
    found = objective.loss(model, CLEAN, CLEAN, TO, KEYS, state)
    # Each pass of means m leaves 0.9 of the old ones; the images are nearly the same in all.
    share = np.asarray(model.stats["norm"]["mean"]) / embed(X).mean(axis=0)
    assert np.isfinite(found.loss)
    assert share.mean() == pytest.approx(1 - 0.9**passes, abs=0.02)


def test_the_published_adversary_sees_the_statistics_of_its_batch():
    """One step in train mode, where the images of a batch depend on each other."""
    objective = dataclasses.replace(KINDS["qtrades"], as_published=True)
    network, centres, variance = Normed(), np.random.default_rng(1).normal(size=(8, DIM)), 2.0
    head = dataclasses.replace(
        STATE.head, centres=jnp.asarray(centres, jnp.float32), variance=jnp.float32(variance)
    )
    state = dataclasses.replace(STATE, head=head)

    def normed(x):
        h = embed(x)
        return (h - h.mean(axis=0)) / np.sqrt(h.var(axis=0) + network.norm.epsilon)

    def seen(x):
        return scores(normed(x), centres, head.centre_classes, variance, 8)

    target = seen(X) / seen(X).sum(axis=1, keepdims=True)

    def consistency(x):
        return -(target * log_softmax(seen(x))).sum(axis=1)

    start = np.asarray(BALL.random_start(KEYS, CLEAN), np.float64)
    slope = numeric(lambda x: consistency(x).sum(), start)
    x_adv = np.clip(start + 0.125 * np.sign(slope), X - 0.1, X + 0.1).clip(0, 1)
    train = nnx.view(network, use_running_average=False, raise_if_not_found=False)
    graph, params, stats = nnx.split(train, nnx.Param, nnx.BatchStat)
    model = TrainingModel(graph, nnx.to_pure_dict(params), nnx.to_pure_dict(stats))
    found = objective.loss(model, CLEAN, CLEAN, TO, KEYS, state)
    assert found.metrics["consistency"] == pytest.approx(consistency(x_adv).mean(), rel=1e-4)
    # In eval mode the adversary finds other images.
    honest = dataclasses.replace(objective, as_published=False)
    other = np.asarray(honest.perturb(KEYS, network, CLEAN, TO, state))
    assert abs(consistency(other).mean() / consistency(x_adv).mean() - 1) > 5e-3
