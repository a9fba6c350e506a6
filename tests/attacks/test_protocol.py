"""What every attack promises, for each attack of the registry under each threat model."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.tree_util import Partial

from jaxclus import _classifier, parallel
from jaxclus.attacks import ATTACKS, AttackResult, AutoAttack, Queries
from jaxclus.attacks._base import MinimumNormAttack
from jaxclus.threat import L1, L2, Linf, Threat

THREATS = {"linf": Linf(0.08), "l2": L2(0.25), "l1": L1(1.0)}
CASES = [
    (name, norm)
    for name, attack in ATTACKS.items()
    for norm in getattr(attack, "NORMS", THREATS)  # minimum-norm attacks name those they know
    if name != "autoattack" or norm == "l2"  # its members are here in every norm
]
# Attacks that draw no random numbers, some as they are made here, with one start: another key
# gives the same images.
DETERMINISTIC = {"fgsm", "mi-fgsm", "carlini-wagner", "fab", "fab-t", "deepfool"}
# Attacks that return an adversarial image or the clean one.
ALL_OR_NOTHING = (MinimumNormAttack, AutoAttack)
FOUR_CLASSES = {"apgd-t"}

KEY = jax.random.key(0)
BATCH, SHAPE, CLASSES = 8, (5, 3, 2), 4
TRACES = []


def predict(params, x):
    """A two-layer network that notes when it is traced."""
    TRACES.append(x.shape)
    hidden = jax.nn.relu(x.reshape(x.shape[0], -1) @ params["in"] + params["shift"])
    return hidden @ params["out"]


def weights(seed=0, shape=SHAPE, classes=CLASSES):
    first, second, third = jax.random.split(jax.random.key(seed), 3)
    return {
        "in": jax.random.normal(first, (int(np.prod(shape)), 16)) / 3,
        "shift": jax.random.normal(third, (1, 16)) / 3,
        "out": jax.random.normal(second, (16, classes)) / 2,
    }


def batch(model, seed=0, shape=SHAPE, size=BATCH, classes=CLASSES):
    """Images with the model's own labels, but for the first, which is mislabelled."""
    x = jnp.asarray(np.random.default_rng(seed).uniform(size=(size, *shape)), jnp.float32)
    x = x.at[:, 0, 0, 0].set(1.0).at[:, 0, 1, 0].set(0.0)
    y = jnp.argmax(model(x), axis=-1).astype(jnp.int32)
    return x, y.at[0].set((y[0] + 1) % classes)


MODEL = Partial(predict, weights())
X, Y = batch(MODEL)


def make(name: str, threat: Threat):
    """The attack with a small budget."""
    cls = ATTACKS[name]
    if name == "autoattack":
        members = tuple(make(member, threat) for member in ("apgd", "fab-t", "square"))
        return cls(threat, version="custom", attacks=members)
    small = {"steps": 6, "queries": 30, "restarts": 2, "norm": threat.name, "threat": threat}
    small |= {"learning_rate": 0.1, "initial_const": 1.0, "initial_evals": 20}
    small |= {"restarts": 1} if name in DETERMINISTIC else {}
    names = {field.name for field in dataclasses.fields(cls)}
    return cls(**{name: value for name, value in small.items() if name in names})


@functools.cache
def standard(name, norm):
    return make(name, THREATS[norm]).run(KEY, MODEL, X, Y)


def measured_norm(norm, delta):
    order = {"linf": np.inf, "l2": 2, "l1": 1}[norm]
    return np.linalg.norm(np.float64(delta).reshape(len(delta), -1), order, axis=1)


def assert_inside(threat, x_adv, x):
    x_adv = np.asarray(x_adv)
    assert x_adv.dtype == np.float32 and x_adv.shape == x.shape
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    limit = threat.eps + 1e-6 if threat.name == "linf" else threat.eps * (1 + 1e-5)
    assert np.all(measured_norm(threat.name, np.float64(x_adv) - np.float64(x)) <= limit)


