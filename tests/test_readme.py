"""The examples of the README do what they say."""

import re
from pathlib import Path

import pytest

import jaxclus as jc

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_examples_run(capsys, tmp_path, monkeypatch):
    example = README.split("```python\n")[1].split("```")[0]
    names = {}
    # Less training, fewer images.
    for whole, part in (("epochs=30", "epochs=1"), ('"test")', '"test").take(40)')):
        assert example.count(whole) == 1
        example = example.replace(whole, part)
    exec(example, names)
    clean, robust = map(float, capsys.readouterr().out.splitlines()[0].split())
    assert 0 <= robust <= clean <= 1
    assert isinstance(names["result"], jc.evaluation.Robustness)

    load, judge = README.split("```python\n")[2].split("```")[0].split("\n", 1)
    assert "from_torch" in load and "AutoAttack" in judge  # which the first example has run
    names |= {"model": names["run"].model, "test": names["test"].take(12)}
    monkeypatch.chdir(tmp_path)
    exec(judge.replace("AutoAttack", "PGD"), names)
    assert (tmp_path / "out" / "evaluation.json").exists()
    assert float(capsys.readouterr().out.split()[0]) == names["result"].robust_accuracy


def test_the_example_about_clustr_runs(capsys):
    example = (ROOT / "docs/clustr.md").read_text().split("```python\n")[1].split("```")[0]
    for whole, part in (("epochs=20", "epochs=1"), ('"test")', '"test").take(40)')):
        assert example.count(whole) == 1
        example = example.replace(whole, part)
    names = {}
    exec(example, names)
    assert capsys.readouterr().out.startswith("[")
    assert names["head"].scores(names["h"]).shape == (40, 10)


def test_the_examples_about_prototypes_run(few_queries, capsys, tmp_path, monkeypatch):
    example = (ROOT / "docs/prototypes.md").read_text().split("```python\n")[1].split("```")[0]
    for whole, part in (
        ("embedding_size=20", "embedding_size=20, widths=(8,), hidden=16"),
        ("epochs=20", "epochs=5"),
        ("steps=20", "steps=2"),
        ("take(60)", "take(8)"),
    ):
        assert example.count(whole) == 1
        example = example.replace(whole, part)
    names = {}
    exec(example, names)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("Separation(min_linf=") and printed[1].startswith("{'noise': ")
    assert not names["suite"].not_run.keys() & jc.evaluation.ITEMS

    suite = README.split("```python\n")[3].split("```")[0]
    assert "adaptive_suite" in suite
    monkeypatch.chdir(tmp_path)
    names |= {"jc": jc, "test": names["test"].take(6), "key": names["jax"].random.key(0)}
    exec(suite.replace('directory="suite"', 'directory="suite", items=["margin"]'), names)
    assert (tmp_path / "suite" / "margin" / "evaluation.json").exists()
    assert 0 <= float(capsys.readouterr().out.split()[0]) <= 1


def test_every_command_it_names_exists():
    from jaxclus.cli import _main

    block = README.split("## On the command line")[1].split("```")[1]
    named = {line.split()[1] for line in block.splitlines() if line.startswith("jaxclus ")}
    assert named <= set(_main._COMMANDS) and "train" in named


@pytest.mark.parametrize(
    "page, results",
    [
        ("README.md", "*.md"),
        ("docs/clustering_effect.md", "clustering_effect-*.md"),
        ("docs/clustr.md", "clustr-*.md"),
        ("docs/prototypes.md", "*prototype*.md"),
    ],
)
def test_figures_with_a_spread_stand_in_the_results(page, results):
    tables = (ROOT / "experiments/results").glob(results)
    measured = {f for table in tables for f in _spreads(table.read_text())}
    shown = _spreads((ROOT / page).read_text())
    assert shown and shown <= measured


def _spreads(text):
    """All "1.2 ± 0.3" of a text."""
    return set(re.findall(r"[\d.]+ ± [\d.]+", text))


def test_links_lead_to_files():
    for page in (ROOT / "README.md", *ROOT.glob("docs/*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), target
