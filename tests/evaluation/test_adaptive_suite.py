"""The adaptive suite on a trained network with prototypes that saturate, and on heads by hand."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from sklearn.linear_model import LogisticRegression

import jaxclus as jc
from jaxclus.attacks import PGD, Temperature
from jaxclus.clustr import ClusterClassifier
from jaxclus.evaluation import ITEMS, adaptive_suite, robustness
from jaxclus.evaluation._adaptive_inputs import parts
from jaxclus.evaluation._softmax_head import softmax_head
from jaxclus.prototypes import PrototypeHead, PrototypeTraining, prototype_loss
from jaxclus.threat import L1, Linf
from jaxclus.training import TrainingConfig, fit

KEY = jax.random.key(0)
ONE = jax.devices()[:1]
BALL = Linf(0.1)
TRAIN = jc.data.load("digits", "train")
TEST = jc.data.load("digits", "test").take(60)


def trained():
    """Digits onto repulsive prototypes, whose inner products lead by thousands at T = 1."""
    net = jc.models.create("cnn", 10, (8, 8, 1), KEY, widths=(8,), hidden=16, embedding_size=20)
    config = TrainingConfig(epochs=12, batch_size=96, optimizer="adamw", learning_rate=1e-2)
    objective = PrototypeTraining("repulsive", distance="l2")
    run = fit(KEY, net, TRAIN, objective, config, devices=ONE, progress=False)
    network, head = jc.models.parts(run.model)
    saturated = dataclasses.replace(head, temperature=1.0)
    return jc.Chain(jc.models.features(network), saturated)


@pytest.fixture(scope="module")
def defence():
    return trained()


def own_loss(defence):
    prototypes = defence.parts[-1].prototypes
    return lambda h, y: prototype_loss(h, prototypes[y], "l2")


@pytest.fixture(scope="module")
def suite(defence, few_queries, tmp_path_factory):
    place = tmp_path_factory.mktemp("suite")
    undefended = Partial(
        lambda w, x: x.reshape(x.shape[0], -1) @ w, jax.random.normal(KEY, (64, 10))
    )
    settings = {
        "own_loss": own_loss(defence),
        "surrogates": {"random": undefended},
        "steps": 10,
        "restarts": 2,
        "directory": place,
        "devices": ONE,
        "progress": False,
    }
    found = adaptive_suite(KEY, defence, TEST, BALL, **settings)
    return found, settings


def test_lands_where_cross_entropy_does_not(suite, defence):
    """Logits that lead by hundreds leave the cross-entropy without a gradient."""
    found, _ = suite
    plain = robustness(KEY, defence, PGD(BALL, 10, restarts=2), TEST, devices=ONE, progress=False)
    assert plain.robust_accuracy - found.robust_accuracy > 0.3
    assert found.temperature > 100


def test_the_worst_case_is_over_all_items(suite, defence):
    found, _ = suite
    assert tuple(found.results) == ITEMS[:-1]
    assert found.not_run == {} and found.masking is not None
    stands = {name: each.robust for name, each in found.results.items()}
    np.testing.assert_array_equal(found.robust, np.all(list(stands.values()), axis=0))
    assert found.robust_accuracy == found.robust.mean() < found.clean_accuracy
    assert found.masking_gap == stands["own-loss"].mean() - found.robust_accuracy
    # Every image that some item breaks is wrong, and in the ball; the others are the clean ones.
    clean = jc.data.to_float(TEST.images)
    wrong = np.argmax(defence(jnp.asarray(found.adversarial)), axis=1) != TEST.labels
    broken = found.results["margin"].clean & ~found.robust
    assert broken.sum() > 20
    np.testing.assert_array_equal(wrong[broken], True)
    np.testing.assert_array_equal(found.adversarial[found.robust], clean[found.robust])
    assert np.abs(found.adversarial - clean).max() <= BALL.limit


def test_what_gradients_miss(suite):
    """Square inside AutoAttack counts as gradient-free."""
    found, _ = suite
    *gradients, square = found.results["autoattack"].members
    assert square.name == "square"
    others = [found.results[name].robust for name in ("own-loss", "margin", "prototypes")]
    others += [found.results["transfer"].robust, gradients[-1].robust]
    expected = (np.all(others, axis=0) & ~found.robust).mean()
    assert found.gradient_free_alone == expected
    only = dataclasses.replace(found, results={"noise": found.results["noise"]})
    assert only.gradient_free_alone is None and only.masking_gap is None
    blind = dataclasses.replace(
        found, results={name: found.results[name] for name in ("gradient-free", "noise")}
    )
    assert blind.gradient_free_alone is None


def test_members_and_report(suite):
    found, _ = suite
    members = {name: [m.name for m in each.members] for name, each in found.results.items()}
    assert members["own-loss"] == ["PGD", "APGD"]
    assert members["margin"] == ["PGD", "targeted PGD"]
    assert members["prototypes"] == [
        "target, l2", "difference, l2", "target, cosine", "difference, cosine", "target, l8",
        "difference, l8",
    ]  # fmt: skip
    assert members["gradient-free"] == ["Square", "HopSkipJump"]
    assert members["transfer"] == [
        "linear head, APGD", "linear head, targeted APGD", "random, APGD", "random, targeted APGD",
    ]  # fmt: skip
    report = json.loads(json.dumps(found.to_json()))
    assert report["norm"] == "linf" and report["eps"] == pytest.approx(0.1)
    assert report["robust_accuracy"] == found.robust_accuracy
    assert set(report["items"]) == set(found.results) and report["masking"]["num_images"] > 20


def test_a_finished_suite_is_read(suite, defence):
    """Nothing is computed again, as the times tell; another model is refused."""
    found, settings = suite
    again = adaptive_suite(KEY, defence, TEST, BALL, **settings, items=("margin", "prototypes"))
    for name in ("margin", "prototypes"):
        np.testing.assert_array_equal(again.results[name].robust, found.results[name].robust)
        assert again.results[name].seconds == pytest.approx(found.results[name].seconds, abs=1e-2)
    assert set(again.not_run) == set(ITEMS) - {"margin", "prototypes"}
    assert set(again.not_run.values()) == {"not asked for"}
    other = jc.Chain(defence.parts[0], dataclasses.replace(defence.parts[1], rule="l2"))
    with pytest.raises(ValueError, match="^`directory` must be empty or hold this evaluation"):
        adaptive_suite(KEY, other, TEST, BALL, **settings, items=("margin",))


# Heads by hand: embeddings are the images themselves.


def flat(one, x):
    return x.reshape(x.shape[0], -1) * one


EMBED = Partial(flat, jnp.float32(1))
CENTRES = jnp.float32([[0.3, 0.3], [0.7, 0.7], [0.3, 0.7]])
POINTS = np.random.default_rng(0).integers(60, 200, (40, 1, 2, 1)).astype(np.uint8)


def by_hand(head, eps):
    """Images of two pixels, labelled by the head, and whether a grid over their balls stands."""
    x = np.float32(POINTS / 255)
    labels = np.asarray(head(x.reshape(-1, 2))).argmax(axis=1).astype(np.int32)
    grid = np.stack(np.meshgrid(*[np.linspace(-eps, eps, 81)] * 2), axis=-1).reshape(-1, 2)
    near = np.clip(x.reshape(-1, 1, 2) + grid[None], 0, 1).astype(np.float32)
    verdicts = np.asarray(head(near.reshape(-1, 2))).argmax(axis=1).reshape(len(x), -1)
    return jc.data.Dataset(POINTS, labels), (verdicts == labels[:, None]).all(axis=1)


@pytest.mark.parametrize(
    "head",
    [
        PrototypeHead(CENTRES, "l2"),
        PrototypeHead(CENTRES, "linf"),
        ClusterClassifier(CENTRES, (0, 1, 1), 0.05),
    ],
    ids=["l2", "linf", "clusters"],
)
def test_targeted_distances_find_every_adversarial_image(head):
    """As an exhaustive search of the ball does, with prototypes and with clusters."""
    data, stands = by_hand(head, 0.06)
    assert 5 < stands.sum() < 35
    found = adaptive_suite(
        KEY, jc.Chain(EMBED, head), data, Linf(0.06), items=("prototypes",), steps=20,
        devices=ONE, progress=False,
    )  # fmt: skip
    # A grid of 81 x 81 can miss what lies between its points.
    assert not (found.robust & ~stands).any() and (found.robust != stands).sum() <= 1


def test_parts_can_be_given():
    """A model that hides its parts is attacked in the same way when they are named."""
    head = PrototypeHead(CENTRES, "l2")
    data, _ = by_hand(head, 0.06)
    settings = {"items": ("own-loss",), "steps": 5, "restarts": 1, "devices": ONE}
    settings |= {"progress": False, "own_loss": lambda h, y: prototype_loss(h, CENTRES[y], "l2")}
    hidden = Partial(lambda head, x: head(flat(1, x)), head)
    given = adaptive_suite(KEY, hidden, data, Linf(0.06), embed=EMBED, head=head, **settings)
    known = adaptive_suite(KEY, jc.Chain(EMBED, head), data, Linf(0.06), **settings)
    assert known.robust_accuracy < known.clean_accuracy
    np.testing.assert_array_equal(given.robust, known.robust)
    chained = jc.Chain(Partial(lambda one, x: x * one, jnp.float32(1)), EMBED, head)
    longer = adaptive_suite(KEY, chained, data, Linf(0.06), **settings)
    np.testing.assert_array_equal(longer.robust, known.robust)
    assert parts(hidden, EMBED, head) == (EMBED, head)
    assert parts(jc.Chain(EMBED, head), None, None) == (EMBED, head)
    # Chains of chains, and temperatures around them.
    nested = Temperature(Temperature(jc.Chain(EMBED, head), 2.0), 3.0)
    assert parts(nested, None, None) == (EMBED, head)
    embed, found = parts(jc.Chain(chained.parts[0], jc.Chain(EMBED, head)), None, None)
    assert embed.parts == chained.parts[:2] and found is head
    assert parts(Temperature(hidden, 2.0), None, None) == (None, None)


def test_what_lacks_inputs_is_not_run():
    plain = Partial(lambda w, x: flat(1, x) @ w, CENTRES.T)
    data = jc.data.Dataset(POINTS, np.zeros(40, np.int32))
    found = adaptive_suite(
        KEY, plain, data, L1(0.05), steps=2, restarts=1, devices=ONE, progress=False,
        items=("own-loss", "prototypes", "gradient-free", "transfer", "noise"),
    )  # fmt: skip
    assert set(found.results) == {"noise", "gradient-free"}
    assert [m.name for m in found.results["gradient-free"].members] == ["Square"]
    reasons = {name: reason for name, reason in found.not_run.items() if "asked" not in reason}
    assert reasons == {
        "own-loss": "`own_loss` is not given",
        "prototypes": "`embed` is not given, and `model` does not end in a prototype or cluster "
        "head",
        "gradient-free: HopSkipJump": "it is not made for l1",
        "transfer: linear head": "`embed` is not given, and `model` does not end in a prototype or "
        "cluster head",
        "transfer: surrogates": "none is given",
    }
    with pytest.raises(ValueError, match="^`items` must hold an attack that can run"):
        adaptive_suite(KEY, plain, data, L1(0.05), items=("own-loss",), progress=False)


def test_an_own_loss_of_the_logits():
    """Without an embedding; and of a model that is never right, nothing is left to check."""
    plain = Partial(lambda w, x: flat(1, x) @ w, CENTRES.T)
    logits = np.asarray(plain(jnp.float32(POINTS / 255)))
    data = jc.data.Dataset(POINTS, np.argmin(logits, axis=1).astype(np.int32))
    found = adaptive_suite(
        KEY, plain, data, Linf(0.05), lambda z, y: -z[:, 0], items=("own-loss", "masking"), steps=2,
        restarts=1, devices=ONE, progress=False,
    )  # fmt: skip
    assert found.robust_accuracy == found.clean_accuracy == 0 and found.masking_gap == 0
    assert found.masking is None
    assert found.not_run["masking"] == "no image is classified correctly"


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"items": ("A1",)}, ValueError, "`items` must be one of"),
        ({"steps": 0}, ValueError, "`steps` must be at least 1, got 0"),
        ({"restarts": 0}, ValueError, "`restarts` must be at least 1, got 0"),
        ({"model": jc.Stochastic(lambda key, x: x)}, TypeError, "`model` must draw no random"),
        ({"key": jax.random.PRNGKey(0)}, TypeError, "`key` must be"),
    ],
)
def test_bad_arguments(changes, error, message):
    head = PrototypeHead(CENTRES, "l2")
    data, _ = by_hand(head, 0.01)
    given = {"key": KEY, "model": jc.Chain(EMBED, head), "data": data, "threat": BALL}
    with pytest.raises(error, match="^" + message):
        adaptive_suite(**given | changes)
    for wrong in ({"head": CENTRES}, {"threat": 0.1}, {"data": POINTS}, {"surrogates": (1,)}):
        with pytest.raises(TypeError, match=next(iter(wrong))):
            adaptive_suite(**given | wrong)


TWO_CLASSES = Partial(lambda w, x: flat(1, x) @ w, jnp.ones((2, 2)))


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"head": PrototypeHead(CENTRES[:2])}, ValueError, "`head` must have the 3 classes"),
        ({"embed": lambda x: x}, TypeError, "`embed` must be a callable pytree of arrays"),
        ({"surrogates": {"net": len}}, TypeError, r"`surrogates\['net'\]` must be a callable"),
        (
            {"surrogates": {"two": TWO_CLASSES}},
            ValueError,
            r"`surrogates\['two'\]` must have the 3",
        ),
        ({"own_loss": lambda h, y: h.sum()}, ValueError, "`own_loss` must return one loss for"),
        ({"own_loss": lambda h, y: y}, ValueError, "`own_loss` must return .* floating point"),
        (
            {"embed": Partial(lambda one, x: x * one, jnp.float32(1))},
            ValueError,
            r"`embed` must return .*embeddings \[b, 2\], .*float32 \(1, 1, 2, 1\)",
        ),
        (
            {"embed": Partial(lambda w, x: flat(1, x) @ w, jnp.ones((2, 6)))},
            ValueError,
            r"`embed` must return .*embeddings \[b, 2\], .*float32 \(1, 6\)",
        ),
        (
            {"embed": Partial(lambda w, x: jnp.int32(flat(1, x) @ w), jnp.eye(2))},
            ValueError,
            r"`embed` must return floating-point embeddings \[b, 2\], .*int32 \(1, 2\)",
        ),
        (
            {"embed": Partial(lambda w, x: jnp.tile(flat(1, x) @ w, (2, 1)), jnp.eye(2))},
            ValueError,
            r"`embed` must return .*embeddings \[b, 2\], .*float32 \(2, 2\)",
        ),
    ],
)
def test_what_does_not_fit_is_said_before_any_attack(changes, error, message):
    """Under the argument's own name, whatever items are asked for."""
    head = PrototypeHead(CENTRES, "l2")
    data, _ = by_hand(head, 0.01)
    with pytest.raises(error, match="^" + message):
        adaptive_suite(KEY, jc.Chain(EMBED, head), data, BALL, items=("noise",), **changes)


