"""Certificates against closed forms, float64 and every image of the ball."""

import json
import math

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from certified_networks import (
    SHAPE,
    affine,
    cnn,
    cnn_clusters,
    cnn_nearest,
    digits,
    lipschitz_clusters,
    lipschitz_nearest,
)

import jaxclus as jc
from jaxclus.evaluation import certify

BALLS = {"l2": (jc.L2, 1.0), "l1": (jc.L1, 1.0), "linf": (jc.Linf, 8.0)}


@pytest.fixture(scope="module")
def data():
    return digits(60)


def pixels(data):
    return data.images.reshape(len(data), -1).astype(np.float64) / 255


@pytest.fixture(scope="module")
def isometry(data):
    """3 Q x + 24 for orthogonal Q, which a move along any direction stretches alike; some head."""
    rng = np.random.default_rng(0)
    q, head = np.linalg.qr(rng.normal(size=(64, 64)))[0], 0.1 * rng.normal(size=(64, 10))
    model = affine(3 * q, head, bias=24.0)
    return model, pixels(data) @ (3 * q) + 24, head


@pytest.mark.parametrize("norm", BALLS)
def test_lipschitz_radii_are_the_distances_to_other_classes(isometry, data, norm):
    model, features, head = isometry
    ball, per_unit = BALLS[norm]
    logits = features @ head
    y, found = logits.argmax(axis=1), certify(model, data, ball(0.02))
    gaps = np.linalg.norm(head[:, :, None] - head[:, None], axis=0)[y]
    gaps[np.arange(len(y)), y] = 1
    leads = logits.max(axis=1, keepdims=True) - logits
    leads[np.arange(len(y)), y] = np.inf
    wanted = np.where(y == data.labels, (leads / (3 * gaps)).min(axis=1), 0) / per_unit
    np.testing.assert_array_equal(found.clean, y == data.labels)
    assert 0 < found.clean.sum() < len(data)
    assert found.lipschitz == pytest.approx(3, rel=1e-5)
    np.testing.assert_allclose(found.radius, wanted, rtol=5e-3, atol=2e-3)
    assert (found.radius <= wanted + 1e-9).all()
    np.testing.assert_array_equal(found.certified, found.radius > float(ball(0.02).limit))


def test_l2_radii_are_tight_for_an_isometry(isometry, data):
    model, features, head = isometry
    found = certify(model, data, jc.L2(0.1))
    logits, q = features @ head, np.asarray(model.dense.kernel[...], np.float64) / 3
    changed = 0
    for n in np.flatnonzero(found.clean & (found.radius > 0.1)):
        y, moved = data.labels[n], []
        for size in (0.995, 1.02):
            rays = (q @ (head - head[:, [y]])).T
            lengths = np.linalg.norm(rays, axis=1, keepdims=True)
            rays = rays / np.where(lengths > 0, lengths, 1) * size * found.radius[n]
            moved.append((logits[n] + rays @ (3 * q) @ head).argmax(axis=1) != y)
        assert not moved[0].any()
        changed += moved[1].any()
    assert changed > 0.5 * (found.clean & (found.radius > 0.1)).sum() > 0


