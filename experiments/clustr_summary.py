"""What the rows of `experiments.clustr` say: claims, a table and a figure."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from experiments.clustr_evaluation import GRID, eps_name
from experiments.clustr_mechanism import SHARES
from experiments.clustr_trials import Setting, trials
from experiments.rows import Claims, Row, cell, claim_lines, value

GRID_NAMES = tuple(eps_name(eps) for eps in GRID)
CHECK = "check"
COLOURS = {"published_100": "#b45309", "scores_100": "#7c3aed", "logits_100": "#1d6fb8"}
LABELS = {
    "published_20": "as published, PGD-20",
    "published_100": "as published, PGD-100",
    "scores_20": "scores, PGD-20",
    "scores_100": "scores, PGD-100",
    "logits_20": "logits, PGD-20",
    "logits_100": "logits, PGD-100",
}


def claims(rows: Sequence[Row], setting: Setting, part: str) -> list[dict[str, Any]]:
    """The comparisons that were planned, each with its verdict."""
    eps, found = eps_name(setting.eps), Claims(rows)
    {"headline": _headline, "ablations": _ablations, "certificates": _certificates}[part](
        found, eps
    )
    found.correct()
    return found.found


def _headline(found: Claims, eps: str) -> None:
    published, scores, logits = (f"{n}_100.{eps}" for n in ("published", "scores", "logits"))
    # Three and no more: at six seeds Holm leaves a fourth no chance.
    masking = "the attack on scores leaves more than the same on logits"
    found.add(masking, ("qtrades", logits), ("qtrades", scores), "primary")
    for trial in ("clustr", "qtrades"):
        found.add(
            f"{trial} is more robust than PGD training",
            ("pgd", "worst"), (trial, "worst"), "primary",
        )  # fmt: skip
    found.add(masking, ("clustr", logits), ("clustr", scores))
    for trial in ("clustr", "qtrades"):
        found.add(
            f"{trial} as published against PGD training", ("pgd", published), (trial, published)
        )
        found.add(
            "the published evaluation hides more than of PGD training",
            ("pgd", "hidden"), (trial, "hidden"),
        )  # fmt: skip
        found.add(
            "more robust than with as much plain training",
            ("standard, continued", "worst"), (trial, "worst"),
        )  # fmt: skip
        found.add(
            "what the selection of restarts hides", (trial, scores), (trial, published), CHECK
        )
        found.add("what PGD on logits leaves", (trial, "worst"), (trial, logits), CHECK)
    found.add("consistency helps", ("clustr", "worst"), ("qtrades", "worst"))


def _ablations(found: Claims, eps: str) -> None:
    published = f"published_100.{eps}"
    for trial in trials("ablations"):
        if trial.base is not None:
            found.add("is more robust", (trial.base, "worst"), (trial.name, "worst"))
            found.add("reports more", (trial.base, published), (trial.name, published))
        if trial.epochs == 3:
            found.add(
                "with more epochs more robust than PGD training",
                ("pgd", "worst"), (trial.name, "worst"),
            )  # fmt: skip


def _certificates(found: Claims, eps: str) -> None:
    plain, own = "standard, Lipschitz, continued", "clustr, Lipschitz"
    for path in ("median_radius", "l2.0.25.certified", "l2.0.25.attacked", "worst"):
        found.add("ClusTR raises it beyond as much plain training", (plain, path), (own, path))


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    setting, rows = result["setting"], result["rows"]
    eps, seeds = eps_name(setting["eps"]), ", ".join(map(str, setting["seeds"]))
    count = setting["num_images"]
    attacked = setting["lipschitz_images" if result["part"] == "certificates" else "test_images"]
    images = "all training images" if count is None else f"{count} training images"
    lines = [
        f"# ClusTR on {result['dataset']}",
        "",
        f"`{result['command']}` ({result['hardware']}; JAX {result['versions']['jax']}). Mean and "
        f"standard deviation over {len(setting['seeds'])} seeds ({seeds}), {images}. Linf eps "
        f"{eps} unless it says otherwise. Published: PGD-20 and PGD-100 (steps of 2/255, 10 "
        "restarts) on the scores, the restart of the largest cross-entropy counts. Scores: the "
        "same, the image itself and all ends must be classified rightly. Logits: the same on the "
        "log-domain logits. Networks without clusters have one kind of logits, and no scores. "
        'AutoAttack: "standard", on the logits. Worst: rightly classified under all of these and, '
        "for clusters, under targeted APGD on the distances to them. Clean accuracy on all test "
        f"images; attacks, and the clean accuracy beside them, on {attacked} from "
        f"number {setting['first_image']} on. Stuck: of the ends of PGD-100 that are classified "
        "rightly, where there are any, those where the attacked loss has gradient 0 in every "
        "pixel. Radius: the median certified L2 radius over all test images, 0 for misclassified "
        f"ones, by the bound beside it, the product of the layers' norms. Code {result['code']}.",
        "",
        "| network | epochs (steps) | clean % | clean, attacked images % | published, PGD-20 % "
        "| published, PGD-100 % | scores % | logits % | AutoAttack % | worst % "
        "| stuck, scores % | stuck, logits % | radius | Lipschitz bound |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    names = dict.fromkeys(row["trial"] for row in rows)
    paths = ["clean_accuracy", "clean_attacked", f"published_20.{eps}", f"published_100.{eps}"]
    paths += [f"scores_100.{eps}", f"logits_100.{eps}", f"autoattack.{eps}", "worst"]
    paths += ["stuck_scores", "stuck_logits"]
    for name in names:
        own = [row for row in rows if row["trial"] == name]
        cells = [name, f"{own[0]['epochs']} ({own[0]['steps']})"]
        cells += [cell(own, path, percent=True) for path in paths]
        for path in ("median_radius", "lipschitz"):
            cells.append(f"{np.mean([row[path] for row in own]):.2g}")
        lines.append(f"| {' | '.join(cells)} |")
    if result["part"] == "headline":
        lines += ["", *_answer_lines(rows, setting["eps"]), "", *_grid_lines(rows)]
        lines += ["", *_nearest_lines(rows), "", *_mechanism_lines(rows)]
    if result["part"] == "certificates":
        lines += ["", *_certificate_lines(rows)]
    if result["claims"]:
        lines += ["", *claim_lines(result["claims"], no_accuracies=("median_radius",))]
    return "\n".join(lines) + "\n"


def _answer_lines(rows: Sequence[Row], trained_eps: float) -> Iterable[str]:
    yield (
        "How much of what the published evaluation reports is not there? PGD-100 with 10 restarts, "
        "on the scores and on the logits; kept: of an image's restarts the one of the largest "
        "cross-entropy counts, as published; any: the image itself and all ends must be classified "
        "rightly. Published is the first, scores and kept. Left: worst at the radius of training, "
        "AutoAttack at others. Not there: the share of the published mean that is not left."
    )
    yield ""
    names = ["scores, kept", "scores, any", "logits, kept", "logits, any", "left"]
    yield f"| network | Linf eps | {' | '.join(f'{name} %' for name in names)} | not there |"
    yield "|---" * (len(names) + 3) + "|"
    kinds = ("published_scores", "scores", "published_logits", "logits")
    for name in dict.fromkeys(row["trial"] for row in rows if "scores_100" in row):
        own = [row for row in rows if row["trial"] == name]
        for eps in own[0]["autoattack"]:
            left = "worst" if eps == eps_name(trained_eps) else f"autoattack.{eps}"
            paths = [*(f"{kind}_100.{eps}" for kind in kinds), left]
            reported, remains = (
                sum(value(row, path) for row in own) for path in (paths[0], paths[-1])
            )
            cells = [name, eps, *(cell(own, path, percent=True) for path in paths)]
            cells += [f"{1 - remains / reported:.0%}" if reported else "-"]
            yield f"| {' | '.join(cells)} |"


def _grid_lines(rows: Sequence[Row]) -> Iterable[str]:
    yield "Accuracy in % by Linf radius (10 restarts, images as above):"
    yield ""
    yield f"| network, evaluation | {' | '.join(GRID_NAMES)} |"
    yield "|---|" + "---|" * len(GRID_NAMES)
    for name in dict.fromkeys(row["trial"] for row in rows):
        own = [row for row in rows if row["trial"] == name]
        for kind, label in LABELS.items():
            if kind in own[0]:
                cells = [cell(own, f"{kind}.{eps}", percent=True) for eps in GRID_NAMES]
                yield f"| {name}, {label} | {' | '.join(cells)} |"
        found = own[0]["autoattack"]
        cells = [
            cell(own, f"autoattack.{eps}", percent=True) if eps in found else ""
            for eps in GRID_NAMES
        ]
        yield f"| {name}, AutoAttack | {' | '.join(cells)} |"


def _nearest_lines(rows: Sequence[Row]) -> Iterable[str]:
    own = [row for row in rows if row["trial"] == "qtrades"]
    yield (
        "L, the clusters that the scores count (qtrades; the published evaluation with PGD-20, "
        "clean accuracy of the same images):"
    )
    yield ""
    yield "| L | clean % | published % |"
    yield "|---|---|---|"
    for nearest in own[0]["nearest"]:
        paths = (f"nearest.{nearest}.{name}" for name in ("clean_accuracy", "published_20"))
        yield f"| {' | '.join([nearest, *(cell(own, path, percent=True) for path in paths)])} |"


def _mechanism_lines(rows: Sequence[Row]) -> Iterable[str]:
    yield (
        "One restart of PGD-100 on the scores. Standing: the images that are classified rightly at "
        "its end. Of those: the scores' cross-entropy is at least log k - 0.001, as far from all "
        "clusters (flat); its gradient and that of the logits' cross-entropy have a negative inner "
        "product (opposed), and had so where the attack began (opposed at first); broken by as "
        "many further steps, on the logits and, for comparison, on the scores."
    )
    yield ""
    yield (
        "| network | standing % | flat % | opposed % | opposed at first % | broken, logits % "
        "| broken, scores % |"
    )
    yield "|---|---|---|---|---|---|---|"
    for name in dict.fromkeys(row["trial"] for row in rows if "stopped_short" in row):
        own = [row for row in rows if row["trial"] == name]
        paths = (f"stopped_short.{of}" for of in ("standing", *SHARES))
        yield f"| {name} | {' | '.join(cell(own, path, percent=True) for path in paths)} |"


def _certificate_lines(rows: Sequence[Row]) -> Iterable[str]:
    yield "L2, the attacked images: certified <= true <= targeted APGD (9 targets, 100 steps), %:"
    yield ""
    radii = list(rows[0]["l2"])
    yield f"| network | Lipschitz bound | {' | '.join(f'eps {r}' for r in radii)} |"
    yield "|---|---|" + "---|" * len(radii)
    for name in dict.fromkeys(row["trial"] for row in rows):
        own = [row for row in rows if row["trial"] == name]
        cells = [cell(own, "lipschitz")]
        for radius in radii:
            ends = (f"l2.{radius}.{end}" for end in ("certified", "attacked"))
            cells.append(" to ".join(cell(own, path, percent=True) for path in ends))
        yield f"| {name} | {' | '.join(cells)} |"


def figure(result: dict[str, Any]) -> Any:
    """Accuracy over eps by evaluation: cluster classifiers beside PGD training."""
    from matplotlib.figure import Figure

    rows, setting = result["rows"], result["setting"]
    shown = [name for name in ("clustr", "qtrades") if any(r["trial"] == name for r in rows)]
    made = Figure(figsize=(4.6 * len(shown), 4.2), dpi=130, layout="constrained")
    for axes, name in zip(np.ravel(made.subplots(1, len(shown), sharey=True)), shown, strict=True):
        own = [row for row in rows if row["trial"] == name]
        for kind, colour in COLOURS.items():
            _draw(axes, own, kind, colour, LABELS[kind])
        pgd = [row for row in rows if row["trial"] == "pgd"]
        if pgd:
            _draw(axes, pgd, "logits_100", "#6b7280", "PGD training, its own logits")
        hits = [100 * row["worst"] for row in own]
        axes.plot([255 * setting["eps"]] * len(hits), hits, "x", color="#dc2626", label="worst")
        axes.set(xlabel="Linf eps, in 1/255", title=name, ylim=(0, 100))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, color="#e5e7eb")
        axes.set_axisbelow(True)
    made.axes[0].set_ylabel("accuracy, %")
    made.axes[0].legend(fontsize=8)
    made.suptitle(f"ClusTR on {result['dataset']}: what an evaluation sees", fontsize=12)
    return made


def _draw(axes: Any, rows: Sequence[Row], kind: str, colour: str, label: str) -> None:
    """Mean accuracy over eps, from the clean one on, and that of each seed."""
    values = np.array([[row["clean_attacked"], *row[kind].values()] for row in rows])
    radii = [0, *(255 * eps for eps in GRID)]
    axes.plot(radii, 100 * values.mean(axis=0), color=colour, label=label)
    for line in values:
        axes.plot(radii, 100 * line, "o", color=colour, markersize=3, alpha=0.4)