def with_own_derivative(loss):
    """Another function, with the derivative of this one."""

    @jax.custom_vjp
    def same(h, y):
        return prototype_loss(h, CENTRES[y], "l2")

    def backward(kept, slope):
        h, y = kept
        return jax.vjp(lambda h: loss(h, y), h)[1](slope)[0], None

    same.defvjp(lambda h, y: (same(h, y), (h, y)), backward)
    return same


def in_bfloat16(loss):
    """With constants that NumPy does not know: literals of bfloat16, keys."""
    key = jax.random.key(0)

    def low(h, y):
        noise = 1e-3 * jax.random.normal(key, h.shape)
        return (loss(h + noise, y).astype(jnp.bfloat16) * 2).astype(jnp.float32)

    return jax.jit(low)


@pytest.mark.parametrize(
    "wrapped", [lambda loss: loss, jax.jit, jax.checkpoint, with_own_derivative, in_bfloat16]
)
def test_another_own_loss_is_another_evaluation(tmp_path, wrapped):
    """Also where functions have the same name and differ in what they close over."""
    head = PrototypeHead(CENTRES, "l2")
    data, _ = by_hand(head, 0.06)
    settings = {"items": ("own-loss",), "steps": 2, "restarts": 1, "devices": ONE}
    settings |= {"directory": tmp_path, "progress": False}
    model = jc.Chain(EMBED, head)

    def run(sign):
        own = wrapped(lambda h, y: sign * prototype_loss(h, CENTRES[y], "l2"))
        return adaptive_suite(KEY, model, data, Linf(0.06), own, **settings).robust_accuracy

    first = run(jnp.float32(1.0))
    assert run(jnp.float32(1.0)) == first
    with pytest.raises(ValueError, match="^`directory` must be empty or hold this evaluation"):
        run(jnp.float32(-1.0))


