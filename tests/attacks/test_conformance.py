"""Verdicts against the authors' own AutoAttack, image by image.

On the first images of the reference networks; `benchmarks/conformance.py` does it on all of them.
"""

import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxclus as jc
from benchmarks import reference_networks

SHARED = Path(__file__).parents[3] / "shared"
REFERENCE = SHARED / "reference"
DATA = os.environ.get("TFDS_DATA_DIR", str(SHARED / "data" / "tfds"))
pytestmark = pytest.mark.skipif(
    not (REFERENCE / "autoattack.json").exists() or not Path(DATA).is_dir(),
    reason="no ../shared/reference here",
)


def theirs(kind, network, norm):
    """The runs of the authors' implementation on one network, one for each of their seeds."""
    runs = json.loads((REFERENCE / "autoattack.json").read_text())[kind]
    return [run for run in runs if run["network"] == network and run["norm"] == norm]


def evaluate(run, attack, count):
    model = reference_networks.load(REFERENCE / "networks" / f"{run['network']}.npz")
    data = jc.data.load(run["dataset"], "test", data_dir=DATA).take(count)
    threat = jc.threat.create(run["norm"].lower(), run["eps"])
    ensemble = jc.attacks.AutoAttack(threat, *attack)
    return jc.evaluation.robustness(
        jax.random.key(0), model, ensemble, data, devices=jax.devices()[:1], progress=False
    )


def as_verdicts(texts, count):
    return np.array([[digit == "1" for digit in text[:count]] for text in texts])


def assert_as_many(robust, texts):
    """Within 0.4 points, 2 images or 3 standard deviations of their seeds."""
    counts = as_verdicts(texts, len(robust)).sum(axis=1)
    allowed = max(0.004 * len(robust), 2, 3 * np.std(counts, ddof=1))
    assert abs(robust.sum() - counts.mean()) <= allowed


def assert_the_same(robust, texts):
    """At least 99 % agree of the images whose verdict all of their seeds share."""
    theirs = as_verdicts(texts, len(robust))
    shared = (theirs == theirs[0]).all(axis=0)
    assert shared.mean() > 0.9
    assert (robust == theirs[0])[shared].mean() >= 0.99


@pytest.mark.parametrize(
    "network, norm, attack, between",
    [
        ("mnist_madry_tiny", "Linf", (), (0.7, 0.9)),
        # Its beginning: in L2, FAB and Square take the suite too long.
        ("cifar10_cnn_a_adv4", "L2", ("custom", ("apgd-ce", "apgd-t")), (0.2, 0.5)),
    ],
)
def test_the_chain(network, norm, attack, between):
    runs = theirs("runs", network, norm)
    found = evaluate(runs[0], attack, 100)
    assert between[0] < found.robust_accuracy < between[1]
    names = [link["attack"] for link in runs[0]["chain"]]
    assert [member.name for member in found.members] == list(attack[1] if attack else names)
    links = [[run["chain"][number]["still_correct"] for run in runs] for number in range(4)]
    for member, link in zip(found.members, links, strict=False):
        assert_as_many(member.robust, link)
    assert_the_same(found.robust, links[len(found.members) - 1])


@pytest.mark.parametrize("name", ["apgd-ce", "apgd-dlr"])
@pytest.mark.parametrize("network", ["mnist_madry_tiny", "cifar10_cnn_a_adv4"])
def test_attacks_alone(network, name):
    runs = [run for run in theirs("individual", network, "Linf") if run["attack"] == name]
    found = evaluate(runs[0], ("custom", (name,)), 500)
    assert_as_many(found.robust, [run["verdict"] for run in runs])
    assert_the_same(found.robust, [run["verdict"] for run in runs])
