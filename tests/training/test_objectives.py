"""Every objective's loss, adversary and gradient against NumPy in float64."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import scipy.optimize
import scipy.special
from flax import nnx
from training_problems import ONE, Softmax, assert_same_weights, small_cnn, weights

import jaxclus as jc
from jaxclus.threat import image_keys
from jaxclus.training import TrainingConfig, fit
from jaxclus.training.objectives import (
    AWP,
    MART,
    TRADES,
    Adversarial,
    CentrePull,
    FastAdversarial,
    FreeAdversarial,
    LogitClustering,
    Objective,
    Standard,
    TrainingModel,
    WeightClustering,
    WrappedState,
)

BALL = jc.Linf(0.1)
GROUPS = (("round", (0, 2, 3)), ("straight", (1, 4)))
RNG = np.random.default_rng(0)
WEIGHT = RNG.normal(size=(8, 5))
X = RNG.uniform(size=(6, 2, 4, 1)).astype(np.float32)
X_ADV = np.clip(X + RNG.uniform(-0.1, 0.1, X.shape), 0, 1).astype(np.float32)
Y = RNG.integers(0, 5, 6)
KEYS = jax.random.split(jax.random.key(0), 6)
PGD_AT = Adversarial(jc.attacks.PGD(BALL, steps=2))
FREE = FreeAdversarial(BALL, replays=3, step_size=0.06)


@pytest.fixture(scope="module", autouse=True)
def small_programs():
    """Nearly all time here goes into compiling small programs that run once: without optimising."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def in_training(network):
    graph, params, stats = nnx.split(
        nnx.view(network, use_running_average=False, raise_if_not_found=False),
        nnx.Param,
        nnx.BatchStat,
    )
    return graph, nnx.to_pure_dict(params), nnx.to_pure_dict(stats)


def loss_and_gradient(objective, network, x=X, x_adv=X_ADV, y=Y):
    """The outcome and the gradient with respect to the parameters, and the statistics after."""
    graph, params, stats = in_training(network)

    @jax.jit
    def compute(params):
        def loss(params):
            model = TrainingModel(graph, params, stats)
            batch = map(jnp.asarray, (x, x_adv, y))
            state = WrappedState((), WrappedState((), ()))  # also for one in another
            found = objective.loss(model, *batch, KEYS, state)
            return found.loss, (found, model.stats)

        return jax.grad(loss, has_aux=True)(params)

    gradient, (found, stats) = compute(params)
    return found, gradient, stats


def softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def logits_of(x, weight=WEIGHT):
    return np.asarray(x, np.float64).reshape(len(x), -1) @ weight


def cross_entropy(z):
    return -np.log(softmax(z)[np.arange(6), Y])


def kl(z, z_adv):
    p, q = softmax(z), softmax(z_adv)
    return (p * (np.log(p) - np.log(q))).sum(axis=1)


def numeric_gradient(function, at, h=1e-6):
    """Central differences in float64."""
    found = np.zeros_like(at)
    for place in np.ndindex(at.shape):
        for sign in (1, -1):
            moved = at.copy()
            moved[place] += sign * h
            found[place] += sign * function(moved) / (2 * h)
    return found


def both(weight):
    """Logits of X and of X_ADV."""
    return logits_of(X, weight), logits_of(X_ADV, weight)


def trades(z, z_adv, beta):
    return cross_entropy(z).mean() + beta * kl(z, z_adv).mean()


