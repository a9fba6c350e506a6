"""Experiments run end to end in their quick form; their statistics against closed forms."""

import dataclasses
import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro

import jaxclus as jc
from experiments import (
    clustering_effect,
    clustering_figures,
    clustering_summary,
    clustering_trials,
    paired,
    robustness_table,
    zoo,
)


def test_clustering_effect_quick(tmp_path, capsys):
    # As `python -m experiments.clustering_effect --quick ...` reads its words.
    words = ["--quick", "--dataset", "digits", "--output", str(tmp_path)]
    words += ["--work", str(tmp_path / "work")]
    experiment = tyro.cli(clustering_effect.Experiment, args=words)
    result = experiment.run()
    name = tmp_path / "clustering_effect-digits-quick"
    written = json.loads(name.with_suffix(".json").read_text())
    assert written["claims"] == json.loads(json.dumps(result["claims"])) and written["quick"]
    names = {row["trial"] for row in written["rows"]}
    assert names == {"standard", "pgd", "pgd, weight", "transfer, pgd, logits"}
    tested = [row for row in written["claims"] if "change" in row]
    assert len(tested) > 5 and all(row["smallest_p"] == 0.25 <= row["p_value"] for row in tested)
    assert {row["verdict"] for row in written["claims"]} == {"not run", "not decided"}
    (weight,) = (
        row
        for row in written["claims"]
        if row["claim"] == "the regulariser strengthens the clustering"
        and row["to"] == "pgd, weight"
    )
    assert weight["change"][0] > 0.3 and weight["seeds_with_more"] == 2
    (pgd, *_) = (row for row in written["rows"] if row["trial"] == "pgd")
    assert pgd["epochs"][-1] == pytest.approx(pgd["without_batch_norm"]["difference"], abs=1e-4)
    few = jc.data.load("digits", "test").take(8)
    (directory,) = (tmp_path / "work").glob("*/digits-quick-pgd-0")
    model = jc.load(directory)
    assert 0 <= pgd["autoattack_accuracy"] <= jc.evaluation.correct(model, few).mean()
    transfers = [row for row in written["rows"] if row["trial"] == "transfer, pgd, logits"]
    assert [row["taken_out"] for row in transfers] == [-1, -2]
    assert all(row["tuned_without_centres"] > 0.5 > row["chance"] for row in transfers)
    table = name.with_suffix(".md").read_text()
    assert "| pgd, weight |" in table and "| transfer, pgd, logits |" in table
    for kind in ("effect", "matrices"):
        assert (tmp_path / f"{name.name}-{kind}.png").read_bytes().startswith(b"\x89PNG")
    # Again: everything is found, nothing trained.
    capsys.readouterr()
    assert experiment.run()["rows"] == result["rows"]
    assert "seed 0" not in capsys.readouterr().out.split("#")[0]


@pytest.mark.parametrize(
    "before, after, p, verdict",
    [
        ([0.1, 0.2, 0.3], [0.2, 0.4, 0.6], 1 / 8, "not decided"),  # all rise: one of eight flips
        ([0.2, 0.4, 0.6], [0.1, 0.2, 0.3], 1.0, "not decided"),  # all fall
        ([0.1, 0.2, 0.3], [0.1, 0.2, 0.3], 1.0, "not decided"),  # no change at all
        ([0.0, 0.0, 0.0], [0.3, 0.2, -0.1], 2 / 8, "not decided"),  # sums >= 0.4: 0.6 and 0.4
        ([0.0] * 5, [0.1, 0.2, 0.3, 0.4, 0.5], 1 / 32, "holds"),
        ([0.0] * 5, [-0.1, -0.2, -0.3, -0.4, -0.5], 1.0, "reversed"),
    ],
)
def test_paired_p_value_is_exact(before, after, p, verdict):
    found = paired.paired(before, after)
    assert found["p_value"] == pytest.approx(p)
    assert found["change"][0] == pytest.approx(np.mean(after) - np.mean(before), abs=1e-6)
    assert paired.verdict(found) == verdict


def test_interval_of_the_mean_change_is_students():
    found = paired.paired([1.0, 1.0, 1.0], [1.1, 1.2, 1.6])
    # By hand: mean 0.3, deviation 0.264575, t_{0.975, 2} = 4.302653, over sqrt(3).
    half = 4.302653 * 0.264575 / 3**0.5
    assert found["interval"] == pytest.approx([0.3 - half, 0.3 + half], abs=1e-5)


