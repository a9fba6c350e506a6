"""Each check on a toy built for it, silence on plain networks, and the figures by hand."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest

import jaxclus as jc
from jaxclus import _pytree
from jaxclus.attacks import PGD, AutoAttack, Finding
from jaxclus.data import to_float
from jaxclus.evaluation import (
    SIGNS,
    MemberResult,
    Robustness,
    _flags,
    _indicators,
    masking,
    robustness,
)
from jaxclus.evaluation._probe import Probe

KEY = jax.random.key(0)
BALL = jc.Linf(0.1)
ATTACK = PGD(BALL, steps=20)
Partial = jax.tree_util.Partial


def network(weights, x):
    hidden = jax.nn.relu(x.reshape(x.shape[0], -1) @ weights["in"])
    return hidden @ weights["out"]


def trained(data, eps):
    """A plain network of one hidden layer after 150 steps, adversarial ones if eps is given."""
    x, y = to_float(data.images), jnp.asarray(data.labels)
    first, second = jax.random.split(jax.random.key(1))
    weights = {
        "in": 0.2 * jax.random.normal(first, (64, 32)),
        "out": 0.2 * jax.random.normal(second, (32, 10)),
    }
    optimiser = optax.adam(5e-3)

    def step(carry, key):
        weights, state = carry
        index = jax.random.randint(key, (128,), 0, len(y))
        images, labels = x[index], y[index]
        if eps:
            model = Partial(network, weights)
            images = PGD(jc.Linf(eps), steps=3).perturb(
                jax.random.split(key, 128), model, images, labels
            )

        def loss(weights):
            return jc.losses.cross_entropy(network(weights, images), labels).mean()

        updates, state = optimiser.update(jax.grad(loss)(weights), state)
        return (optax.apply_updates(weights, updates), state), None

    start = (weights, optimiser.init(weights))
    keys = jax.random.split(jax.random.key(2), 150)
    return jax.jit(lambda: jax.lax.scan(step, start, keys))()[0][0]


@pytest.fixture(scope="module")
def digits():
    return jc.data.load("digits", "test")


@pytest.fixture(scope="module")
def weights():
    return trained(jc.data.load("digits"), None)


@pytest.fixture(scope="module")
def robust_weights():
    return trained(jc.data.load("digits"), 0.1)


@pytest.fixture
def as_users_call(monkeypatch):
    """Without the checks of annotations, which in the tests come before our own."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def check(model, data, attack: PGD | None = ATTACK, threat=BALL, **arguments):
    return masking(
        KEY, model, data, threat, attack=attack, num_images=40, progress=False, **arguments
    )


def said(checked):
    """What a finding says."""
    assert checked is not None and checked.finding is not None
    return checked.finding.detail


def names(found):
    return {finding.name for finding in found.findings}


# Plain networks --------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [None, 0.1])
def test_a_plain_network_has_no_finding(digits, weights, robust_weights, eps):
    model = Partial(network, robust_weights if eps else weights)
    found = check(model, digits, attack=None, surrogate=model)
    assert found.findings == ()
    assert set(found.not_run) == {"Square wins"}
    assert set(found.figures) == set(SIGNS) - {"Square wins"}
    assert isinstance(found.attack, jc.attacks.APGD)
    assert found.loss.shape == (101, 40)
    np.testing.assert_allclose(found.eps, [0.05, 0.1, 0.2, 0.4, 1])
    assert found.robust_accuracy[-1] == 0
    assert 0.2 < found.robust_accuracy[1] < 1
    assert set(found.gradient_norms) == {"cross_entropy", "dlr"}
    logits = network(weights if not eps else robust_weights, to_float(digits.images[found.index]))
    assert (logits.argmax(axis=-1) == digits.labels[found.index]).all()


def test_the_curves_are_those_of_the_attack(digits, weights):
    model = Partial(network, weights)
    found = check(model, digits)
    x, y = to_float(digits.images[found.index]), digits.labels[found.index]
    for eps, standing in zip(found.eps, found.standing, strict=True):
        attack = PGD(jc.Linf(float(eps)), steps=20)
        run = attack.run(KEY, model, x, y, jnp.asarray(found.index), trace=True)
        np.testing.assert_array_equal(standing, ~np.asarray(run.success))
        if eps == BALL.eps:
            np.testing.assert_array_equal(found.loss, np.asarray(run.trace)[0])