def mart(z, z_adv, beta):
    p_adv, rows, k = softmax(z_adv), np.arange(6), z.shape[1]
    rival = np.delete(p_adv.ravel(), rows * k + Y).reshape(6, k - 1).max(axis=1)
    boosted = cross_entropy(z_adv) - np.log(1.0001 - rival)
    return (boosted + beta * kl(z, z_adv) * (1 - softmax(z)[rows, Y])).mean()


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
        (Standard(), lambda w: cross_entropy(logits_of(X_ADV, w)).mean()),
        (PGD_AT, lambda w: cross_entropy(logits_of(X_ADV, w)).mean()),
        (TRADES(BALL, beta=2.0), lambda w: trades(*both(w), 2.0)),
        (MART(BALL, beta=3.0), lambda w: mart(*both(w), 3.0)),
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
    ids=["standard", "pgd", "trades", "mart", "sum", "mean", "sum over trades"],
)  # fmt: skip
def test_loss_and_gradient(objective, reference):
    found, gradient, _ = loss_and_gradient(objective, Softmax(WEIGHT))
    assert found.loss == pytest.approx(reference(WEIGHT), rel=1e-5)
    wanted = numeric_gradient(reference, WEIGHT)
    np.testing.assert_allclose(gradient["weight"], wanted, atol=1e-5 * np.abs(wanted).max())
    np.testing.assert_allclose(found.logits, logits_of(X_ADV), rtol=1e-5, atol=1e-6)
    right = logits_of(X_ADV).argmax(axis=1) == Y
    assert found.metrics["accuracy"] == pytest.approx(right.mean())


@pytest.mark.parametrize(
    "objective, reference",
    [(TRADES(BALL, beta=2.0), trades), (MART(BALL, beta=2.0), mart)],
    ids=["trades", "mart"],
)
def test_both_terms_are_in_train_mode_and_move_statistics_once(objective, reference):
    network = small_cnn()
    clean, attacked = RNG.uniform(size=(2, 6, 8, 8, 1)).astype(np.float32)
    attacked *= 0.5  # other statistics than those of the clean images
    found, _, stats = loss_and_gradient(objective, network, clean, attacked)

    def one_after_the_other(*batches):
        model = TrainingModel(*in_training(network))
        logits = [np.asarray(model(jnp.asarray(x)), np.float64) for x in batches]
        return logits, model.stats["blocks"][0]["norm"]

    logits, wanted = one_after_the_other(clean, attacked)
    assert found.loss == pytest.approx(reference(*logits, 2.0), rel=1e-5)
    ours = stats["blocks"][0]["norm"]
    others = [one_after_the_other(*xs)[1] for xs in ((attacked, clean), (clean,), (attacked,))]
    for name in ("mean", "var"):
        np.testing.assert_allclose(ours[name], wanted[name], rtol=1e-5, atol=1e-7)
        assert all(np.abs(ours[name] - other[name]).max() > 1e-4 for other in others)


def test_both_forms_are_one_for_ten_classes():
    logits = jnp.asarray(RNG.normal(size=(4, 10)), jnp.float32)
    network = Softmax(RNG.normal(size=(8, 10)))
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
    x = RNG.uniform(size=(6, 4, 4, 2)).astype(np.float32)
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
    x = RNG.uniform(size=(6, 8, 8, 1)).astype(np.float32)
    found, _, _ = loss_and_gradient(WeightClustering(Standard(), groups), network, x, x)
    bare = jc.models.without_batch_norm(network)
    weight, _ = jc.implicit_weight(jc.linearize(bare), (8, 8, 1))
    score = jc.clustering.clustering_score(jc.clustering.correlation(weight), groups)
    assert found.metrics["regulariser"] == pytest.approx(-score.difference, abs=1e-5)


def test_around_awp_the_regulariser_sees_the_weights_themselves():
    network, groups = small_cnn(), jc.data.class_groups("digits")
    x = RNG.uniform(size=(6, 8, 8, 1)).astype(np.float32)
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


def test_trades_climbs_the_divergence_from_close_to_x():
    network, weight = Softmax(WEIGHT), WEIGHT
    noise = np.stack([jax.random.normal(key, X.shape[1:]) for key in KEYS])
    x_adv = X.astype(np.float64) + 0.001 * noise
    clean = logits_of(X)
    for _ in range(3):
        slope = (softmax(logits_of(x_adv)) - softmax(clean)) @ weight.T
        x_adv = x_adv + 0.03 * np.sign(slope.reshape(X.shape))
        x_adv = np.clip(x_adv, np.maximum(X - 0.1, 0), np.minimum(X + 0.1, 1))
    objective = TRADES(BALL, steps=3, step_size=0.03)
    found = objective.perturb(KEYS, network, jnp.asarray(X), jnp.asarray(Y), ())
    np.testing.assert_allclose(found, x_adv, atol=1e-6)
    assert kl(clean, logits_of(found)).min() > 1e-4
    # MART climbs the cross-entropy from the same start.
    x_adv = X + 0.001 * noise
    for _ in range(3):
        slope = (softmax(logits_of(x_adv)) - np.eye(5)[Y]) @ weight.T
        x_adv = x_adv + 0.03 * np.sign(slope.reshape(X.shape))
        x_adv = np.clip(x_adv, np.maximum(X - 0.1, 0), np.minimum(X + 0.1, 1))
    objective = MART(BALL, steps=3, step_size=0.03)
    found = objective.perturb(KEYS, network, jnp.asarray(X), jnp.asarray(Y), ())
    np.testing.assert_allclose(found, x_adv, atol=1e-6)


