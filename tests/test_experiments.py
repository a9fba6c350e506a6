"""Experiments run end to end in their quick form; their statistics against closed forms."""

import json

import jax
import numpy as np
import pytest

import jaxclus as jc
from experiments import clustering_effect, robustness_table


def test_clustering_effect_quick(tmp_path):
    experiment = clustering_effect.Experiment(
        dataset="digits", quick=True, output=tmp_path, work=tmp_path / "work"
    )
    result = experiment.run()
    written = json.loads((tmp_path / "clustering_effect-digits-quick.json").read_text())
    assert written["comparison"] == result["comparison"]
    assert len(written["runs"]) == 4 and written["quick"] is True
    row = written["comparison"]["without_batch_norm"]["difference"]
    assert row["seeds"] == 2 and row["smallest_p"] == 0.25 and 0.25 <= row["p_value"] <= 1


def rows(standard, robust):
    variants = ("with_batch_norm", "without_batch_norm")
    return [
        {
            "method": method,
            **{v: {"score": dict.fromkeys(clustering_effect.SCORES, x)} for v in variants},
        }
        for method, values in (("standard", standard), ("robust", robust))
        for x in values
    ]


@pytest.mark.parametrize(
    "standard, robust, p",
    [
        ([0.1, 0.2, 0.3], [0.2, 0.4, 0.6], 1 / 8),  # all three rise: one of eight sign flips
        ([0.2, 0.4, 0.6], [0.1, 0.2, 0.3], 1.0),  # all fall
        ([0.1, 0.2, 0.3], [0.1, 0.2, 0.3], 1.0),  # no change at all
        ([0.0, 0.0, 0.0], [0.3, 0.2, -0.1], 2 / 8),  # sums of flips >= 0.4: 0.6 and 0.4
    ],
)
def test_paired_p_value_is_exact(standard, robust, p):
    found = clustering_effect.compare(rows(standard, robust))["with_batch_norm"]["difference"]
    assert found["p_value"] == pytest.approx(p)
    assert found["change"][0] == pytest.approx(np.mean(robust) - np.mean(standard), abs=1e-6)


def test_undefined_scores_are_left_out():
    found = clustering_effect.compare(rows([0.1, None, 0.3], [0.2, 0.4, None]))
    assert found["with_batch_norm"]["cophenetic"] == {"seeds": 1}


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
