"""The networks that ship with the library: files, cards, and the cards' figures measured again.

What ships is found by listing, so that the tests hold for any set of networks but none.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxclus as jc
from experiments import zoo
from jaxclus.attacks import PGD
from jaxclus.evaluation._result import as_digits
from jaxclus.zoo import _cards

DATA = Path(
    os.environ.get("TFDS_DATA_DIR") or Path(__file__).parents[3] / "shared" / "data" / "tfds"
)
NAMES = jc.zoo.list()
ONE = jax.devices()[:1]
FEW = 8  # images to attack


@pytest.fixture(scope="module", autouse=True)
def directories(tmp_path_factory):
    """The prepared sets, and a cache of the module's own: the user's stays as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(DATA))
        patch.setenv("JAXCLUS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def copies(tmp_path, monkeypatch):
    """A copy of the zoo's directory in its place, to be changed."""
    directory = tmp_path / "models"
    shutil.copytree(_cards.DIRECTORY, directory)
    monkeypatch.setattr(_cards, "DIRECTORY", directory)
    return directory


def test_networks_ship():
    assert NAMES and len(set(NAMES)) == len(NAMES)
    files = {path.name for path in _cards.DIRECTORY.iterdir()}
    assert files == {f"{name}.{end}" for name in NAMES for end in ("json", "safetensors")}


@pytest.mark.parametrize("name", NAMES)
def test_the_file_is_small_and_the_one_on_its_card(name):
    content = jc.zoo.card(name).path.read_bytes()
    assert len(content) <= 1_500_000
    assert hashlib.sha256(content).hexdigest() == jc.zoo.card(name).sha256


@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_the_one_on_its_card(name):
    model, card = jc.load(name), jc.zoo.card(name)
    assert model.spec is not None and model.spec.to_json() == card.model
    logits = model(jnp.zeros((1, *card.model["input_shape"])))
    assert logits.shape == (1, len(card.class_names)) and np.isfinite(logits).all()


def empty(values):
    """Names of the fields that say nothing; numbers always say something."""
    return [name for name, value in values.items() if value in (None, "", (), [], {})]


@pytest.mark.parametrize("name", NAMES)
def test_the_card_is_complete(name):
    card = jc.zoo.card(name)
    assert not empty(dataclasses.asdict(card))
    assert not empty(dataclasses.asdict(card.figures))
    assert not empty(card.environment) and not empty(card.environment["versions"])
    members = [c for _, classes in card.groups for c in classes]
    assert sorted(members) == list(range(len(card.class_names)))
    assert card.groups == jc.data.class_groups(card.dataset)
    assert jc.threat.create(card.norm, card.eps).eps == card.eps


@pytest.mark.parametrize("name", NAMES)
def test_the_name_says_data_model_and_method(name):
    card = jc.zoo.card(name)
    dataset, model, method = name.split("-")
    assert (card.name, card.dataset, card.model["name"]) == (name, dataset, model)
    assert (method == "standard") == (card.objective == "Standard()")


@pytest.mark.parametrize("name", NAMES)
def test_the_network_has_the_recipe_of_its_name(name):
    assert name in zoo.NAMES
    card, (dataset, _, method) = jc.zoo.card(name), name.split("-")
    labels = np.arange(len(card.class_names))
    data = jc.data.Dataset(np.zeros((len(labels), 1, 1, 1), np.uint8), labels, groups=card.groups)
    recipe = zoo.RECIPES[dataset]
    assert card.objective == repr(zoo.objective(method, recipe, data))
    assert card.training == json.loads(json.dumps(dataclasses.asdict(recipe.config)))
    assert (card.norm, card.eps, card.note) == ("linf", recipe.eps, zoo.NOTES[dataset])


def test_the_experiment_checks_all_names_before_it_trains():
    with pytest.raises(ValueError, match="`names` must be some of .*; got 'mnist-cnn-pgd'"):
        zoo.Experiment(names=("fashion_mnist-cnn-pgd", "mnist-cnn-pgd"))


@pytest.mark.parametrize("name", NAMES)
def test_the_figures_agree_with_each_other(name):
    figures = jc.zoo.card(name).figures
    assert figures.first(figures.attacked_images) == figures
    for verdicts in (figures.pgd_verdicts, figures.autoattack_verdicts):
        assert len(verdicts) == figures.attacked_images and set(verdicts) <= {"0", "1"}
    assert figures.autoattack_accuracy <= figures.pgd_accuracy <= figures.clean_accuracy


@pytest.mark.parametrize("count", [1, 3, 40])
def test_figures_of_the_first_images_are_counted(count):
    verdicts = np.random.default_rng(0).integers(0, 2, (2, 40))
    pgd, ensemble = ("".join(map(str, row)) for row in verdicts)
    whole = jc.zoo.Figures(0.9, 100, 40, -1.0, -1.0, pgd, ensemble, 0.5, 0.25)
    found = whole.first(count)
    assert found.attacked_images == count
    assert [found.pgd_accuracy, found.autoattack_accuracy] == list(verdicts[:, :count].mean(axis=1))
    assert (found.pgd_verdicts, found.autoattack_verdicts) == (pgd[:count], ensemble[:count])
    same = ("clean_accuracy", "clean_images", "within_minus_between", "adjusted_rand")
    assert all(getattr(found, field) == getattr(whole, field) for field in same)


@pytest.mark.parametrize("count", [0, -1, 41])
def test_figures_of_more_images_than_were_attacked(count):
    whole = jc.zoo.Figures(0.9, 100, 40, 0.0, 0.0, "0" * 40, "0" * 40, 0.5, 0.25)
    with pytest.raises(ValueError, match=rf"`num_images` must be in \[1, 40\], got {count}"):
        whole.first(count)


def test_a_changed_byte_is_refused(copies):
    path = copies / f"{NAMES[0]}.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    wanted, found = jc.zoo.card(NAMES[0]).sha256, hashlib.sha256(content).hexdigest()
    with pytest.raises(ValueError, match=f"{path} must have .* {wanted} .* got {found}"):
        jc.load(NAMES[0])


@pytest.mark.parametrize("function", [jc.load, jc.zoo.card, jc.zoo.remeasure])
def test_an_unknown_name_lists_the_known(function):
    with pytest.raises((ValueError, FileNotFoundError), match="no-such-network") as error:
        function("no-such-network")
    assert all(name in str(error.value) for name in NAMES)


def test_a_file_of_that_name_wins_over_the_zoo(tmp_path, monkeypatch):
    own = jc.models.create("cnn", 3, (8, 8, 1), jax.random.key(0), widths=(2,), hidden=4)
    jc.export(own, tmp_path / "own.safetensors").rename(tmp_path / NAMES[0])
    monkeypatch.chdir(tmp_path)
    assert jc.load(NAMES[0]).spec == own.spec


def test_other_images_than_the_cards_are_refused(monkeypatch):
    other = jc.data.load("digits", "test")
    monkeypatch.setattr(jc.data, "load", lambda name, split: other)
    card = jc.zoo.card(NAMES[0])
    match = f"{card.dataset} must be .*{card.test_fingerprint[:12]}.*got {other.fingerprint[:12]}"
    with pytest.raises(ValueError, match=match):
        jc.zoo.remeasure(NAMES[0], FEW)


@pytest.mark.parametrize("count", [0, -1, 10**6])
def test_remeasuring_too_few_or_too_many(count):
    most = jc.zoo.card(NAMES[0]).figures.attacked_images
    with pytest.raises(ValueError, match=rf"`num_images` must be in \[1, {most}\], got {count}"):
        jc.zoo.remeasure(NAMES[0], count)


def test_measuring_needs_groups():
    digits = dataclasses.replace(jc.data.load("digits", "test"), groups=None)
    with pytest.raises(ValueError, match="`images` must come with groups .* got Dataset.*digits"):
        jc.zoo.measure(jc.load(NAMES[0]), digits, jc.Linf(0.1), FEW)


@pytest.mark.parametrize(
    "activation, groups, count, message",
    [
        ("tanh", jc.data.class_groups("digits"), FEW, "must be affine .* in the way: tanh"),
        ("relu", (("all", tuple(range(10))),), FEW, "`groups` must be at least two"),
        ("relu", jc.data.class_groups("digits"), 0, "`num_images` must be at least 1, got 0"),
        (
            "relu",
            jc.data.class_groups("digits"),
            1000,
            r"`num_images` must be in \[1, 364\], got 1000",
        ),
    ],
    ids=["model", "groups", "too few", "too many"],
)
def test_measuring_refuses_before_it_attacks(monkeypatch, activation, groups, count, message):
    def attacked(*_, **__):
        raise AssertionError("the attacks take their time first")

    monkeypatch.setattr(jc.evaluation, "robustness", attacked)
    digits = dataclasses.replace(jc.data.load("digits", "test"), groups=groups)
    network = jc.models.create(
        "cnn", 10, (8, 8, 1), jax.random.key(0), widths=(2,), hidden=4, activation=activation
    )
    with pytest.raises(ValueError, match=message):
        jc.zoo.measure(network, digits, jc.Linf(0.1), count)


def prepared(name):
    """The test set of a card, where it is."""
    dataset = jc.zoo.card(name).dataset
    if not (DATA / dataset).is_dir():
        pytest.skip(f"no {dataset} in {DATA}")
    return jc.data.load(dataset, "test")


# All of AutoAttack on a robust ResNet takes a minute to compile: that is left to `jaxclus zoo
# --verify`. Where PGD breaks every image, so does the first member, and the others need no program;
# and one robust network is small.
BROKEN = [name for name in NAMES if "1" not in jc.zoo.card(name).figures.first(FEW).pgd_verdicts]
WHOLE = [*BROKEN, "fashion_mnist-cnn-pgd"]


def test_verdicts_of_both_kinds_are_measured_again():
    verdicts = {name: jc.zoo.card(name).figures.first(FEW).autoattack_verdicts for name in WHOLE}
    assert set("".join(verdicts.values())) == {"0", "1"}


@pytest.mark.parametrize("name", WHOLE)
def test_remeasuring_gives_the_card_to_the_digit(name):
    prepared(name)
    wanted, found = jc.zoo.remeasure(name, FEW, devices=ONE)
    assert found == wanted == jc.zoo.card(name).figures.first(FEW)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in WHOLE])
def test_all_but_autoattack_gives_the_card_to_the_digit(name):
    images, card = prepared(name), jc.zoo.card(name)
    model, attack = jc.load(name), PGD(jc.threat.create(card.norm, card.eps), steps=20)
    found = jc.evaluation.robustness(
        jax.random.key(0), model, attack, images.take(FEW), devices=ONE, progress=False
    )
    assert as_digits(found.robust) == card.figures.pgd_verdicts[:FEW]
    assert jc.evaluation.correct(model, images, devices=ONE).mean() == card.figures.clean_accuracy
    matrix = jc.evaluation.implicit_correlation(model, images.input_shape)
    score = jc.clustering.clustering_score(matrix, card.groups)
    assert round(score.difference, 3) == card.figures.within_minus_between
    assert round(score.adjusted_rand, 3) == card.figures.adjusted_rand