def test_holms_correction():
    # By hand: sorted 0.01, 0.02, 0.04 times 3, 2, 1; never below the one before, never above 1.
    assert paired.holm([0.04, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert paired.holm([0.03, 0.01, 0.012]) == pytest.approx([0.03, 0.03, 0.03])
    assert paired.holm([0.9, 0.8]) == [1, 1] and paired.holm([]) == []


def test_undefined_scores_are_left_out():
    found = paired.paired([0.1, None, 0.3], [0.2, 0.4, None])
    assert found == {"seeds": 1} and paired.verdict(found) == "not decided"


def test_every_trial_of_a_setting_is_unlike_the_others():
    for setting in clustering_effect.SETTINGS.values():
        planned = clustering_effect.trials(setting)
        assert len({trial.name for trial in planned}) == len(planned)
        assert len({dataclasses.replace(t, name="", factors=()) for t in planned}) == len(planned)
    fashion = clustering_effect.trials(clustering_effect.SETTINGS["fashion_mnist"])
    radii = [trial.eps for trial in fashion if trial.eps is not None]
    assert radii == pytest.approx([0.025, 0.05, 0.15])


# Of each class, three images are taken for each other class of its group and one for each other.
IDS = jc.clustering.group_ids(jc.data.class_groups("fashion_mnist"), 10)
FLIPS = ((1 + 2 * (IDS[:, None] == IDS)) * (1 - np.eye(10, dtype=int))).tolist()


def synthetic_row(trial, seed, score):
    """A row of every value that the summary reads, all of them `score`."""
    measured = {"difference": score, "adjusted_rand": score, "silhouette": score}
    return {
        "trial": trial.name,
        "seed": seed,
        "eps": trial.eps or 0.1,
        **dict.fromkeys(clustering_summary.ACCURACIES, score),
        "with_batch_norm": measured,
        "without_batch_norm": measured,
        "pattern": {"within": 0.5, "chance": 0.1, "counts": FLIPS},
        "epochs": [0.0, score],
        "correlation": np.eye(10).tolist(),
    }


def test_claims_of_the_clustering_effect():
    setting = clustering_effect.SETTINGS["fashion_mnist"]
    rows = [
        # Robust networks score 1 more than standard ones, eps 0.025 less than 0.05 and so on.
        synthetic_row(trial, seed, (trial.method != "standard") + (trial.eps or 0.1) + 0.01 * seed)
        for seed in range(6)
        for trial in clustering_effect.trials(setting)
    ]
    for name in (transfer.name for transfer in clustering_effect.TRANSFERS):
        # Robust networks are better as they are and worse when tuned; the regulariser does nothing.
        gain = 0.0 if name == "transfer, standard" else 0.1
        rows += [
            {
                "trial": name,
                "seed": seed,
                "chance": 1 / 3,
                "taken_out": -1 - seed % 2,
                "source_accuracy": 0.9,
                "no_tuning": 0.5 + gain + 0.01 * seed,
                "no_tuning_pgd": 0.4 + 0.01 * seed,
                "tuned": 0.8 - gain + 0.01 * seed,
                "tuned_without_centres": 0.8 + 0.01 * seed,
                "centres_lose_classes": seed == 0,
            }
            for seed in range(6)
        ]
    found = clustering_summary.claims(rows, jc.data.class_groups("fashion_mnist"))
    verdicts = {}
    for row in found:
        verdicts.setdefault(row["claim"], []).append(row["verdict"])
    assert verdicts["trades clusters more than standard"] == ["holds"]
    assert verdicts["pgd clusters more: VGG-11 of width 8"] == ["holds"]
    assert verdicts["pgd clusters more: no BatchNorm"] == ["holds"]
    assert verdicts["a larger eps of training clusters more"] == ["holds"] * 3
    assert verdicts["the regulariser raises pgd_accuracy"] == ["not decided"] * 3
    assert verdicts["robust networks transfer better without tuning"] == ["holds"]
    better = ["not decided", "reversed", "not decided"]  # under attack, tuned, without centres
    assert verdicts["robust networks transfer better"] == better
    assert verdicts["the regulariser transfers better"] == ["not decided"] * 4
    assert verdicts["class centres help tuning"] == ["reversed"]
    assert verdicts["attacks reach classes of the same group"] == ["holds"] * 2
    (pattern, _) = (row for row in found if row["claim"].startswith("attacks"))
    assert pattern["p_value"] == pattern["smallest_p"] == pytest.approx(1 / 2520)
    primary = {row["claim"]: row for row in found if row["kind"] == "primary"}
    assert len(primary) == 3
    effect = primary["pgd clusters more than standard"]
    assert effect["p_value"] == 1 / 64 and effect["p_value_corrected"] == pytest.approx(3 / 64)
    assert effect["verdict"] == "holds"
    (check, _) = (row for row in found if row["kind"] == "check")
    assert check["to"] == "pgd, weight"
    steps = [row["to"] for row in found if row["claim"].startswith("a larger eps")]
    assert steps == ["pgd, eps 0.05", "pgd", "pgd, eps 0.15"]
    groups = [[name, list(members)] for name, members in jc.data.class_groups("fashion_mnist")]
    result = {
        "dataset": "fashion_mnist", "setting": dataclasses.asdict(setting), "rows": rows,
        "claims": found, "groups": groups, "class_names": list("0123456789"), "command": "c",
        "hardware": "h", "versions": {"jax": "0"}, "minutes": {"training": 1, "evaluation": 2},
    }  # fmt: skip
    table = clustering_summary.table(result)
    assert "| pgd | 112.5 ± 1.9 | 112.5 ± 1.9 |" in table
    assert "0.0156 (0.0469) | holds |" in table and "| check |" in table
    assert "| without_batch_norm.difference | +1.000 ± 0.000 (+1.000 to +1.000) | 6 of 6 |" in table
    assert "| no_tuning | +10.0 ± 0.0 points (+10.0 to +10.0) | 6 of 6 |" in table
    assert (
        "| tuned_without_centres to tuned | -10.0 ± 0.0 points (-10.0 to -10.0) | 0 of 6 |" in table
    )
    effect = clustering_figures.figures(result)["effect"]
    by_trial, by_epoch, by_eps = effect.axes
    assert len(by_trial.get_yticklabels()) == len(clustering_effect.trials(setting)) - 3
    assert [line.get_label() for line in by_epoch.lines][:2] == ["standard", "pgd"]
    np.testing.assert_allclose(by_eps.lines[-1].get_xdata(), [0.025, 0.05, 0.1, 0.15])
    without = result | {"rows": [row for row in rows if ", eps " not in row["trial"]]}
    assert len(clustering_figures.figures(without)["effect"].axes) == 2


def test_every_trial_can_be_built():
    for name in ("fashion_mnist", "cifar10"):
        setting, groups = clustering_effect.SETTINGS[name], jc.data.class_groups(name)
        shape = (28, 28, 1) if name == "fashion_mnist" else (32, 32, 3)
        for trial in [*clustering_effect.trials(setting), *clustering_effect.TRANSFERS]:
            goal = clustering_trials.objective(trial, 0.1, setting, groups)
            assert isinstance(goal, jc.training.objectives.Objective) and hash(goal)
        for trial in clustering_effect.trials(setting):
            spec = jc.models.ModelSpec(
                trial.model or setting.model, 10, shape, arguments=tuple(sorted(trial.arguments))
            )
            logits = jax.eval_shape(lambda m, x: m(x), spec.abstract(), jnp.zeros((2, *shape)))
            assert logits.shape == (2, 10)


def test_fashion_mnist_transfers_between_its_own_superclasses():
    groups = jc.data.transfer_groups("fashion_mnist")
    data = jc.data.Dataset(np.zeros((10, 2, 2, 1), np.uint8), np.arange(10))
    source, target = jc.data.split_subclasses(data, groups)
    assert source.num_classes == 5 and target.class_names == ("outer", "tops", "shoes")
    assert target.labels.tolist() == [0, 1, 2]  # coat, shirt, ankle boot
    assert jc.data.transfer_groups("cifar10") is None


def test_zoo_makes_a_network_and_its_card(tmp_path, capsys):
    name = "digits-cnn-pgd_clustering"
    zoo.Experiment((name,), num_images=8, output=tmp_path, work=tmp_path / "work").run()
    assert f"{name}: clean 0." in capsys.readouterr().out
    card = json.loads((tmp_path / f"{name}.json").read_text())
    weights = tmp_path / f"{name}.safetensors"
    assert card["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert "LogitClustering(objective=Adversarial(" in card["objective"]
    assert (card["norm"], card["eps"], card["figures"]["attacked_images"]) == ("linf", 0.2, 8)
    measured = jc.zoo.measure(
        jc.load(weights), jc.data.load("digits", "test"), jc.Linf(0.2), num_images=8
    )
    assert card["figures"] == json.loads(json.dumps(dataclasses.asdict(measured)))


def test_zoo_names_its_networks():
    assert set(jc.zoo.list()) == set(zoo.SHIPPED)
    with pytest.raises(ValueError, match="`names` must be some of .*cifar10-resnet8-pgd.* got 'x'"):
        zoo.Experiment(("x",)).run()


@pytest.fixture
def linear_network(tmp_path):
    """Least squares on the digits, as a reference network."""
    train = jc.data.load("digits", "train")
    x = train.images.reshape(len(train), -1) / 255
    x = np.hstack([x, np.ones((len(x), 1))])
    y = np.eye(10)[train.labels]
    solution = np.linalg.solve(x.T @ x + np.eye(65), x.T @ y).astype(np.float32)
    layers = [["flatten", "hwc"], ["dense", "p0", "p1"]]
    meta = {"dataset": "digits", "mean": [0.0], "std": [1.0], "layers": layers}
    path = tmp_path / "networks" / "least_squares.npz"
    path.parent.mkdir()
    np.savez(path, meta=json.dumps(meta), p0=solution[:-1], p1=solution[-1])
    return path


def test_robustness_table_quick(tmp_path, linear_network, capsys):
    experiment = robustness_table.Experiment(
        networks=(linear_network.parent,), eps="0.03", quick=True, seeds=2, output=tmp_path,
        work=tmp_path / "work",
    )  # fmt: skip
    result = experiment.run()
    (row,) = result["rows"]
    assert row["network"] == "least_squares" and row["num_images"] == robustness_table.QUICK_IMAGES
    assert row["clean_accuracy"] > 0.8 and row["eps"] == pytest.approx(0.03)
    after = list(row["accuracy_after"].values())
    assert list(row["accuracy_after"]) == ["APGD", "TargetedFAB", "Square"]
    assert row["clean_accuracy"] >= after[0] >= after[1] >= after[2] == row["robust_accuracy"]
    assert 0 < row["worst_over_seeds"] <= row["robust_accuracy"] < row["clean_accuracy"]
    assert len(row["evaluations"]) == 2 and row["masking"]["num_images"] == 4
    written = json.loads((tmp_path / "robustness_table-quick.json").read_text())
    assert written["rows"] == json.loads(json.dumps(result["rows"]))
    table = (tmp_path / "robustness_table-quick.md").read_text()
    assert "| least_squares | digits | 16 | linf, 0.03 (7.65/255) |" in table
    capsys.readouterr()
    (again,) = experiment.run()["rows"]  # from what the first run left, with its times
    assert "masking checks" not in capsys.readouterr().err
    for name in ("accuracy_after", "worst_over_seeds", "masking"):
        assert again[name] == row[name]
    # Kept to two digits for each seed, and their mean again.
    assert again["seconds"] == pytest.approx(row["seconds"], abs=0.011)


def test_robustness_table_names_its_networks(tmp_path, linear_network):
    model = jc.models.create("cnn", 10, (8, 8, 1), jax.random.key(0))
    path = jc.export(model, tmp_path / "tiny.safetensors")
    table = robustness_table.Experiment((path,), (linear_network,), dataset="digits")
    found = table._networks()
    assert [(network.name, network.dataset) for network in found] == [
        ("tiny", "digits"), ("least_squares", "digits"),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="`checkpoints` must have different names, got.*tiny"):
        robustness_table.Experiment((path, path), dataset="digits").run()
    with pytest.raises(ValueError, match="`dataset` must be given"):
        robustness_table.Experiment((path,)).run()
    with pytest.raises(ValueError, match="`checkpoints` or `networks` must name a network"):
        robustness_table.Experiment().run()
    with pytest.raises(ValueError, match="`eps` must be given, since digits has no usual l1 one"):
        robustness_table.Experiment(norm="l1")._threat("digits")
    assert robustness_table.Experiment(eps="4/255")._threat("cifar10").eps == pytest.approx(4 / 255)


def test_flags_leave_out_what_merely_informs():
    findings = [("rounding", "certain"), ("loop", "suspected"), ("classes", "information")]
    masking = {"findings": [{"name": n, "severity": s} for n, s in findings]}
    assert robustness_table.flags(masking) == "rounding (certain), loop (suspected)"
    assert robustness_table.flags({"findings": []}) == "none"
