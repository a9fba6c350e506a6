"""Experiments run end to end in their quick form; their statistics against closed forms."""

import json

import numpy as np
import pytest

from experiments import clustering_effect


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
