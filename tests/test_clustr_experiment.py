"""The experiment about ClusTR: its quick form, its claims, its published evaluation."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro

import jaxclus as jc
from experiments import (
    clustr,
    clustr_evaluation,
    clustr_mechanism,
    clustr_summary,
    clustr_trials,
    rows,
)


def test_clustr_quick(tmp_path, capsys):
    words = ["--quick", "--output", str(tmp_path), "--work", str(tmp_path / "work")]
    result = tyro.cli(clustr.Experiment, args=words).run()
    name = tmp_path / "clustr-digits-quick"
    written = json.loads(name.with_suffix(".json").read_text())
    assert written["quick"] and written["claims"] == json.loads(json.dumps(result["claims"]))
    first = {row["trial"]: row for row in written["rows"] if row["seed"] == 0}
    assert list(first) == ["standard", "qtrades"]
    row, grid = first["qtrades"], ["2/255", "8/255", "16/255", "25.5/255"]
    for kind in clustr_summary.LABELS:
        assert list(row[kind]) == grid and all(0 <= found <= 1 for found in row[kind].values())
    for steps in (20, 100):  # a restart counts in both or in one
        for eps in grid:
            assert row[f"scores_{steps}"][eps] <= row[f"published_{steps}"][eps]
    assert row["worst"] <= min(row[f"{name}_100"]["25.5/255"] for name in ("scores", "logits"))
    assert row["worst"] <= row["autoattack"]["25.5/255"] <= row["autoattack"]["8/255"]
    assert row["steps"] == 2 * (480 // 120) and row["epochs"] == 2
    assert 0 <= row["stopped_short"]["standing"] <= 1
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
    found_rows = []
    for seed in range(6):
        for trial in clustr_trials.trials(part):
            robust = left.get(trial.name, 0.1) + 0.001 * seed
            curve = dict.fromkeys(clustr_summary.GRID_NAMES, robust + 0.01)
            reported = dict.fromkeys(curve, robust + (0.2 if trial.start else 0.02))
            row = {"trial": trial.name, "seed": seed, "clean_accuracy": 0.8, "epochs": 8}
            row |= {"clean_attacked": 0.9, "autoattack": curve, "worst": robust, "steps": 664}
            row |= {"logits_20": curve, "logits_100": curve, "published_20": curve}
            row |= {"published_100": reported, "median_radius": 0.1, "stuck_logits": 0.0}
            row["hidden"] = reported["25.5/255"] - robust
            if "clustr" in trial.method or "qtrades" in trial.method:
                scores = {name: value + 0.1 for name, value in curve.items()}
                row |= {"scores_20": scores, "scores_100": scores}
                row |= {"published_scores_100": reported, "published_logits_100": curve}
                row["stuck_scores"] = 0.1 if seed else None
                row["nearest"] = {"1": {"clean_accuracy": 0.8, "published_20": 0.3}}
                shares = dict.fromkeys(("standing", *clustr_mechanism.SHARES), 0.3)
                row["stopped_short"] = shares | {"flat": None}
            row["lipschitz"] = 0.9
            if trial.lipschitz:
                row["l2"] = {"0.25": {"certified": 0.2, "attacked": 0.4}}
            found_rows.append(row)
    found = clustr_summary.claims(found_rows, setting, part)
    primary = {row["claim"]: row["verdict"] for row in found if row["kind"] == "primary"}
    if part == "headline":
        assert sorted(primary.values()) == ["holds", "reversed", "reversed"]
    else:
        assert not primary
    result = {
        "dataset": "digits", "part": part, "setting": dataclasses.asdict(setting),
        "rows": found_rows, "claims": found, "command": "it",
        "hardware": "this", "versions": {"jax": "0"}, "code": "c0de",
    }  # fmt: skip
    table = clustr_summary.table(result)
    for trial in clustr_trials.trials(part):
        assert f"| {trial.name} | 8 (664) | 80.0 ± 0.0 | 90.0 ± 0.0 |" in table
    assert ("20.0 ± 0.0 to 40.0 ± 0.0" in table) == (part == "certificates")
    ends = "| qtrades | 30.0 ± 0.0 | - | 30.0 ± 0.0 | 30.0 ± 0.0 | 30.0 ± 0.0 | 30.0 ± 0.0 |"
    assert (ends in table) == (part == "headline")
    lost = "| 31.3 ± 0.2 | 21.3 ± 0.2 | 21.3 ± 0.2 | 20.3 ± 0.2 | 50% |"
    assert (f"| qtrades | 25.5/255 | 40.2 ± 0.2 {lost}" in table) == (part == "headline")
    assert "10.0 ± 0.0 (5 seeds)" in table or part == "certificates"


def test_every_trial_is_unlike_the_others_and_has_what_it_needs():
    setting = clustr.SETTINGS["fashion_mnist"]
    for part in ("headline", "ablations", "certificates"):
        planned = {trial.name: trial for trial in clustr_trials.trials(part)}
        assert len(planned) == len(clustr_trials.trials(part))
        made = [
            (clustr_trials.objective(t, setting), clustr_trials.config(t, setting), t.start)
            for t in planned.values()
        ]
        assert len({repr(each) for each in made}) == len(made)
        for trial in planned.values():
            assert {trial.start, trial.base} <= {None, *planned}


def test_changed_code_keeps_nothing(tmp_path):
    module = type(dataclasses)("made")
    module.__file__ = str(tmp_path / "made.py")
    found = set()
    for text in ("x = 1", "x = 2", "x = 1"):
        (tmp_path / "made.py").write_text(text)
        found.add(rows.sources(module))
    assert len(found) == 2
    assert rows.sources(jc) != rows.sources(jc, module)


def test_the_published_evaluation_can_miss_what_it_found():
    """Right with a large loss in one half of the ball, wrong with a small one in the other."""

    @jax.tree_util.Partial
    def model(x):
        right, wrong = jnp.array([0.02, 0.0, 0.0]), jnp.array([0.0, 0.2, -10.0])
        return jnp.where(x[:, 0, 0] > 0.5, wrong[None], right[None])

    images = jc.data.Dataset(np.full((6, 1, 1, 1), 127, np.uint8), np.zeros(6, np.int32))
    key = jax.random.key(0)
    found = clustr_evaluation.attacked(key, model, model, images, 0.1)
    assert not found.robust[100].any() and found.published == {20: 1, 100: 1}
    # Flat; but where it is wrong it does not stand.
    assert 0 < found.standing < 60 and found.stuck == 1
    # A slope is climbed as far as the ball goes, from 127/255 on.
    slope = jax.tree_util.Partial(
        lambda x: jnp.stack([0.55 - x[:, 0, 0, 0], x[:, 0, 0, 0] - 0.55], axis=1)
    )
    found = clustr_evaluation.attacked(key, slope, slope, images, 0.1)
    assert not found.robust[20].any() and found.published == {20: 0, 100: 0}
    assert found.standing == 0 and found.stuck is None
    found = clustr_evaluation.attacked(key, slope, slope, images, 0.04)
    assert found.robust[100].all() and found.published == {20: 1, 100: 1} and found.stuck == 0
    # Another classifier judges, and of the clean image too.
    wrong = jax.tree_util.Partial(lambda x: slope(x)[:, ::-1])
    assert not clustr_evaluation.attacked(key, slope, wrong, images, 0.04).robust[100].any()


def one_pixel_clusters(centres, variance):
    """A network whose embedding is (pixel, 0), under a cluster for each class."""
    network = jc.models.create(
        "cnn", len(centres), (1, 1, 1), jax.random.key(0), widths=(), hidden=2, mean=(0.0,),
        std=(1.0,),
    )  # fmt: skip
    network.dense.kernel[...], network.dense.bias[...] = jnp.array([[1.0, 0.0]]), jnp.zeros(2)
    places = jnp.array([[place, 0.0] for place in centres])
    head = jc.clustr.ClusterClassifier(places, tuple(range(len(centres))), variance)
    return jc.Chain(jc.models.features(network), head)


def test_certified_and_attacked_accuracy_in_l2_balls():
    # From 0.6 the plane to the nearest other cluster is at 0.4: further than 0.1, closer than 0.25.
    images = jc.data.Dataset(np.full((6, 1, 1, 1), 153, np.uint8), np.zeros(6, np.int32))
    model = one_pixel_clusters((0.6, 0.2, 5.0, 9.0), 0.05)
    setting = dataclasses.replace(clustr.SETTINGS["digits"], short=True)
    found = clustr_evaluation.bracketed(jax.random.key(0), model, images, setting)
    held, lost = {"certified": 1, "attacked": 1}, {"certified": 0, "attacked": 0}
    assert found == {"0.1": held, "0.25": lost, "0.5": lost}


def test_where_an_attack_on_scores_stops_short():
    setting = dataclasses.replace(clustr.SETTINGS["digits"], eps=0.3)
    images = jc.data.Dataset(np.full((6, 1, 1, 1), 153, np.uint8), np.zeros(6, np.int32))

    def found(centres, variance):
        model = one_pixel_clusters(centres, variance)
        return clustr_mechanism.stopped_short(jax.random.key(0), model, images, setting)

    # From 0.6 in [0.3, 0.9]. The own cluster is at 0.6, the other one at 0.35: away from the own
    # one is away from both, to 0.9, where the scores are not 0 yet; on logits the way is back.
    away = found((0.6, 0.35), 0.05)
    assert 0 < away["standing"] <= 1
    # The first step decides which way it goes, so that the gradients are opposed from the start.
    wanted = {"opposed": 1, "opposed_at_first": 1, "broken": 1, "broken_on_scores": 0}
    assert away == away | wanted | {"flat": 0}
    # Narrow clusters: the scores are nearly 0 there.
    flat = found((0.6, 0.35), 2e-3)
    assert flat == flat | wanted | {"flat": 1}
    # Nothing stands where the other cluster is all around.
    nothing = dict.fromkeys(clustr_mechanism.SHARES)
    assert found((0.0, 0.6), 0.05) == {"standing": 0} | nothing


def test_the_published_attack_image_by_image(monkeypatch):
    """Distinct images in batches that are not full, against a loop in float64."""
    monkeypatch.setattr(clustr_evaluation, "_BATCH", 7)
    rng, eps, key = np.random.default_rng(0), 0.1, jax.random.key(3)
    weight = rng.normal(size=(4, 3)) + 0.0
    pixels, labels = rng.integers(0, 256, (9, 2, 2, 1), np.uint8), rng.integers(0, 3, 9)
    images = jc.data.Dataset(pixels, labels.astype(np.int32))
    model = jax.tree_util.Partial(
        lambda w, x: jnp.tanh(x.reshape(len(x), -1) @ w) * 2, jnp.asarray(weight, jnp.float32)
    )
    found = clustr_evaluation.attacked(key, model, model, images, eps)

    def outputs(x):
        return 2 * np.tanh(x.ravel() @ weight)

    def softmax(z):
        return np.exp(z) / np.exp(z).sum()

    ball, clean, wanted = jc.Linf(eps), pixels / 255, {20: [], 100: []}
    starts = [
        np.asarray(ball.random_start(jax.random.fold_in(key, r), jc.data.to_float(pixels)))
        for r in range(10)
    ]
    for n, y in enumerate(labels):
        ends = {20: [], 100: []}
        for restart in range(10):
            x = starts[restart][n].astype(np.float64)
            for step in range(100):
                z = outputs(x)
                if z.argmax() == y:
                    slope = weight @ ((softmax(z) - np.eye(3)[y]) * 2 * (1 - (z / 2) ** 2))
                    x = x + 2 / 255 * np.sign(slope).reshape(x.shape)
                    x = np.clip(np.clip(x, clean[n] - eps, clean[n] + eps), 0, 1)
                if step + 1 in ends:
                    ends[step + 1].append(outputs(x))
        for steps, z in ends.items():
            losses = [-np.log(softmax(each)[y]) for each in z]
            survives = all(each.argmax() == y for each in (*z, outputs(clean[n])))
            wanted[steps].append((survives, z[int(np.argmax(losses))].argmax() == y))
    for steps, verdicts in wanted.items():
        robust, published = np.array(verdicts).T
        np.testing.assert_array_equal(found.robust[steps], robust)
        assert found.published[steps] == pytest.approx(published.mean())
    assert 0 < robust.sum() < 9
