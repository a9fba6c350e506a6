"""Chains, classifiers that draw random numbers, and averages over their passes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import jaxclus as jc
from jaxclus import _classifier, compose, losses
from jaxclus.attacks import EOT, MIFGSM, PGD, TargetedFAB, Transfer, _gradient
from jaxclus.compose import Chain, Stochastic
from jaxclus.threat import Linf

KEY = jax.random.key(0)
SHAPE, SIZE = (3, 2, 1), 6
TRACES = []


def predict(w, x):
    TRACES.append(x.shape)
    return (x.reshape(x.shape[0], -1) - 0.5) @ w


def noisy(params, key, x):
    """A linear model of noisy images; one draw for the whole batch that it is given."""
    return predict(params["w"], x + params["noise"] * jax.random.normal(key, x.shape))


W = jnp.float32(np.random.default_rng(0).normal(size=(6, 3)))
X = jnp.float32(np.random.default_rng(1).uniform(0.2, 0.8, size=(SIZE, *SHAPE)))
Y = jnp.argmax(predict(W, X), axis=-1).astype(jnp.int32)
KEYS = jax.random.split(jax.random.key(7), SIZE)
MODEL = Stochastic(Partial(noisy, {"w": W, "noise": 0.1}))


def of_one(key, image):
    """The model's logits for one image under one key."""
    return noisy({"w": W, "noise": 0.1}, key, image[None])[0]


# Chain


def test_chain():
    chain = Chain(lambda x: x + 1, lambda x: 2 * x, lambda x: x - 3)
    assert chain(jnp.float32(5.0)) == 9.0 and not compose.is_stochastic(chain)
    np.testing.assert_array_equal(jc.Chain(Partial(predict, W))(X), predict(W, X))
    gradient = jax.grad(lambda x: Chain(jnp.sin, jnp.square)(x))(jnp.float32(0.3))
    np.testing.assert_allclose(gradient, 2 * np.sin(0.3) * np.cos(0.3), rtol=1e-6)


def test_chain_with_stochastic_parts():
    """Part i draws from fold_in(key, i), so that two of a kind draw different numbers."""
    draw = Stochastic(lambda key, x: x + jax.random.normal(key, x.shape))
    chain = Chain(draw, lambda x: 10 * x, draw)
    assert compose.is_stochastic(chain)
    first, last = (jax.random.normal(jax.random.fold_in(KEY, i), (2,)) for i in (0, 2))
    x = jnp.array([1.0, 2.0])
    np.testing.assert_allclose(chain(KEY, x), 10 * (x + first) + last, rtol=1e-6)
    with pytest.raises(TypeError, match="^a chain with a `Stochastic` part is called with"):
        chain(x)


def test_chains_of_chains():
    inner = Chain(Stochastic(lambda key, x: x + jax.random.uniform(key), passes=7))
    chain = Chain(lambda x: x, inner, Stochastic(lambda key, x: x, passes=3))
    assert compose.is_stochastic(chain) and compose.passes(chain) == 7
    expected = jax.random.uniform(jax.random.fold_in(jax.random.fold_in(KEY, 1), 0))
    np.testing.assert_allclose(chain(KEY, jnp.float32(1.0)), 1 + expected, rtol=1e-6)


def test_passes():
    assert compose.passes(predict) == 1 and compose.passes(Chain(predict)) == 1
    assert compose.passes(Stochastic(noisy)) == 20
    assert compose.passes(EOT(Stochastic(noisy, passes=5), samples=2)) == 5


@pytest.mark.parametrize("parts", [(), (3,), (jnp.sin, None)])
def test_bad_chains(parts):
    with pytest.raises(TypeError, match="parts"):
        Chain(*parts)


# Keys


def test_every_image_has_its_own_key():
    """Logits are those of the image alone, whatever batch and place it is in."""
    expected = jnp.stack([of_one(key, image) for key, image in zip(KEYS, X, strict=True)])
    out = compose.with_keys(MODEL, KEYS)(X)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    order = np.array([4, 0, 5, 2])
    np.testing.assert_allclose(compose.with_keys(MODEL, KEYS[order])(X[order]), out[order], 1e-6)
    assert not np.allclose(compose.with_keys(MODEL, KEYS[::-1])(X), out, atol=1e-3)
    same = compose.with_keys(MODEL, KEYS)(jnp.broadcast_to(X[:1], X.shape))
    assert len(np.unique(np.asarray(same)[:, 0])) == SIZE
    plain = Partial(predict, W)
    assert compose.with_keys(plain, KEYS) is plain


def test_split():
    """`fold_in` of each key, with one number for all or one for each."""
    data = lambda keys: np.asarray(jax.random.key_data(keys))  # noqa: E731
    each = compose.split(KEYS, jnp.arange(SIZE))
    for i in range(SIZE):
        expected = data(jax.random.fold_in(KEYS[i], i))
        np.testing.assert_array_equal(data(each[i]), expected)
        np.testing.assert_array_equal(data(compose.split(KEYS, i)[i]), expected)