def test_json_holds_what_a_page_needs(digits, weights):
    found = check(Partial(saturated, weights), digits)
    values = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert values["attack"] == "PGD(steps=20, restarts=1, loss=cross_entropy)"
    assert (values["norm"], values["eps"], values["num_images"]) == ("linf", 0.1, 40)
    assert values["findings"] == [dataclasses.asdict(finding) for finding in found.findings]
    assert {row["name"] for row in values["checks"] if row["found"]} == names(found) == FLAT
    for row in values["checks"]:
        assert set(row) == {"name", "figure", "limit", "unit", "found"}
        assert row["found"] == (row["figure"] > row["limit"])
    lengths = {name: len(curve) for name, curve in values["loss"].items()}
    assert lengths == dict.fromkeys(("mean", "low", "median", "high"), 21)
    np.testing.assert_allclose(values["loss"]["median"], np.median(found.loss, axis=1), rtol=1e-6)
    assert values["accuracy"]["robust"] == found.robust_accuracy.tolist()
    assert values["not_run"]["transfer failure"] == "no surrogate was given"


# Toys ------------------------------------------------------------------------------------------


def dropout(weights, x):
    """Noise that a fixed key ties to the image's place in the batch."""
    keep = jax.random.bernoulli(jax.random.key(3), 0.7, x.shape)
    return network(weights, jnp.where(keep, x / 0.7, 0))


def softmax(weights, x):
    return jax.nn.softmax(network(weights, x))


def rounded(weights, x):
    """To 5 levels; all pixels are sixteenths, far from where it jumps."""
    return network(weights, jnp.round(4 * x + 0.375) / 4)


def saturated(weights, x):
    return 1000 * network(weights, x)


def shattered(weights, x):
    """Smooth, with a gradient that says nothing about anything but the next 1/1000."""
    return network(weights, x + 0.2 * jnp.sin(1e3 * x))


def purified(weights, x):
    energy = jax.grad(lambda z: jax.nn.logsumexp(network(weights, z), axis=-1).sum())
    for _ in range(2):
        x = x - 0.01 * energy(x)
    return network(weights, x)


def looped(weights, x):
    def body(x):
        return 0.9 * x

    return network(weights, jax.lax.while_loop(lambda x: jnp.abs(x).mean() > 0.2, body, x))


def noisy(weights, key, x):
    return network(weights, x + 0.2 * jax.random.normal(key, x.shape))


FLAT = {"zero gradient", "unavailable gradients", "unconstrained attack failure"}
FLAT |= {"loss does not rise"}
TOYS = {
    dropout: {"randomised", "random numbers"},
    softmax: {"softmax output", "softmax head"},
    rounded: FLAT | {"rounding"},
    saturated: FLAT,
    shattered: {
        "unstable predictions",
        "unconstrained attack failure",
        "loss does not rise",
    },
    purified: {"dynamic", "inner gradient"},
    looped: {"dynamic", "data-dependent loop", "unavailable gradients"},
}


@pytest.mark.parametrize("toy", TOYS, ids=lambda toy: toy.__name__)
def test_a_toy_has_its_findings_and_no_other(digits, weights, toy):
    found = check(Partial(toy, weights), digits)
    assert names(found) == TOYS[toy]
    severities = [finding.severity for finding in found.findings]
    assert severities == sorted(severities)  # "certain" comes before "suspected"
    assert all(finding.detail and finding.advice for finding in found.findings)
    if toy is looped:
        assert found.eps.shape == (0,) and found.loss.shape == (0, 40)
        assert found.not_run["noisy loss"] == "the model has no gradient"
        json.dumps(found.to_json(), allow_nan=False)
    if toy is saturated:  # the DLR loss keeps its gradient
        assert (found.gradient_norms["dlr"] > 0).all()