@pytest.mark.parametrize("ball", [BALL, jc.L2(0.3)], ids=repr)
def test_fast_training_takes_one_long_step_from_a_random_start(ball):
    start = ball.random_start(KEYS, jnp.asarray(X))
    slope = ((softmax(logits_of(start)) - np.eye(5)[Y]) @ WEIGHT.T).reshape(X.shape)
    step = ball.step(jnp.asarray(slope, jnp.float32), start)
    wanted = ball.project(start + 1.25 * ball.eps * step, jnp.asarray(X))
    found = FastAdversarial(ball).perturb(KEYS, Softmax(WEIGHT), jnp.asarray(X), jnp.asarray(Y), ())
    np.testing.assert_allclose(found, wanted, atol=2e-6)


def test_awp_is_the_gradient_at_perturbed_weights():
    def gradient(weight):
        p = softmax(logits_of(X_ADV, weight)) - np.eye(5)[Y]
        return X_ADV.reshape(6, 8).T.astype(np.float64) @ p / 6

    g = gradient(WEIGHT)
    moved = WEIGHT + 0.05 * np.linalg.norm(WEIGHT) / np.linalg.norm(g) * g
    found, ours, _ = loss_and_gradient(AWP(PGD_AT, gamma=0.05), Softmax(WEIGHT))
    assert found.loss == pytest.approx(cross_entropy(logits_of(X_ADV, moved)).mean(), rel=1e-5)
    assert found.loss > cross_entropy(logits_of(X_ADV)).mean()
    np.testing.assert_allclose(ours["weight"], gradient(moved), atol=1e-5 * np.abs(g).max())


def test_awp_holds_its_weights_fixed_in_the_gradient_of_the_images():
    # What free training under AWP moves its perturbation along: v depends on the images too.
    def images_gradient(weight):
        p = softmax(logits_of(X_ADV, weight)) - np.eye(5)[Y]
        return (p @ weight.T).reshape(X.shape) / 6

    p = softmax(logits_of(X_ADV)) - np.eye(5)[Y]
    g = X_ADV.reshape(6, 8).T.astype(np.float64) @ p / 6
    wanted = images_gradient(WEIGHT + 0.5 * np.linalg.norm(WEIGHT) / np.linalg.norm(g) * g)
    network, (x, x_adv, y) = in_training(Softmax(WEIGHT)), map(jnp.asarray, (X, X_ADV, Y))

    def loss(x_adv):
        state = WrappedState((), ())
        return AWP(FREE, gamma=0.5).loss(TrainingModel(*network), x, x_adv, y, KEYS, state).loss

    found = jax.jit(jax.grad(loss))(x_adv)
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


def test_awp_moves_kernels_alone_and_counts_statistics_once():
    network = small_cnn()
    x = RNG.uniform(size=(6, 8, 8, 1)).astype(np.float32)
    graph, params, stats = in_training(network)
    model = TrainingModel(graph, params, stats)
    by = jax.tree.map(lambda w: 0.1 * w if w.ndim > 1 else jnp.zeros_like(w), params)
    model = model.at(jax.tree.map(jnp.add, params, by))
    model(jnp.asarray(x))
    # gamma |w| / |g| g = 0.1 w exactly where the objective's gradient is w itself.
    objective = AWP(_HalfSquaredKernels(), gamma=0.1)
    _, gradient, after = loss_and_gradient(objective, network, x, x)
    for ours, wanted in zip(jax.tree.leaves(after), jax.tree.leaves(model.stats), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-5)
    moved = jax.tree.map(jnp.add, params, by)
    for ours, wanted in zip(jax.tree.leaves(gradient), jax.tree.leaves(moved), strict=True):
        np.testing.assert_allclose(ours, wanted if wanted.ndim > 1 else 0 * wanted, rtol=1e-5)
    assert np.isfinite(loss_and_gradient(AWP(_Nothing()), network, x, x)[0].loss)


