import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from training_problems import (
    ONE,
    PLAIN_SGD,
    Memorise,
    Memory,
    Softmax,
    memory_after,
    one_image_per_label,
    small_cnn,
)

import jaxclus as jc
from jaxclus import parallel
from jaxclus.training import TrainingConfig, _step, fit
from jaxclus.training.objectives import MART, Adversarial, CentrePull, FastAdversarial, Standard

BALL = jc.Linf(0.1)
NO_AUGMENTATION = jc.data.Augmentation(crop_padding=0, flip=False)

# Softmax regression in NumPy, float64.
rng = np.random.default_rng(0)
REGRESSION = jc.data.Dataset(
    rng.integers(0, 256, (12, 2, 2, 1), dtype=np.uint8), rng.integers(0, 3, 12), ("a", "b", "c")
)
START = rng.normal(size=(4, 3))


def gradient(weight):
    x = REGRESSION.images.reshape(12, 4) / 255
    logits = x @ weight
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    return x.T @ (p - np.eye(3)[REGRESSION.labels]) / 12


def sgd(weight, rates, momentum, weight_decay):
    """torch.optim.SGD: buffer = momentum * buffer + (grad + decay * w); w -= rate * buffer."""
    buffer = np.zeros_like(weight)
    for rate in rates:
        buffer = momentum * buffer + gradient(weight) + weight_decay * weight
        weight = weight - rate * buffer
        yield weight


def adamw(weight, rates, weight_decay):
    """Algorithm 2 of arXiv:1711.05101 with PyTorch's scale of the decay, rate * decay."""
    m, v = np.zeros_like(weight), np.zeros_like(weight)
    for t, rate in enumerate(rates, start=1):
        g = gradient(weight)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        step = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        weight = weight - rate * (step + weight_decay * weight)
        yield weight


def trained(**settings):
    config = TrainingConfig(epochs=3, batch_size=12, **settings)
    run = fit(
        jax.random.key(0), Softmax(START), REGRESSION, Standard(), config,
        devices=ONE, progress=False,
    )  # fmt: skip
    return np.asarray(run.model.weight[...])


def assert_close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("momentum, weight_decay", [(0.9, 0.01), (0.0, 0.1), (0.5, 0.0)])
def test_sgd_is_pytorchs(momentum, weight_decay):
    *_, wanted = sgd(START, [0.5] * 3, momentum, weight_decay)
    found = trained(
        schedule="step", learning_rate=0.5, momentum=momentum, weight_decay=weight_decay
    )
    assert_close(found, wanted)


def test_sgd_follows_the_schedule():
    rates = [0.5 * 0.5 * (1 + np.cos(np.pi * t / 3)) for t in range(3)]
    *_, wanted = sgd(START, rates, 0.9, 0.01)
    assert_close(trained(learning_rate=0.5, momentum=0.9, weight_decay=0.01), wanted)
    rates = [0.5, 0.5, 0.05]
    *_, wanted = sgd(START, rates, 0.9, 0.01)
    found = trained(schedule="step", milestones=(2,), learning_rate=0.5, weight_decay=0.01)
    assert_close(found, wanted)


def test_adamw_is_the_published_one():
    *_, wanted = adamw(START, [0.1] * 3, 0.2)
    found = trained(optimizer="adamw", schedule="step", learning_rate=0.1, weight_decay=0.2)
    assert_close(found, wanted)


def test_moving_average_by_hand():
    average = START
    for weight in sgd(START, [0.5] * 3, 0.9, 0.0):
        average = 0.6 * average + 0.4 * weight
    found = trained(schedule="step", learning_rate=0.5, weight_decay=0.0, ema_decay=0.6)
    assert_close(found, average)


def digits_program(model, objective, devices, augmentation=NO_AUGMENTATION, **settings):
    config = TrainingConfig(epochs=2, batch_size=16, learning_rate=0.1, **settings)
    return _step.Program.of(
        model,
        objective=objective,
        config=config,
        augmentation=augmentation,
        steps_per_epoch=1,
        mesh=parallel.mesh(devices),
    )


def one_step(model, objective, devices, **settings):
    """State and metrics after one step on 16 digits."""
    program = digits_program(model, objective, devices, **settings)
    data, placement = jc.data.load("digits").take(16), parallel.replicated(program.mesh)
    arrays = jnp.asarray(data.images), jnp.asarray(data.labels)
    own = objective.init(jax.random.key(1), model, *arrays, 16)
    state = _step.initial_state(program, _step.weights_of(model), own, validated=False)
    key, order = jax.random.key(3), np.arange(16, dtype=np.int32)
    arguments = jax.device_put((key, order, data.images, data.labels), placement)
    state, metrics = _step.train_step(state, *arguments, program=program)
    return jax.tree.map(np.asarray, (state, metrics))


