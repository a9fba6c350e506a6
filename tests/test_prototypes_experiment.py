"""The experiment about repulsive prototypes: its quick form, its claims, its published attack."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro

import jaxclus as jc
from experiments import (
    prototype_generators,
    prototypes_evaluation,
    prototypes_summary,
    prototypes_trials,
    repulsive_prototypes,
)
from jaxclus.attacks.adaptive import DistanceLogits


def test_prototypes_quick(tmp_path, capsys):
    words = ["--quick", "--output", str(tmp_path), "--work", str(tmp_path / "work")]
    one = tyro.cli(repulsive_prototypes.Experiment, args=[*words, "--only", "1"]).run()
    assert [row["seed"] for row in one["rows"]] == [1, 1]
    name = tmp_path / "repulsive_prototypes-digits-quick"
    table = name.with_suffix(".md").read_text()
    assert "over 1 seeds (1), " in table and "seed 1" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "work")  # seed 1 stands in the results
    result = tyro.cli(repulsive_prototypes.Experiment, args=words).run()
    assert result["rows"][2:] == one["rows"]
    printed = capsys.readouterr().out.split("#")[0]
    assert "seed 0" in printed and "seed 1" not in printed  # which was kept
    written = json.loads(name.with_suffix(".json").read_text())
    assert written["quick"] and written["claims"] == json.loads(json.dumps(result["claims"]))
    first = {row["trial"]: row for row in written["rows"] if row["seed"] == 0}
    assert list(first) == ["standard", "published"]
    row = first["published"]
    for kind in ("published", "published_margin", "targeted"):
        assert list(row[kind]) == list(prototypes_summary.GRID_NAMES)
        assert all(0 <= found <= 1 for found in row[kind].values())
    assert list(row["published_20"]) == ["8/255"]
    assert row["worst"] == row["common"]  # there are no further items in short
    assert row["common"] <= min(row["targeted"]["8/255"], *row["suite"].values())
    assert 0 <= row["masking_gap"] <= row["suite"]["own-loss"]
    assert row["hidden"] == pytest.approx(row["published"]["8/255"] - row["worst"])
    assert set(row["suite"]) == {"own-loss", "margin"}
    assert row["epochs"] == 2 and row["step"] == 2 * (480 // 120)
    shapes = {name: np.shape(points) for name, points in row["picture"].items()}
    assert shapes == {
        "before": (8, 2), "after": (8, 2), "prototypes": (10, 2), "labels": (8,), "right": (8,)
    }  # fmt: skip
    assert [row["seed"] for row in written["rows"] if "picture" in row] == [0, 0]
    assert row["separation"]["min_linf"] > 5 and "separation" not in first["standard"]
    table = name.with_suffix(".md").read_text()
    assert "| published | 2 (8) | " in table and "| published, targeted | " in table
    assert "published: as published " in table and "of 2 seeds)" in table
    for kind in ("-eps", "-embeddings"):
        assert (tmp_path / f"{name.name}{kind}.png").read_bytes().startswith(b"\x89PNG")


def made_up(trial, seed, part):
    """A row as the evaluation makes it."""
    left = {"standard": 0.0, "published": 0.1, "cosine": 0.2, "pgd": 0.6, "cosine, pgd": 0.7}
    common = left.get(trial.name, 0.3) + 0.002 * seed
    reported = common + (0.5 if trial.name == "published" else 0.02)
    grid = prototypes_summary.GRID_NAMES
    row = {"trial": trial.name, "seed": seed, "epochs": 8, "step": 664, "accuracy": 0.95}
    row["hardware"] = "this" if seed < 4 else "that"
    row |= {"clean_accuracy": 0.8, "clean_attacked": 0.9, "common": common, "worst": common - 0.01}
    row["published"] = dict.fromkeys(grid, reported)
    row["published_20"] = {"24/255": reported}
    row["published_margin"] = row["targeted"] = dict.fromkeys(grid, common)
    items = prototypes_evaluation.HEADLINE if part == "headline" else prototypes_evaluation.COMMON
    row |= {"hidden": reported - row["worst"], "masking_gap": 0.04}
    row["suite"] = dict.fromkeys([name for name in items if name != "masking"], common)
    row["temperature"] = 12.345
    if trial.method.startswith("prototypes"):
        kinds = [f"{of}_{by}" for of in ("min", "mean") for by in ("linf", "l2", "angle")]
        row["separation"] = dict.fromkeys(kinds, np.pi / 2)
        row["separation"]["self_classified"] = {"inner_product": 1.0}
        row |= {"cross_entropy": 0.85, "cross_entropy_calibrated": 0.25}
        row["rules"] = {rule: {"clean": 0.7, "attacked": 0.4} for rule in prototypes_summary.RULES}
    if part == "headline":
        row["without_gradients"] = {"Square": 0.5, "from pgd": 0.6}
        row |= {"white_box": 0.4, "without_gradients_alone": 0.01, "hop_skip_jump_l2": 1.5}
        row["findings"] = ["saturating head"] * (seed > 1)
        row["masking"] = {"zero gradient": 0.03}
        if seed == 0:
            points = np.random.default_rng(0).normal(size=(4, 2)).tolist()
            row["picture"] = {"labels": [0, 1, 2, 3], "before": points, "after": points}
            row["picture"]["right"] = [True, False, False, True]
    return row


@pytest.mark.parametrize("part", ["headline", "ablations"])
def test_prototypes_claims_and_tables(part):
    """Six seeds that all agree decide the primary claims; every trial is in the table."""
    setting = repulsive_prototypes.SETTINGS["fashion_mnist"]
    planned = prototypes_trials.trials(part)
    rows = [made_up(trial, seed, part) for seed in range(6) for trial in planned]
    found = prototypes_summary.claims(rows, setting, part)
    primary = [row["verdict"] for row in found if row["kind"] == "primary"]
    assert primary == (["reversed", "holds", "holds"] if part == "headline" else [])
    assert all(row["verdict"] != "not run" for row in found)
    result = {
        "dataset": "digits", "part": part, "setting": dataclasses.asdict(setting),
        "rows": rows, "claims": found, "command": "it",
        "versions": {"jax": "0"}, "code": "c0de",
    }  # fmt: skip
    table = prototypes_summary.table(result)
    assert "`it` (this, that; JAX 0). " in table
    for trial in planned:
        assert f"\n| {trial.name} | 8 (664) | 95.0 ± 0.0 | 80.0 ± 0.0 | 90.0 ± 0.0 | " in table
    assert "| 60.5 ± 0.4 | 10.5 ± 0.4 | 10.5 ± 0.4 | 9.5 ± 0.4 | 51.0 ± 0.0 |\n" in table
    assert "| published | 1.57 | 1.57 | 1.57 | 1.57 | 90.0 | 90.0 | 100.0 ± 0.0 |" in table
    assert f"| published |{' 70.0 ± 0.0 | 40.0 ± 0.0 |' * 4}\n" in table
    assert "| 4.0 ± 0.0 | 85.0 ± 0.0 | 25.0 ± 0.0 | 12.3 |\n" in table
    over = "published: as published 60.5 ± 0.4 % (over 50 % in 6 of 6 seeds), common attacks 10.5"
    headline = [
        over, "| pgd, on margins | ", "| published | 3.0 ± 0.0 | saturating head (4) |",
        "| published | 50.0 ± 0.0 | 60.0 ± 0.0 | 40.0 ± 0.0 | 1.0 ± 0.0 | 1.50 ± 0.00 |",
    ]  # fmt: skip
    assert [each in table for each in headline] == [part == "headline"] * len(headline)
    if part == "headline":
        assert list(prototypes_summary.figures(result)) == ["-eps", "-embeddings"]


def test_every_trial_is_unlike_the_others_and_has_what_it_needs():
    setting = repulsive_prototypes.SETTINGS["fashion_mnist"]
    for part in ("headline", "ablations"):
        planned = {trial.name: trial for trial in prototypes_trials.trials(part)}
        assert len(planned) == len(prototypes_trials.trials(part))
        made = [
            (prototypes_trials.objective(t, setting), t.embedding_size, t.epochs)
            for t in planned.values()
        ]
        assert len({repr(each) for each in made}) == len(made)
        assert {trial.base for trial in planned.values()} <= {None, *planned}
        # The sources of transfer come before the others.
        assert list(planned)[:2] == ["standard", "pgd"]


def test_the_published_attack_image_by_image(monkeypatch):
    """One run, its last iterate, the distance to the own prototype: against a loop in float64."""
    monkeypatch.setattr(prototypes_evaluation, "_BATCH", 7)
    rng, key, grid = np.random.default_rng(0), jax.random.key(3), (0.05, 0.2)
    weight, prototypes = rng.normal(size=(4, 5)), rng.normal(size=(3, 5))
    pixels, labels = rng.integers(0, 256, (9, 2, 2, 1), np.uint8), rng.integers(0, 3, 9)
    images = jc.data.Dataset(pixels, labels.astype(np.int32))
    embed = jax.tree_util.Partial(
        lambda w, x: x.reshape(len(x), -1) @ w, jnp.asarray(weight, jnp.float32)
    )
    head = jc.prototypes.PrototypeHead(jnp.asarray(prototypes, jnp.float32), "inner_product")
    source = DistanceLogits(embed, head.prototypes, "l2")
    found = prototypes_evaluation.published(
        key, jc.Chain(embed, head), source, prototypes_evaluation._own_distance, images, grid
    )
    for eps in grid:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(9))
        start = jc.Linf(eps).random_start(keys, jc.data.to_float(pixels))
        right = []
        for x, clean, y in zip(np.float64(start), pixels / 255, labels, strict=True):
            for _ in range(100):
                slope = weight @ (x.ravel() @ weight - prototypes[y])
                x = x + 2 / 255 * np.sign(slope).reshape(x.shape)
                x = np.clip(np.clip(x, clean - eps, clean + eps), 0, 1)
            right.append((prototypes @ (x.ravel() @ weight)).argmax() == y)
        assert found[prototypes_evaluation.eps_name(eps)] == pytest.approx(np.mean(right))
    assert 0 < np.mean(right) < 1


def test_generators_quick(tmp_path):
    words = ["--quick", "--output", str(tmp_path)]
    result = tyro.cli(prototype_generators.Experiment, args=words).run()
    assert len(result["rows"]) == 2 * len(prototype_generators.SIZES)
    table = (tmp_path / "prototype_generators-quick.md").read_text()
    assert "\n| hadamard | 4 | 6 | 10 | 2 | 2 | 2.83 | 2 | 2 | 0 | 0 | 0 | 1 | 100 | 100 |" in table
    assert "\n| simplex | 4 | 6 | 10 | 1.33 | " in table
    assert " | 1.63 | 1 | 1 | -0.333 | -0.333 | -0.333 | 1 | 100 | 100 |" in table


def test_generators_are_measured_as_defined():
    found = prototype_generators.measured(jnp.array([[3.0, 0.0], [4.0, 0.0], [0.0, -2.0]]))
    wanted = {
        "min_linf": 1, "mean_linf": (1 + 3 + 4) / 3, "min_length": 2, "max_length": 4,
        "min_cosine": 0, "mean_cosine": 1 / 3, "max_cosine": 1, "largest_entry": 4,
    }  # fmt: skip
    assert {name: pytest.approx(value) for name, value in wanted.items()} == {
        name: found[name] for name in wanted
    }
    own = found["self_classified"]
    assert own["inner_product"] == pytest.approx(2 / 3) and own["l2"] == 1
