"""Attacks with gradients from elsewhere, ensembles of any attacks, and random noise."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import jaxclus as jc
from jaxclus import compose, losses
from jaxclus.attacks import (
    APGD,
    FGSM,
    PGD,
    AutoAttack,
    CarliniWagner,
    Ensemble,
    Guided,
    MultiTargetedPGD,
    Square,
    TargetedAPGD,
    Transfer,
)
from jaxclus.attacks._noise import RandomNoise
from jaxclus.threat import L1, L2, Linf, image_keys

KEY = jax.random.key(0)
SHAPE = (4, 3, 2)
RNG = np.random.default_rng(0)
X = jnp.float32(RNG.uniform(0.2, 0.8, size=(12, *SHAPE)))


def predict(weights, x):
    return (x.reshape(x.shape[0], -1) - 0.5) @ weights


def linear(classes=4, seed=0):
    weights = np.random.default_rng(seed).normal(size=(24, classes))
    return Partial(predict, jnp.float32(weights))


def labels(model, x=X):
    return jnp.argmax(model(x), axis=-1).astype(jnp.int32)


@pytest.mark.parametrize(
    "attack",
    [
        FGSM(Linf(0.03)),
        PGD(Linf(0.03), steps=5, restarts=2, loss="margin"),
        MultiTargetedPGD(L2(0.1), steps=5),
        APGD(Linf(0.03), steps=8),
        APGD(L1(0.2), steps=8),
        TargetedAPGD(L2(0.1), steps=5),
    ],
    ids=lambda attack: f"{type(attack).__name__} {attack.threat.name}",
)
def test_guided_by_the_model_itself(attack):
    """The attack as it is, with one more forward pass for each evaluated iterate."""
    model = linear()
    y = labels(model).at[0].set((labels(model)[0] + 1) % 4)
    plain = attack.run(KEY, model, X, y)
    guided = Guided(attack, model).run(KEY, model, X, y)
    assert plain.success[1:].any() and not plain.success.all()
    np.testing.assert_array_equal(guided.success, plain.success)
    np.testing.assert_allclose(guided.x_adv, plain.x_adv, atol=1e-6)
    np.testing.assert_array_equal(guided.queries.gradient, plain.queries.gradient)
    searched = np.asarray(plain.queries.forward) - np.array([1] + [2] * 11)
    extra = np.asarray(guided.queries.forward) - np.asarray(plain.queries.forward)
    np.testing.assert_array_equal(extra, searched)
    traced = Guided(attack, model).run(KEY, model, X, y, trace=True)
    np.testing.assert_array_equal(traced.success, guided.success)


def brightness(x):
    """Outputs [b, 1]: not logits of the classes."""
    return x.mean(axis=(1, 2, 3))[:, None]


def band(edge, x):
    """Three classes by brightness: 0, 1 in a narrow band around the edge, 0 again."""
    inside = 0.02 - jnp.abs(x.mean(axis=(1, 2, 3)) - edge)
    return jnp.stack([jnp.zeros_like(inside), inside, inside - 1], axis=1)


def test_every_iterate_is_judged():
    """The climb passes through the band; at its end the model is right again."""
    model, y = Partial(band, jnp.float32(0.55)), jnp.zeros(4, jnp.int32)
    x = jnp.full((4, *SHAPE), 0.5)
    attack = PGD(Linf(0.1), steps=10, step_size=0.03, loss=lambda out, y: out[:, 0])
    source = Partial(lambda one, x: brightness(x) * one, jnp.float32(1))
    guided = Guided(attack, source).run(KEY, model, x, y)
    assert guided.success.all()
    assert np.all(np.abs(guided.x_adv.mean(axis=(1, 2, 3)) - 0.55) < 0.02)
    # Its source has the model's classes; the loss is the brightness in both.
    same = Partial(lambda one, x: jnp.repeat(brightness(x), 3, axis=1) * one, jnp.float32(1))
    transferred = Transfer(attack, same).run(KEY, model, x, y)
    assert not transferred.success.any()


def test_an_own_loss_against_a_loop():
    """Iterates, verdicts and candidate as in NumPy, from the same random start."""
    model, source = linear(seed=1), linear(7, seed=2)
    y, eps, step = labels(model), 0.06, 0.02
    attack = PGD(Linf(eps), steps=4, step_size=step, loss=lambda h, y: -jnp.square(h).sum(axis=1))
    result = Guided(attack, source).run(KEY, model, X, y)
    weights = np.float64(source.args[0])
    keys = compose.split(image_keys(KEY, jnp.arange(12)), 0)
    iterate, clean = np.float64(Linf(eps).random_start(keys, X)), np.float64(X)
    best, value, done = clean.copy(), np.full(12, -np.inf), np.zeros(12, bool)
    for number in range(5):
        flat = iterate.reshape(12, -1) - 0.5
        h, wrong = flat @ weights, np.argmax(flat @ np.float64(model.args[0]), axis=1) != y
        loss = -np.square(h).sum(axis=1)
        better = ~done & (wrong | (loss > value))
        best[better], value[better] = iterate[better], loss[better]
        done |= wrong
        if number < 4:
            slope = (-2 * h @ weights.T).reshape(X.shape)
            moved = np.clip(iterate + step * np.sign(slope), clean - eps, clean + eps)
            iterate = np.clip(moved, 0, 1)
    assert done.any() and not done.all()
    np.testing.assert_array_equal(result.success, done)
    np.testing.assert_allclose(result.x_adv, best, atol=1e-5)


def test_guided_keeps_to_another_ball():
    model = linear()
    attack = Guided(PGD(Linf(0.2), steps=5), linear(seed=3), Linf(0.01))
    assert attack.attack.threat == Linf(0.01) == attack.ball
    assert np.all(attack.run(KEY, model, X, labels(model)).norm <= 0.01 + 1e-7)
    wider = dataclasses.replace(attack, threat=Linf(0.3))
    assert wider.run(KEY, model, X, labels(model)).norm.max() > 0.1


@pytest.mark.parametrize("attack", [Square(Linf(0.1)), CarliniWagner("l2")])
def test_guided_needs_a_climb(attack):
    with pytest.raises(TypeError, match="^`attack` must be one that climbs by gradients"):
        Guided(attack, linear())
    with pytest.raises(TypeError, match="^`source` must be a callable pytree of arrays"):
        Guided(PGD(Linf(0.1)), lambda x: x)


def test_guided_by_outputs_that_are_no_logits_of_the_classes():
    """Named and targeted losses would be constant for labels that are not there."""
    model, y = linear(), labels(linear())
    for attack in (APGD(Linf(0.1), losses.margin, 2), PGD(Linf(0.1), 2, loss=lambda h, y: h[:, 0])):
        Guided(attack, linear(2, seed=3)).run(KEY, model, X, y)
    for attack in (APGD(Linf(0.1), "margin", 2), MultiTargetedPGD(Linf(0.1), 2)):
        with pytest.raises(ValueError, match=r"^`source` must return outputs \[b, 4, the classes"):
            Guided(attack, linear(2, seed=3)).run(KEY, model, X, y)
    deep = Partial(lambda one, x: x * one, jnp.float32(1))
    attack = PGD(Linf(0.1), 2, loss=lambda h, y: h.sum(axis=(1, 2, 3)))
    with pytest.raises(ValueError, match=r"^`source` must return outputs \[b, m\], got \(12, 4, 3"):
        Guided(attack, deep).run(KEY, model, X, y)


# Ensembles


def test_an_ensemble_of_the_same_members_is_custom_autoattack():
    ball, model = Linf(0.02), linear()
    members = (PGD(Linf(0.5), steps=2), APGD(ball, steps=5, loss="margin"))
    own = Ensemble(ball, members, ("weak", "strong"))
    assert [name for name, _ in own.members(4)] == ["weak", "strong"]
    assert own.attacks[0].threat == ball
    found = own.run(KEY, model, X, labels(model))
    expected = AutoAttack(ball, "custom", members).run(KEY, model, X, labels(model))
    assert found.success.any() and not found.success.all()
    for mine, its in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(mine, its)


def test_an_ensemble_holds_attacks_with_arrays():
    """The second member breaks what the first, which knows a useless source, leaves."""
    model, ball = linear(), Linf(0.05)
    useless = Transfer(PGD(ball, steps=3, loss=lambda z, y: 0 * z[:, 0]), linear(seed=9))
    right = Guided(APGD(ball, losses.margin, 5), model)
    attack = Ensemble(ball, (useless, right), ("useless", "right"))
    data = jc.data.Dataset(np.uint8(np.round(X * 255)), np.arange(12) % 4)
    data = dataclasses.replace(
        data, labels=np.asarray(labels(model, jc.data.to_float(data.images)))
    )
    result = jc.evaluation.robustness(KEY, model, attack, data, progress=False)
    alone = jc.evaluation.robustness(KEY, model, APGD(ball, "margin", 5), data, progress=False)
    first, second = result.members
    assert (first.name, second.name) == ("useless", "right")
    assert second.attacked == first.robust.sum() > alone.robust.sum()
    np.testing.assert_array_equal(result.robust, alone.robust & first.robust)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"attacks": (), "names": ()}, ValueError, "`attacks` must hold at least one attack"),
        ({"attacks": (PGD(L2(0.1)),)}, ValueError, "`attacks` must be of the threat's norm linf"),
        ({"names": ("a", "b")}, ValueError, "`names` must be 1 different ones"),
        (
            {"attacks": (PGD(Linf(0.1)),) * 2, "names": ("a", "a")},
            ValueError,
            "`names` must be 2 different ones",
        ),
    ],
)
def test_bad_ensembles(changes, error, message):
    given = {"threat": Linf(0.1), "attacks": (PGD(Linf(0.1)),), "names": ("a",)}
    with pytest.raises(error, match="^" + message):
        Ensemble(**given | changes)
    for wrong in ({"threat": 0.1}, {"attacks": (AutoAttack(Linf(0.1)),)}):
        with pytest.raises(TypeError, match=next(iter(wrong))):
            Ensemble(**given | wrong)


# Noise


def test_noise_finds_what_is_large_and_not_what_is_small():
    """A half-space 0.01 away is met by most draws, one beyond the ball's reach by none."""
    x, y = jnp.full((6, *SHAPE), 0.5), jnp.zeros(6, jnp.int32)

    def brighter(edge, x):
        return jnp.stack([jnp.full(x.shape[0], edge), x[:, 0, 0, 0]], axis=1)

    near, far = Partial(brighter, jnp.float32(0.51)), Partial(brighter, jnp.float32(0.61))
    found = RandomNoise(Linf(0.1), steps=50).run(KEY, near, x, y)
    assert found.success.all() and np.all(found.norm <= 0.1 + 1e-7)
    assert np.all(found.queries.gradient == 0) and found.queries.forward.max() < 52
    none = RandomNoise(Linf(0.1), steps=50).run(KEY, far, x, y)
    assert not none.success.any() and np.all(none.queries.forward == 52)
    # Of those the best: the expected largest of 50 uniform draws is 0.096.
    assert np.all(none.x_adv[:, 0, 0, 0] > 0.56)
    with pytest.raises(ValueError, match="^`steps` must be at least 1, got 0"):
        RandomNoise(Linf(0.1), steps=0)
