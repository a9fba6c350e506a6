"""What the rows of `experiments.repulsive_prototypes` say: claims, a table and figures."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from experiments.prototypes_evaluation import GRID, RULES, eps_name
from experiments.prototypes_trials import Setting, trials
from experiments.rows import Claims, Row, cell, claim_lines
from jaxclus.evaluation import ITEMS

GRID_NAMES = tuple(eps_name(eps) for eps in GRID)
SHOWN = ("published", "cosine", "learned", "pgd", "cosine, pgd", "cosine, trades")
COLOURS = ("#b45309", "#7c3aed", "#6b7280", "#111827", "#1d6fb8", "#0f766e")


def claims(rows: Sequence[Row], setting: Setting, part: str) -> list[dict[str, Any]]:
    """The comparisons that were planned, each with its verdict."""
    found = Claims(rows)
    {"headline": _headline, "ablations": _ablations}[part](found, eps_name(setting.eps))
    found.correct()
    return found.found


def _headline(found: Claims, eps: str) -> None:
    # Three and no more: at six seeds Holm leaves a fourth no chance.
    found.add(
        "as published, more robust than PGD training",
        ("pgd", "worst"), ("published", "worst"), "primary",
    )  # fmt: skip
    found.add(
        "the published evaluation hides more than of PGD training",
        ("pgd", "hidden"), ("published", "hidden"), "primary",
    )  # fmt: skip
    found.add(
        "PGD training onto prototypes is more robust than PGD training",
        ("pgd", "worst"), ("cosine, pgd", "worst"), "primary",
    )  # fmt: skip
    for trial in ("published", "cosine", "max-mahalanobis", "learned"):
        found.add("more robust than plain training", ("standard", "worst"), (trial, "worst"))
        found.add(
            "as published against PGD training",
            ("pgd", f"published.{eps}"), (trial, f"published.{eps}"),
        )  # fmt: skip
    for trial in ("published, pgd", "cosine, trades"):
        found.add("more robust than PGD training", ("pgd", "worst"), (trial, "worst"))
    largest = GRID_NAMES[-1]
    found.add(
        "loses less than PGD training at the largest radius",
        ("pgd", f"targeted.{largest}"), ("published", f"targeted.{largest}"),
    )  # fmt: skip


def _ablations(found: Claims, eps: str) -> None:
    for trial in trials("ablations"):
        if trial.base is not None:
            found.add("is more robust", (trial.base, "worst"), (trial.name, "worst"))
            found.add(
                "reports more",
                (trial.base, f"published.{eps}"), (trial.name, f"published.{eps}"),
            )  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    setting, rows = result["setting"], result["rows"]
    eps, seeds = eps_name(setting["eps"]), ", ".join(map(str, setting["seeds"]))
    count = setting["num_images"]
    images = "all training images" if count is None else f"{count} training images"
    first = setting["first_image"]
    lines = [
        f"# Repulsive prototypes on {result['dataset']}",
        "",
        f"`{result['command']}` ({result['hardware']}; JAX {result['versions']['jax']}). Mean and "
        f"standard deviation over {len(setting['seeds'])} seeds ({seeds}), {images}. Linf eps "
        f"{eps} unless it says otherwise. Published: PGD-100 on the network's own loss, one run, "
        "its last iterate. Targeted: APGD on z_t - z_y, 9 targets. Cross-entropy: PGD on it at "
        f"temperature 1, {setting['steps']} steps. Worst: rightly classified under the adaptive "
        "suite and the targeted attack. Hidden: published less worst. Own loss: after the suite's "
        "attacks on it, every iterate and restart judged. Clean accuracy on all test images; "
        f"attacks on {setting['test_images']} from number {first} on, the suite with "
        f"{setting['steps']} steps and {setting['restarts']} restarts. T: the suite's temperature. "
        f"Code {result['code']}.",
        "",
        "| network | epochs | clean % | clean, attacked images % | published % | own loss % "
        "| cross-entropy, T = 1 % | targeted % | AutoAttack % | worst % | hidden, points | T |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    paths = [
        "clean_accuracy", "clean_attacked", f"published.{eps}", "suite.own-loss", "cross_entropy",
        f"targeted.{eps}", "suite.autoattack", "worst", "hidden",
    ]  # fmt: skip
    for name, own in _by_trial(rows):
        cells = [name, str(own[0]["epochs"]), *(_cell(own, path) for path in paths)]
        cells.append(f"{np.mean([row['temperature'] for row in own]):.3g}")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *_separation_lines(rows), "", *_rule_lines(rows)]
    if result["part"] == "headline":
        lines += ["", *_suite_lines(rows), "", *_grid_lines(rows)]
    if result["claims"]:
        lines += ["", *claim_lines(result["claims"])]
    return "\n".join(lines) + "\n"


def _by_trial(rows: Sequence[Row]) -> Iterable[tuple[str, list[Row]]]:
    for name in dict.fromkeys(row["trial"] for row in rows):
        yield name, [row for row in rows if row["trial"] == name]


def _cell(rows: Sequence[Row], path: str) -> str:
    """A share in %, or nothing where the item did not run."""
    try:
        return cell(rows, path, percent=True)
    except KeyError:
        return ""


def _separation_lines(rows: Sequence[Row]) -> Iterable[str]:
    yield (
        "Prototypes, means over seeds: distances of pairs, angles in degrees, and the share of "
        "prototypes that the network's rule classifies as their own class."
    )
    yield ""
    yield "| network | min Linf | mean Linf | min L2 | mean L2 | min angle | mean angle |"
    yield "|---|---|---|---|---|---|---|"
    for name, own in _by_trial(rows):
        if "separation" in own[0]:
            found = [row["separation"] for row in own]
            cells = [
                f"{np.mean([each[f'{kind}_{norm}'] for each in found]):.3g}"
                for norm in ("linf", "l2")
                for kind in ("min", "mean")
            ]
            cells += [
                f"{np.degrees(np.mean([each[f'{kind}_angle'] for each in found])):.1f}"
                for kind in ("min", "mean")
            ]
            yield f"| {' | '.join([name, *cells])} |"


def _rule_lines(rows: Sequence[Row]) -> Iterable[str]:
    yield "The same embeddings by each rule: accuracy in %, clean and under the targeted attack:"
    yield ""
    columns = [(rule, when) for rule in RULES for when in ("clean", "targeted")]
    yield f"| network | {' | '.join(map(', '.join, columns))} |"
    yield "|---" * (len(columns) + 1) + "|"
    for name, own in _by_trial(rows):
        if "rules" in own[0]:
            cells = [_cell(own, f"rules.{rule}.{when}") for rule, when in columns]
            yield f"| {' | '.join([name, *cells])} |"


def _suite_lines(rows: Sequence[Row]) -> Iterable[str]:
    yield (
        "The adaptive suite, accuracy in % after each item; gradient-free alone: images that "
        "noise, Square or HopSkipJump break and no attack with gradients."
    )
    yield ""
    items = [name for name in ITEMS if any(name in row["suite"] for row in rows)]
    yield f"| network | {' | '.join(items)} | gradient-free alone |"
    yield "|---" * (len(items) + 2) + "|"
    for name, own in _by_trial(rows):
        cells = [_cell(own, f"suite.{item}") for item in items]
        yield f"| {' | '.join([name, *cells, _cell(own, 'gradient_free_alone')])} |"


def _grid_lines(rows: Sequence[Row]) -> Iterable[str]:
    yield "Accuracy in % by Linf radius:"
    yield ""
    yield f"| network, evaluation | {' | '.join(GRID_NAMES)} |"
    yield "|---" * (len(GRID_NAMES) + 1) + "|"
    for name, own in _by_trial(rows):
        for kind in ("published", "targeted"):
            cells = [cell(own, f"{kind}.{eps}", percent=True) for eps in GRID_NAMES]
            yield f"| {name}, {kind} | {' | '.join(cells)} |"


def figures(result: dict[str, Any]) -> dict[str, Any]:
    """Accuracy over eps by attack, and the embeddings before and after the worst attack."""
    found = {"-eps": _curves(result)}
    pictures = {row["trial"]: row["picture"] for row in result["rows"] if "picture" in row}
    return found | ({"-embeddings": _embeddings(pictures, result)} if pictures else {})


def _curves(result: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    made = Figure(figsize=(10, 4.2), dpi=130, layout="constrained")
    both = zip(np.ravel(made.subplots(1, 2, sharey=True)), ("published", "targeted"), strict=True)
    titles = {"published": "PGD on the own loss, as published", "targeted": "targeted APGD"}
    radii = [0, *(255 * eps for eps in GRID)]
    for axes, kind in both:
        for name, own in _by_trial(result["rows"]):
            if name in SHOWN:
                values = [[row["clean_attacked"], *row[kind].values()] for row in own]
                colour = COLOURS[SHOWN.index(name)]
                axes.plot(radii, 100 * np.mean(values, axis=0), color=colour, label=name)
        axes.set(xlabel="Linf eps, in 1/255", title=titles[kind], ylim=(0, 100))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, color="#e5e7eb")
        axes.set_axisbelow(True)
    made.axes[0].set_ylabel("accuracy, %")
    made.axes[0].legend(fontsize=8)
    made.suptitle(f"Prototypes on {result['dataset']}: what an evaluation sees", fontsize=12)
    return made


def _embeddings(pictures: dict[str, Any], result: dict[str, Any]) -> Any:
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    made = Figure(figsize=(3.2 * len(pictures), 6.2), dpi=130, layout="constrained")
    grid = made.subplots(2, len(pictures), squeeze=False)
    for column, (name, found) in enumerate(pictures.items()):
        for row, when in enumerate(("before", "after")):
            points, axes = np.array(found[when]), grid[row, column]
            axes.scatter(*points.T, c=found["labels"], cmap=colormaps["tab10"], s=6, vmin=0, vmax=9)
            axes.set(title=f"{name}, {when} attack", xticks=[], yticks=[])
            axes.title.set_fontsize(9)
    made.suptitle(f"Embeddings on {result['dataset']}, two principal components", fontsize=12)
    return made
