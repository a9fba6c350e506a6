"""What AutoAttack consists of, and that it is the union of its members."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import jaxclus as jc
from jaxclus import compose
from jaxclus.attacks import APGD, EOT, FAB, PGD, AutoAttack, Square, TargetedAPGD, TargetedFAB
from jaxclus.threat import L1, L2, Linf, image_keys

KEY = jax.random.key(0)
BALLS = {"linf": Linf(0.1), "l2": L2(0.5), "l1": L1(3.0)}
SHAPE = (4, 4, 1)


def linear(params, x):
    return (x.reshape(x.shape[0], -1) - 0.5) @ params["w"] + params["bias"][None]


def setting(classes, size=12):
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(math.prod(SHAPE), classes)), "bias": np.zeros(classes)}
    model = Partial(linear, jax.tree.map(jnp.float32, params))
    x = rng.uniform(size=(size, *SHAPE)).astype(np.float32)
    y = np.argmax(model(x), axis=1)
    return model, x, np.where(np.arange(size) == 1, (y + 1) % classes, y)


# What it consists of.


def standard(ball):
    return [
        ("apgd-ce", APGD(ball, loss="cross_entropy", steps=100, restarts=1, rho=0.75)),
        ("apgd-t", TargetedAPGD(ball, steps=100, targets=9, restarts=1, rho=0.75)),
        ("fab-t", TargetedFAB(ball.name, ball, steps=100, targets=9)),
        ("square", Square(ball, queries=5000)),
    ]


def standard_l1(ball):
    return [
        ("apgd-ce", APGD(ball, loss="cross_entropy", steps=100, restarts=5)),
        ("apgd-t", TargetedAPGD(ball, steps=100, targets=5, restarts=1)),
        *standard(ball)[2:],
    ]


def plus(ball):
    return [
        ("apgd-ce", APGD(ball, loss="cross_entropy", steps=100, restarts=5)),
        ("apgd-dlr", APGD(ball, loss="dlr", steps=100, restarts=5)),
        ("fab", FAB(ball.name, ball, steps=100, restarts=5)),
        ("square", Square(ball, queries=5000)),
        ("apgd-t", TargetedAPGD(ball, steps=100, targets=9, restarts=1)),
        ("fab-t", TargetedFAB(ball.name, ball, steps=100, targets=9)),
    ]


def rand(ball):
    return [
        ("apgd-ce", APGD(ball, loss="cross_entropy", steps=100, restarts=1)),
        ("apgd-dlr", APGD(ball, loss="dlr", steps=100, restarts=1)),
    ]


@pytest.mark.parametrize(
    "version, norm, expected",
    [
        ("standard", "linf", standard),
        ("standard", "l2", standard),
        ("standard", "l1", standard_l1),
        *(("plus", norm, plus) for norm in BALLS),
        *(("rand", norm, rand) for norm in BALLS),
    ],
)
def test_versions(version, norm, expected):
    ball = BALLS[norm]
    attack = AutoAttack(ball, version=version)
    for classes in (4, 10, 1000):
        assert attack.members(classes) == expected(ball)
        assert attack.skipped(classes) == {}
        attack.check_classes(classes)
    assert AutoAttack(ball) == AutoAttack(ball, version="standard")
    assert attack.ball == ball


DLR = "`loss` dlr needs at least 3 classes, got a model of 2"
TARGETED = "`model` must have at least 4 classes for the targeted DLR loss, got "


@pytest.mark.parametrize(
    "version, classes, skipped",
    [
        ("standard", 2, {"apgd-t": TARGETED + "2"}),
        ("standard", 3, {"apgd-t": TARGETED + "3"}),
        ("plus", 2, {"apgd-dlr": DLR, "apgd-t": TARGETED + "2"}),
        ("plus", 3, {"apgd-t": TARGETED + "3"}),
        ("rand", 2, {"apgd-dlr": DLR}),
        ("rand", 3, {}),
    ],
)
def test_too_few_classes_leave_members_out(version, classes, skipped):
    attack = AutoAttack(Linf(0.1), version=version)
    assert attack.skipped(classes) == skipped
    kept = [member for member in attack.members(10) if member[0] not in skipped]
    assert attack.members(classes) == kept and kept
    attack.check_classes(classes)


@pytest.mark.parametrize("norm", BALLS)
def test_custom_names(norm):
    """A name stands for the attack that it is in "standard"."""
    ball = BALLS[norm]
    names = ("square", "apgd-t", "apgd-ce", "apgd-dlr", "fab", "fab-t")
    members = dict(AutoAttack(ball, version="custom", attacks=names).members(10))
    assert tuple(members) == names
    for name, attack in AutoAttack(ball).members(10):
        assert members[name] == attack
    assert members["apgd-dlr"] == APGD(ball, loss="dlr", restarts=members["apgd-ce"].restarts)
    assert members["fab"] == FAB(ball.name, ball, restarts=1)


def test_custom_attacks():
    ball, other = Linf(0.1), Linf(0.3)
    given = (PGD(other, steps=3), "apgd-ce", FAB("linf"), PGD(other, steps=4))
    attack = AutoAttack(ball, version="custom", attacks=given)
    expected = [
        ("PGD", PGD(ball, steps=3)),  # the ensemble's threat is everybody's
        ("apgd-ce", APGD(ball)),
        ("FAB", FAB("linf", ball)),
        ("PGD", PGD(ball, steps=4)),
    ]
    assert attack.members(10) == expected
    assert attack == AutoAttack(ball, version="custom", attacks=given)
    assert hash(attack) == hash(AutoAttack(ball, version="custom", attacks=given))
    # Sweeps over eps change the number that is the threat's leaf.
    halved = jax.tree.map(lambda eps: eps / 2, attack)
    assert [member.threat for _, member in halved.members(10)] == [Linf(0.05)] * 4


def test_members_of_one_name_are_left_out_one_by_one():
    attacks = (APGD(Linf(0.1)), APGD(Linf(0.1), loss="dlr"), APGD(Linf(0.1), steps=5))
    attack = AutoAttack(Linf(0.1), version="custom", attacks=attacks)
    assert attack.members(2) == [("APGD", attacks[0]), ("APGD", attacks[2])]
    assert attack.skipped(2) == {"APGD": DLR}


def test_no_member_is_left():
    model, x, y = setting(2)
    attack = AutoAttack(Linf(0.1), version="custom", attacks=("apgd-t", "apgd-dlr"))
    message = "`attacks` must hold one that 2 classes are enough for: " + TARGETED + "2; " + DLR
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        attack.run(KEY, model, x, y)
    attack.check_classes(3)


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"version": "fast"}, ValueError, "`version` must be one of custom, plus, rand, standard;"),
        ({"version": "custom"}, ValueError, '`attacks` must name the members if `version` is "cus'),
        ({"attacks": ("fab",)}, ValueError, "`attacks` must name the members if `version` is"),
        (
            {"version": "custom", "attacks": ("apgd",)},
            ValueError,
            "`attacks` must be one of apgd-ce, apgd-dlr, apgd-t, fab, fab-t, square; got 'apgd'",
        ),
        (
            {"version": "custom", "attacks": (APGD(L2(0.1)),)},
            ValueError,
            "`attacks` must be of the threat's norm linf, got APGD(threat=L2(eps=0.1)",
        ),
        (
            {"version": "custom", "attacks": (FAB("l2"),)},
            ValueError,
            "`attacks` must be of the threat's norm linf, got FAB(norm='l2'",
        ),
    ],
)
def test_bad_settings(settings, error, message):
    with pytest.raises(error, match="^" + re.escape(message)) as raised:
        AutoAttack(Linf(0.1), **settings)
    assert "\n" not in str(raised.value)


def test_no_ensembles_of_ensembles():
    with pytest.raises(TypeError, match="attacks"):
        AutoAttack(Linf(0.1), version="custom", attacks=(AutoAttack(Linf(0.1)),))


# The chain.


@functools.partial(jax.jit, static_argnames="number")
def alone(member, model, x, y, active, number):
    """One member's search, on all images that are classified correctly, with its own keys."""
    keys = compose.split(image_keys(KEY, jnp.arange(len(x))), number)
    return member._search(keys, model, x, y, model(x), active, trace=False)