@pytest.mark.parametrize(
    "objective",
    [
        Standard(),
        Adversarial(jc.attacks.PGD(BALL, steps=2)),
        MART(BALL, steps=2),
        FastAdversarial(BALL),
        CentrePull(Standard()),
    ],
    ids=lambda objective: type(objective).__name__,
)
def test_eight_devices_take_the_step_of_one(objective):
    augmentation = jc.data.Augmentation(crop_padding=1, flip=True)
    settings = {"augmentation": augmentation, "ema_decay": 0.9}
    assert len(jax.devices()) == 8

    def outcome(devices):
        state, metrics = one_step(small_cnn(), objective, devices, **settings)
        return jax.tree.leaves((state.weights, state.average)), metrics

    (one, metrics), (eight, metrics_of_eight) = outcome(ONE), outcome(jax.devices())
    start = jax.tree.leaves(_step.weights_of(small_cnn()))
    for ours, theirs in zip(one, eight, strict=True):
        largest = np.abs(ours).max()
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 * largest)
    assert metrics.keys() == metrics_of_eight.keys()
    for name, ours in metrics.items():
        # A divergence is a small difference of log-probabilities, which are around log 10.
        scale = np.log(10) if name == "divergence" else ours
        np.testing.assert_allclose(ours, metrics_of_eight[name], rtol=0, atol=1e-6 * scale)
    # A wrong gradient would show: the step is far larger than the tolerance.
    assert max(np.abs(a - b).max() for a, b in zip(one, start, strict=False)) > 1e-2


def test_the_attack_sees_eval_mode_and_leaves_statistics_alone():
    attack = jc.attacks.FGSM(jc.Linf(0.2))
    model = small_cnn()
    # Statistics far from those of the batch: the two modes have different gradients.
    model.blocks[0].norm.mean[...] += jnp.linspace(-0.5, 0.5, 4)
    model.blocks[0].norm.var[...] *= 0.05
    data = jc.data.load("digits").take(16)
    x, y = jc.data.to_float(data.images), jnp.asarray(data.labels)
    keys = jax.random.split(jax.random.key(0), 16)

    def statistics_after(x_adv):
        train = nnx.view(nnx.clone(model), use_running_average=False)
        train(x_adv)
        return {
            name: np.asarray(getattr(train.blocks[0].norm, name)[...]) for name in ("mean", "var")
        }

    def attacked(network):
        return attack.perturb(keys, network, x, y)

    state, _ = one_step(model, Adversarial(attack), ONE)
    found = state.weights["stats"]["blocks"][0]["norm"]
    wanted = statistics_after(attacked(model))
    in_train_mode = nnx.view(nnx.clone(model), use_running_average=False)
    other = statistics_after(jax.lax.stop_gradient(_ascent_in_train_mode(in_train_mode, x, y)))
    for name in ("mean", "var"):
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-6, atol=1e-7)
        assert np.abs(found[name] - other[name]).max() > 1e-4


def _ascent_in_train_mode(network, x, y):
    """FGSM on a network in train mode, which the objective must not do."""
    graph, state = nnx.split(network)

    def loss(x):
        return jc.losses.cross_entropy(nnx.merge(graph, state, copy=True)(x), y).sum()

    return jnp.clip(x + 0.2 * jnp.sign(jax.grad(loss)(x)), min=0, max=1)


def test_initial_state_shares_no_buffer_with_the_model():
    # Training donates its state: an alias would delete the caller's weights.
    model = small_cnn()
    one_step(model, Standard(), jax.devices(), ema_decay=0.5)
    assert np.isfinite(model(jnp.zeros((1, 8, 8, 1)))).all()


def test_is_finite():
    good = {"a": jnp.ones(3), "b": {"c": jnp.zeros((2, 2))}}
    assert _step.is_finite(good)
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        assert not _step.is_finite(good | {"a": jnp.array([1.0, bad, 0.0])})


def test_equal_programs_are_equal_keys():
    models = [small_cnn(key) for key in (0, 1)]
    one, same = (digits_program(model, Standard(), ONE) for model in models)
    assert one == same and hash(one) == hash(same)
    attacks = [jc.attacks.PGD(jc.Linf(eps)) for eps in (0.1, 0.2)]
    other = [digits_program(models[0], Adversarial(attack), ONE) for attack in attacks]
    assert len({one, *other}) == 3


def test_same_memory_on_eight_devices():
    # Augmentation keys do not depend on the devices either.
    data = one_image_per_label(8)
    augmentation = jc.data.Augmentation(crop_padding=2, flip=True)
    order = tuple(range(8))
    one, _ = memory_after(0, data, order=order, augmentation=augmentation)
    run = fit(
        jax.random.key(0), Memory(data), data, Memorise(order),
        dataclasses.replace(PLAIN_SGD, batch_size=8), augmentation=augmentation,
        devices=jax.devices(), progress=False,
    )  # fmt: skip
    np.testing.assert_array_equal(one, -np.asarray(run.model.seen[...]))