@dataclasses.dataclass(frozen=True)
class _HalfSquaredKernels(Objective):
    def loss(self, model, x, x_adv, y, keys, state):
        found = super().loss(model, x, x_adv, y, keys, state)
        kernels = [w for w in jax.tree.leaves(model.params) if w.ndim > 1]
        return found._replace(loss=sum(jnp.square(w).sum() / 2 for w in kernels))


@dataclasses.dataclass(frozen=True)
class _Nothing(Objective):
    def loss(self, model, x, x_adv, y, keys, state):
        found = super().loss(model, x, x_adv, y, keys, state)
        return found._replace(loss=jnp.zeros(()))


def test_free_training_by_hand():
    data = jc.data.Dataset((X * 255).astype(np.uint8), Y, tuple("abcde"))
    config = TrainingConfig(
        epochs=2, batch_size=3, learning_rate=0.5, momentum=0.0, weight_decay=0.0, schedule="step"
    )
    plain = jc.data.NO_AUGMENTATION
    run = fit(
        jax.random.key(0), Softmax(WEIGHT), data, FREE, config, augmentation=plain, devices=ONE,
        progress=False,
    )  # fmt: skip
    order_key = jax.random.split(jax.random.key(0), 4)[1]
    weight, d = WEIGHT.copy(), np.zeros((3, 2, 4, 1))
    for epoch in range(2):
        order = np.asarray(jax.random.permutation(jax.random.fold_in(order_key, epoch), 6))
        for batch in order.reshape(2, 3):
            x = data.images[batch] / 255
            for _ in range(3):
                x_adv = np.clip(x + d, 0, 1)
                p = (softmax(logits_of(x_adv, weight)) - np.eye(5)[Y[batch]]) / 3
                slope = np.where(x + d == x_adv, (p @ weight.T).reshape(x.shape), 0)
                weight = weight - 0.5 * x_adv.reshape(3, 8).T @ p
                d = np.clip(d + 0.06 * np.sign(slope), -0.1, 0.1)
    assert run.history[-1]["step"] == 12
    np.testing.assert_allclose(run.model.weight[...], weight, atol=2e-5)


def test_free_training_goes_on_with_its_perturbation(tmp_path):
    interrupted_training(FREE, tmp_path)