@pytest.mark.parametrize(
    "ball, classes, last",
    [
        (Linf(0.02), 6, Square(Linf(0.02), queries=20)),
        (L1(0.4), 3, APGD(L1(0.4), loss="dlr", steps=10, restarts=2)),
    ],
    ids=["linf", "l1, 3 classes"],
)
def test_chain_is_the_union_of_its_members(ball, classes, last):
    model, x, y = setting(classes, size=40)
    weak = PGD(ball, steps=1, step_size=ball.eps / 2, loss="margin")
    given = (weak, TargetedAPGD(ball, steps=3, targets=2), last)
    attack = AutoAttack(ball, version="custom", attacks=given)
    members = [member for _, member in attack.members(classes)]
    assert len(members) == (3 if classes > 3 else 2)
    result = attack.run(KEY, model, x, y)

    correct = np.argmax(model(x), axis=1) == y
    assert correct.sum() == 39
    standing, x_adv, forward, gradient = correct, x, 1 + 1 * correct, 0 * correct
    broken = []
    for number, member in enumerate(members):
        found = alone(member, model, x, y, correct, number)
        forward = forward + np.where(standing, found.queries.forward, 0)
        gradient = gradient + np.where(standing, found.queries.gradient, 0)
        new = standing & found.success
        x_adv = np.where(new[:, None, None, None], found.x_adv, x_adv)
        standing = standing & ~found.success
        broken.append(new.sum())
    assert np.sum(np.array(broken) > 0) >= 2 and standing.any()  # no member does it all
    np.testing.assert_array_equal(result.success, ~standing)
    np.testing.assert_allclose(result.x_adv, x_adv, atol=1e-6)
    # Where nothing was found, as where nothing was sought, the image is the clean one.
    untouched = standing | ~correct
    np.testing.assert_array_equal(np.asarray(result.x_adv)[untouched], x[untouched])
    np.testing.assert_array_equal(result.norm[untouched], 0)
    np.testing.assert_array_equal(result.queries.forward, forward)
    np.testing.assert_array_equal(result.queries.gradient, gradient)