# EOT


def test_eot_averages_gradients():
    """Loss and gradient are the means over single passes, taken here image by image."""
    model = EOT(MODEL, 5)
    found = jax.jit(
        lambda x: _gradient.evaluate_with_gradient(model, KEYS, losses.cross_entropy, x, Y)
    )(X)

    def one(key, image, label):
        logits = of_one(key, image)
        return losses.cross_entropy(logits[None], label[None])[0], jnp.argmax(logits) != label

    single = jax.jit(jax.value_and_grad(one, argnums=1, has_aux=True))
    for i in range(SIZE):
        passes = [single(jax.random.fold_in(KEYS[i], s), X[i], Y[i]) for s in range(5)]
        loss = np.mean([value for (value, _), _ in passes])
        np.testing.assert_allclose(found.loss[i], loss, rtol=1e-5)
        gradient = np.mean([slope for _, slope in passes], axis=0)
        np.testing.assert_allclose(found.gradient[i], gradient, rtol=1e-4, atol=1e-6)
        assert found.wrong[i] == (np.sum([wrong for (_, wrong), _ in passes]) >= 3)
    value, verdict = _gradient.evaluate(model, KEYS, losses.cross_entropy, X, Y)
    np.testing.assert_allclose(value, found.loss, rtol=1e-5)
    np.testing.assert_array_equal(verdict, found.wrong)


def test_eot_is_wrong_by_majority():
    """Three of five passes; a tie is no majority."""

    def coin(key, x):
        wrong = jax.random.bernoulli(key, 0.5, (x.shape[0],))
        return jax.nn.one_hot(wrong.astype(jnp.int32), 2)

    keys, y = jax.random.split(KEY, 40), jnp.zeros(40, jnp.int32)
    x = jnp.zeros((40, 1, 1, 1))
    for samples in (4, 5):
        drawn = [
            compose.with_keys(Stochastic(coin), compose.split(keys, s))(x)[:, 1]
            for s in range(samples)
        ]
        count = np.sum(drawn, axis=0)
        wrong = _gradient.evaluate(EOT(Stochastic(coin), samples), keys, losses.margin, x, y)[1]
        np.testing.assert_array_equal(wrong, count > samples / 2)
        assert samples == 5 or 2 in count


