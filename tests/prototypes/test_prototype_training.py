"""Whole trainings onto prototypes: what they reach, resume, two devices, certificates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from prototype_trainings import DIGITS, HELD_OUT, KEY, ONE, broken_off, train

import jaxclus as jc
from jaxclus.prototypes import AdversarialPrototypes, PrototypeTRADES, PrototypeTraining
from jaxclus.training import TrainingConfig, fit
from jaxclus.training.objectives import AWP

BALL = jc.Linf(0.1)


def test_training_finds_the_prototypes_and_is_loaded_again(tmp_path):
    objective = PrototypeTraining("simplex", distance="cosine", rule="cosine")
    run = train(objective, tmp_path, epochs=12)
    assert jc.evaluation.correct(run.model, HELD_OUT).mean() > 0.8
    loaded, x = jc.load(tmp_path), jc.data.to_float(HELD_OUT.images)
    np.testing.assert_array_equal(loaded(x), run.model(x))
    head = jc.models.parts(loaded)[1]
    np.testing.assert_allclose(head.prototypes, jc.prototypes.simplex(10, 20), rtol=1e-6)
    assert head.rule == "cosine"
    # Calibrated for the weights of the best epoch, on all training images.
    seen = np.sort(run.model(jc.data.to_float(DIGITS.images)), axis=1)
    lead = np.quantile(seen[:, -1] - seen[:, -2], 0.95)
    assert lead == pytest.approx(np.log(81), rel=1e-3)
    again = jc.load(jc.export(loaded, tmp_path / "model.safetensors"))
    np.testing.assert_array_equal(again(x), run.model(x))


@pytest.mark.parametrize(
    "objective",
    [
        PrototypeTraining(as_published=True),
        AdversarialPrototypes("hadamard", distance="l2", rule="l2", threat=BALL, steps=2),
        PrototypeTRADES("simplex", distance="cosine", rule="cosine", threat=BALL, steps=2),
    ],
    ids=["published", "adversarial", "trades"],
)
def test_variants_train(objective):
    losses = [line["loss"] for line in train(objective).history if "loss" in line]
    assert losses[-1] < losses[0]


def test_the_published_training_learns():
    run = train(PrototypeTraining(), epochs=30, learning_rate=1e-2)
    assert jc.evaluation.correct(run.model, HELD_OUT).mean() > 0.5


def test_adversaries_in_training_buy_robustness():
    """Beside as much training without; under a targeted attack on the head's logits."""
    given = {"generator": "simplex", "distance": "cosine", "rule": "cosine"}
    adversary = {"threat": BALL, "steps": 4}
    attack = jc.attacks.TargetedAPGD(BALL, "difference", 10)
    plain, adversarial, trades = (
        jc.evaluation.robustness(
            KEY, train(objective, epochs=20).model, attack, HELD_OUT, devices=ONE, progress=False
        ).robust_accuracy
        for objective in (
            PrototypeTraining(**given),
            AdversarialPrototypes(**given, **adversary),
            PrototypeTRADES(**given, **adversary),
        )
    )
    assert min(adversarial, trades) > plain + 0.1


def test_certificates_of_a_lipschitz_network_trained_onto_prototypes():
    """Between what is proved and what an attack leaves lies the truth; both say something."""
    start = jc.models.create(
        "lipschitz_resnet8", 10, (8, 8, 1), KEY, width=4, blocks=(1, 1), embedding_size=20
    )
    objective = PrototypeTraining("simplex", distance="l2", rule="l2", scale=2.0)
    config = TrainingConfig(epochs=30, batch_size=96, optimizer="adamw", learning_rate=1e-2)
    run = fit(KEY, start, DIGITS, objective, config, devices=ONE, progress=False)
    ball = jc.L2(0.2)
    proved = jc.evaluation.certify(run.model, HELD_OUT, ball)
    attack = jc.attacks.TargetedAPGD(ball, "difference", 10)
    broken = jc.evaluation.robustness(KEY, run.model, attack, HELD_OUT, devices=ONE, progress=False)
    found = jc.evaluation.bracket(proved, broken)
    assert 0.3 < found.certified_accuracy <= found.robust_accuracy <= found.clean_accuracy
    assert proved.lipschitz <= 1 + 1e-5
    network, head = jc.models.parts(run.model)
    h = network.features(jc.data.to_float(HELD_OUT.images))
    radius = jc.prototypes.certified_radius(head, h, proved.lipschitz)
    np.testing.assert_allclose(proved.radius[broken.clean], radius[broken.clean], rtol=1e-4)


def test_training_goes_on_where_it_was_broken_off(tmp_path):
    """Under a perturbation of the weights, averaged, in bfloat16, from the kept prototypes."""
    trades = PrototypeTRADES("uniform", distance="l2", rule="l2", threat=BALL, steps=1)
    settings = {"objective": AWP(trades), "ema_decay": 0.9, "precision": "bfloat16"}
    whole = train(directory=tmp_path / "whole", **settings)
    again = broken_off(PrototypeTraining, lambda: train(directory=tmp_path / "broken", **settings))
    for mine, theirs in zip(*map(jax.tree.leaves, (again.model, whole.model)), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert jc.models.parts(again.model)[1].prototypes.dtype == jnp.float32


@pytest.mark.parametrize("kind", [AdversarialPrototypes, PrototypeTRADES])
def test_two_devices_do_as_one(kind):
    objective = kind("simplex", distance="cosine", rule="cosine", threat=BALL)
    runs = [train(objective, devices=devices, epochs=1) for devices in (ONE, jax.devices()[:2])]
    ours, theirs = (np.asarray(run.model(jc.data.to_float(HELD_OUT.images))) for run in runs)
    np.testing.assert_allclose(ours, theirs, rtol=0.02, atol=0.02 * np.abs(ours).max())