def predicted(model, x):
    with jax.default_matmul_precision("highest"):
        return np.argmax(_classifier.logits(model)(x), axis=-1)


def same(a, b):
    """Whether two results agree bit for bit."""
    return all(np.array_equal(m, n) for m, n in zip(*map(jax.tree.leaves, (a, b)), strict=True))


@pytest.mark.parametrize("name, norm", CASES)
def test_result(name, norm):
    result = standard(name, norm)
    assert isinstance(result, AttackResult) and isinstance(result.queries, Queries)
    for array, dtype in (
        (result.success, jnp.bool_),
        (result.norm, jnp.float32),
        (result.queries.forward, jnp.int32),
        (result.queries.gradient, jnp.int32),
    ):
        assert array.shape == (BATCH,) and array.dtype == dtype
    assert result.trace is None
    np.testing.assert_array_equal(make(name, THREATS[norm])(KEY, MODEL, X, Y), result.x_adv)


@pytest.mark.parametrize("name, norm", CASES)
def test_inside_ball_and_box(name, norm):
    result = standard(name, norm)
    assert_inside(THREATS[norm], result.x_adv, X)
    delta = np.float64(result.x_adv) - np.float64(X)
    np.testing.assert_allclose(result.norm, measured_norm(norm, delta), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name, norm", CASES)
def test_misclassified_images_are_returned_as_they_are(name, norm):
    result = standard(name, norm)
    np.testing.assert_array_equal(result.x_adv[0], X[0])
    assert result.norm[0] == 0 and result.success[0]
    assert result.queries.forward[0] == 1 and result.queries.gradient[0] == 0
    assert np.all(result.queries.forward[1:] > 2)


@pytest.mark.parametrize("name, norm", CASES)
def test_verdicts_are_those_of_the_final_images(name, norm):
    result = standard(name, norm)
    np.testing.assert_array_equal(result.success, predicted(MODEL, result.x_adv) != Y)
    # FGSM's L1 step moves one pixel of 30: too little here.
    assert np.any(result.success[1:]) == ((name, norm) != ("fgsm", "l1"))
    assert not np.all(result.success)
    assert np.all(result.norm[result.success][1:] > 0)


@pytest.mark.parametrize("name", ATTACKS)
def test_trace(name):
    result = make(name, THREATS["l2"]).run(KEY, MODEL, X, Y, trace=True)
    for trace in jax.tree.leaves(result.trace):
        assert trace.ndim == 3 and trace.shape[-1] == BATCH and trace.dtype == jnp.float32
    assert len(jax.tree.leaves(result.trace)) >= 1
    expected = standard(name, "l2")
    np.testing.assert_allclose(result.x_adv, expected.x_adv, atol=1e-5)
    np.testing.assert_array_equal(result.success, expected.success)


@pytest.mark.parametrize("name, norm", CASES)
def test_keys(name, norm):
    attack, result = make(name, THREATS[norm]), standard(name, norm)
    assert same(attack.run(KEY, MODEL, X, Y), result)
    other = attack.run(jax.random.key(1), MODEL, X, Y)
    assert same(other, result) == (name in DETERMINISTIC)
    shifted = attack.run(KEY, MODEL, X, Y, jnp.arange(BATCH) + 1)
    assert same(shifted, result) == (name in DETERMINISTIC)


@pytest.mark.parametrize("name, norm", CASES)
def test_an_image_does_not_depend_on_its_place(name, norm):
    attack, result = make(name, THREATS[norm]), standard(name, norm)
    order = np.random.default_rng(0).permutation(BATCH)
    moved = attack.run(KEY, MODEL, X[order], Y[order], order)
    assert same(moved, jax.tree.map(lambda leaf: leaf[order], result))
    # Nor on the company it is in.
    strangers = jnp.where(jnp.arange(BATCH)[:, None, None, None] == 3, X, 1 - X)
    mixed = attack.run(KEY, MODEL, strangers, Y)
    np.testing.assert_array_equal(mixed.x_adv[3], result.x_adv[3])


def rooted(params, x):
    """The network, with a gradient that is not a number where the first pixel is 0."""
    return predict(params, x) + 0 * jnp.sqrt(x[:, 0, 0, 0])[:, None]


@pytest.mark.parametrize("name", ["pgd", "apgd", "fab-t", "deepfool"])
def test_an_image_without_gradient_does_not_spoil_others(name):
    attack, model = make(name, THREATS["l2"]), Partial(rooted, weights())
    spoilt = X.at[0, 0, 0, 0].set(0.0)
    assert jnp.isnan(jax.grad(lambda x: model(x).sum())(spoilt)[0, 0, 0, 0])
    y = jnp.argmax(model(spoilt), axis=-1)
    whole, without = (attack.run(KEY, model, x, y) for x in (spoilt, X))
    np.testing.assert_array_equal(whole.x_adv[1:], without.x_adv[1:])
    assert np.all(np.isfinite(whole.x_adv)) and np.any(whole.success[1:])


@pytest.mark.parametrize("name, norm", CASES)
def test_no_recompilation(name, norm):
    attack = make(name, THREATS[norm])
    attack.run(KEY, MODEL, X, Y)
    scaled = jax.tree.map(lambda number: 0.5 * number, attack)
    for variant in (attack, scaled):
        for seed in (0, 7):
            model = Partial(predict, weights(seed))
            x, y = batch(model, seed)
            before = len(TRACES)
            result = variant.run(jax.random.key(seed), model, x, y)
            assert len(TRACES) == before
            assert_inside(variant.threat, result.x_adv, x)
            np.testing.assert_array_equal(result.success, predicted(model, result.x_adv) != y)


def numbers(name):
    """The fields of an attack that are numbers, but for the threat."""
    return [
        field.name
        for field in dataclasses.fields(ATTACKS[name])
        if not field.metadata.get("static") and field.name != "threat"
    ]


@pytest.mark.parametrize("name", list(filter(numbers, ATTACKS)))
def test_no_recompilation_for_other_numbers(name):
    """Whether given or left to their defaults."""
    attack, leaves = make(name, THREATS["l2"]), numbers(name)
    attack = dataclasses.replace(attack, **{leaf: 0.05 for leaf in leaves})
    attack.run(KEY, MODEL, X, Y)
    before = len(TRACES)
    for leaf in leaves:
        dataclasses.replace(attack, **{leaf: 0.02}).run(KEY, MODEL, X, Y)
    assert len(TRACES) == before


class Net(nnx.Module):
    def __init__(self, params):
        self.params = nnx.Dict({name: nnx.Param(value) for name, value in params.items()})

    def __call__(self, x):
        return predict({name: param[...] for name, param in self.params.items()}, x)


@pytest.mark.parametrize(
    "name, visible",
    # What hides weights is bound by `Attack.run`, whatever the attack, and compiled every time.
    [*((name, True) for name in ATTACKS), ("pgd", False)],
)
def test_mutated_weights_are_the_ones_attacked(name, visible):
    attack, net = make(name, THREATS["l2"]), Net(weights())
    model = net if visible else net.__call__
    first = attack.run(KEY, model, X, Y)
    np.testing.assert_allclose(first.x_adv, standard(name, "l2").x_adv, atol=1e-5)
    net.params["out"][...] = -net.params["out"][...]
    before = len(TRACES)
    second = attack.run(KEY, model, X, Y)
    assert (len(TRACES) == before) == visible
    fresh = Partial(predict, {**weights(), "out": -weights()["out"]})
    np.testing.assert_array_equal(second.success, predicted(fresh, second.x_adv) != Y)
    np.testing.assert_allclose(second.x_adv, attack.run(KEY, fresh, X, Y).x_adv, atol=1e-5)
    assert not np.allclose(second.x_adv, first.x_adv, atol=1e-3)


@pytest.mark.parametrize("name", ATTACKS)
def test_inside_jit(name):
    @jax.jit
    def whole(attack, key, params, x, y, index):
        return attack.run(key, lambda x: predict(params, x), x, y, index)

    attack, expected = make(name, THREATS["l2"]), standard(name, "l2")
    result = whole(attack, KEY, weights(), X, Y, jnp.arange(BATCH))
    np.testing.assert_allclose(result.x_adv, expected.x_adv, atol=1e-5)
    np.testing.assert_array_equal(result.success, expected.success)
    np.testing.assert_array_equal(result.queries.forward, expected.queries.forward)


@pytest.mark.parametrize("name", ATTACKS)
def test_perturb(name):
    """Images move, and for the gradient of a training loss its place is a constant."""
    attack = make(name, THREATS["l2"])
    keys = jax.random.split(KEY, BATCH)

    @jax.jit
    def grads(params):
        def loss(params):
            x_adv = attack.perturb(keys, Partial(predict, params), X, Y)
            return jnp.square(predict(params, x_adv)).sum(), x_adv

        through, x_adv = jax.grad(loss, has_aux=True)(params)
        constant = jax.grad(lambda params: jnp.square(predict(params, x_adv)).sum())(params)
        return through, constant, x_adv

    through, constant, x_adv = grads(weights())
    assert_inside(THREATS["l2"], x_adv, X)
    if not isinstance(attack, ALL_OR_NOTHING):
        assert np.all(measured_norm("l2", x_adv - X) > 0.01)
    for grad, expected in zip(*map(jax.tree.leaves, (through, constant)), strict=True):
        np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ATTACKS)
