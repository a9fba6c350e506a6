"""Learned prototypes against NumPy in float64, and whole trainings."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx
from prototype_trainings import DIGITS, HELD_OUT, KEY, ONE, broken_off, train

import jaxclus as jc
from jaxclus.prototypes import LearnedPrototypes, PrototypeHead
from jaxclus.prototypes._learned import Centres, attraction, repulsion
from jaxclus.training import TrainingConfig, fit
from jaxclus.training.objectives import Seen, TrainingModel

RNG = np.random.default_rng(0)
H, OWN, RIVALS = (RNG.normal(size=shape).astype(np.float32) for shape in ((9, 5), (4, 5), (4, 5)))
Y = (np.arange(9) % 3).astype(np.int32)  # class 3 has no images


def pull(h, own):
    return np.square(np.float64(h) - np.float64(own)[Y]).sum(axis=1).mean()


def push(h, rivals):
    found = [
        np.square(np.float64(h[b]) - np.float64(rivals[j])).sum()
        for b in range(9)
        for j in range(4)
        if j != Y[b]
    ]
    return np.mean(found)


def slope(value, at):
    step, found = 1e-5, np.zeros(at.shape)
    for place in np.ndindex(at.shape):
        move = np.zeros(at.shape)
        move[place] = step
        found[place] = (value(at + move) - value(at - move)) / (2 * step)
    return found


@pytest.mark.parametrize(
    "loss, reference, centres", [(attraction, pull, OWN), (repulsion, push, RIVALS)]
)
def test_terms_and_their_gradients(loss, reference, centres):
    h, y, c = jnp.asarray(H), jnp.asarray(Y), jnp.asarray(centres)
    assert loss(h, y, c) == pytest.approx(reference(H, centres), rel=1e-5)
    for argument, at in ((0, H), (2, centres)):
        wanted = slope(lambda v: reference(*((v, centres) if argument == 0 else (H, v))), at)  # noqa: B023
        np.testing.assert_allclose(jax.grad(loss, argument)(h, y, c), wanted, atol=1e-5)


def state(rule="l2"):
    return Centres(PrototypeHead(jnp.asarray(OWN), rule), jnp.asarray(RIVALS))


@pytest.mark.parametrize("rule", ["l2", None])
def test_a_step(rule):
    """The loss with both weights; the centres' own steps, which do not depend on them."""
    objective = LearnedPrototypes(0.3, 0.02, 0.5, 0.1, rule)
    net = jc.models.create("cnn", 4, (8, 8, 1), KEY, widths=(4,), hidden=8, embedding_size=5)
    graph, params, stats = nnx.split(net, nnx.Param, nnx.BatchStat)
    model = TrainingModel(graph, params, stats)
    x = jnp.asarray(RNG.uniform(size=(9, 8, 8, 1)), jnp.float32)
    h, z = np.asarray(net.features(x)), np.asarray(net(x))
    found = objective.loss(model, x, x, jnp.asarray(Y), jax.random.split(KEY, 9), state())
    entropy = np.mean(np.log(np.exp(z - z[np.arange(9), Y][:, None]).sum(axis=1)))
    assert found.loss == pytest.approx(entropy + 0.3 * pull(h, OWN) - 0.02 * push(h, RIVALS), 1e-4)
    assert found.metrics["cross_entropy"] == pytest.approx(entropy, rel=1e-4)
    assert found.metrics["attraction"] == pytest.approx(pull(h, OWN), rel=1e-4)
    assert found.metrics["repulsion"] == pytest.approx(push(h, RIVALS), rel=1e-4)
    nearest = -np.sqrt(np.square(h[:, None] - OWN[None]).sum(axis=2))
    np.testing.assert_allclose(found.logits, z if rule is None else nearest, rtol=1e-4, atol=1e-5)
    seen = Seen(jnp.arange(9), x, x, jnp.zeros_like(x), found.noted)
    new = objective.update(state(), seen)
    np.testing.assert_allclose(
        new.head.prototypes, OWN - 0.5 * slope(lambda w: pull(h, w), OWN), atol=1e-4
    )
    np.testing.assert_allclose(
        new.rivals, RIVALS + 0.1 * slope(lambda v: push(h, v), RIVALS), atol=1e-4
    )
    np.testing.assert_array_equal(new.head.prototypes[3], OWN[3])  # no image pulled it
    assert push(h, np.asarray(new.rivals)) > push(h, RIVALS)
    assert (objective.head(new) is None) == (rule is None)


