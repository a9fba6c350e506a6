"""Every command as a user runs it: what it prints, what it writes, how it fails."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest

import jaxclus as jc
from jaxclus import cli
from jaxclus.attacks import ATTACKS, PGD
from jaxclus.cli._attack import Attack
from jaxclus.cli._train import Train
from jaxclus.evaluation._progress import Progress
from jaxclus.training import objectives
from jaxclus.zoo import _cards

DATA = Path(
    os.environ.get("TFDS_DATA_DIR") or Path(__file__).parents[3] / "shared" / "data" / "tfds"
)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A cache of the module's own: the user's stays as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXCLUS_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("TFDS_DATA_DIR", raising=False)
        yield


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


def test_several_seeds_make_several_runs(tmp_path):
    words = ["train", "digits", "--seeds", "1", "2", "--epochs", "1", "--num-images", "200"]
    words += ["--batch-size", "64", "--validation", "0", "--output", str(tmp_path)]
    assert cli.main([*words, "--name", "two"]) == 0
    first, second = (jc.load(tmp_path / f"two-seed{seed}") for seed in (1, 2))
    assert not np.array_equal(first.head.bias[...], second.head.bias[...])


BALL = jc.Linf(0.1)
PGD_AT = objectives.Adversarial(PGD(BALL, steps=10))
DIGITS = jc.data.load("digits")


@pytest.mark.parametrize(
    "settings, wanted, name",
    [
        ({}, objectives.Standard(), "standard"),
        ({"method": "pgd"}, PGD_AT, "pgd"),
        (
            {"method": "pgd", "attack_steps": 3, "step_size": 0.05},
            objectives.Adversarial(PGD(BALL, steps=3, step_size=0.05)),
            "pgd",
        ),
        ({"method": "trades"}, objectives.TRADES(BALL), "trades"),
        (
            {"method": "trades", "tradeoff": 1.0, "attack_steps": 3, "step_size": 0.05},
            objectives.TRADES(BALL, 1.0, 3, 0.05),
            "trades",
        ),
        ({"method": "mart"}, objectives.MART(BALL), "mart"),
        ({"method": "mart", "tradeoff": 2.0}, objectives.MART(BALL, 2.0), "mart"),
        ({"method": "fast"}, objectives.FastAdversarial(BALL), "fast"),
        ({"method": "fast", "step_size": 0.05}, objectives.FastAdversarial(BALL, 0.05), "fast"),
        ({"method": "free"}, objectives.FreeAdversarial(BALL), "free"),
        (
            {"method": "free", "step_size": 0.05},
            objectives.FreeAdversarial(BALL, step_size=0.05),
            "free",
        ),
        ({"method": "pgd", "awp": 0.01}, objectives.AWP(PGD_AT, 0.01), "pgd-awp"),
        (
            {"method": "pgd", "cluster": "logits"},
            objectives.LogitClustering(PGD_AT, DIGITS.groups, 0.1),
            "pgd-logits_clustering",
        ),
        (
            {"cluster": "weight"},
            objectives.WeightClustering(objectives.Standard(), DIGITS.groups, 0.1),
            "standard-weight_clustering",
        ),
        (
            {"method": "pgd", "awp": 0.01, "cluster": "weight", "beta": 3.0},
            objectives.WeightClustering(objectives.AWP(PGD_AT, 0.01), DIGITS.groups, 3.0),
            "pgd-awp-weight_clustering",
        ),
    ],
)
def test_train_knows_every_objective(settings, wanted, name):
    command = Train("digits", eps=0.1 if "method" in settings else None, **settings)
    assert command.objective(DIGITS) == wanted
    assert command.directory(7) == Path("runs") / f"digits-cnn-{name}-seed7"


TINY = ["--epochs", "1", "--num-images", "200", "--batch-size", "64", "--validation", "0"]


def trained(words, output):
    """The one run that a command makes, and what its config says of the objective."""
    assert cli.main(["train", "digits", *words, *TINY, "--output", str(output)]) == 0
    (run,) = output.iterdir()
    return run, json.loads((run / "config.json").read_text())["objective"]


def test_trades_under_awp_with_the_published_regulariser(tmp_path):
    words = ["--method", "trades", "--eps", "0.1", "--attack-steps", "1", "--awp", "0.01"]
    run, config = trained([*words, "--cluster", "logits"], tmp_path)
    assert run.name == "digits-cnn-trades-awp-logits_clustering-seed0"
    wanted = objectives.AWP(objectives.TRADES(BALL, steps=1), 0.01)
    wanted = objectives.LogitClustering(wanted, DIGITS.groups)
    assert config["settings"] == repr(wanted)
    assert config["name"] == "trades-awp-logits_clustering"  # what a report calls the method
    assert (config["norm"], config["eps"]) == ("linf", 0.1)
    (line,) = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert line["regulariser"] > 0 and line["divergence"] > 0 and line["step"] == 3


def test_free_training_with_groups_from_a_teacher(runs, tmp_path):
    words = ["--method", "free", "--eps", "0.1", "--cluster", "weight", "--beta", "0.5"]
    run, config = trained([*words, "--teacher", str(runs[1]), "--num-groups", "3"], tmp_path)
    assert run.name == "digits-cnn-free-weight_clustering-seed0"
    groups = jc.evaluation.discover_groups(jc.load(runs[1]), DIGITS.input_shape, 3)
    assert len(groups) == 3
    wanted = objectives.WeightClustering(objectives.FreeAdversarial(BALL), groups, 0.5)
    assert config["settings"] == repr(wanted)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 12 and "regulariser" in lines[-1]


def test_groups_come_with_the_data_or_from_a_teacher_of_such_data(tmp_path, runs, capsys):
    rng = np.random.default_rng(0)
    for name, size in (("small", 8), ("large", 9)):
        np.savez(
            tmp_path / f"{name}.npz",
            images=rng.integers(0, 256, (64, size, size, 1), np.uint8),
            labels=np.arange(64) % 10,
        )
    words = ["--cluster", "logits", "--batch-size", "64", "--validation", "0"]
    words += ["--output", str(tmp_path / "runs")]
    assert cli.main(["train", str(tmp_path / "small.npz"), *words]) == 1
    assert "`teacher` must be given for --cluster, since small comes" in no_traceback(capsys)
    words += ["--teacher", str(runs[0])]
    assert cli.main(["train", str(tmp_path / "large.npz"), *words]) == 1
    assert "`teacher` and `num_groups` must be given together" in no_traceback(capsys)
    words += ["--num-groups", "2"]
    assert cli.main(["train", str(tmp_path / "large.npz"), *words]) == 1
    assert "`teacher` must tell 10 classes of images (9, 9, 1) apart" in no_traceback(capsys)


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


def test_data_lists_and_describes(capsys):
    assert cli.main(["data", "list"]) == 0
    assert "digits" in capsys.readouterr().out
    assert cli.main(["data", "info", "digits"]) == 0
    assert re.search(r"train 1,\d+, test \d+ images", capsys.readouterr().out)


NETWORK = next(iter(jc.zoo.list()), "none ships")
COMMANDS = ("train", "attack", "evaluate", "linearize", "report", "data", "zoo", "demo")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"jaxclus {command}" in capsys.readouterr().out.split("Try:")[1]


def test_preparing_jax_leaves_the_backend_to_the_command():
    """What `--deterministic` puts into XLA_FLAGS counts only before the backend starts."""
    code = (
        "import jax; from jaxclus.cli import _main; _main._keep_compiled_code();"
        "jax.config.update('jax_num_cpu_devices', 3); assert jax.device_count('cpu') == 3"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def no_traceback(capsys) -> str:
    """The one line of an error."""
    found = capsys.readouterr()
    assert "Traceback" not in found.err
    (line,) = (line for line in found.err.splitlines() if line.startswith("jaxclus: error:"))
    return line


@pytest.mark.parametrize(
    "words, named",
    [
        (["train", "digits", "--epochs", "0"], "`epochs`"),
        (["train", "digits", "--method", "pgd"], "`eps`"),
        (["train", "digits", "--method", "pgd", "--eps", "0"], "`eps`"),
        (["train", "digits", "--model", "resnet9"], "resnet18"),
        (["train", "digits", "--batch-size", "100000"], "`data`"),
        (["train", "digits", "--num-images", "100000"], "`n`"),
        (["train", "digits", "--seeds"], "`seeds`"),
        (["train", "no_such_set"], "no_such_set"),
        (["data", "info", "no_such_set"], "no_such_set"),
        (["train", "cifar10"], "jaxclus data prepare cifar10"),
        (["attack", "no/such/run", "--eps", "0.1"], "no/such/run"),
        (["attack", "no/such/run", "--eps"], "`eps`"),
        (["linearize", "no/such/run"], "no/such/run"),
        (["report", "no/such/run"], "no/such/run"),
        (["train", "digits", "--method", "trades"], "`eps` must be given for --method trades"),
        (["train", "digits", "--method", "free", "--norm", "l2", "--eps", "0.1"], "`norm`"),
        (
            ["train", "digits", "--method", "fast", "--eps", "0.1", "--attack-steps", "4"],
            "`attack_steps` is a setting of pgd, trades and mart, not of fast",
        ),
        (
            ["train", "digits", "--eps", "8/255"],
            "`eps` is a setting of training against an adversary, as --method pgd, not of standard",
        ),
        (["train", "digits", "--step-size", "0.1"], "`step_size` is a setting of training against"),
        (["train", "digits", "--attack-steps", "4"], "`attack_steps` is a setting of pgd, trades"),
        (["train", "digits", "--norm", "l2"], "`norm` is a setting of training against"),
        (["train", "digits", "--num-groups", "3"], "`num_groups` is a setting of --cluster"),
        (["train", "digits", "--beta", "0.1"], "`beta` is a setting of --cluster"),
        (["train", "digits", "--teacher", "runs/x"], "`teacher` is a setting of --cluster"),
        (["train", "digits", "--tradeoff", "2"], "`tradeoff` is a setting of trades and mart"),
        (
            ["train", "digits", "--cluster", "weight", "--teacher", "no/such", "--num-groups", "2"],
            "no/such",
        ),
        (["train", "digits", "--cluster", "weight", "--teacher", "x"], "must be given together"),
        (["zoo", "no-such-network"], NETWORK),
        (["zoo", "no-such-network", "--verify"], "'no-such-network'"),
        (["zoo", "--num-images", "8"], "`num_images` is a setting of --verify, got 8"),
        (["linearize", NETWORK], "`output` must be given"),
        (["attack", "no-such-network", "--eps", "0.1"], "(`jaxclus zoo`), found no no-such"),
    ],
)
def test_user_errors_are_one_line_and_exit_code_1(words, named, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert cli.main(words) == 1
    assert named in no_traceback(capsys)


def test_an_unwritable_output_is_one_line(runs, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert cli.main(["report", str(runs[0]), "--output", str(tmp_path / "file" / "x")]) == 1
    assert "file" in no_traceback(capsys)
    words = ["train", "digits", "--epochs", "1", "--output", str(tmp_path / "file" / "x")]
    assert cli.main(words) == 1
    assert "file" in no_traceback(capsys)


@pytest.mark.parametrize(
    "words",
    [["train"], ["nonsense"], ["attack", "x", "--eps", "one"], ["attack", "x", "--eps", "8/0"]],
)
def test_a_command_line_that_cannot_be_parsed_exits_with_2(words):
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
