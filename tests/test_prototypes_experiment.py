"""The experiment about repulsive prototypes: its quick form, its claims, its published attack."""

import dataclasses
import json

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

ITEMS = ("noise", "own-loss", "margin", "prototypes", "autoattack", "gradient-free", "transfer")


def test_prototypes_quick(tmp_path, capsys):
    words = ["--quick", "--output", str(tmp_path), "--work", str(tmp_path / "work")]
    result = tyro.cli(repulsive_prototypes.Experiment, args=words).run()
    name = tmp_path / "repulsive_prototypes-digits-quick"
    written = json.loads(name.with_suffix(".json").read_text())
    assert written["quick"] and written["claims"] == json.loads(json.dumps(result["claims"]))
    first = {row["trial"]: row for row in written["rows"] if row["seed"] == 0}
    assert list(first) == ["standard", "published"]
    row = first["published"]
    for kind in ("published", "targeted"):
        assert list(row[kind]) == list(prototypes_summary.GRID_NAMES)
        assert all(0 <= found <= 1 for found in row[kind].values())
    assert row["worst"] <= min(row["targeted"]["8/255"], *row["suite"].values())
    assert row["hidden"] == pytest.approx(row["published"]["8/255"] - row["worst"])
    assert set(row["suite"]) == {"noise", "own-loss", "margin"} and row["epochs"] == 2
    # The drawn points, of the attacked images alone; seeds after the first draw none.
    assert np.shape(row["picture"]["before"]) == np.shape(row["picture"]["after"]) == (8, 2)
    assert [row["seed"] for row in written["rows"] if "picture" in row] == [0]
    assert row["separation"]["min_linf"] > 5 and "separation" not in first["standard"]
    table = name.with_suffix(".md").read_text()
    assert "| published | 2 | " in table and "| published, targeted | " in table
    for kind in ("-eps", "-embeddings"):
        assert (tmp_path / f"{name.name}{kind}.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    again = tyro.cli(repulsive_prototypes.Experiment, args=words).run()
    assert again["rows"] == result["rows"]
    assert "seed 0" not in capsys.readouterr().out.split("#")[0]


@pytest.mark.parametrize("part", ["headline", "ablations"])
def test_prototypes_claims_and_tables(part):
    """Six seeds that all agree decide the primary claims; every trial is in the table."""
    setting = repulsive_prototypes.SETTINGS["fashion_mnist"]
    left = {"standard": 0.0, "published": 0.1, "cosine": 0.2, "pgd": 0.6, "cosine, pgd": 0.7}
    rows = []
    for seed in range(6):
        for trial in prototypes_trials.trials(part):
            worst = left.get(trial.name, 0.3) + 0.002 * seed
            reported = worst + (0.2 if trial.name == "published" else 0.02)
            row = {"trial": trial.name, "seed": seed, "epochs": 8, "clean_accuracy": 0.8}
            row |= {"clean_attacked": 0.9, "worst": worst, "hidden": reported - worst}
            row["published"] = dict.fromkeys(prototypes_summary.GRID_NAMES, reported)
            row["targeted"] = dict.fromkeys(prototypes_summary.GRID_NAMES, worst)
            row["suite"] = dict.fromkeys(ITEMS if part == "headline" else ITEMS[1:5], worst)
            row |= {"gradient_free_alone": 0.0, "temperature": 12.345}
            if trial.method not in ("standard", "pgd"):
                kinds = [f"{of}_{by}" for of in ("min", "mean") for by in ("linf", "l2", "angle")]
                row["separation"] = dict.fromkeys(kinds, np.pi / 2)
                row["cross_entropy"] = 0.85
                row["rules"] = {
                    rule: {"clean": 0.7, "targeted": 0.4} for rule in prototypes_summary.RULES
                }
            if seed == 0 and part == "headline" and trial.name == "published":
                points = np.random.default_rng(0).normal(size=(4, 2)).tolist()
                row["picture"] = {"labels": [0, 1, 2, 3], "before": points, "after": points}
            rows.append(row)
    found = prototypes_summary.claims(rows, setting, part)
    primary = [row["verdict"] for row in found if row["kind"] == "primary"]
    assert primary == (["reversed", "holds", "holds"] if part == "headline" else [])
    result = {
        "dataset": "digits", "part": part, "setting": dataclasses.asdict(setting),
        "rows": rows, "claims": found, "command": "it",
        "hardware": "this", "versions": {"jax": "0"}, "code": "c0de",
    }  # fmt: skip
    table = prototypes_summary.table(result)
    for trial in prototypes_trials.trials(part):
        assert f"\n| {trial.name} | 8 | 80.0 ± 0.0 | 90.0 ± 0.0 | " in table
    shown = "30.5 ± 0.4 | 10.5 ± 0.4 | 85.0 ± 0.0 | 10.5 ± 0.4 | 10.5 ± 0.4 | 10.5 ± 0.4"
    assert f"| {shown} | 20.0 ± 0.0 | 12.3 |" in table
    assert "| published | 1.57 | 1.57 | 1.57 | 1.57 | 90.0 | 90.0 |" in table
    assert f"| published |{' 70.0 ± 0.0 | 40.0 ± 0.0 |' * 4}\n" in table
    assert ("gradient-free alone |" in table) == ("| pgd, targeted | " in table)
    assert ("gradient-free alone |" in table) == (part == "headline")
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
        # Surrogates of the suite, and of the transfer between parts, come before the others.
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
    trial = prototypes_trials.Trial("it", "prototypes", (("distance", "l2"),))
    loss = prototypes_evaluation.own_loss(trial, head)
    found = prototypes_evaluation.published(key, jc.Chain(embed, head), embed, loss, images, grid)
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