def test_eot_of_one_pass_of_the_model():
    np.testing.assert_array_equal(EOT(MODEL)(KEY, X), MODEL(KEY, X))
    assert compose.is_stochastic(EOT(MODEL))


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: EOT(predict), TypeError, "^`model` must be a jc.Stochastic, or a jc.Chain with"),
        (lambda: EOT(Chain(predict)), TypeError, "^`model` must be a jc.Stochastic"),
        (lambda: EOT(MODEL, 0), ValueError, "^`samples` must be at least 1, got 0"),
        (lambda: Stochastic(noisy, 0), ValueError, "^`passes` must be at least 1, got 0"),
        (lambda: Stochastic(3), TypeError, "fn"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


# Verdicts


def test_verdict_by_majority():
    """Votes of single passes counted by hand; ties go to the lower class."""

    def dice(key, x):
        return jax.nn.one_hot(jax.random.randint(key, (x.shape[0],), 0, 3), 3)

    keys, x = jax.random.split(KEY, 60), jnp.zeros((60, 1, 1, 1))
    model = Stochastic(dice, passes=4)
    logits, predicted = jax.jit(lambda: _classifier.verdict(model, keys, x))()
    folded = compose.split(keys, _classifier._VERDICT)
    votes = sum(compose.with_keys(model, compose.split(folded, s))(x) for s in range(4))
    np.testing.assert_allclose(logits, votes / 4, rtol=1e-6)
    np.testing.assert_array_equal(predicted, np.argmax(votes, axis=1))
    ties = np.sum(votes == votes.max(axis=1, keepdims=True), axis=1) > 1
    assert ties.any() and not ties.all()


def test_votes_count_not_logits():
    """One pass with huge logits does not outvote three others."""

    def loud(key, x):
        rare = jax.random.bernoulli(key, 0.2, (x.shape[0], 1))
        return jnp.where(rare, jnp.array([[0.0, 1000.0]]), jnp.array([[1.0, 0.0]]))

    keys, x = jax.random.split(KEY, 8), jnp.zeros((8, 1, 1, 1))
    logits, predicted = _classifier.verdict(Stochastic(loud, passes=50), keys, x)
    assert np.all(np.argmax(logits, axis=1) == 1) and np.all(predicted == 0)


# Attacks on stochastic classifiers


def test_attacked_images_do_not_depend_on_their_batch():
    attack = PGD(Linf(0.1), steps=3)
    result = attack.run(KEY, MODEL, X, Y)
    order = np.array([3, 1, 0, 5, 4, 2])
    moved = attack.run(KEY, MODEL, X[order], Y[order], order)
    np.testing.assert_array_equal(moved.x_adv, result.x_adv[order])
    np.testing.assert_array_equal(moved.success, result.success[order])
    # Draws are new for another key; new weights reuse the program.
    assert not np.array_equal(attack.run(jax.random.key(1), MODEL, X, Y).x_adv, result.x_adv)
    before = len(TRACES)
    attack.run(KEY, Stochastic(Partial(noisy, {"w": -W, "noise": 0.2})), X, Y)
    assert len(TRACES) == before
    verdict = _classifier.verdict(
        MODEL, jax.vmap(lambda i: jax.random.fold_in(KEY, i))(jnp.arange(SIZE)), result.x_adv
    )[1]
    np.testing.assert_array_equal(result.success, verdict != Y)


def test_eot_steadies_the_direction():
    """Noise that drowns a single gradient's signs averages out over many passes."""

    def masked(w, key, x):
        noise = jax.random.normal(key, x.shape)
        return predict(w, x) + jnp.array([[0.0, 0.0, 6.0]]) * (noise * x).sum()

    model = Stochastic(Partial(masked, W))
    y = jnp.full(SIZE, 2, jnp.int32)
    loss = lambda logits, y: logits[:, 0] - logits[:, 2]  # noqa: E731
    attack = MIFGSM(Linf(0.05), steps=1, loss=loss)
    corner = 0.05 * np.sign(np.asarray(W[:, 0] - W[:, 2])).reshape(1, *SHAPE)
    agree = []
    for samples in (1, 400):
        x_adv = attack.perturb(KEYS, EOT(model, samples), X, y)
        agree.append(np.mean(np.sign(np.asarray(x_adv - X)) == np.sign(corner)))
    assert agree[0] < 0.8 < agree[1]


def lucky(reach, key, x):
    """Right below 0.6, wrong above; with noise, sometimes wrong from 0.3 on."""
    margin = 0.6 - x.reshape(x.shape[0]) + reach * jax.random.uniform(key, minval=-1.0)
    return jnp.stack([margin, jnp.zeros_like(margin)], axis=1)


@pytest.mark.parametrize("trace", [False, True])
def test_one_lucky_pass_does_not_end_a_search(trace):
    """An image leaves where the verdict's own passes agree, in `run` and in an evaluation."""
    model = Stochastic(Partial(lucky, jnp.float32(0.3)), passes=51)
    images = np.full((12, 1, 1, 1), 102, np.uint8)
    x, y = jc.data.to_float(images), np.zeros(12, np.int32)
    attack = PGD(Linf(0.35), steps=30, step_size=0.02, restarts=1)
    result = attack.run(KEY, model, x, y, trace=trace)
    assert np.all(result.success) and np.all(result.x_adv > 0.5)
    if not trace:
        ended = np.asarray(result.queries.gradient)
        assert np.any(ended < 30)
        data = jc.data.Dataset(images, y, ("low", "high"), name="grey", split="test")
        found = jc.evaluation.robustness(KEY, model, attack, data, progress=False)
        assert found.robust_accuracy == 0 and found.members[0].gradient == np.sum(ended)


def test_a_lucky_candidate_does_not_hide_later_ones():
    """Minimum-norm attacks keep the closest candidate: of those that the verdict confirms."""
    model = Stochastic(Partial(lucky, jnp.float32(0.3)), passes=51)
    x, y = jnp.full((12, 1, 1, 1), 0.4), jnp.zeros(12, jnp.int32)
    result = TargetedFAB("linf", Linf(0.4), beta=1.0).run(KEY, model, x, y)
    assert np.all(result.success) and np.all(result.x_adv > 0.5)


def test_queries_of_a_transfer_attack_are_the_sources():
    threat = Linf(1e-6)
    plain = Partial(predict, W)
    to_noisy = Transfer(PGD(threat, steps=3), plain).run(KEY, EOT(MODEL, 5), X, Y)
    assert np.max(to_noisy.queries.gradient) == 3
    from_noisy = Transfer(PGD(threat, steps=3), plain).run(KEY, plain, X, Y)
    np.testing.assert_array_equal(from_noisy.queries.gradient, 3)


def test_queries_count_every_sample():
    attack = PGD(Linf(1e-6), steps=3)
    plain, averaged = (attack.run(KEY, model, X, Y) for model in (MODEL, EOT(MODEL, 5)))
    np.testing.assert_array_equal(averaged.queries.gradient, 5 * plain.queries.gradient)
    search = plain.queries.forward - 1 - (plain.queries.gradient > 0)
    np.testing.assert_array_equal(
        averaged.queries.forward, 5 * search + 1 + (averaged.queries.gradient > 0)
    )
    assert np.any(search > 0)