def test_random_numbers_drawn_while_tracing_are_seen(digits, weights):
    rng = np.random.default_rng(0)

    def model(x):  # the same for all images of a batch
        return network(weights, x + 0.1 * rng.normal(size=(1, 8, 8, 1)).astype(np.float32))

    probe = Probe(KEY, model, digits, 40)
    found = _flags.randomised(probe.passes(), np.asarray(probe.y))
    assert found.finding is not None and found.figure > 0.01


def test_a_stochastic_classifier_is_random_by_its_own_account(digits, weights):
    found = check(jc.Stochastic(Partial(noisy, weights), passes=5), digits)
    # Lucky draws are no silent successes: the verdict has to confirm them.
    assert "noisy loss" in names(found) and "silent success" not in names(found)
    assert not {"randomised", "random numbers", "zero gradient"} & names(found)
    assert "jc.Stochastic" in found.not_run["randomised"]


@pytest.mark.parametrize("classes, left_out", [(2, "apgd-dlr and apgd-t"), (3, "apgd-t")])
def test_few_classes_are_information(digits, weights, classes, left_out):
    groups = np.arange(10) * classes // 10

    def merged(weights, x):
        logits = network(weights, x)
        return jnp.stack([logits[:, groups == g].max(axis=-1) for g in range(classes)], axis=-1)

    data = jc.data.Dataset(digits.images, groups[digits.labels], tuple("abc"[:classes]))
    found = check(Partial(merged, weights), data)
    (finding,) = found.findings
    assert (finding.name, finding.severity) == ("classes", "information")
    assert f"too few for {left_out}, which" in finding.detail
    assert ("dlr" in found.gradient_norms) == (classes == 3)


@_pytree.register
@dataclasses.dataclass(frozen=True)
class LastIterate(PGD):
    """An attack that forgets its successes, and moves on to the other end of the ball."""

    def step(self, model, images, i, state):
        state = super().step(model, images, i, state)
        return state._replace(success=state.success & False)

    def finish(self, model, images, state):
        far = self.threat.project(2 * images.x - state.memory.iterate, images.x)
        return state._replace(x_adv=far)


def test_silent_success(digits, weights):
    found = check(Partial(network, weights), digits, attack=LastIterate(BALL, 20, loss="margin"))
    assert "silent success" in names(found)
    assert found.figures["silent success"] > 0.2


def test_square_wins_where_the_gradient_is_gone(digits, weights):
    model = Partial(rounded, weights)
    ball = jc.Linf(0.25)
    chain = AutoAttack(
        ball, "custom", attacks=(PGD(ball, steps=2), jc.attacks.Square(ball, queries=50))
    )
    evaluated = robustness(
        KEY, model, chain, digits.take(50), devices=jax.devices()[:1], progress=False
    )
    found = check(model, digits, threat=ball, robustness=evaluated)
    assert "Square wins" in names(found)
    assert found.not_run.keys() == {"transfer failure", "transfer wins"}


def test_transfer_wins_where_the_gradient_is_gone(digits, weights):
    surrogate = Partial(network, weights)
    found = check(Partial(saturated, weights), digits, surrogate=surrogate)
    assert "transfer wins" in names(found)
    assert found.figures["transfer failure"] == 0  # scaling does not change a prediction
    assert names(found) == FLAT | {"transfer wins"}


def test_transfer_is_checked_where_there_is_no_gradient_at_all(digits, weights):
    found = check(Partial(looped, weights), digits, surrogate=Partial(network, weights))
    assert names(found) == TOYS[looped] | {"transfer wins"}
    assert found.gradient_norms == {}


def test_transfer_failure_is_information(digits, weights, robust_weights):
    found = check(Partial(network, robust_weights), digits, surrogate=Partial(network, weights))
    (finding,) = found.findings
    assert (finding.name, finding.severity) == ("transfer failure", "information")


# Figures by hand -------------------------------------------------------------------------------