def interrupted_training(objective, tmp_path):
    """Two epochs at once and with an interruption in the second end with the same weights."""
    data = jc.data.load("digits").take(128)
    config = TrainingConfig(epochs=2, batch_size=64, learning_rate=0.1)

    def train(directory):
        return fit(
            jax.random.key(0), small_cnn(), data, objective, config, directory=directory,
            devices=ONE, progress=False,
        )  # fmt: skip

    whole = train(tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(jc.training._fit._Trainer, "_end_epoch", _interrupt_second_epoch())
        train(tmp_path / "broken")
    assert_same_weights(train(tmp_path / "broken").model, whole.model)


def _interrupt_second_epoch():
    end = jc.training._fit._Trainer._end_epoch

    def end_epoch(trainer, state, step):
        if step > 6:
            raise KeyboardInterrupt
        return end(trainer, state, step)

    return end_epoch


@pytest.mark.parametrize(
    "objective",
    [
        TRADES(BALL, steps=2),
        AWP(PGD_AT),
        FREE,
        LogitClustering(PGD_AT, jc.data.class_groups("digits"), 1.0),
        WeightClustering(Standard(), jc.data.class_groups("digits")),
    ],
    ids=lambda objective: type(objective).__name__,
)
def test_eight_devices_train_as_one(objective):
    data = jc.data.load("digits").take(32)
    config = TrainingConfig(epochs=1, batch_size=16, learning_rate=0.05)
    one, eight = (
        weights(
            fit(
                jax.random.key(0), small_cnn(), data, objective, config, devices=devices,
                progress=False,
            ).model
        )
        for devices in (ONE, jax.devices())
    )  # fmt: skip
    # So close to x, rounding decides the sign of some entries of the divergence's gradient.
    for name, array in one.items():
        exact = 2e-5 * np.abs(array).max() + 1e-7
        atol = 1e-3 if isinstance(objective, TRADES) else exact
        np.testing.assert_allclose(eight[name], array, atol=atol)


@pytest.mark.parametrize(
    "objective, attack",
    [
        (TRADES(BALL, steps=4), jc.attacks.PGD(BALL, steps=4)),
        (MART(BALL, steps=4, step_size=0.02), jc.attacks.PGD(BALL, steps=4, step_size=0.02)),
        (FastAdversarial(BALL), jc.attacks.PGD(BALL, steps=10)),
        (FREE, jc.attacks.PGD(BALL, steps=10)),
        (AWP(PGD_AT), PGD_AT.attack),
        (WeightClustering(AWP(PGD_AT), GROUPS), PGD_AT.attack),
        (LogitClustering(Standard(), GROUPS), None),
    ],
)
def test_validation_attack(objective, attack):
    assert objective.validation_attack() == attack


def test_objectives_are_hashable_and_groups_have_one_form():
    named = LogitClustering(PGD_AT, GROUPS)
    ids = LogitClustering(PGD_AT, np.array([7, 9, 7, 7, 9]))
    assert named == ids and hash(named) == hash(ids)
    assert named.groups == (0, 1, 0, 0, 1)
    assert WeightClustering(FREE, GROUPS).steps_per_batch == 3


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: TRADES(BALL, beta=-1.0), "`beta` must be a finite number of at least 0, got -1.0"),
        (lambda: TRADES(BALL, steps=0), "`steps` must be at least 1, got 0"),
        (lambda: MART(BALL, step_size=0.0), "`step_size` must be a finite number above 0"),
        (lambda: AWP(PGD_AT, gamma=-0.1), "`gamma` must be a finite number of at least 0"),
        (lambda: FastAdversarial(BALL, -1.0), "`step_size` must be a finite number above 0"),
        (lambda: FreeAdversarial(BALL, replays=0), "`replays` must be at least 1, got 0"),
        (lambda: LogitClustering(PGD_AT, GROUPS, -1.0), "`beta` must be a finite number of at"),
        (lambda: LogitClustering(PGD_AT, (("a", (0, 1)), ("b", (1, 2)))), "`groups` must hold"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_threat_model_is_no_attack(monkeypatch):
    # Without the checks of annotations, which in the tests come before our own.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    message = r"`attack` must be an attack as PGD\(Linf\(8 / 255\)\) is, got Linf\(eps=0.1\)"
    with pytest.raises(TypeError, match=message):
        Adversarial(BALL)


def test_bad_types_and_shapes_are_named():
    with pytest.raises(TypeError, match=r"`threat` must be one as Linf\(8 / 255\) makes"):
        FreeAdversarial(jc.L2(0.5))
    # Where pytest checks types, its error comes before ours.
    with pytest.raises((TypeError, jaxtyping.TypeCheckError), match="objective"):
        AWP(jc.attacks.PGD(BALL))
    with pytest.raises((ValueError, jaxtyping.TypeCheckError), match="form"):
        LogitClustering(PGD_AT, GROUPS, 1.0, "max")
    with pytest.raises(ValueError, match="`groups` must give a group for each of the 5 classes"):
        loss_and_gradient(LogitClustering(Standard(), (0, 0, 1, 1)), Softmax(WEIGHT))
    with pytest.raises(ValueError, match="`groups` must be at least two, one of them with at"):
        jc.clustering.within_minus_between(jnp.eye(4), (0, 0, 0, 0))


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


@pytest.mark.parametrize(
    "objective",
    [CentrePull(FREE), LogitClustering(AWP(FREE), jc.data.class_groups("digits"))],
    ids=["centres", "clustering"],
)
def test_objectives_in_objectives_go_on_after_an_interruption(objective, tmp_path):
    interrupted_training(objective, tmp_path)


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