@pytest.mark.parametrize("rule", ["l2", None])
def test_training_gathers_the_classes(rule, tmp_path):
    """Embeddings are nearer to their own prototype than to others; the model is loaded again."""
    net = jc.models.create("cnn", 10, (8, 8, 1), KEY, widths=(8,), hidden=16, embedding_size=20)
    config = TrainingConfig(epochs=25, batch_size=80, optimizer="adamw", learning_rate=3e-3)
    objective = LearnedPrototypes(0.01, rule=rule)
    run = fit(
        KEY, net, DIGITS, objective, config, validation=HELD_OUT, directory=tmp_path, devices=ONE,
        progress=False,
    )  # fmt: skip
    assert jc.evaluation.correct(run.model, HELD_OUT).mean() > 0.75
    loaded, x = jc.load(tmp_path), jc.data.to_float(HELD_OUT.images)
    np.testing.assert_array_equal(loaded(x), run.model(x))
    assert (jc.models.parts(loaded)[1] is None) == (rule is None)
    first, last = run.history[0], [line for line in run.history if "attraction" in line][-1]
    assert last["attraction"] < first["attraction"]
    # The same run again is read, not trained: prototypes and all.
    again = fit(
        KEY, net, DIGITS, objective, config, validation=HELD_OUT, directory=tmp_path, devices=ONE,
        progress=False,
    )  # fmt: skip
    np.testing.assert_array_equal(again.model(x), run.model(x))


def test_training_goes_on_where_it_was_broken_off(tmp_path):
    """From the prototypes as they were then."""
    objective = LearnedPrototypes(0.01)
    whole = train(objective, epochs=3)
    again = broken_off(LearnedPrototypes, lambda: train(objective, tmp_path, epochs=3))
    for mine, theirs in zip(*map(jax.tree.leaves, (again.model, whole.model)), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_two_devices_do_as_one():
    objective = LearnedPrototypes(0.01)
    one, two = (train(objective, devices=d, epochs=1) for d in (ONE, jax.devices()[:2]))
    for mine, theirs in zip(*map(jax.tree.leaves, (one.model, two.model)), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-3, atol=2e-3)


def test_keys_decide_where_they_start():
    net = jc.models.create("cnn", 4, (8, 8, 1), KEY, widths=(4,), embedding_size=5)
    images, labels = jnp.zeros((4, 8, 8, 1), jnp.uint8), jnp.arange(4, dtype=jnp.int32)
    first, again, other = (
        LearnedPrototypes().init(jax.random.key(seed), net, images, labels, 2) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first.rivals, again.rivals)
    own = first.head.prototypes
    assert own.shape == first.rivals.shape == (4, 5)
    for another in (other.head.prototypes, first.rivals):
        assert np.abs(own - another).min() > 0


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"attraction": -1.0}, "`attraction` must be .*at least 0, got -1.0"),
        ({"repulsion": -1.0}, "`repulsion` must be .*at least 0, got -1.0"),
        ({"attraction_rate": 0.0}, "`attraction_rate` must be .*above 0, got 0.0"),
        ({"repulsion_rate": 0.0}, "`repulsion_rate` must be .*above 0, got 0.0"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match="^" + message):
        LearnedPrototypes(**changes)


def test_an_unknown_rule():
    with pytest.raises((ValueError, jaxtyping.TypeCheckError), match="rule"):
        LearnedPrototypes(rule="dot")


def test_one_class_alone():
    net = jc.models.create("cnn", 4, (8, 8, 1), KEY, widths=(4,), embedding_size=5)
    net.head = None
    with pytest.raises(ValueError, match="^`labels` must be of at least 2 classes"):
        LearnedPrototypes().init(KEY, net, jnp.zeros((4, 8, 8, 1), jnp.uint8), jnp.zeros(4, int), 2)