def test_randomised():
    logits = np.array([[[3.0, 4.0]], [[3.0, 4.0]], [[4.0, 3.0]]])
    found = _flags.randomised(logits, np.array([1]))
    assert found.figure == pytest.approx(np.sqrt(2) / 5)
    assert "0 to 1 of 1" in said(found)
    assert _flags.randomised(logits[:2] * [[[1]], [[5]]], np.array([1])).finding is None
    near = np.array([[[1.0, 1.0 + 1e-6]], [[1.0 + 1e-6, 1.0]]])  # other predictions, almost equal
    assert _flags.randomised(near, np.array([1])).finding is not None


@pytest.mark.parametrize(
    "logits, expected",
    [([[0.2, 0.8], [1.0, 0.0]], True), ([[0.2, 0.8], [0.5, 0.6]], False), ([[-1, 2.0]], False)],
)
def test_softmax_output(logits, expected):
    assert (_flags.softmax_output(np.array(logits)).finding is not None) == expected


def test_zero_gradient_counts_images_that_are_right():
    norms = {"cross_entropy": np.array([0.0, 1, 1, 1]), "dlr": np.array([0.0, 0, 0, 1])}
    found = _flags.zero_gradient(norms, np.array([True, True, False, True]))
    assert found.figure == 0.5
    assert "1 with cross_entropy, 2 with dlr" in said(found)


def chain(*counts, names=("apgd-ce", "apgd-t", "square", "fab-t")):
    """An evaluation of 1000 images, of which so many stand after each attack."""
    members = tuple(
        MemberResult(name, name, 1000, np.arange(1000) < count, 1.0, 0, 0)
        for name, count in zip(names, counts, strict=False)
    )
    robust, ones = members[-1].robust, np.ones(1000, bool)
    return Robustness(
        AutoAttack(BALL), "", "", (0,), ones, robust, np.zeros(1000), 0.0, 1.0, members, {},
        0, 1, 1, 1, 1, np.zeros((1000, 1, 1, 1)),
    )  # fmt: skip


def test_square_wins_above_two_thousandths():
    two, three = (_flags.square_wins(chain(900, 800, 800 - n, 700)) for n in (2, 3))
    assert two is not None and three is not None
    assert (two.figure, two.finding) == (pytest.approx(0.2), None)
    assert three.figure == pytest.approx(0.3)
    assert "3 of 1000 images that apgd-ce, apgd-t did not" in said(three)
    assert "100 of 1000" in said(_flags.square_wins(chain(900, 800, names=("PGD", "Square"))))


def test_square_wins_needs_square_after_another_attack():
    assert _flags.square_wins(chain(900, 800)) is None
    assert _flags.square_wins(chain(900, 800, names=("Square", "PGD"))) is None


@pytest.mark.parametrize("number", [4, 9, 10])
def test_classes(number):
    found = _flags.classes(number, BALL)
    assert (found.finding is None) == (number == 10)
    if number < 10:
        assert f"{number - 1} targets in place of 9" in said(found)


def test_dynamic():
    lint = [Finding("inner gradient", "suspected", "tanh", "")]
    assert _flags.dynamic(lint).finding is not None
    assert _flags.dynamic([Finding("rounding", "certain", "", "")]).finding is None


def test_unavailable_gradients():
    found = _indicators.unavailable_gradients(np.array([1.0, 0, np.nan, np.inf]), "margin")
    assert found.figure == 0.75
    assert "gradient of margin" in said(found)
    assert _indicators.unavailable_gradients(np.array([1e-30]), "margin").finding is None


def test_unstable_predictions():
    margins, noisy = np.array([-2.0, -1.0]), np.array([[-1.0, -1.0], [-2.0, 9.0]])
    assert _indicators.unstable_predictions(margins, noisy).figure == (0.5 + 0 + 0 + 1) / 4


def test_indicators_of_runs():
    yes, no = np.array([True]), np.array([False])
    assert _indicators.silent_success(yes, no).figure == 1
    assert _indicators.silent_success(yes, yes).figure == 0
    assert _indicators.silent_success(no, no).figure == 0
    broken, fooled = np.array([True, True, False, False]), np.array([True, False, False, True])
    assert _indicators.transfer_failure(broken, fooled).figure == 0.5
    assert _indicators.transfer_wins(fooled, broken).figure == 25
    assert _indicators.transfer_failure(broken & False, fooled).figure == 0
    assert _indicators.unconstrained_attack_failure(broken).figure == 0.5