def test_clusters_that_were_trained():
    """ClusTR with its own loss, full-set and per image: less is left than it reports."""
    net = jc.models.create("cnn", 10, (8, 8, 1), KEY, widths=(8,), hidden=16)
    config = TrainingConfig(epochs=8, batch_size=80, optimizer="adamw", learning_rate=1e-2)
    objective = jc.clustr.ClusTR(clusters_per_batch=10, nearest=5)
    model = fit(KEY, net, TRAIN.take(600), objective, config, devices=ONE, progress=False).model
    head = jc.models.parts(model)[1]
    found = adaptive_suite(
        KEY, model, TEST, BALL, lambda h, y: jc.losses.cross_entropy(head.scores(h), y),
        items=("own-loss", "margin", "prototypes", "transfer"), steps=10, restarts=1,
        devices=ONE, progress=False,
    )  # fmt: skip
    members = {name: [m.name for m in each.members] for name, each in found.results.items()}
    assert members["own-loss"] == ["PGD", "APGD"] and len(members["prototypes"]) == 6
    assert members["transfer"] == ["linear head, APGD", "linear head, targeted APGD"]
    assert found.clean_accuracy > 0.8
    assert found.masking_gap > 0 and found.robust_accuracy < found.clean_accuracy - 0.3


def test_a_ball_over_the_whole_box_has_no_masking_checks():
    """All falls there, and nothing that was found is lost."""
    head = PrototypeHead(CENTRES, "l2")
    data, _ = by_hand(head, 0.01)
    found = adaptive_suite(
        KEY, jc.Chain(EMBED, head), data, Linf(1.0), items=("margin", "masking"), steps=10,
        restarts=2, progress=False,
    )  # fmt: skip
    assert found.robust_accuracy == 0 < found.clean_accuracy
    assert found.not_run["masking"] == "the ball covers the whole pixel box"
    assert found.to_json()["seed"] == [0, 0]


def test_the_linear_head_is_logistic_regression():
    """scikit-learn's on standardised embeddings, with C = 1 / (n decay)."""
    rng = np.random.default_rng(0)
    labels = np.arange(300) % 3
    h = rng.normal(size=(300, 5)) * [1, 10, 0.1, 2, 0] + labels[:, None] * [1, 5, 0.1, 0, 0] + 4
    head = softmax_head(np.float32(h), labels, 3)
    spread = np.where(h.std(axis=0) > 0, h.std(axis=0), 1)
    reference = LogisticRegression(C=1 / (300 * 1e-3), max_iter=1000, tol=1e-8)
    reference.fit((h - h.mean(axis=0)) / spread, labels)
    expected = reference.predict_log_proba((h - h.mean(axis=0)) / spread)
    found = jax.nn.log_softmax(head(jnp.float32(h)), axis=1)
    np.testing.assert_allclose(found, expected, atol=2e-2)
