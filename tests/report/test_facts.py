"""Headline figures, remarks and numbers as text."""

import json
import math

import pytest
from synthetic_runs import write_run

from jaxclus.report import _facts
from jaxclus.report._html import Markup, element, join, table, tree
from jaxclus.report._read import read_runs


def write_evaluations(directory, dataset, *evaluations):
    """A run with nothing but evaluations: (attack, norm, {eps: robust accuracy})."""
    (directory / "attacks").mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"dataset": {"name": dataset}}))
    for i, (attack, norm, curve) in enumerate(evaluations):
        record = {"attack": attack, "norm": norm, "num_images": 400, "seed": 0}
        record["clean_accuracy"] = 0.9
        record["curve"] = [
            {"eps": eps, "robust_accuracy": accuracy, "largest_norm": eps}
            for eps, accuracy in curve.items()
        ]
        (directory / "attacks" / f"{i}.json").write_text(json.dumps(record))
    return directory


def test_headline_is_the_strongest_attack_at_the_shared_eps(tmp_path):
    first = write_evaluations(
        tmp_path / "a",
        "mnist",
        ("PGD", "linf", {0.0: 0.9, 8 / 255: 0.8, 0.3: 0.6}),
        ("AutoAttack", "linf", {0.3: 0.4}),
    )
    second = write_evaluations(tmp_path / "b", "mnist", ("PGD", "linf", {0.3: 0.5}))
    other = write_evaluations(tmp_path / "c", "cifar10", ("PGD", "linf", {8 / 255: 0.7}))
    runs = read_runs([first, second, other])
    (headline,) = _facts.headlines(runs[0], runs)
    assert (headline.evaluation.attack, headline.point.eps) == ("AutoAttack", 0.3)
    assert headline.point.robust_accuracy == 0.4
    # Alone, nothing decides but the customary radius, or the one that the run was trained at.
    (headline,) = _facts.headlines(runs[0], runs[:1])
    assert (headline.point.eps, headline.point.robust_accuracy) == (8 / 255, 0.8)
    config = {"dataset": {"name": "mnist"}, "objective": {"norm": "linf", "eps": 0.29}}
    (first / "config.json").write_text(json.dumps(config))
    trained = read_runs([first])
    (headline,) = _facts.headlines(trained[0], trained)
    assert headline.point.eps == 0.3


def test_one_headline_per_norm_and_none_without_a_radius(tmp_path):
    run = write_evaluations(
        tmp_path / "a",
        "mnist",
        ("PGD", "l1", {12.0: 0.3}),
        ("PGD", "linf", {0.1: 0.5}),
        ("PGD", "l2", {0.0: 0.9}),
    )
    runs = read_runs([run])
    assert [h.evaluation.norm for h in _facts.headlines(runs[0], runs)] == ["linf", "l1"]


def test_eps_within_float32_rounding_is_the_same():
    assert _facts.same_eps(8 / 255, 0.0313725508749485)
    assert not _facts.same_eps(8 / 255, 0.031)


def test_remarks_name_rising_curves_oversized_norms_and_the_lack_of_autoattack(tmp_path):
    run = write_evaluations(tmp_path / "a", "mnist", ("PGD", "linf", {0.1: 0.3, 0.2: 0.5}))
    path = run / "attacks" / "0.json"
    record = json.loads(path.read_text())
    record["curve"][0]["largest_norm"] = 0.1001
    path.write_text(json.dumps(record))
    (read,) = read_runs([run])
    rising, norm, autoattack = _facts.remarks(read)
    assert "rises from 30.0 % at 25.5/255 (0.1) to 50.0 % at 51/255 (0.2)" in rising
    assert "Linf norm 0.1001, above eps = 0.1" in norm
    assert "No AutoAttack" in autoattack


def test_no_remarks_on_a_sound_run(tmp_path):
    (read,) = read_runs([write_run(tmp_path / "a")])
    assert _facts.remarks(read) == ()
    assert _facts.gaps(read) == ()


def test_commands_attack_as_the_run_was_trained(tmp_path):
    directory = tmp_path / "run"
    directory.mkdir()
    config = {"command": "jaxclus train mnist", "objective": {"norm": "l2", "eps": 1.5}}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    (read,) = read_runs([directory])
    commands = {gap.part: gap.command for gap in _facts.gaps(read)}
    assert commands["attacks"] == f"jaxclus attack {directory} --norm l2 --eps 1.5"
    assert commands["validation"] == "jaxclus train mnist --validation 0.05"
    assert "training" not in commands


def test_affine_error_is_remarked(tmp_path):
    run = write_run(tmp_path / "a")
    record = json.loads((run / "linear.json").read_text())
    record["variants"]["with_batch_norm"]["affine_error"] = 0.02
    (run / "linear.json").write_text(json.dumps(record))
    (remark,) = _facts.remarks(read_runs([run])[0])
    assert "with BatchNorm: affine error 0.02" in remark


def test_clean_accuracy_prefers_evaluations_to_validation(tmp_path):
    run = write_run(tmp_path / "a")
    assert _facts.clean_accuracy(read_runs([run])[0]) == (0.84, "1,000 images")
    for path in (run / "attacks").iterdir():
        path.unlink()
    value, source = _facts.clean_accuracy(read_runs([run])[0])
    assert source == "validation, last epoch"
    assert value == pytest.approx(0.84 - 0.5 * math.exp(-5))
    (run / "metrics.jsonl").unlink()
    assert _facts.clean_accuracy(read_runs([run])[0]) is None


def test_numbers_as_text():
    assert _facts.percent(0.4731) == "47.3 %" and _facts.percent(None) == "–"
    assert _facts.eps_text(8 / 255, "linf") == "8/255 (0.03137)"
    assert _facts.eps_text(0.5, "l2") == "0.5 (127.5/255)"
    assert _facts.standard_error(0.5, 400) == 0.025
    score = {"difference": -0.1234, "p_value": 1 / 210, "cophenetic": None}
    assert _facts.score_text(score, "difference") == "−0.123"
    assert _facts.score_text(score, "p_value") == "0.0048"
    assert _facts.score_text(score, "cophenetic") == "–"
    assert _facts.score_text(None, "difference") == "–"


def test_html_is_escaped_once():
    inner = element("b", "<&>")
    assert inner == "<b>&lt;&amp;&gt;</b>"
    assert element("p", inner, '"', class_='"x"') == (
        '<p class="&quot;x&quot;"><b>&lt;&amp;&gt;</b>&quot;</p>'
    )
    assert isinstance(join(inner, "<"), Markup) and join(inner, "<").endswith("</b>&lt;")
    assert "<td>&lt;i&gt;</td>" in table(["a"], [["<i>"]], numeric=())


def test_settings_of_every_kind_are_shown():
    shown = tree({"a": {"<b>": 1}, "c": [1, 2], "d": None, "e": [], "f": [{"g": 1}, {"h": False}]})
    for part in ("&lt;b&gt;", "1, 2", "–", "<th>g</th>", "False"):
        assert part in shown
    assert tree("01" * 5000).endswith("01… (10,000 characters)</span>")