def test_incomplete_optimisation():
    t = np.arange(101.0)
    rising, early = t, np.minimum(t, 90)
    swinging = np.where(t % 2, 100.0, 0.0)  # its best loss does not rise
    flat, late = np.zeros(101), np.maximum(0, t - 96)
    losses = np.stack([rising, early, swinging, flat, late], axis=1)
    standing = np.ones(5, bool)
    assert _indicators.incomplete_optimisation(losses, standing).figure == 2 / 5
    standing[0] = False
    assert _indicators.incomplete_optimisation(losses, standing).figure == 1 / 5
    assert [_indicators.last(n) for n in (2, 11, 21, 101, 1001)] == [2, 3, 5, 10, 10]
    exact = np.minimum(t, 95)  # iterates 91 to 100: 4 of 95, less than 5 %
    assert _indicators.incomplete_optimisation(exact[:, None], standing[:1] | True).figure == 0


def test_loss_does_not_rise():
    t = np.arange(101.0)
    losses = np.stack([t, -t, np.zeros(101), np.minimum(t, 1)], axis=1)
    found = _indicators.loss_does_not_rise(losses, np.ones(4, bool))
    assert found.figure == 0.5
    assert _indicators.loss_does_not_rise(losses, np.zeros(4, bool)).figure == 0


def test_noisy_loss():
    t, rng = np.arange(101.0), np.random.default_rng(0)
    swinging = np.where(t < 50, t, 50 + 2 * (t % 2))
    losses = np.stack([t, rng.uniform(size=101), rng.normal(size=101), swinging], axis=1)
    found = _indicators.noisy_loss(losses, np.ones(4, bool))
    assert found.figure == 0.5
    assert _indicators.noisy_loss(np.zeros((11, 1)), np.ones(1, bool)).figure == 0


def test_accuracy_rises_with_eps():
    eps = np.array([0.1, 0.2, 0.4])
    found = _indicators.accuracy_rises(eps, np.array([0.5, 0.3, 0.4]))
    assert found.figure == pytest.approx(0.1)
    assert "30% at eps 0.2 and 40% at eps 0.4" in said(found)
    assert _indicators.accuracy_rises(eps, np.array([0.5, 0.3, 0.3])).figure == 0


def test_every_sign_can_fire_by_itself():
    assert all(sign.limit >= 0 and sign.advice and sign.unit for sign in SIGNS.values())
    assert SIGNS["classes"].severity == "information"


# Bad input -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"key": jnp.zeros(2, jnp.uint32)}, TypeError, "`key` must be a typed key"),
        ({"num_images": 0}, ValueError, "`num_images` must be at least 1"),
        ({"threat": 0.1}, TypeError, "`threat` must be one as Linf"),
        ({"threat": jc.Linf(1.0)}, ValueError, "`threat` must be smaller than the whole pixel box"),
        ({"attack": AutoAttack(BALL)}, TypeError, "`attack` must be one gradient attack"),
        ({"attack": jc.attacks.Square(BALL)}, TypeError, "`attack` must be one gradient attack"),
        ({"robustness": 0.5}, TypeError, "`robustness` must be what jc.evaluation.robustness"),
        ({"robustness": chain(9), "threat": jc.L2(0.1)}, ValueError, "`robustness` must be for"),
        ({"surrogate": lambda x: x[:, 0, :2, 0]}, ValueError, "`surrogate` must have 10 classes"),
        ({"model": lambda x: jnp.ones((len(x), 11)).at[:, 10].set(2)}, ValueError, "none is"),
    ],
)
def test_bad_input(digits, weights, change, error, message):
    arguments = {"key": KEY, "model": Partial(network, weights), "data": digits, "threat": BALL}
    arguments |= change
    positional = [arguments.pop(name) for name in ("key", "model", "data", "threat")]
    with pytest.raises(error, match=message):
        masking(*positional, progress=False, **arguments)
