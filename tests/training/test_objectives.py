"""Every objective's loss, adversary and gradient against NumPy in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
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
    kl,
    logits_of,
    loss_and_gradient,
    random_images,
    softmax,
    trades,
)
from training_problems import ONE, Softmax, assert_same_weights, small_cnn, weights

import jaxclus as jc
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


def mart(z, z_adv, beta):
    p_adv, rows, k = softmax(z_adv), np.arange(6), z.shape[1]
    rival = np.delete(p_adv.ravel(), rows * k + Y).reshape(6, k - 1).max(axis=1)
    boosted = cross_entropy(z_adv) - np.log(1.0001 - rival)
    return (boosted + beta * kl(z, z_adv) * (1 - softmax(z)[rows, Y])).mean()


@pytest.mark.parametrize(
    "objective, reference",
    [
        (Standard(), lambda w: cross_entropy(logits_of(X_ADV, w)).mean()),
        (PGD_AT, lambda w: cross_entropy(logits_of(X_ADV, w)).mean()),
        (TRADES(BALL, beta=2.0), lambda w: trades(*both(w), 2.0)),
        (MART(BALL, beta=3.0), lambda w: mart(*both(w), 3.0)),
    ],
    ids=["standard", "pgd", "trades", "mart"],
)
def test_loss_and_gradient(objective, reference):
    assert_loss_and_gradient(objective, reference)


@pytest.mark.parametrize(
    "objective, reference",
    [(TRADES(BALL, beta=2.0), trades), (MART(BALL, beta=2.0), mart)],
    ids=["trades", "mart"],
)
def test_both_terms_are_in_train_mode_and_move_statistics_once(objective, reference):
    network = small_cnn()
    clean, attacked = random_images(2, 6, 8, 8, 1)
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
    x = random_images(6, 8, 8, 1)
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


@pytest.mark.parametrize(
    "objective",
    [FREE, CentrePull(FREE), LogitClustering(AWP(FREE), jc.data.class_groups("digits"))],
    ids=["free", "centres", "clustering"],
)
def test_free_training_goes_on_with_its_perturbation(objective, tmp_path):
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
        LogitClustering(FREE, jc.data.class_groups("digits"), 1.0),
        WeightClustering(AWP(PGD_AT), jc.data.class_groups("digits")),
    ],
    ids=["trades", "clustering and free", "clustering and AWP"],
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