def test_one_grey_image_of_two_classes(name):
    model = Partial(predict, weights(3, (3, 6, 1), 2))
    x, y = batch(model, 3, (3, 6, 1), 1, 2)
    y, attack = 1 - y, make(name, THREATS["l2"])  # of which `batch` mislabels the first
    if name in FOUR_CLASSES:
        with pytest.raises(ValueError, match="^`model` must have at least 4 classes .*, got 2$"):
            attack.run(KEY, model, x, y)
        return
    result = attack.run(KEY, model, x, y)
    assert_inside(THREATS["l2"], result.x_adv, x)
    assert (result.norm > 0) | isinstance(attack, ALL_OR_NOTHING)
    np.testing.assert_array_equal(result.success, predicted(model, result.x_adv) != y)


@pytest.mark.parametrize("name", ATTACKS)
def test_all_devices(name):
    mesh = parallel.mesh(jax.devices())
    assert mesh.size == BATCH
    x, y = jax.device_put((X, Y), parallel.over_batch(mesh))
    model = jax.device_put(MODEL, parallel.replicated(mesh))
    result, expected = make(name, THREATS["l2"]).run(KEY, model, x, y), standard(name, "l2")
    np.testing.assert_array_equal(result.success, expected.success)
    np.testing.assert_allclose(result.x_adv, expected.x_adv, atol=1e-5)
    np.testing.assert_array_equal(result.queries.gradient, expected.queries.gradient)


