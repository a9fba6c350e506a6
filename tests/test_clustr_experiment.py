"""The experiment about ClusTR: its quick form, its claims, its published evaluation."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro

import jaxclus as jc
from experiments import clustr, clustr_evaluation, clustr_summary, clustr_trials


def test_clustr_quick(tmp_path, capsys):
    words = ["--quick", "--output", str(tmp_path), "--work", str(tmp_path / "work")]
    result = tyro.cli(clustr.Experiment, args=words).run()
    name = tmp_path / "clustr-digits-quick"
    written = json.loads(name.with_suffix(".json").read_text())
    assert written["quick"] and written["claims"] == json.loads(json.dumps(result["claims"]))
    rows = {row["trial"]: row for row in written["rows"] if row["seed"] == 0}
    assert list(rows) == ["standard", "qtrades"]
    row, grid = rows["qtrades"], ["2/255", "8/255", "16/255", "25.5/255"]
    for kind in clustr_summary.LABELS:
        assert list(row[kind]) == grid and all(0 <= found <= 1 for found in row[kind].values())
    for steps in (20, 100):  # a restart counts in both or in one
        for eps in grid:
            assert row[f"scores_{steps}"][eps] <= row[f"published_{steps}"][eps]
    table = name.with_suffix(".md").read_text()
    assert "| qtrades | " in table and "| L | clean % |" in table
    assert name.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert tyro.cli(clustr.Experiment, args=words).run()["rows"] == result["rows"]
    assert "seed 0" not in capsys.readouterr().out.split("#")[0]


@pytest.mark.parametrize("part", ["headline", "ablations", "certificates"])
def test_clustr_claims_and_tables(part):
    """Six seeds that all agree decide the primary claims; every trial is in the table."""
    setting = clustr.SETTINGS["digits"]
    left = {"qtrades": 0.2, "clustr": 0.0, "pgd": 0.6, "standard": 0.0}
    rows = []
    for seed in range(6):
        for trial in clustr_trials.trials(part):
            robust = left.get(trial.name, 0.1) + 0.001 * seed
            curve = dict.fromkeys(clustr_summary.GRID_NAMES, robust + 0.01)
            reported = dict.fromkeys(curve, robust + (0.2 if trial.start else 0.02))
            row = {"trial": trial.name, "seed": seed, "clean_accuracy": 0.8, "autoattack": robust}
            row |= {"logits_20": curve, "logits_100": curve, "published_20": curve}
            row |= {"published_100": reported, "median_radius": 0.1}
            if trial.start:
                scores = {name: value + 0.1 for name, value in curve.items()}
                row |= {"scores_20": scores, "scores_100": scores, "saturated": 0.1}
                row["nearest"] = {"1": {"clean_accuracy": 0.8, "published_20": 0.3}}
            if trial.lipschitz:
                row |= {"l2": {"0.5": {"certified": 0.2, "attacked": 0.4}}, "lipschitz": 0.9}
            rows.append(row)
    found = clustr_summary.claims(rows, setting, part)
    primary = {row["claim"]: row["verdict"] for row in found if row["kind"] == "primary"}
    if part == "headline":
        assert sorted(primary.values()) == ["holds", "reversed", "reversed"]
    else:
        assert not primary
    result = {
        "dataset": "digits", "part": part, "setting": dataclasses.asdict(setting), "rows": rows,
        "claims": found, "command": "it",
        "hardware": "this", "versions": {"jax": "0"},
    }  # fmt: skip
    table = clustr_summary.table(result)
    for trial in clustr_trials.trials(part):
        assert f"| {trial.name} | 80.0 ± 0.0 |" in table
    assert ("20.0 ± 0.0 to 40.0 ± 0.0" in table) == (part == "certificates")


def test_the_published_evaluation_can_miss_what_it_found():
    """Right with a large loss in one half of the ball, wrong with a small one in the other."""

    @jax.tree_util.Partial
    def model(x):
        right, wrong = jnp.array([0.02, 0.0, 0.0]), jnp.array([0.0, 0.2, -10.0])
        return jnp.where(x[:, 0, 0] > 0.5, wrong[None], right[None])

    images = jc.data.Dataset(np.full((6, 1, 1, 1), 127, np.uint8), np.zeros(6, np.int32))
    key = jax.random.key(0)
    assert clustr_evaluation.attacked(key, model, images, 0.1) == {20: (0, 1), 100: (0, 1)}
    # A slope is climbed as far as the ball goes, from 127/255 on.
    slope = jax.tree_util.Partial(
        lambda x: jnp.stack([0.55 - x[:, 0, 0, 0], x[:, 0, 0, 0] - 0.55], axis=1)
    )
    assert clustr_evaluation.attacked(key, slope, images, 0.1) == {20: (0, 0), 100: (0, 0)}
    assert clustr_evaluation.attacked(key, slope, images, 0.04) == {20: (1, 1), 100: (1, 1)}
