"""Adaptive wrappers, and attacks crafted on another model."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.tree_util import Partial
from scipy.spatial.distance import cdist

import jaxclus as jc
from jaxclus import _classifier
from jaxclus.attacks import FGSM, PGD, adaptive
from jaxclus.attacks._carlini_wagner import CarliniWagner
from jaxclus.attacks._multi_targeted import MultiTargetedPGD
from jaxclus.attacks._transfer import Transfer
from jaxclus.attacks.adaptive import BPDA, EOT, DistanceLogits, Temperature
from jaxclus.threat import L2, Linf

KEY = jax.random.key(0)
SHAPE = (4, 3, 2)
TRACES = []


def predict(params, x):
    TRACES.append(x.shape)
    return (x.reshape(x.shape[0], -1) - 0.5) @ params["w"]


def linear(classes=3, seed=0, scale=1.0):
    w = np.random.default_rng(seed).normal(size=(24, classes)) * scale
    return Partial(predict, {"w": jnp.float32(w)})


def images(model, size=6, seed=1):
    x = jnp.float32(np.random.default_rng(seed).uniform(0.2, 0.8, size=(size, *SHAPE)))
    return x, jnp.argmax(model(x), axis=-1).astype(jnp.int32)


def quantise(x):
    """Eight levels: the derivative is zero everywhere."""
    return jnp.round(x * 8) / 8


def smooth(params, x):
    return jnp.sin(params * x)


# BPDA


def test_bpda_value_and_derivative():
    """The forward's value bit for bit, the backward's derivative in every mode."""
    x = jnp.float32(np.random.default_rng(0).uniform(size=(3, 5)))
    wrapped = BPDA(quantise, Partial(smooth, 2.0))
    loss = lambda x: jnp.sum(wrapped(x) * jnp.arange(5.0)[None])  # noqa: E731
    expected = 2 * np.cos(2 * np.float64(x)) * np.arange(5.0)
    np.testing.assert_array_equal(wrapped(x), quantise(x))
    np.testing.assert_array_equal(jax.jit(wrapped)(x), jax.jit(quantise)(x))
    np.testing.assert_allclose(jax.grad(loss)(x), expected, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(x), expected, rtol=1e-5)
    np.testing.assert_allclose(jax.vmap(jax.grad(lambda r: loss(r[None])))(x), expected, rtol=1e-5)
    value, tangent = jax.jvp(wrapped, (x,), (jnp.ones_like(x),))
    np.testing.assert_array_equal(value, quantise(x))
    np.testing.assert_allclose(tangent, 2 * jnp.cos(2 * x), rtol=1e-5)
    np.testing.assert_array_equal(jax.grad(lambda x: BPDA(quantise)(x).sum())(x), 1)


def test_bpda_forward_is_never_differentiated():
    """A search of unknown length, which has no reverse mode, is a forward; NaN derivatives too."""

    def search(x):
        return jax.lax.while_loop(lambda v: jnp.any(v > 0.1), lambda v: v / 2, x)

    x = jnp.array([0.0, 0.5])
    np.testing.assert_array_equal(jax.grad(lambda x: BPDA(search)(x).sum())(x), 1)
    np.testing.assert_array_equal(jax.grad(lambda x: BPDA(jnp.sqrt)(x).sum())(x), 1)


def test_bpda_breaks_what_hides_its_gradient():
    net = linear()
    defence = jc.Chain(BPDA(Partial(quantise)), net)
    hidden = jc.Chain(Partial(quantise), net)
    x, y = images(hidden)
    attack = PGD(Linf(0.1), steps=8)
    assert not np.any(FGSM(Linf(0.1)).run(KEY, hidden, x, y).success)
    found = attack.run(KEY, defence, x, y)
    assert np.all(found.success)
    np.testing.assert_array_equal(np.argmax(hidden(found.x_adv), axis=-1) != y, found.success)


def test_bpda_is_a_pytree():
    """Weights in it are seen: new ones reuse the program."""

    def forward(params, x):
        TRACES.append(x.shape)
        return jnp.round(x * params) / params

    x, y = images(linear())
    for levels, expected in ((8.0, None), (4.0, 0)):
        before = len(TRACES)
        model = jc.Chain(BPDA(Partial(forward, jnp.float32(levels))), linear())
        PGD(Linf(0.1), steps=2).run(KEY, model, x, y)
        assert expected is None or len(TRACES) - before == expected
    assert _classifier.is_pytree(model)
    assert BPDA(quantise) == BPDA(quantise) and hash(BPDA(quantise)) == hash(BPDA(quantise))


def test_bpda_inside_a_stochastic_model():
    def noisy_levels(key, x):
        return jnp.round(x * 8 + jax.random.uniform(key, x.shape)) / 8

    net = linear()
    model = jc.Stochastic(lambda key, x: net(BPDA(partial(noisy_levels, key))(x)))
    x, y = images(net)
    attack = FGSM(Linf(0.3), loss="margin")  # one step, far over the boundary
    assert np.all(attack.run(KEY, EOT(model, samples=4), x, y).success)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((3,), "forward"),
        ((quantise, 3), "backward"),
        ((jc.Stochastic(lambda key, x: x),), "^`forward` must be a callable of images alone"),
    ],
)
def test_bad_bpda(arguments, message):
    with pytest.raises(TypeError, match=message):
        BPDA(*arguments)


def test_bpda_of_other_shapes():
    x = jnp.zeros((2, 3))
    with pytest.raises(ValueError, match=r"^`backward` must .* float32 \(2,\), got float32 \(2, 3"):
        BPDA(lambda x: x.sum(axis=1))(x)
    with pytest.raises(ValueError, match=r"^`backward` must return .* int32 \(2, 3\), got float"):
        BPDA(jnp.int32)(x)


# Temperature


def test_temperature():
    model, (x, y) = linear(), images(linear())
    for wrapped in (Temperature(model, 4.0), Temperature(model, jnp.float32(4.0))):
        np.testing.assert_allclose(wrapped(x), model(x) / 4, rtol=1e-6)
    grad = jax.grad(lambda x: jc.losses.cross_entropy(Temperature(model, 4.0)(x), y).sum())(x)
    share = jax.nn.softmax(model(x) / 4) - jax.nn.one_hot(y, 3)
    expected = (share @ model.args[0]["w"].T).reshape(x.shape) / 4
    np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-6)


def test_temperature_revives_saturated_losses():
    """Logits of a thousand: the softmax is one-hot in float32, its gradient zero."""
    model = linear(scale=1e4)
    x, y = images(model)
    attack = FGSM(Linf(0.3))
    assert not np.any(attack.run(KEY, model, x, y).success)
    result = attack.run(KEY, Temperature(model, 1e4), x, y)
    assert np.all(result.success)
    np.testing.assert_array_equal(np.argmax(model(result.x_adv), axis=-1) != y, True)


def test_temperature_of_a_stochastic_model():
    """It is stochastic too; an EOT goes around it; other temperatures reuse the program."""
    net = linear()
    model = jc.Stochastic(Partial(lambda net, key, x: net(x) + jax.random.normal(key, (1, 3)), net))
    wrapped = Temperature(model, 2.0)
    x, y = images(net)
    keys = jax.random.split(KEY, len(x))
    from jaxclus import compose

    assert compose.is_stochastic(wrapped) and compose.passes(wrapped) == 20
    np.testing.assert_allclose(
        compose.with_keys(wrapped, keys)(x),
        jax.vmap(lambda key, image: model(jax.random.fold_in(key, 0), image[None])[0])(keys, x) / 2,
        rtol=1e-5,
    )
    attack = PGD(Linf(0.1), steps=2)
    attack.run(KEY, EOT(wrapped, samples=2), x, y)
    before = len(TRACES)
    attack.run(KEY, EOT(Temperature(model, 5.0), samples=2), x, y)
    assert len(TRACES) == before


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan])
def test_bad_temperature(value):
    with pytest.raises(ValueError, match="^`temperature` must be a finite number above 0, got "):
        Temperature(linear(), value)


@pytest.mark.parametrize("wrap", [lambda part: Temperature(part, 2.0), Transfer])
def test_eot_goes_outside(wrap):
    eot = EOT(jc.Stochastic(lambda key, x: x))
    with pytest.raises((TypeError, ValueError)):
        wrap(eot)


# DistanceLogits


EMBEDDINGS = np.random.default_rng(3).normal(size=(5, 4)).astype(np.float32)
CENTRES = np.random.default_rng(4).normal(size=(6, 4)).astype(np.float32)
METRICS = {
    "l2": partial(cdist, metric="euclidean"),
    "squared_l2": partial(cdist, metric="sqeuclidean"),
    "l8": partial(cdist, metric="minkowski", p=8),
    "linf": partial(cdist, metric="chebyshev"),
    "cosine": partial(cdist, metric="cosine"),
}


def flat(x):
    return x.reshape(x.shape[0], -1)


@pytest.mark.parametrize("rule", METRICS)
def test_distance_logits(rule):
    """SciPy's distances; several centres of a class count by the nearest."""
    expected = -METRICS[rule](np.float64(EMBEDDINGS), np.float64(CENTRES))
    x = jnp.asarray(EMBEDDINGS).reshape(5, 2, 2, 1)
    out = DistanceLogits(flat, CENTRES, rule)(x)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    classes = np.array([1, 0, 2, 1, 1, 0])
    out = jax.jit(DistanceLogits(Partial(flat), CENTRES, rule, classes))(x)
    for label in range(3):
        nearest = expected[:, classes == label].max(axis=1)
        np.testing.assert_allclose(out[:, label], nearest, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", METRICS)
def test_gradients_of_distances(rule):
    """Against finite differences in float64; at a centre, and at zero, they are finite.

    At a centre they are 0, but for the maximum norm, which has no such preference.
    """
    distance, step = METRICS[rule], 1e-6
    point, weights = np.float64(EMBEDDINGS[:1]), np.arange(1.0, 7)
    value = lambda e: (-distance(e, np.float64(CENTRES)) @ weights).item()  # noqa: E731
    model = DistanceLogits(flat, CENTRES, rule)
    total = lambda x: (model(x) * jnp.float32(weights)[None]).sum()  # noqa: E731
    grad = jax.jit(jax.grad(total))
    numeric = [
        (value(point + step * e) - value(point - step * e)) / (2 * step) for e in np.eye(4)[:, None]
    ]
    found = grad(jnp.float32(point).reshape(1, 2, 2, 1))
    np.testing.assert_allclose(found.ravel(), numeric, rtol=1e-3, atol=1e-4)
    for point in (CENTRES[2], np.zeros(4, np.float32)):
        assert np.all(np.isfinite(grad(jnp.asarray(point).reshape(1, 2, 2, 1))))
    own = jax.grad(lambda x: model(x)[0, 2])(jnp.asarray(CENTRES[2]).reshape(1, 2, 2, 1))
    if rule != "linf":
        np.testing.assert_allclose(own, 0, atol=1e-6)


def test_the_smooth_maximum_does_not_overflow():
    """(1e6)^8 is more than float32 holds."""
    x = jnp.float32([[[[1e6], [-1e6]], [[0.0], [3.0]]]])
    model = DistanceLogits(flat, np.zeros((1, 4), np.float32), "l8")
    np.testing.assert_allclose(model(x), [[-1e6 * 2**0.125]], rtol=1e-6)
    slope = jax.grad(lambda x: -model(x).sum())(x).ravel()
    np.testing.assert_allclose(slope, [2**-0.875, -(2**-0.875), 0, 0], rtol=1e-6, atol=1e-12)


def test_calibrated_temperature():
    """95 % of the leads are at most log(9 (k - 1)) after it."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(1000, 5)).astype(np.float32) * 300
    temperature = adaptive.calibrated_temperature(jnp.asarray(logits))
    ranked = np.sort(logits / float(temperature), axis=1)
    lead = ranked[:, -1] - ranked[:, -2]
    assert np.quantile(lead, 0.95) == pytest.approx(np.log(36), rel=1e-4)
    assert adaptive.calibrated_temperature(jnp.zeros((4, 3))) == 1
    with pytest.raises(ValueError, match=r"^`logits` must have the shape \[b, k\], k at least"):
        adaptive.calibrated_temperature(jnp.zeros((4, 1)))
    assert adaptive.calibrated_temperature(jnp.full((4, 3), jnp.nan)) == 1


def test_shared_centres_of_unequal_classes_do_not_distort_gradients():
    """The table of centres is filled up by repetition, which must not count twice."""
    classes = [0, 1, 1, 1, 1, 1]
    x = jnp.asarray(EMBEDDINGS).reshape(5, 2, 2, 1)
    grouped = DistanceLogits(flat, CENTRES, "squared_l2", classes)
    grad = jax.grad(lambda x: grouped(x)[:, 0].sum())(x)
    np.testing.assert_allclose(flat(grad), -2 * (EMBEDDINGS - CENTRES[0]), rtol=1e-5)


def test_attack_on_distance_logits():
    """New centres reuse the program; the verdict is that of the nearest centre."""

    def embed(w, x):
        TRACES.append(x.shape)
        return flat(x) @ w

    rng = np.random.default_rng(0)
    w = jnp.float32(rng.normal(size=(24, 4)) / 5)
    x = jnp.float32(rng.uniform(0.2, 0.8, size=(6, *SHAPE)))
    attack = PGD(Linf(0.2), steps=10, loss="margin")
    for number in range(2):
        centres = flat(x) @ w + 0.02 * jnp.float32(rng.normal(size=(6, 4)))
        model = DistanceLogits(Partial(embed, w), centres, "l2", [0, 1, 2, 0, 1, 2])
        y = jnp.array([0, 1, 2, 0, 1, 2], jnp.int32)
        before = len(TRACES)
        result = attack.run(KEY, model, x, y)
        assert number == 0 or len(TRACES) == before
        nearest = cdist(flat(result.x_adv) @ w, centres).argmin(axis=1) % 3
        np.testing.assert_array_equal(result.success, nearest != y)
        assert result.success.any()


@pytest.mark.parametrize(
    "change, error, message",
    [
        (
            {"rule": "l1"},
            ValueError,
            "^`rule` must be one of cosine, l2, l8, linf, squared_l2; got",
        ),
        ({"embed": 3}, TypeError, "embed"),
        ({"centres": CENTRES[0]}, (TypeError, ValueError), "centres"),
        ({"centres": CENTRES.astype(int)}, TypeError, "centres"),
        ({"centres": CENTRES[:0]}, ValueError, r"^`centres` must have the shape \[m, d\]"),
        ({"classes": [0, 1]}, ValueError, r"^`classes` must have the shape \(6,\), one entry"),
        ({"classes": [0, 0, 2, 2, 3, 3]}, ValueError, r"^`classes` must cover 0 to k - 1, got"),
        ({"classes": np.ones(6)}, TypeError, "^`classes` must be integers, got dtype float64"),
    ],
)
def test_bad_distance_logits(change, error, message):
    with pytest.raises(error, match=message):
        DistanceLogits(**{"embed": flat, "centres": CENTRES, **change})


def test_distance_logits_of_other_dimensions():
    with pytest.raises(ValueError, match=r"^`embed` must return embeddings \[b, 4\], .* \(2, 9\)$"):
        DistanceLogits(flat, CENTRES)(jnp.zeros((2, 3, 3, 1)))


# Transfer


def test_transfer_crafts_on_the_source_and_judges_on_the_target():
    source, target = linear(seed=1), linear(seed=2)
    x, y = images(target, size=12)
    y = y.at[0].set((y[0] + 1) % 3)
    inner = PGD(Linf(0.1), steps=30, loss=lambda logits, y: logits[:, 1] - logits[:, 0])
    result = Transfer(inner, source).run(KEY, target, x, y)
    # The search goes on to the corner of the ball that the source's weights name.
    push = np.asarray(source.args[0]["w"])
    corner = np.clip(
        np.float64(x) + 0.1 * np.sign(push[:, 1] - push[:, 0]).reshape(1, *SHAPE), 0, 1
    )
    np.testing.assert_array_equal(result.x_adv[0], x[0])
    np.testing.assert_allclose(result.x_adv[1:], corner[1:], atol=1e-6)
    np.testing.assert_array_equal(result.success, np.argmax(target(result.x_adv), axis=-1) != y)
    assert result.success[1:].any() and not result.success.all()
    assert np.any((np.argmax(source(result.x_adv), axis=-1) != y) & ~result.success)
    np.testing.assert_array_equal(result.queries.gradient, [0] + [30] * 11)
    np.testing.assert_array_equal(result.queries.forward, [1] + [1 + 30 + 2 + 1] * 11)


def test_transfer_to_the_source_itself():
    """It breaks what the attack breaks whose search does not end early."""
    model = linear()
    x, y = images(model)
    inner = PGD(Linf(0.05), steps=10, loss="margin")
    result = Transfer(inner, model).run(KEY, model, x, y)
    np.testing.assert_array_equal(result.success, inner.run(KEY, model, x, y).success)
    assert np.all(result.norm <= 0.05 + 1e-6)


def test_transfer_rounds_end_with_the_first_that_fools_the_target():
    source, target = linear(4, seed=1), linear(4, seed=2)
    x, y = images(target, size=12)
    result = Transfer(MultiTargetedPGD(Linf(0.08), steps=5), source).run(KEY, target, x, y)
    np.testing.assert_array_equal(result.success, np.argmax(target(result.x_adv), axis=-1) != y)
    rounds = np.asarray(result.queries.gradient) / 5
    assert set(rounds[~result.success]) == {3} and 1 in rounds[result.success]
    traced = Transfer(MultiTargetedPGD(Linf(0.08), steps=5), source).run(
        KEY, target, x, y, trace=True
    )
    assert traced.trace.shape == (3, 6, 12)
    np.testing.assert_array_equal(traced.success, result.success)
    np.testing.assert_allclose(traced.x_adv, result.x_adv, atol=1e-6)


def test_transfer_of_a_minimum_norm_attack():
    """The source's closest image fools the target where both agree; the ball is checked."""
    model = linear()
    x, y = images(model)
    attack = CarliniWagner("l2", steps=30, learning_rate=0.03)
    free = Transfer(attack, model).run(KEY, model, x, y)
    assert free.success.all() and free.norm.max() > 0.05
    eps = float(jnp.median(free.norm)) + 1e-3
    bound = Transfer(dataclasses.replace(attack, threat=L2(eps)), model).run(KEY, model, x, y)
    np.testing.assert_array_equal(bound.success, free.norm <= eps)
    assert np.all(bound.norm <= eps * (1 + 1e-5))


def test_transfer_of_stochastic_models():
    net = linear()
    noisy = jc.Stochastic(
        Partial(lambda net, key, x: net(x + 0.01 * jax.random.normal(key, x.shape)), net)
    )
    x, y = images(net)
    inner = PGD(Linf(0.1), steps=5)
    assert np.all(Transfer(inner, EOT(noisy, samples=2)).run(KEY, noisy, x, y).success)
    assert np.all(Transfer(inner, net).run(KEY, noisy, x, y).success)


def test_transfer_reuses_its_program():
    """For new weights of either model, and another eps; one image does not depend on others."""
    target = linear(seed=2)
    x, y = images(target)
    attack = Transfer(PGD(Linf(0.1), steps=2), linear(seed=1))
    first = attack.run(KEY, target, x, y)
    before = len(TRACES)
    weaker = dataclasses.replace(attack, threat=Linf(0.05))
    assert weaker.attack.threat == Linf(0.05) == weaker.threat
    assert np.all(weaker.run(KEY, target, x, y).norm <= 0.05 + 1e-6)
    Transfer(PGD(Linf(0.1), steps=2), linear(seed=5)).run(KEY, linear(seed=6), x, y)
    assert len(TRACES) == before
    order = np.array([3, 1, 0, 5, 4, 2])
    moved = attack.run(KEY, target, x[order], y[order], order)
    np.testing.assert_array_equal(moved.x_adv, first.x_adv[order])
    assert attack == attack and hash(attack) == hash(attack)


def test_transfer_from_a_module():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(24, 3, rngs=rngs)

        def __call__(self, x):
            return self.linear(flat(x))

    target = linear()
    x, y = images(target)
    result = Transfer(FGSM(Linf(0.3)), Net(nnx.Rngs(0))).run(KEY, target, x, y)
    np.testing.assert_array_equal(result.success, np.argmax(target(result.x_adv), axis=-1) != y)


@pytest.mark.parametrize(
    "attack, source, message",
    [
        ("pgd", linear(), "attack"),
        (PGD(Linf(0.1)), lambda x: flat(x), "^`source` must be a callable pytree of arrays, as an"),
        (PGD(Linf(0.1)), jnp.zeros(3), "source"),
    ],
)
def test_bad_transfer(attack, source, message):
    with pytest.raises(TypeError, match=message):
        Transfer(attack, source)


def test_transfer_between_other_classes():
    target = linear(4)
    x, y = images(target)
    with pytest.raises(ValueError, match="^`source` must have the 4 classes .*, got 3"):
        Transfer(PGD(Linf(0.1)), linear(3)).run(KEY, target, x, y)


def test_exports():
    assert adaptive.EOT is jc.attacks.EOT
