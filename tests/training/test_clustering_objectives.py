"""The clustering regularisers and the centres of classes against NumPy in float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special
from flax import nnx
from objective_problems import (
    BALL,
    FREE,
    GROUPS,
    KEYS,
    PGD_AT,
    WEIGHT,
    X_ADV,
    X,
    Y,
    assert_loss_and_gradient,
    both,
    cross_entropy,
    in_training,
    logits_of,
    loss_and_gradient,
    numeric_gradient,
    random_images,
    trades,
)
from training_problems import ONE, Softmax, assert_same_weights, small_cnn

import jaxclus as jc
from jaxclus.threat import image_keys
from jaxclus.training import TrainingConfig, fit
from jaxclus.training.objectives import (
    AWP,
    TRADES,
    CentrePull,
    LogitClustering,
    Standard,
    TrainingModel,
    WeightClustering,
)


def logit_clustering(weight, beta, form):
    z = logits_of(X_ADV, weight)
    total = 0.0
    for _, members in GROUPS:
        own = z[:, list(members)]
        total += ((own - own.mean(axis=1, keepdims=True)) ** 2).mean(axis=0).sum()
    scale = 0.1 if form == "sum" else 1 / 5
    return cross_entropy(z).mean() + beta * scale * total


@pytest.mark.parametrize(
    "objective, reference",
    [
        (LogitClustering(PGD_AT, GROUPS, 0.7), lambda w: logit_clustering(w, 0.7, "sum")),
        (
            LogitClustering(PGD_AT, GROUPS, 0.7, "mean"),
            lambda w: logit_clustering(w, 0.7, "mean"),
        ),
        (
            LogitClustering(TRADES(BALL, beta=2.0), GROUPS, 1.0),
            lambda w: trades(*both(w), 2.0) + logit_clustering(w, 1.0, "sum")
            - cross_entropy(logits_of(X_ADV, w)).mean(),
        ),
    ],
    ids=["sum", "mean", "sum over trades"],
)  # fmt: skip
def test_loss_and_gradient(objective, reference):
    assert_loss_and_gradient(objective, reference)


def test_both_forms_are_one_for_ten_classes():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(4, 10)), jnp.float32)
    network = Softmax(rng.normal(size=(8, 10)))
    groups = jc.data.class_groups("cifar10")
    one, other = (
        loss_and_gradient(LogitClustering(Standard(), groups, 1.0, form), network)[0].loss
        for form in ("sum", "mean")
    )
    assert one == pytest.approx(float(other), rel=1e-6)
    assert jc.clustering.within_group_spread(logits, groups).shape == (4,)


def linear_weight(conv, dense, head):
    """W [k, h * w * c] of conv (3x3, stride 2, padding 1), dense and head, without biases."""
    rows = []
    for image in np.eye(4 * 4 * 2).reshape(-1, 4, 4, 2):
        padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
        maps = [
            np.einsum("hwi,hwio->o", padded[2 * i : 2 * i + 3, 2 * j : 2 * j + 3], conv)
            for i in range(2)
            for j in range(2)
        ]
        rows.append(np.concatenate(maps) @ dense @ head)
    return np.array(rows).T


def test_weight_clustering_against_finite_differences():
    network = jc.models.create(
        "cnn", 5, (4, 4, 2), jax.random.key(1), widths=(3,), hidden=4, mean=[0.4, 0.5]
    )
    objective = WeightClustering(Standard(), GROUPS, beta=2.0)
    x = random_images(6, 4, 4, 2)
    found, gradient, _ = loss_and_gradient(objective, network, x, x)
    plain, plain_gradient, _ = loss_and_gradient(Standard(), network, x, x)
    shapes = [(3, 3, 2, 3), (12, 4), (4, 5)]
    start = np.concatenate(
        [
            np.asarray(layer.kernel[...], np.float64).ravel()
            for layer in (network.blocks[0].conv, network.dense, network.head)
        ]
    )
    same = np.array([0, 1, 0, 0, 1])[:, None] == np.array([0, 1, 0, 0, 1])[None]
    upper = np.triu(np.ones((5, 5), bool), 1)

    def regulariser(flat):
        ends = np.cumsum([np.prod(shape) for shape in shapes])[:-1]
        kernels = [p.reshape(s) for p, s in zip(np.split(flat, ends), shapes, strict=True)]
        rows = linear_weight(*kernels)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        C = rows @ rows.T
        return C[upper & ~same].mean() - C[upper & same].mean()

    assert found.metrics["regulariser"] == pytest.approx(regulariser(start), abs=1e-5)
    assert found.loss == pytest.approx(float(plain.loss) + 2 * regulariser(start), abs=1e-5)
    wanted = 2 * numeric_gradient(regulariser, start)
    difference = jax.tree.map(jnp.subtract, gradient, plain_gradient)
    ours = [
        np.ravel(difference["blocks"][0]["conv"]["kernel"]),
        np.ravel(difference["dense"]["kernel"]),
        np.ravel(difference["head"]["kernel"]),
    ]
    largest = np.abs(wanted).max()
    np.testing.assert_allclose(np.concatenate(ours), wanted, atol=2e-5 * largest)
    # Neither BatchNorm nor any bias takes part.
    norm = difference["blocks"][0]["norm"]
    for leaf in (norm["scale"], norm["bias"], difference["dense"]["bias"]):
        np.testing.assert_array_equal(leaf, 0)


def test_weight_clustering_is_minus_the_clustering_score():
    network = small_cnn()
    groups = jc.data.class_groups("digits")
    x = random_images(6, 8, 8, 1)
    found, _, _ = loss_and_gradient(WeightClustering(Standard(), groups), network, x, x)
    bare = jc.models.without_batch_norm(network)
    weight, _ = jc.implicit_weight(jc.linearize(bare), (8, 8, 1))
    score = jc.clustering.clustering_score(jc.clustering.correlation(weight), groups)
    assert found.metrics["regulariser"] == pytest.approx(-score.difference, abs=1e-5)


def test_around_awp_the_regulariser_sees_the_weights_themselves():
    network, groups = small_cnn(), jc.data.class_groups("digits")
    x = random_images(6, 8, 8, 1)
    plain, _, _ = loss_and_gradient(WeightClustering(Standard(), groups), network, x, x)
    around = WeightClustering(AWP(Standard(), gamma=0.5), groups)
    found, _, _ = loss_and_gradient(around, network, x, x)
    assert found.metrics["regulariser"] == pytest.approx(float(plain.metrics["regulariser"]))
    within = AWP(WeightClustering(Standard(), groups), gamma=0.5)
    moved, _, _ = loss_and_gradient(within, network, x, x)
    assert abs(moved.metrics["regulariser"] - plain.metrics["regulariser"]) > 1e-3


def trained(objective, **settings):
    config = TrainingConfig(epochs=1, batch_size=64, learning_rate=0.1, **settings)
    data = jc.data.load("digits").take(256)
    run = fit(jax.random.key(0), small_cnn(), data, objective, config, devices=ONE, progress=False)
    return run.model


@pytest.mark.parametrize("inner", [Standard(), TRADES(BALL, steps=2)], ids=repr)
def test_beta_0_is_the_objective_itself_bit_for_bit(inner):
    groups, plain = jc.data.class_groups("digits"), trained(inner)
    for kind in (LogitClustering, WeightClustering):
        assert_same_weights(trained(kind(inner, groups, beta=0.0)), plain)


def test_objectives_are_hashable_and_groups_have_one_form():
    named = LogitClustering(PGD_AT, GROUPS)
    ids = LogitClustering(PGD_AT, np.array([7, 9, 7, 7, 9]))
    assert named == ids and hash(named) == hash(ids)
    assert named.groups == (0, 1, 0, 0, 1)
    assert WeightClustering(FREE, GROUPS).steps_per_batch == 3


def test_centre_pull_on_softmax_regression():
    data = jc.data.Dataset((X * 255).astype(np.uint8), Y, tuple("abcde"))
    objective, network = CentrePull(PGD_AT, beta=0.5), Softmax(WEIGHT)
    arrays = jnp.asarray(data.images), jnp.asarray(data.labels)
    state = objective.init(jax.random.key(0), network, *arrays, 3)
    z = logits_of(data.images / 255)
    centres = np.stack([z[Y == c].mean(axis=0) if c in Y else np.zeros(5) for c in range(5)])
    np.testing.assert_allclose(state.own, centres, rtol=1e-5, atol=1e-6)
    assert set(range(5)) - set(Y.tolist()), "a class without images is part of the test"
    graph, params, stats = in_training(network)
    model = TrainingModel(graph, params, stats)
    found = objective.loss(model, *map(jnp.asarray, (X, X_ADV, Y)), KEYS, state)
    pull = ((logits_of(X_ADV) - centres[Y]) ** 2).mean()
    wanted = cross_entropy(logits_of(X_ADV)).mean() + 0.5 * pull
    assert found.loss == pytest.approx(wanted, rel=1e-5)
    assert found.metrics["distance_to_centre"] == pytest.approx(pull, rel=1e-5)


def test_centre_pull_warns_of_the_classes_that_it_loses():
    k, beta = 4, 2.0
    rng = np.random.default_rng(0)
    centres = rng.normal(0, 1.5, (k, k)).astype(np.float32)

    def optimum(y):
        """Of cross-entropy plus beta mean (z - m_y)^2, a convex function of z."""
        return scipy.optimize.minimize(
            lambda z: scipy.special.logsumexp(z) - z[y] + beta * np.mean((z - centres[y]) ** 2),
            np.zeros(k),
            tol=1e-10,
        ).x

    lost = [y for y in range(k) if optimum(y).argmax() != y]
    assert 0 < len(lost) < k
    labels = jnp.arange(k)
    images = labels.astype(jnp.uint8).reshape(k, 1, 1, 1)
    network = _Lookup(centres)
    with pytest.warns(UserWarning, match=rf"`beta` 2 pulls the classes {re.escape(str(lost))} to"):
        found = CentrePull(Standard(), beta).own_state(KEYS[0], network, images, labels)
    np.testing.assert_allclose(found, centres, rtol=1e-6)
    gaps = (centres + np.where(np.eye(k), -np.inf, 0)).max(axis=1) - centres.diagonal()
    limit = k / (2 * gaps.max())
    above, below = (CentrePull(Standard(), factor * limit) for factor in (1.01, 0.99))
    with pytest.warns(UserWarning, match=f"must be below {limit:.3g} with this head"):
        above.own_state(KEYS[0], network, images, labels)
    below.own_state(KEYS[0], network, images, labels)  # a warning is an error in the tests


class _Lookup(nnx.Module):
    """An image of one pixel, the class in levels of 255, has that class's centre as logits."""

    def __init__(self, centres):
        self.centres = nnx.Param(jnp.array(centres))

    def __call__(self, x):
        return self.centres[...][jnp.round(x[:, 0, 0, 0] * 255).astype(int)]


