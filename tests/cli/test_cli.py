"""From training to the report, as a user runs it: what is printed and written."""

import json
from typing import get_args, get_type_hints

import numpy as np
import pytest
from error_line import error_line

import jaxclus as jc
from jaxclus import cli
from jaxclus.attacks import ATTACKS
from jaxclus.cli._attack import Attack
from jaxclus.evaluation._progress import Progress


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A standard and a robust run on digits, attacked and linearised."""
    output = tmp_path_factory.mktemp("runs")
    common = ["--epochs", "2", "--batch-size", "64", "--num-images", "600"]
    for method in ([], ["--method", "pgd", "--eps", "0.1", "--attack-steps", "2"]):
        assert cli.main(["train", "digits", *method, *common, "--output", str(output)]) == 0
    found = [output / f"digits-cnn-{method}-seed0" for method in ("standard", "pgd")]
    for run in found:
        assert cli.main(["attack", str(run), "--eps", "12/255", "0.1", "--steps", "3"]) == 0
        assert cli.main(["linearize", str(run)]) == 0
    return found


def test_train_keeps_config_metrics_and_a_model_that_loads(runs):
    config = json.loads((runs[1] / "config.json").read_text())
    assert config["dataset"]["name"] == "digits" and config["seed"] == 0
    assert config["objective"]["eps"] == 0.1 and "PGD" in config["objective"]["attack"]
    assert {"jax", "jaxclus", "python"} <= config["versions"].keys()
    lines = [json.loads(line) for line in (runs[1] / "metrics.jsonl").read_text().splitlines()]
    assert any("validation_robust_accuracy" in line for line in lines)
    model = jc.load(runs[1])
    x = jc.data.to_float(jc.data.load("digits", "test").images[:4])
    assert model(x).shape == (4, 10)


def test_the_same_train_command_goes_on_instead_of_starting_again(runs, capsys):
    before = (runs[0] / "metrics.jsonl").read_text()
    words = ["train", "digits", "--epochs", "2", "--batch-size", "64", "--num-images", "600"]
    words += ["--output", str(runs[0].parent)]
    assert cli.main(words) == 0
    assert (runs[0] / "metrics.jsonl").read_text() == before
    assert "validation accuracy" in capsys.readouterr().out


def test_attack_writes_a_curve_with_everything_a_figure_needs(runs):
    found = json.loads((runs[0] / "attacks" / "pgd-linf.json").read_text())
    assert [point["eps"] for point in found["curve"]] == [pytest.approx(12 / 255), 0.1]
    assert found["attack"] == "PGD(steps=3, restarts=1, loss=cross_entropy)"
    assert (found["norm"], found["num_images"], found["dataset"]) == ("linf", 364, "digits")
    for point in found["curve"]:
        assert len(point["robust"]) == 364
        assert point["robust"].count("1") / 364 == pytest.approx(point["robust_accuracy"])
        assert point["largest_norm"] <= point["eps"] + 1e-6
    examples = np.load(runs[0] / "attacks" / "pgd-linf.npz")
    moved = np.abs(examples["adversarial"] - examples["images"]).max()
    assert 0 < moved <= examples["eps"] + 1e-6


def test_evaluate_judges_in_one_command(runs, tmp_path, capfd):
    words = ["evaluate", str(runs[0]), "--eps", "0.1", "--num-images", "10", "--curve", "1", "9"]
    words += ["--seeds", "2", "--microbatch", "16", "--surrogate", str(runs[1])]
    assert cli.main([*words, "--output", str(tmp_path)]) == 0
    out = capfd.readouterr().out
    assert "AutoAttack(version=standard)" in out and "after square" in out
    assert "over 2 seeds: " in out
    assert "masking checks: " in out
    found = json.loads((tmp_path / "attacks" / "autoattack-linf.json").read_text())
    members = [member["name"] for member in found["curve"][0]["members"]]
    assert members == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert found["curve"][0]["microbatch"] == 16
    seeds = found["seeds"]
    assert seeds[0] == found["curve"][0] and seeds[0]["seed"] != seeds[1]["seed"]
    mean = sum(each["robust_accuracy"] for each in seeds) / 2
    assert found["spread"]["mean"] == pytest.approx(mean)
    curve = json.loads((tmp_path / "attacks" / "apgd-linf.json").read_text())["curve"]
    assert [point["eps"] for point in curve] == pytest.approx([0.1, 0.9])
    assert curve[1]["robust_accuracy"] == 0
    masking = json.loads((tmp_path / "masking.json").read_text())
    assert masking["num_images"] > 0 and masking["not_run"] == {}
    assert not list((tmp_path / "attacks").glob(".unfinished*"))


def test_an_attack_that_was_stopped_goes_on(runs, tmp_path, monkeypatch):
    words = ["attack", str(runs[0]), "--eps", "0.1", "--attack", "autoattack", "--version", "plus"]
    words += ["--num-images", "12", "--microbatch", "16", "--output", str(tmp_path)]
    write, done = Progress.finish_member, []

    def stopped(progress, result):
        write(progress, result)
        done.append(result.name)
        if done == ["apgd-ce", "apgd-dlr"]:
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "finish_member", stopped)
    assert cli.main(words) == 130
    assert len(list((tmp_path / "attacks").glob(".unfinished*"))) == 1
    assert cli.main(words) == 0
    assert done == ["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"]
    found = json.loads((tmp_path / "attacks" / "autoattack-plus-linf.json").read_text())
    assert [member["name"] for member in found["curve"][0]["members"]] == done
    assert found["attack"] == "AutoAttack(version=plus)"
    assert not list((tmp_path / "attacks").glob(".unfinished*"))


def test_attack_takes_settings_that_fit(runs, tmp_path, capsys):
    words = ["attack", str(runs[0]), "--eps", "0.1", "--output", str(tmp_path)]
    few = ["--num-images", "20"]
    assert cli.main([*words, *few, "--attack", "square", "--queries", "20"]) == 0
    found = json.loads((tmp_path / "attacks" / "square-linf.json").read_text())
    assert found["attack"] == "Square(queries=20, restarts=1, p_init=0.8)"
    assert cli.main([*words, "--attack", "square", "--steps", "3"]) == 1
    assert "`steps` is no setting of square" in capsys.readouterr().err
    assert cli.main([*words, "--attack", "carlini-wagner"]) == 1
    assert "`norm` must be one of l2 for carlini-wagner, got linf" in capsys.readouterr().err


def test_every_attack_is_on_the_command_line():
    assert set(get_args(get_type_hints(Attack)["attack"])) == set(ATTACKS)


@pytest.mark.parametrize("attack", ["fgsm", "mi-fgsm"])
def test_attack_knows_the_other_attacks_and_norms(runs, attack, tmp_path):
    words = ["attack", str(runs[0]), "--attack", attack, "--norm", "l2", "--eps", "0.5"]
    assert cli.main([*words, "--num-images", "20", "--output", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "attacks" / f"{attack}-l2.json").read_text())["norm"] == "l2"


def test_linearize_writes_affine_maps_and_scores(runs):
    found = json.loads((runs[1] / "linear.json").read_text())
    for variant in ("with_batch_norm", "without_batch_norm"):
        assert found["variants"][variant]["affine_error"] < 1e-4
        assert 0 < found["variants"][variant]["score"]["p_value"] <= 1
    arrays = np.load(runs[1] / "linear.npz")
    assert arrays["without_batch_norm/weight"].shape == (10, 8, 8, 1)


def test_an_exported_model_can_be_attacked_and_linearised(runs, tmp_path):
    path = str(jc.export(jc.load(runs[0]), tmp_path / "model.safetensors"))
    more = ["--dataset", "digits", "--num-images", "50", "--output", str(tmp_path)]
    assert cli.main(["attack", path, "--eps", "0.1", "--steps", "2", *more]) == 0
    assert cli.main(["linearize", path, *more]) == 0
    assert (tmp_path / "linear.npz").exists()


def test_report_shows_both_runs_on_one_page(runs, tmp_path):
    assert cli.main(["report", *map(str, runs), "--output", str(tmp_path)]) == 0
    page = (tmp_path / "index.html").read_text()
    assert all(run.name in page for run in runs)


def test_a_report_that_cannot_be_written_is_one_line(runs, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert cli.main(["report", str(runs[0]), "--output", str(tmp_path / "file" / "x")]) == 1
    assert "file" in error_line(capsys)
