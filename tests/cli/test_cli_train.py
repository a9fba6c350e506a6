"""What `jaxclus train` minimises, and the groups that it regularises with."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from error_line import error_line

import jaxclus as jc
from jaxclus import cli, clustr, prototypes
from jaxclus.attacks import PGD
from jaxclus.cli._train import Train
from jaxclus.training import objectives

BALL = jc.Linf(0.1)
PGD_AT = objectives.Adversarial(PGD(BALL, steps=10))
DIGITS = jc.data.load("digits")
TINY = ["--epochs", "1", "--num-images", "200", "--batch-size", "64", "--validation", "0"]


def test_several_seeds_make_several_runs(tmp_path):
    words = ["train", "digits", "--seeds", "1", "2", *TINY, "--output", str(tmp_path)]
    assert cli.main([*words, "--name", "two"]) == 0
    first, second = (jc.load(tmp_path / f"two-seed{seed}") for seed in (1, 2))
    assert not np.array_equal(first.head.bias[...], second.head.bias[...])


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


@pytest.mark.parametrize(
    "settings, wanted",
    [
        ({"method": "clustr"}, clustr.ClusTR()),
        (
            {"method": "clustr", "clusters_per_class": 3, "clusters_per_batch": 8, "alpha": 1.0},
            clustr.ClusTR(clusters_per_class=3, clusters_per_batch=8, alpha=1.0),
        ),
        (
            {"method": "clustr_qtrades", "eps": 0.1, "tradeoff": 2.0, "step_size": 0.05},
            clustr.QTRADES(threat=BALL, beta=2.0, step_size=0.05),
        ),
        (
            {"method": "clustr_qtrades", "eps": 0.1, "nearest": 5, "cross_entropy_weight": 0.5},
            clustr.QTRADES(threat=BALL, nearest=5, cross_entropy_weight=0.5),
        ),
        (
            {"method": "clustr", "num_init": 10, "max_iter": 40, "as_published": True},
            clustr.ClusTR(num_init=10, max_iter=40, as_published=True),
        ),
        (
            {"method": "clustr_trades", "eps": 0.1, "attack_steps": 3},
            clustr.ClusTRTRADES(threat=BALL, steps=3),
        ),
        ({"method": "clustr_free", "eps": 0.1}, clustr.FreeClusTR(threat=BALL)),
    ],
)
def test_train_knows_clustr(settings, wanted):
    command = Train("digits", **settings)
    assert command.objective(DIGITS) == wanted
    assert command.directory(7) == Path("runs") / f"digits-cnn-{settings['method']}-seed7"


@pytest.mark.parametrize(
    "settings, wanted",
    [
        ({"method": "prototypes"}, prototypes.PrototypeTraining()),
        (
            {
                "method": "prototypes",
                "generator": "simplex",
                "distance": "cosine",
                "rule": "l2",
                "scale": 10.0,
                "as_published": True,
            },
            prototypes.PrototypeTraining("simplex", None, "cosine", "l2", 10.0, True),
        ),
        (
            {"method": "prototypes_pgd", "eps": 0.1, "attack_steps": 3, "step_size": 0.05},
            prototypes.AdversarialPrototypes(threat=BALL, steps=3, step_size=0.05),
        ),
        (
            {"method": "prototypes_trades", "eps": 0.1, "tradeoff": 2.0, "rule": "cosine"},
            prototypes.PrototypeTRADES(threat=BALL, beta=2.0, rule="cosine"),
        ),
        (
            {"method": "prototypes", "generator": "repulsive_mean", "generator_steps": 1000},
            prototypes.PrototypeTraining("repulsive_mean", 1000),
        ),
        ({"method": "prototypes_learned"}, prototypes.LearnedPrototypes()),
        (
            {"method": "prototypes_learned", "rule": "cosine"},
            prototypes.LearnedPrototypes(rule="cosine"),
        ),
    ],
)
def test_train_knows_prototypes(settings, wanted):
    command = Train("digits", **settings)
    assert command.objective(DIGITS) == wanted
    assert command.directory(7) == Path("runs") / f"digits-cnn-{settings['method']}-seed7"


def test_prototypes_are_trained_judged_and_certified(tmp_path, capsys, monkeypatch):
    words = ["--method", "prototypes", "--embedding-size", "12", "--generator", "simplex"]
    words += ["--distance", "cosine", "--rule", "cosine", "--optimizer", "adamw"]
    run, config = trained(words, tmp_path / "runs")
    assert run.name == "digits-cnn-prototypes-seed0" and config["name"] == "prototypes"
    monkeypatch.setattr(jc.attacks, "AutoAttack", lambda ball, version: jc.attacks.FGSM(ball))
    judge = ["evaluate", str(run), "--norm", "l2", "--eps", "0.0005", "--num-images", "16"]
    assert cli.main([*judge, "--no-masking", "--curve", "--microbatch", "8"]) == 0
    assert "certified accuracy" in capsys.readouterr().out
    network, head = jc.models.parts(jc.load(run))
    assert head.rule == "cosine" and head.prototypes.shape == (10, 12)
    assert dict(network.spec.arguments)["embedding_size"] == 12
    words = ["train", "digits", "--start", str(run), "--embedding-size", "5"]
    assert cli.main([*words, "--output", str(tmp_path)]) == 1
    assert "`embedding_size` must not be given beside `start`, got 5" in error_line(capsys)


def test_clustr_goes_on_from_a_network(teacher, tmp_path, capsys, monkeypatch):
    words = ["--method", "clustr", "--start", str(teacher), "--clusters-per-batch", "8"]
    run, config = trained(words, tmp_path / "runs")
    assert run.name == "digits-cnn-clustr-seed0" and config["name"] == "clustr"
    assert json.loads((run / "config.json").read_text())["start"] == str(teacher)
    # What was trained is judged and certified; any attack will do.
    monkeypatch.setattr(jc.attacks, "AutoAttack", lambda ball, version: jc.attacks.FGSM(ball))
    judge = ["evaluate", str(run), "--norm", "l2", "--eps", "0.0005", "--num-images", "16"]
    assert cli.main([*judge, "--no-masking", "--curve", "--microbatch", "8"]) == 0
    assert "certified accuracy" in capsys.readouterr().out
    (bracket,) = json.loads((run / "certificates.json").read_text())["brackets"]
    assert 0 < bracket["certified_accuracy"] <= bracket["robust_accuracy"] < 1
    network, head = jc.models.parts(jc.load(run))
    assert network.spec.arguments == (("hidden", 8), ("widths", (4,)))
    assert head.centre_classes == tuple(np.repeat(np.arange(10), 2))
    words = ["train", "digits", *words, "--model", "resnet8", *TINY]
    assert cli.main([*words, "--output", str(tmp_path)]) == 1
    assert "`model` must not be given beside `start`, got resnet8" in error_line(capsys)


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


@pytest.fixture
def teacher(tmp_path):
    """A network for the digits, as a file."""
    model = jc.models.create("cnn", 10, (8, 8, 1), jax.random.key(0), widths=(4,), hidden=8)
    return jc.export(model, tmp_path / "teacher.safetensors")


def test_free_training_with_groups_from_a_teacher(teacher, tmp_path):
    words = ["--method", "free", "--eps", "0.1", "--cluster", "weight", "--beta", "0.5"]
    run, config = trained(
        [*words, "--teacher", str(teacher), "--num-groups", "3"], tmp_path / "runs"
    )
    assert run.name == "digits-cnn-free-weight_clustering-seed0"
    groups = jc.evaluation.discover_groups(jc.load(teacher), DIGITS.input_shape, 3)
    assert len(groups) == 3
    wanted = objectives.WeightClustering(objectives.FreeAdversarial(BALL), groups, 0.5)
    assert config["settings"] == repr(wanted)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 12 and "regulariser" in lines[-1]


def test_groups_come_with_the_data_or_from_a_teacher_of_such_data(tmp_path, teacher, capsys):
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
    assert "`teacher` must be given for --cluster, since small comes" in error_line(capsys)
    words += ["--teacher", str(teacher)]
    assert cli.main(["train", str(tmp_path / "large.npz"), *words]) == 1
    assert "`teacher` and `num_groups` must be given together" in error_line(capsys)
    words += ["--num-groups", "2"]
    assert cli.main(["train", str(tmp_path / "large.npz"), *words]) == 1
    assert "`teacher` must tell 10 classes of images (9, 9, 1) apart" in error_line(capsys)
