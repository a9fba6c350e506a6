"""`jaxclus zoo` and `jaxclus demo`."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest

import jaxclus as jc
from jaxclus import cli
from jaxclus.zoo import _cards

DATA = Path(
    os.environ.get("TFDS_DATA_DIR") or Path(__file__).parents[3] / "shared" / "data" / "tfds"
)


def test_demo_shows_the_zoo_and_runs_from_training_to_the_report(tmp_path, capsys):
    words = ["demo", "--epochs", "1", "--num-images", "200", "--output", str(tmp_path)]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert jc.zoo.list()
    for card in map(jc.zoo.card, jc.zoo.list()):
        # The score is the one that the card has; only here it is computed, from the weights.
        (line,) = (line for line in out.splitlines() if line.startswith(f"{card.name} "))
        eps, score = map(float, line.split()[3:5])
        assert eps == pytest.approx(card.eps, abs=5.1e-5)
        assert score == pytest.approx(card.figures.within_minus_between, abs=0.0051)
        image = (tmp_path / f"zoo-{card.dataset}.png").read_bytes()
        assert image.startswith(b"\x89PNG") and len(image) > 10_000
        assert f"AutoAttack, {card.norm}, radius eps" in out
        assert f"first {card.figures.attacked_images} test images" in out
    assert (tmp_path / "report" / "index.html").exists()
    assert "done in" in out


def test_zoo_describes_every_network(capsys):
    assert cli.main(["zoo"]) == 0
    out = capsys.readouterr().out
    assert jc.zoo.list() and all(f"{name} (" in out for name in jc.zoo.list())
    for name in jc.zoo.list():
        card = jc.zoo.card(name)
        assert cli.main(["zoo", name]) == 0
        own = capsys.readouterr().out
        assert own in out and own.startswith(f"{name} (") and card.note in own
        assert f"clean {card.figures.clean_accuracy:.2%} (10000 images)" in own
        assert f"AutoAttack {card.figures.autoattack_accuracy:.2%} (first " in own


@pytest.fixture
def shipped(monkeypatch):
    """The network of the zoo that is cheapest to attack, with its data."""

    def cost(name):
        card = jc.zoo.card(name)
        return card.figures.first(8).pgd_verdicts.count("1"), math.prod(card.model["input_shape"])

    name = min(jc.zoo.list(), key=cost)
    dataset = jc.zoo.card(name).dataset
    if not (DATA / dataset).is_dir():
        pytest.skip(f"no {dataset} in {DATA}")
    monkeypatch.setenv("TFDS_DATA_DIR", str(DATA))
    return name


def test_zoo_verifies_a_card_or_says_what_differs(shipped, capsys, tmp_path, monkeypatch):
    words = ["zoo", shipped, "--verify", "--num-images", "8"]
    assert cli.main(words) == 0
    found = capsys.readouterr()
    assert f"{shipped}: clean " in found.out and "(first 8): as on its card" in found.out
    shutil.copytree(_cards.DIRECTORY, tmp_path / "models")
    monkeypatch.setattr(_cards, "DIRECTORY", tmp_path / "models")
    path = tmp_path / "models" / f"{shipped}.json"
    card = json.loads(path.read_text())
    figures = card["figures"]
    true, verdicts = figures["clean_accuracy"], figures["pgd_verdicts"]
    figures["clean_accuracy"] = 0.4321
    figures["pgd_verdicts"] = f"{verdicts[:5]}{1 - int(verdicts[5])}{verdicts[6:]}"
    path.write_text(json.dumps(card))
    assert cli.main(words) == 1
    found = capsys.readouterr()
    wrong = [f"{shipped}: {field}" for field in ("clean_accuracy", "pgd_accuracy", "pgd_verdicts")]
    assert f"differ from the model cards: {', '.join(wrong)}\n" in found.err
    assert "(first 8): DIFFERS" in found.out
    assert f"clean_accuracy: 0.4321 on the card, {true} here" in found.out
    assert "pgd_verdicts: other for image 5\n" in found.out


def test_a_network_of_the_zoo_can_be_attacked_and_linearised(shipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    card = jc.zoo.card(shipped)
    words = [shipped, "--num-images", "200", "--output", "out"]
    assert cli.main(["attack", *words, "--eps", str(card.eps), "--attack", "fgsm"]) == 0
    found = json.loads(Path("out/attacks/fgsm-linf.json").read_text())
    assert (found["dataset"], found["num_images"]) == (card.dataset, 200)
    assert cli.main(["linearize", *words]) == 0
    found = json.loads(Path("out/linear.json").read_text())
    score = found["variants"]["without_batch_norm"]["score"]
    assert score["difference"] == pytest.approx(card.figures.within_minus_between, abs=5.1e-4)
