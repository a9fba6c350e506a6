"""What the rows of `experiments.clustering_effect` say: claims and a table."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

import jaxclus as jc
from experiments.paired import verdict
from experiments.rows import Claims, Row, cell, claim_lines

SCORE = "without_batch_norm.difference"
ACCURACIES = ("clean_accuracy", "pgd_accuracy", "autoattack_accuracy")


class _Claims(Claims):
    """Claims about trials, and about the classes that attacks reach."""

    def __init__(self, rows: Sequence[Row], groups: jc.data.Groups):
        super().__init__(rows)
        self.groups = groups

    def add_pattern(self, trial: str) -> None:
        """That attacks reach classes of the true class's group: flips of all seeds together."""
        if trial not in self.trials:
            return
        counts = np.sum(self.values(trial, "pattern.counts", self.seeds(trial)), axis=0).astype(
            float
        )
        ids = jc.clustering.group_ids(self.groups, len(counts))
        test = jc.clustering.permutation_test(counts + counts.T, ids)
        within = counts[ids[:, None] == ids].sum() / counts.sum()
        self.found.append(
            {
                "claim": "attacks reach classes of the same group",
                "from": "all labellings of the classes",
                "to": trial,
                "value": "pattern.within",
                "kind": "exploratory",
                "within": float(within),
                "p_value": test.p_value,
                "smallest_p": test.smallest_p,
                "verdict": verdict({"p_value": test.p_value}),
            }
        )


def claims(rows: Sequence[Row], groups: jc.data.Groups) -> list[dict[str, Any]]:
    """The comparisons that were planned, each with its verdict."""
    found = _Claims(rows, groups)
    found.add("pgd clusters more than standard", ("standard", SCORE), ("pgd", SCORE), "primary")
    accuracy = "autoattack_accuracy"
    found.add(
        "the published regulariser raises robust accuracy",
        ("pgd", accuracy), ("pgd, logits", accuracy), "primary",
    )  # fmt: skip
    standard, robust, both = (f"transfer, {m}" for m in ("standard", "pgd", "pgd, logits"))
    found.add(
        "robust networks transfer better without tuning",
        (standard, "no_tuning"), (robust, "no_tuning"), "primary",
    )  # fmt: skip
    for method in ("trades", "fast"):
        found.add(f"{method} clusters more than standard", ("standard", SCORE), (method, SCORE))
    for path in ("adjusted_rand", "silhouette"):
        path = f"without_batch_norm.{path}"
        found.add("pgd clusters more, other score", ("standard", path), ("pgd", path))
    kept = "with_batch_norm.difference"
    found.add("pgd clusters more, BatchNorm kept", ("standard", kept), ("pgd", kept))
    for trial in found.trials:
        if trial.endswith(", pgd") and not trial.startswith("transfer"):
            plain = trial.removesuffix("pgd") + "standard"
            found.add(f"pgd clusters more: {plain[:-10]}", (plain, SCORE), (trial, SCORE))
    found.add("pgd clusters more with training", ("pgd", "epochs.0"), ("pgd", "epochs.-1"))
    steps = sorted(by_eps(rows))
    for (_, low), (_, high) in zip(steps, steps[1:], strict=False):
        found.add("a larger eps of training clusters more", (low, SCORE), (high, SCORE))
    for base, other in (
        ("pgd", "pgd, logits"), ("pgd", "pgd, weight"), ("standard", "standard, weight"),
    ):  # fmt: skip
        # The regulariser on the weight trains exactly this score.
        kind = "check" if other.endswith("weight") else "exploratory"
        found.add("the regulariser strengthens the clustering", (base, SCORE), (other, SCORE), kind)
        for path in ACCURACIES:
            if (other, path) != ("pgd, logits", accuracy):
                found.add(f"the regulariser raises {path}", (base, path), (other, path))
    for path in ("no_tuning_pgd", "tuned", "tuned_without_centres"):
        found.add("robust networks transfer better", (standard, path), (robust, path))
    for path in ("no_tuning", "no_tuning_pgd", "tuned", "tuned_without_centres"):
        found.add("the regulariser transfers better", (robust, path), (both, path))
    found.add("class centres help tuning", (both, "tuned_without_centres"), (both, "tuned"))
    for trial in ("standard", "pgd"):
        found.add_pattern(trial)
    found.correct()
    return found.found