@pytest.mark.parametrize("name, norm", CASES)
def test_attacks_are_values_and_pytrees(name, norm):
    attack, again = make(name, THREATS[norm]), make(name, THREATS[norm])
    assert attack == again and hash(attack) == hash(again)
    assert attack != make(name, dataclasses.replace(THREATS[norm], eps=0.5))
    assert jax.tree.map(lambda leaf: leaf, attack) == attack
    assert THREATS[norm].eps in jax.tree.leaves(attack)
    with pytest.raises(dataclasses.FrozenInstanceError):
        attack.threat = THREATS[norm]
    no_threat = jax.tree.map(lambda leaf: leaf, attack)
    object.__setattr__(no_threat, "threat", 0.1)
    with pytest.raises(TypeError, match="^`threat` must be one as .* makes, got 0.1$"):
        no_threat.__post_init__()


def with_pixel(value):
    return X.at[1, 2, 1, 0].set(value)


GOOD = {"key": KEY, "model": MODEL, "x": X, "y": Y}
BAD = {
    "NaN": ("x", with_pixel(jnp.nan), ValueError, "`x` must be finite and in [0, 1]"),
    "infinity": ("x", with_pixel(jnp.inf), ValueError, "`x` must be finite and in [0, 1]"),
    "below 0": ("x", with_pixel(-0.01), ValueError, "`x` must be in [0, 1], got values from -0.01"),
    "0..255": ("x", 255 * X, ValueError, "`x` must be in [0, 1], got values from 0 to 255"),
    "uint8": ("x", jnp.uint8(255 * X), TypeError, "`x` must be float32 images in [0, 1] (uint8 "),
    "bfloat16": ("x", jnp.bfloat16(X), TypeError, "`x` must be float32 images in [0, 1]"),
    "one image": ("x", X[0], ValueError, "`x` must have the shape [b, h, w, c], got (5, 3, 2)"),
    "flat": ("x", X.reshape(BATCH, -1), ValueError, "`x` must have the shape [b, h, w, c], got "),
    "no image": ("x", X[:0], ValueError, "`x` must hold at least one image"),
    "list": ("x", [[[[0.5]]]], TypeError, "`x` must be an array of float32 images"),
    "float64 y": ("y", np.float64(Y), TypeError, "`y` must be integers in [0, 3], got dtype float"),
    "bool y": ("y", Y > 0, TypeError, "`y` must be integers in [0, 3], got dtype bool"),
    "label k": ("y", Y.at[0].set(4), ValueError, "`y` must be in [0, 3], got values from "),
    "label -1": ("y", Y.at[0].set(-1), ValueError, "`y` must be in [0, 3], got values from -1 to "),
    "short y": ("y", Y[:-1], ValueError, "`y` must have the shape (8,), one entry for each image"),
    "one-hot y": ("y", jnp.eye(8, 3, dtype=int), ValueError, "`y` must have the shape (8,), one "),
    "short index": ("index", np.arange(7), ValueError, "`index` must have the shape (8,), one "),
    "float index": ("index", np.arange(8.0), TypeError, "`index` must be integers in [0, "),
    "index -1": ("index", np.arange(8) - 1, ValueError, "`index` must be in [0, 2147483647], got "),
    "raw key": ("key", jax.random.key_data(KEY), TypeError, "`key` must be a typed key, as "),
    "keys": ("key", jax.random.split(KEY), ValueError, "`key` must be one key, got an array of "),
    "images": ("model", lambda x: x, ValueError, "`model` must map images (8, 5, 3, 2) to logits "),
    "loss": (
        "model",
        lambda x: x.mean((1, 2, 3)),
        ValueError,
        "`model` must map images (8, 5, 3, ",
    ),
    "fewer": ("model", lambda x: predict(weights(), x[1:]), ValueError, "`model` must map images "),
    "one class": (
        "model",
        lambda x: x[:, 0, 0, :1],
        ValueError,
        "`model` must return logits of at ",
    ),
    "bfloat16 logits": (
        "model",
        lambda x: jnp.bfloat16(predict(weights(), x)),
        TypeError,
        "`model` must return float32 logits (verdicts need them), got bfloat16",
    ),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("name", ["pgd", "autoattack"])  # the checks are those of `Attack.run`
def test_bad_input(name, case):
    argument, value, error, message = BAD[case]
    with pytest.raises(error, match="^" + re.escape(message)) as raised:
        make(name, THREATS["l2"]).run(**{**GOOD, argument: value})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["pgd", "autoattack"])
@pytest.mark.parametrize("argument, value", [("model", 3), ("model", weights()), ("key", 0)])
def test_bad_type(name, argument, value):
    """What the annotations, which are checked in tests alone, refuse before the function's own."""
    with pytest.raises(TypeError, match=argument):
        make(name, THREATS["l2"]).run(**{**GOOD, argument: value})