# Random classifiers.


def noisy_slope(params, key, x):
    """Three classes; the logits are exact, but their gradient drowns in noise.

    As behind a random, non-differentiable step whose gradient is a bad estimate: every pass alone
    points almost anywhere, the mean of many points where it should.
    """
    flat = x.reshape(x.shape[0], -1)
    noise = 12 * jax.random.normal(key, params["w"].shape)
    clean = flat @ params["w"]
    return clean + (flat - jax.lax.stop_gradient(flat)) @ noise + params["bias"][None]


def test_rand_averages_gradients():
    rng = np.random.default_rng(0)
    w, x = rng.normal(size=(64, 3)), rng.uniform(0.2, 0.8, size=(24, 8, 8, 1))
    params = {"w": jnp.float32(w), "bias": jnp.float32(-0.5 * w.sum(axis=0))}
    stochastic = jc.Stochastic(Partial(noisy_slope, params), passes=1)
    x = jnp.float32(x)
    y = jnp.argmax(stochastic(KEY, x), axis=-1)
    attack = AutoAttack(Linf(0.03), version="rand")
    averaged = attack.run(KEY, EOT(stochastic, samples=20), x, y).success
    members = tuple(member for _, member in attack.members(3))
    same = AutoAttack(Linf(0.03), version="custom", attacks=members)
    plain = same.run(KEY, stochastic, x, y).success
    assert averaged.sum() >= plain.sum() + 6, (plain.sum(), averaged.sum())
    assert np.all(averaged >= plain)


def test_rand_takes_averaged_models_alone():
    model, x, y = setting(3)
    attack = AutoAttack(Linf(0.1), version="rand")
    message = r"^`model` must be a jc.attacks.EOT\(model, samples=20\) for the version "
    for given in (model, jc.Stochastic(lambda key, x: model(x))):
        with pytest.raises(ValueError, match=message):
            attack.run(KEY, given, x, y)
        with pytest.raises(ValueError, match=message):
            attack.check_model(given)
    AutoAttack(Linf(0.1)).check_model(model)
