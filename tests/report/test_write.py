"""The page as a whole: every part for complete runs, every gap named for incomplete ones."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import matplotlib.image
import numpy as np
import pytest
from synthetic_runs import write_run

from jaxclus.report import write

GREY_CLASSES = ["T-shirt", "Trouser", "Bag", "Boot"]
GREY_GROUPS = [["clothes", [0, 1]], ["leather", [2, 3]]]
# Markup, TeX, and a script that the font of the plots lacks.
NASTY = 'a<script>alert("1")</script> & $x_ 東京'


class Page(HTMLParser):
    """Tags with their attributes, and the text outside style sheets."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.words = [], [], []
        self.feed(text)
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("img", "meta", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    root = tmp_path_factory.mktemp("complete")
    runs = [
        write_run(root / "colour", name="robust net", norms=("linf", "l2"), shape=(8, 8, 3)),
        write_run(
            root / "grey",
            name="grey net",
            dataset="fashion_mnist",
            class_names=GREY_CLASSES,
            groups=GREY_GROUPS,
            shape=(9, 7, 1),
            seed=1,
        ),
    ]
    return write(runs, root / "out")


@pytest.fixture(scope="module")
def incomplete(tmp_path_factory):
    root = tmp_path_factory.mktemp("incomplete")
    bare = root / "bare run"
    bare.mkdir()
    (bare / "config.json").write_text(json.dumps({"name": NASTY}))
    partial = write_run(root / "partial", groups=None, class_names=[NASTY, "b", "c"])
    (partial / "metrics.jsonl").unlink()
    for path in (partial / "attacks").glob("*.npz"):
        path.unlink()
    with np.load(partial / "linear.npz") as archive:
        kept = {k: archive[k] for k in archive if not k.startswith(("filters/", "without"))}
    np.savez(partial / "linear.npz", **kept)
    return write([bare, partial], root / "out")


def test_returns_the_page_in_the_output_directory(complete):
    assert complete.name == "index.html" and complete.is_file()
    assert [path.name for path in complete.parent.iterdir() if path.is_file()] == ["index.html"]


def test_complete_runs_have_every_part(complete):
    page = Page(complete.read_text())
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert ids == {
        *("training", "robustness", "examples", "correlation", "dendrograms", "weights"),
        *("features", "filters", "scores", "settings", "masking"),
    }
    per_variant = {
        f"run{run}-{part}-{variant}.png"
        for run in (1, 2)
        for part in ("correlation", "dendrogram", "weights")
        for variant in ("with_batch_norm", "without_batch_norm")
    }
    per_run = {
        f"run{run}-{part}.png"
        for run in (1, 2)
        for part in (
            "features",
            "features-as-published",
            "filters",
            "examples-autoattack-linf",
            "masking",
        )
    }
    files = {path.name for path in (complete.parent / "figures").iterdir()}
    assert files == per_variant | per_run | {
        "training.png",
        "robustness.png",
        "run1-examples-autoattack-l2.png",
    }
    assert "not measured" not in page.text and "Not measured" not in page.text


def test_plots_show_something_and_are_embedded(complete):
    files = sorted((complete.parent / "figures").iterdir())
    sources = re.findall(r'src="data:image/png;base64,([^"]+)"', complete.read_text())
    assert sorted(map(base64.b64decode, sources)) == sorted(path.read_bytes() for path in files)
    for path in files:
        pixels = matplotlib.image.imread(io.BytesIO(path.read_bytes()), format="png")
        assert min(pixels.shape[:2]) >= 150, path.name
        assert pixels[..., :3].std() > 0.05, path.name


def test_headline_and_curves_carry_their_evidence(complete):
    page = Page(complete.read_text())
    linf = "Linf, eps = 8/255 (0.03137), AutoAttack(version=standard), 1,000 images, seed 3"
    l2 = "L2, eps = 0.5 (127.5/255), AutoAttack(version=standard), 1,000 images, seed 3"
    assert linf in page.text and l2 in page.text
    assert "PGD(steps=20, restarts=1, step_size=None)" in page.text
    assert "Linf 12/255 0.04706" in page.text
    assert "perturbation times 15" in page.text


def test_ensembles_show_the_accuracy_after_each_attack(complete):
    text = Page(complete.read_text()).text
    assert "apgd-ce 50.0 %, square 50.0 %" in text and "apgd-ce 3, square 3" in text


@pytest.mark.parametrize("strength, words", [(0.2, "Use more steps."), (0.8, "None of 1 checks")])
def test_masking_findings_are_shown_with_their_advice(tmp_path, strength, words):
    text = Page(write([write_run(tmp_path / "a", strength=strength)], tmp_path / "out").read_text())
    assert words in text.text and "no surrogate was given" in text.text
    assert ("incomplete optimisation" in text.text) == (strength == 0.2)


def test_certificates_stand_beside_the_attacks(complete):
    text = Page(complete.read_text()).text
    row = "AutoAttack, 1,000 images 8/255 (0.03137) 31.0 % lipschitz 11.0 %, interval 29.0 %"
    assert f"{row} 27.0 % 32.0 % 90.0 %" in " ".join(text.split())


def test_settings_are_complete(complete):
    text = Page(complete.read_text()).text
    for words in ("jaxclus train fashion_mnist", "NVIDIA H200", "cosine", "fingerprint"):
        assert words in text
    # Neither verdicts on single images nor anything else that nobody reads.
    assert "0101010101" not in text


def test_nothing_is_loaded_from_elsewhere(complete):
    text = complete.read_text()
    page = Page(text)
    assert (
        "http:" not in text
        and "https:" not in text
        and "//" not in re.sub(r'base64,[^"]+', "", text)
    )
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert attributes.get("src", "data:").startswith("data:")
        assert attributes.get("href", "#").startswith("#")
    assert "@import" not in text and "url(" not in text


def test_one_channel_and_colour_runs_keep_their_own_groups(complete):
    text = Page(complete.read_text()).text
    assert re.search(r"Groups of cifar10: +vehicles +animals", text)
    assert re.search(r"Groups of fashion_mnist: +clothes +leather", text)


def test_every_gap_is_named_with_its_command(incomplete):
    text = Page(incomplete.read_text()).text
    root = incomplete.parents[1]
    train, attack, linearize = (
        "jaxclus train 'not recorded'",
        f"jaxclus attack '{root}/bare run' --eps 8/255",
        f"jaxclus linearize '{root}/bare run'",
    )
    both = [
        f"{part} {variant}"
        for part in ("correlation of the class weights", "dendrogram", "weights as images")
        for variant in ("with BatchNorm", "without BatchNorm")
    ]
    for part, command in (
        ("training curves", train),
        ("validation accuracy", train),
        ("robust accuracy", attack),
        ("adversarial examples", attack),
        ("clustering scores with BatchNorm", linearize),
        ("feature distance", linearize),
        ("filter correlations", linearize),
        *((part, linearize) for part in both),
    ):
        assert f"{part} not measured: run {command}" in text
    for part in both[1::2]:
        assert f"{part} not measured: run jaxclus linearize {root}/partial" in text
    for part in both[::2]:
        assert f"{part} not measured: run jaxclus linearize {root}/partial" not in text
    # A data set without groups cannot be scored: no command is offered.
    assert "clustering scores with BatchNorm not measured: cifar10 has no groups" in text


def test_text_of_runs_is_escaped(incomplete):
    text = incomplete.read_text()
    assert "<script" not in text
    assert NASTY in Page(text).text


def test_runs_of_one_name_are_numbered(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"name": "same"}')
    text = Page(write([tmp_path / "a", tmp_path / "b"], tmp_path / "out").read_text()).text
    assert "same [1]" in text and "same [2]" in text


def test_writing_again_gives_the_same_page(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    first = write([run], tmp_path / "out").read_bytes()
    assert write([str(run)], str(tmp_path / "out")).read_bytes() == first


def test_runs_must_be_given(tmp_path):
    with pytest.raises(ValueError, match="`runs` must hold at least one"):
        write([], tmp_path)
    with pytest.raises(TypeError, match="`runs` must be a sequence .* got one path 'run'"):
        write("run", tmp_path)


def test_output_that_cannot_be_written(tmp_path):
    run = write_run(tmp_path / "run")
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OSError, match=f"`output` {blocked} cannot be written"):
        write([run], blocked)
    with pytest.raises(OSError, match=f"`output` {blocked}/below cannot be written"):
        write([run], blocked / "below")