def test_published_centres_are_those_of_augmented_images():
    data = jc.data.load("digits").take(64)
    arrays = jnp.asarray(data.images), jnp.asarray(data.labels)
    plain, published, again = (
        CentrePull(Standard(), as_published=how).init(jax.random.key(seed), small_cnn(), *arrays, 8)
        for how, seed in ((False, 0), (True, 0), (True, 1))
    )
    # Its own key is what `init` of the objectives around another one gives it.
    keys = image_keys(jax.random.fold_in(jax.random.key(0), 1), jnp.arange(64))
    augmented = jc.data.Augmentation(crop_padding=4, flip=True)(keys, arrays[0])
    network, members = small_cnn(), np.eye(10)[data.labels]
    for images, found in ((arrays[0], plain.own), (augmented, published.own)):
        logits = np.asarray(network(jc.data.to_float(images)), np.float64)
        wanted = members.T @ logits / members.sum(axis=0)[:, None]
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    for other in (plain, again):
        assert np.abs(other.own - published.own).max() > 1e-3


def test_weight_clustering_refuses_networks_that_are_not_affine():
    data = jc.data.load("digits").take(64)
    arrays = jnp.asarray(data.images), jnp.asarray(data.labels)
    network, groups = small_cnn(activation="tanh"), jc.data.class_groups("digits")
    with pytest.raises(ValueError, match="must be affine in the images.*in the way: tanh"):
        WeightClustering(Standard(), groups).init(jax.random.key(0), network, *arrays, 8)
    WeightClustering(Standard(), groups, beta=0.0).init(jax.random.key(0), network, *arrays, 8)


def test_centre_pull_keeps_its_centres_and_the_state_within(tmp_path):
    data = jc.data.load("digits").take(128)
    config = TrainingConfig(epochs=2, batch_size=64, learning_rate=0.1)
    run = fit(
        jax.random.key(0), small_cnn(), data, CentrePull(FREE), config, directory=tmp_path,
        devices=ONE, progress=False,
    )  # fmt: skip
    saved, _ = jc.training.Checkpoints(tmp_path / "checkpoints").restore()
    centres, delta = saved["objective"]["own"], saved["objective"]["inner"]
    arrays = jnp.asarray(data.images), jnp.asarray(data.labels)
    start = CentrePull(FREE).init(jax.random.key(0), small_cnn(), *arrays, 64)
    np.testing.assert_allclose(centres, start.own, rtol=1e-5, atol=1e-6)
    assert delta.shape == (64, 8, 8, 1) and 0 < np.abs(delta).max() <= BALL.eps
    assert run.history[-1]["distance_to_centre"] < run.history[0]["distance_to_centre"]