def by_eps(rows: Iterable[Row]) -> list[tuple[float, str]]:
    """Radius of training and name of the trials of the factor eps; "pgd" is the setting's own."""
    names = dict.fromkeys(row["trial"] for row in rows)
    found = [(float(name.removeprefix("pgd, eps ")), name) for name in names if ", eps " in name]
    own = {row["eps"] for row in rows if row["trial"] == "pgd"}
    return found + [(eps, "pgd") for eps in own] if found else []


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    setting, rows = result["setting"], result["rows"]
    eps = f"Linf eps {setting['eps']:.4g}"
    lines = [
        f"# The clustering effect on {result['dataset']}",
        "",
        f"`{result['command']}` ({result['hardware']}; JAX {result['versions']['jax']}; training "
        f"{result['minutes']['training']} min, evaluation {result['minutes']['evaluation']} min). "
        f"Mean and standard deviation over seeds 0 to {setting['seeds'] - 1}. Robust accuracy: "
        f"{eps}; PGD (20 steps, 1 restart, cross-entropy) on the first {setting['test_images']} "
        f"test images, AutoAttack \"standard\" on the first {setting['autoattack_images']}. Within "
        "- between: mean correlation of class weights within groups minus between, in the linear "
        "sub-network without BatchNorm. Attacks: the share of PGD's successes that end in the true "
        "class's group, and what it is if every wrong class is as likely.",
        "",
        "| network | clean % | PGD % | AutoAttack % | within - between | Rand index | "
        "attacks: within group (chance) % |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    names = dict.fromkeys(row["trial"] for row in rows)
    for name in names:
        own = [row for row in rows if row["trial"] == name]
        if "clean_accuracy" in own[0]:
            lines.append(_line(name, own))
    transfers = [name for name in names if name.startswith("transfer")]
    if transfers:
        lines += ["", *_transfer_lines(transfers, rows, setting)]
    lines += ["", *claim_lines(result["claims"], no_accuracies=("with_", "without_", "epochs"))]
    return "\n".join(lines) + "\n"


def _line(name: str, rows: Sequence[Row]) -> str:
    cells = [name, *(cell(rows, path, percent=True) for path in ACCURACIES)]
    cells += [cell(rows, SCORE), cell(rows, "without_batch_norm.adjusted_rand")]
    within, chance = (cell(rows, f"pattern.{p}", percent=True) for p in ("within", "chance"))
    return f"| {' | '.join(cells)} | {within} ({chance}) |"


def _transfer_lines(names: Sequence[str], rows: Sequence[Row], setting: Row) -> Iterable[str]:
    rows = [row for row in rows if row["trial"] in names]
    splits = len({row["taken_out"] for row in rows})
    lost = sum(row["centres_lose_classes"] for row in rows)
    yield (
        f"Transfer to unseen subclasses (chance {100 * rows[0]['chance']:.0f} %; which classes are "
        f"unseen depends on the seed, there are {splits} splits; PGD as above, but training and "
        f"attack at Linf eps {setting['eps'] / 4:.3g}; tuning on {setting['tuning_images']} images "
        f"of each superclass for {setting['tuning_epochs']} epochs, with the published pull to "
        f"class centres, beta 2, or none). In {lost} of {len(rows)} tunings `CentrePull` warned "
        "that the centres, those of a random head, lose classes."
    )
    yield ""
    yield (
        "| network | source classes % | no tuning % | no tuning, PGD % | tuned % "
        "| tuned without centres % |"
    )
    yield "|---|---|---|---|---|---|"
    for name in names:
        own = [row for row in rows if row["trial"] == name]
        paths = ("source_accuracy", "no_tuning", "no_tuning_pgd", "tuned", "tuned_without_centres")
        yield f"| {' | '.join([name, *(cell(own, path, percent=True) for path in paths)])} |"
