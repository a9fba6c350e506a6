"""Multi-targeted PGD on linear models, where the optimum for every target is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import jaxclus as jc
from jaxclus.attacks import PGD
from jaxclus.attacks._multi_targeted import MultiTargetedPGD
from jaxclus.threat import L2, Linf, image_keys

KEY = jax.random.key(0)
SHAPE, CLASSES, SIZE = (4, 3, 2), 5, 6


def predict(params, x):
    return x.reshape(x.shape[0], -1) @ params["w"] + params["b"]


def problem(lead=50.0, seed=0):
    """A linear model, images whose class 0 leads by about that much, and the weights."""
    rng = np.random.default_rng(seed)
    w = rng.choice([-1, 1], (24, CLASSES)) * rng.uniform(0.1, 1, (24, CLASSES))
    b = np.zeros((1, CLASSES))
    b[0, 0] = lead
    model = Partial(predict, {"w": jnp.float32(w), "b": jnp.float32(b)})
    x = jnp.float32(rng.uniform(size=(SIZE, *SHAPE)))
    return model, x, jnp.zeros(SIZE, jnp.int32), w


def optimum(x, w, target, eps):
    """The largest z_t - z_0 in the Linf ball and the box, but for the lead."""
    push = (w[:, target] - w[:, 0]).reshape(1, *SHAPE)
    best = np.clip(np.float64(x) + eps * np.sign(push), 0, 1)
    return (best * push).sum(axis=(1, 2, 3))


@pytest.mark.parametrize("targets, restarts, rounds", [(9, 1, 4), (2, 1, 2), (3, 2, 6)])
def test_each_round_maximises_its_target(targets, restarts, rounds):
    """By clean logit, the highest but the first; the restarts of a target follow each other."""
    model, x, y, w = problem()
    attack = MultiTargetedPGD(Linf(0.1), steps=5, targets=targets, restarts=restarts)
    assert attack.rounds(CLASSES) == rounds
    result = attack.run(KEY, model, x, y, trace=True)
    assert result.trace.shape == (rounds, 6, SIZE) and not np.any(result.success)
    order = np.argsort(-np.float64(model(x)), axis=1)
    assert np.all(order[:, 0] == 0)
    best = np.full(SIZE, -np.inf)
    for number in range(rounds):
        for image in range(SIZE):
            target = order[image, 1 + number // restarts]
            expected = optimum(x, w, target, 0.1)[image] - 50
            np.testing.assert_allclose(result.trace[number, -1, image], expected, atol=1e-4)
            best[image] = max(best[image], expected)
    # The candidate is that of the best round.
    np.testing.assert_allclose(jc.losses.margin(model(result.x_adv), y), best, atol=1e-4)
    starts = result.trace[:, 0]
    assert len(np.unique(starts)) == starts.size  # every round has a start of its own
    np.testing.assert_array_equal(result.queries.gradient, 5 * rounds)
    np.testing.assert_array_equal(result.queries.forward, 6 * rounds + 2)


def test_finds_what_one_loss_misses():
    """The margin leads to the class that is next by logit, which cannot be reached from there."""

    def fenced(one, x):
        v = x[:, 0, 0, 0]
        return jnp.stack([0 * v + one, 0.9 + 0.09 * v, 1.05 - 0.5 * v], axis=-1)

    model, threat = Partial(fenced, jnp.float32(1.0)), Linf(0.5)
    x, y = jnp.full((32, 1, 1, 1), 0.5), jnp.zeros(32, jnp.int32)
    single = PGD(threat, steps=5, loss="margin").run(KEY, model, x, y).success
    assert 0 < np.sum(single) < 16  # those that start beyond the point where the two cross
    assert np.all(MultiTargetedPGD(threat, steps=5).run(KEY, model, x, y).success)


def test_success_of_any_class_counts():
    """On the way to class 1, which can never win, class 2 overtakes the label."""

    def crossing(one, x):
        v = x[:, 0, 0, 0]
        return jnp.stack([0 * v + one, 0.9 + 0.09 * v, 2 * v - 0.7], axis=-1)

    x, y = jnp.full((4, 1, 1, 1), 0.5), jnp.zeros(4, jnp.int32)
    model = Partial(crossing, jnp.float32(1.0))
    result = MultiTargetedPGD(Linf(0.4), steps=5, targets=1).run(KEY, model, x, y)
    assert np.all(result.success) and np.all(np.argmax(model(result.x_adv), axis=1) == 2)


def test_two_classes_and_other_threats():
    """One target: the same images as PGD on the margin."""
    rng = np.random.default_rng(0)
    model = Partial(predict, {"w": jnp.float32(rng.normal(size=(24, 2))), "b": jnp.zeros((1, 2))})
    x = jnp.float32(rng.uniform(0.3, 0.7, size=(SIZE, *SHAPE)))
    y = jnp.argmax(model(x), axis=-1).astype(jnp.int32)
    attack = MultiTargetedPGD(L2(0.02), steps=4)
    assert attack.rounds(2) == 1
    result = attack.run(KEY, model, x, y)
    expected = PGD(L2(0.02), steps=4, loss="margin").run(KEY, model, x, y)
    np.testing.assert_allclose(result.x_adv, expected.x_adv, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(result.queries.forward, expected.queries.forward)


def test_perturb():
    """All rounds, without verdicts: the candidate of highest loss."""
    model, x, y, w = problem()
    attack = MultiTargetedPGD(Linf(0.1), steps=5)
    keys = image_keys(KEY, jnp.arange(SIZE))
    x_adv = jax.jit(attack.perturb)(keys, model, x, y)
    np.testing.assert_allclose(x_adv, attack(KEY, model, x, y), rtol=0, atol=1e-6)
    best = np.max([optimum(x, w, target, 0.1) for target in range(1, CLASSES)], axis=0) - 50
    np.testing.assert_allclose(jc.losses.margin(model(x_adv), y), best, atol=1e-4)


@pytest.mark.parametrize(
    "name, value, error, message",
    [
        ("threat", 0.1, TypeError, "threat"),
        ("steps", 0, ValueError, "^`steps` must be at least 1, got 0"),
        ("targets", 0, ValueError, "^`targets` must be at least 1, got 0"),
        ("restarts", 0, ValueError, "^`restarts` must be at least 1, got 0"),
        ("step_size", 0.0, ValueError, "^`step_size` must be a finite number above 0, got 0.0"),
    ],
)
def test_bad_hyper_parameters(name, value, error, message):
    with pytest.raises(error, match=message):
        MultiTargetedPGD(**{"threat": Linf(0.1), name: value})
