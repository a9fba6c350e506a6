"""Brackets of real attacks on networks with certificates, and contradictions."""

import dataclasses
import json

import jax
import jaxtyping
import numpy as np
import pytest
from certified_networks import cnn, digits, lipschitz_clusters

import jaxclus as jc
from jaxclus.evaluation import Bracket, bracket, certify

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def data():
    return digits(40)


def attacked_by(attack, model, data):
    return jc.evaluation.robustness(KEY, model, attack, data, microbatch=8, progress=False)


@pytest.fixture(scope="module")
def undecided(data):
    """Both certificates of a CNN without BatchNorm at an eps at which they differ, and PGD."""
    model, ball = cnn(), jc.Linf(0.03)
    methods = ("lipschitz", "interval")
    found = [certify(model, data, ball, method=method) for method in methods]
    return found, attacked_by(jc.attacks.PGD(ball, steps=20), model, data)


def consistent(found):
    certified, clean, robust = found.certified, found.attacked.clean, found.attacked.robust
    assert (certified <= robust).all() and (robust <= clean).all()
    assert found.certified_accuracy <= found.robust_accuracy <= found.clean_accuracy
    parts = found.certified_accuracy + found.undecided + found.broken + 1 - found.clean_accuracy
    assert parts == pytest.approx(1)
    return found


def test_the_union_of_certificates_counts(undecided):
    (lipschitz, interval), attacked = undecided
    both = consistent(bracket([lipschitz, interval], attacked))
    np.testing.assert_array_equal(both.certified, lipschitz.certified | interval.certified)
    assert bracket(interval, attacked).certified_accuracy == interval.certified_accuracy
    assert 0 < interval.certified_accuracy and 0 < both.undecided and 0 < both.broken


@pytest.mark.parametrize("eps", [0.05, 0.4])
def test_l2_brackets_of_a_lipschitz_resnet_under_clusters(data, eps):
    model, ball = lipschitz_clusters(), jc.L2(eps)
    found = certify(model, data, ball)
    attacked = attacked_by(jc.attacks.PGD(ball, steps=10, step_size=eps / 4), model, data)
    assert consistent(bracket(found, attacked)).certified_accuracy > 0 or eps > 0.05


def test_minimum_norm_attacks_stay_outside_the_radii(data):
    # The smallest perturbations found, at an eps that breaks nearly all images.
    model, ball = cnn(), jc.L2(2.0)
    attacked = attacked_by(jc.attacks.DeepFool("l2", threat=ball), model, data)
    found = certify(model, data, ball)
    assert consistent(bracket(found, attacked)).broken > 0.5
    broken = attacked.clean & ~attacked.robust
    assert (attacked.norms[broken] > found.radius[broken]).all()


def test_json_carries_the_evidence(undecided):
    certificates, attacked = undecided
    found = bracket(certificates, attacked)
    values = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert (values["norm"], values["eps"], values["num_images"]) == ("linf", 0.03, 40)
    assert values["attack"].startswith("PGD(steps=20") and values["dataset"] == "digits"
    for name in ("clean_accuracy", "certified_accuracy", "robust_accuracy", "undecided", "broken"):
        assert values[name] == getattr(found, name)
    assert [each["method"] for each in values["methods"]] == ["lipschitz", "interval"]
    shares = [each["certified_accuracy"] for each in values["methods"]]
    assert shares == [each.certified_accuracy for each in certificates]
    assert values["certified"].count("1") == found.certified.sum()
    assert values["robust"].count("1") == attacked.robust.sum()


def test_a_certified_image_that_is_broken_raises(undecided):
    (lipschitz, interval), attacked = undecided
    victims = np.flatnonzero(interval.certified)[:2]
    robust = attacked.robust.copy()
    robust[victims] = False
    norms = np.where(robust, attacked.norms, np.float32(0.03))
    faked = dataclasses.replace(attacked, robust=robust, norms=norms)
    named = f"2 of the images .* interval .* numbers {victims[0]}, {victims[1]}. .* published"
    with pytest.raises(ValueError, match=named):
        bracket([lipschitz, interval], faked)
    with pytest.raises(ValueError, match=named):
        Bracket((interval,), faked)


def test_an_image_broken_within_its_radius_raises(undecided):
    (lipschitz, _), attacked = undecided
    within = attacked.clean & ~lipschitz.certified & (lipschitz.radius > 0)
    victim = np.flatnonzero(within)[0]
    for share, wrong in ((0.99, True), (1.01, False)):
        robust, norms = attacked.robust.copy(), attacked.norms.copy()
        robust[victim], norms[victim] = False, share * lipschitz.radius[victim]
        faked = dataclasses.replace(attacked, robust=robust, norms=norms)
        if wrong:
            with pytest.raises(ValueError, match=f"numbers {victim}. Certificate or attack"):
                bracket(lipschitz, faked)
        else:
            bracket(lipschitz, faked)


def test_long_lists_of_images_are_cut_short(undecided):
    (_, interval), attacked = undecided
    everything = dataclasses.replace(interval, certified=interval.clean)
    nothing = dataclasses.replace(attacked, robust=np.zeros_like(attacked.robust))
    with pytest.raises(ValueError, match=r"numbers (\d+, ){10}\.\.\.\. "):
        bracket(everything, nothing)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"dataset": "mnist"}, "`attacked` must have the certificates' data set mnist, got digits"),
        ({"split": "train"}, "split train, got test"),
        ({"threat": jc.L2(0.03)}, "norm l2, got linf"),
        ({"threat": jc.Linf(0.02)}, "eps 0.02, got 0.03"),
    ],
)
def test_other_threats_and_data_are_refused(undecided, change, message):
    (lipschitz, _), attacked = undecided
    with pytest.raises(ValueError, match=message):
        bracket(dataclasses.replace(lipschitz, **change), attacked)


def test_other_images_and_models_are_refused(undecided):
    (lipschitz, _), attacked = undecided
    fewer = {name: getattr(lipschitz, name)[:9] for name in ("clean", "certified", "radius")}
    with pytest.raises(ValueError, match="number of images 9, got 40"):
        bracket(dataclasses.replace(lipschitz, **fewer), attacked)
    clean, broken = lipschitz.clean.copy(), np.flatnonzero(~attacked.robust & ~lipschitz.certified)
    clean[broken[:1]] ^= True
    bracket(dataclasses.replace(lipschitz, clean=clean), attacked)  # rounding, for all one knows
    clean[broken[1:2]] ^= True
    with pytest.raises(ValueError, match="clean verdicts but for rounding, but 2 of 40 images"):
        bracket(dataclasses.replace(lipschitz, clean=clean), attacked)


def test_other_types_are_refused(undecided, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    (lipschitz, _), attacked = undecided
    for wrong in ([], None, [attacked], attacked):
        with pytest.raises(TypeError, match="`certificates` must be what jc.evaluation.certify"):
            bracket(wrong, attacked)
    with pytest.raises(TypeError, match="`attacked` must be a jc.evaluation.Robustness"):
        bracket(lipschitz, lipschitz)
