"""Objectives on softmax regression, and their losses and gradients by NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from training_problems import Softmax

import jaxclus as jc
from jaxclus.training.objectives import (
    Adversarial,
    FreeAdversarial,
    TrainingModel,
    WrappedState,
)

BALL = jc.Linf(0.1)
GROUPS = (("round", (0, 2, 3)), ("straight", (1, 4)))
_RNG = np.random.default_rng(0)
WEIGHT = _RNG.normal(size=(8, 5))
X = _RNG.uniform(size=(6, 2, 4, 1)).astype(np.float32)
X_ADV = np.clip(X + _RNG.uniform(-0.1, 0.1, X.shape), 0, 1).astype(np.float32)
Y = _RNG.integers(0, 5, 6)
KEYS = jax.random.split(jax.random.key(0), 6)
PGD_AT = Adversarial(jc.attacks.PGD(BALL, steps=2))
FREE = FreeAdversarial(BALL, replays=3, step_size=0.06)


def random_images(*shape):
    return np.random.default_rng(1).uniform(size=shape).astype(np.float32)


def in_training(network):
    graph, params, stats = nnx.split(
        nnx.view(network, use_running_average=False, raise_if_not_found=False),
        nnx.Param,
        nnx.BatchStat,
    )
    return graph, nnx.to_pure_dict(params), nnx.to_pure_dict(stats)


def loss_and_gradient(objective, network, x=X, x_adv=X_ADV, y=Y):
    """The outcome and the gradient with respect to the parameters, and the statistics after."""
    graph, params, stats = in_training(network)

    @jax.jit
    def compute(params):
        def loss(params):
            model = TrainingModel(graph, params, stats)
            batch = map(jnp.asarray, (x, x_adv, y))
            state = WrappedState((), WrappedState((), ()))  # also for one in another
            found = objective.loss(model, *batch, KEYS, state)
            return found.loss, (found, model.stats)

        return jax.grad(loss, has_aux=True)(params)

    gradient, (found, stats) = compute(params)
    return found, gradient, stats


def assert_loss_and_gradient(objective, reference):
    """Of softmax regression at X_ADV, against a loss of its weights in float64."""
    found, gradient, _ = loss_and_gradient(objective, Softmax(WEIGHT))
    assert found.loss == pytest.approx(reference(WEIGHT), rel=1e-5)
    wanted = numeric_gradient(reference, WEIGHT)
    np.testing.assert_allclose(gradient["weight"], wanted, atol=1e-5 * np.abs(wanted).max())
    np.testing.assert_allclose(found.logits, logits_of(X_ADV), rtol=1e-5, atol=1e-6)
    right = logits_of(X_ADV).argmax(axis=1) == Y
    assert found.metrics["accuracy"] == pytest.approx(right.mean())


def numeric_gradient(function, at, h=1e-6):
    """Central differences in float64."""
    found = np.zeros_like(at)
    for place in np.ndindex(at.shape):
        for sign in (1, -1):
            moved = at.copy()
            moved[place] += sign * h
            found[place] += sign * function(moved) / (2 * h)
    return found


def softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def logits_of(x, weight=WEIGHT):
    return np.asarray(x, np.float64).reshape(len(x), -1) @ weight


def cross_entropy(z):
    return -np.log(softmax(z)[np.arange(6), Y])


def kl(z, z_adv):
    p, q = softmax(z), softmax(z_adv)
    return (p * (np.log(p) - np.log(q))).sum(axis=1)


def both(weight):
    """Logits of X and of X_ADV."""
    return logits_of(X, weight), logits_of(X_ADV, weight)


def trades(z, z_adv, beta):
    return cross_entropy(z).mean() + beta * kl(z, z_adv).mean()