def test_two_clusters_on_a_line(data):
    # h = 2 (x . v): the class changes half-way between the centres, at the distance over 2.
    v = np.random.default_rng(1).normal(size=(64, 1))
    v /= np.linalg.norm(v)
    net, h = affine(2 * v, np.zeros((1, 10)), bias=9.0), pixels(data) @ (2 * v) + 9
    low, high = np.quantile(h, [0.2, 0.9])
    head = jc.clustr.ClusterClassifier(jnp.array([[low], [high]], jnp.float32), (0, 1), 0.3)
    two = jc.data.Dataset(data.images, (data.labels % 2).astype(np.int32), ("0", "1"))
    found = certify(jc.Chain(jc.models.features(net), head), two, jc.L2(0.05))
    away = np.abs(h[:, 0] - (low + high) / 2) / 2
    right = (h[:, 0] > (low + high) / 2) == two.labels
    np.testing.assert_allclose(found.radius, np.where(right, away, 0), rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(found.certified, found.radius > 0.05 * (1 + 1e-5))
    assert 0 < found.certified.sum() < found.clean.sum() < len(two)


def test_intervals_are_exact_where_each_feature_is_a_pixel():
    data, head = digits(364), np.random.default_rng(2).normal(size=(64, 10))
    model, x = affine(np.eye(64), head), pixels(data)
    y = (x @ head).argmax(axis=1)
    weights, clean = head[:, y].T[:, :, None] - head[None], y == data.labels  # [n, d, k]
    shares = []
    for eps in np.linspace(0.001, 0.03, 10):
        found = certify(model, data, jc.Linf(float(eps)), method="interval")
        ends = (np.maximum(x - eps, 0), np.minimum(x + eps, 1))
        least = np.minimum(*(weights * end[:, :, None] for end in ends)).sum(axis=1)
        least[np.arange(len(y)), y] = np.inf
        margin = least.min(axis=1)
        np.testing.assert_array_equal(found.clean, clean)
        assert (found.certified <= (clean & (margin > 0))).all()
        clear = np.abs(margin) > 1e-3
        np.testing.assert_array_equal(found.certified[clear], (clean & (margin > 0))[clear])
        shares.append(found.certified.mean())
        assert found.radius is None and found.lipschitz is None
    assert 0 < shares[-1] < shares[0] <= clean.mean()


@pytest.mark.parametrize(
    "make, method, eps",
    [
        (cnn, "lipschitz", 0.004),
        (cnn, "interval", 0.004),
        (lipschitz_clusters, "lipschitz", 0.004),
        (cnn_clusters, "interval", 0.004),
        (lipschitz_nearest, "lipschitz", 0.004),
        (cnn_nearest, "interval", 0.002),
    ],
)
def test_certified_images_hold_at_random_points_and_corners(make, method, eps, data):
    model = make()
    found = certify(model, data, jc.Linf(eps), method=method, microbatch=8)
    assert found.certified.any() and not (found.certified & ~found.clean).any()
    assert make is not lipschitz_clusters or found.lipschitz <= 1.001
    x = jc.data.to_float(data.images[found.certified])
    labels = data.labels[found.certified]

    @jax.jit
    def right(key):
        inner = jax.random.uniform(key, x.shape, minval=-1.0)
        delta = jnp.where(jax.random.bernoulli(key), inner, jnp.sign(inner)) * eps
        return (model(jnp.clip(x + delta, 0, 1)).argmax(axis=1) == labels).all()

    assert all(right(key) for key in jax.random.split(jax.random.key(0), 50))


@pytest.mark.parametrize("make", [lipschitz_clusters, cnn_clusters, lipschitz_nearest])
def test_ten_thousand_moves_through_a_network_stay_in_the_class(make, data):
    """Half towards images of other classes, half in random directions, all as far as is proved."""
    model = make()
    radius = np.asarray(certify(model, data, jc.L2(0.01)).radius)
    chosen = np.argsort(radius)[-20:]
    x, radius = np.asarray(jc.data.to_float(data.images[chosen])), radius[chosen]
    others = np.asarray(jc.data.to_float(data.images))
    before = np.asarray(model(jnp.asarray(x))).argmax(axis=1)
    turned, rng = (
        jax.jit(lambda x, y: (model(x).argmax(axis=1) != y).sum()),
        np.random.default_rng(0),
    )
    assert radius.min() > 0
    for image, y, r in zip(x, before, radius, strict=True):
        rivals = others[data.labels != y] - image
        moves = rivals[rng.integers(len(rivals), size=500)]
        moves = np.concatenate(
            [moves + 0.1 * rng.normal(size=moves.shape), rng.normal(size=moves.shape)]
        )
        moves /= np.linalg.norm(moves.reshape(1000, -1), axis=1)[:, None, None, None]
        # Beyond the pixels' box, where the radius holds as well.
        assert not turned(jnp.asarray(image + 0.9999 * r * moves, jnp.float32), int(y))


def test_clean_verdicts_are_those_of_the_evaluation(data):
    clean = jc.evaluation.correct(cnn_clusters(), data)
    assert clean.mean() > 0.5
    for method in ("lipschitz", "interval"):
        found = certify(cnn_clusters(), data, jc.Linf(0.002), method=method)
        np.testing.assert_array_equal(found.clean, clean)


def test_microbatch_and_devices_change_nothing_but_rounding(data):
    model = cnn_clusters()
    whole = certify(model, data, jc.L2(0.1), devices=jax.devices())
    small = certify(model, data, jc.L2(0.1), microbatch=7, devices=jax.devices()[:2])
    np.testing.assert_allclose(small.radius, whole.radius, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(small.certified, whole.certified)
    assert (small.microbatch, small.num_devices, whole.num_devices) == (7, 2, 8)


def test_json_carries_the_evidence(data):
    found = certify(cnn(), data, jc.Linf(0.002))
    values = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert (values["method"], values["norm"], values["eps"]) == ("lipschitz", "linf", 0.002)
    assert (values["dataset"], values["num_images"]) == ("digits", 60)
    assert values["certified"].count("1") / 60 == pytest.approx(values["certified_accuracy"])
    assert values["clean"].count("1") / 60 == pytest.approx(values["clean_accuracy"])
    np.testing.assert_array_equal(np.float32(values["radius"]), found.radius)
    assert values["lipschitz"] == found.lipschitz and {"versions", "hardware"} <= values.keys()
    assert certify(cnn(), data, jc.Linf(0.01), method="interval").to_json()["radius"] is None


def test_classes_that_nothing_tells_apart(data):
    """Equal weights: a lead of the bias is for ever, and JSON has no infinity."""
    two = jc.data.Dataset(data.images, np.zeros(60, np.int32), ("0", "1"))
    model = affine(np.eye(64), np.zeros((64, 2)), classes=2)
    model.head.bias[...] = jnp.array([1.0, 0.0])
    found = certify(model, two, jc.L2(3.0))
    assert (found.radius == math.inf).all() and found.certified.all()
    assert found.to_json()["radius"] == [None] * 60
    model.head.bias[...] = jnp.zeros(2)  # a tie
    assert not certify(model, two, jc.L2(3.0)).certified.any()


def _net(name="cnn", **arguments):
    return jc.models.create(name, 10, SHAPE, jax.random.key(0), **arguments)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"method": "smoothing"}, ValueError, "`method` must be one of interval, lipschitz"),
        ({"threat": 0.1}, TypeError, "`threat` must be jc.Linf, jc.L2 or jc.L1"),
        (
            {"threat": jc.L2(0.1), "method": "interval"},
            ValueError,
            '`threat` must be a jc.Linf for method="interval"',
        ),
        ({"data": None}, TypeError, "`data` must be a jc.data.Dataset"),
        ({"make": lambda: len}, TypeError, "`model` must be a network of jc.models"),
        ({"make": lambda: _net("vgg11", width=4)}, TypeError, "`model` must be a CNN, ResNet"),
        ({"make": lambda: _net(dtype="bfloat16")}, TypeError, "`model` must .* float32"),
        (
            {"make": lambda: _net(activation="gelu"), "method": "interval"},
            ValueError,
            "`model` must have monotone activations",
        ),
        (
            {"make": lambda: jc.Chain(jc.models.features(_net()), jc.models.Identity())},
            TypeError,
            "`model` must have a head that is a jc.models.Linear, a jc.clustr.ClusterClassifier or",
        ),
        ({"microbatch": 0}, ValueError, "`microbatch` must be at least 1"),
    ],
)
def test_bad_input_is_refused(change, error, message, data, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    given = {"make": _net, "data": data, "threat": jc.Linf(0.1)} | change
    with pytest.raises(error, match=message):
        certify(given.pop("make")(), **given)


def test_a_head_that_is_no_dense_layer_is_refused(data):
    model = _net()
    model.head = jc.models.Identity()
    with pytest.raises(TypeError, match="`model` must have a head that is a jc.models.Linear"):
        certify(model, data, jc.Linf(0.1))
