"""What the rows of `experiments.repulsive_prototypes` say: verdict, claims, tables, figures."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from experiments.prototypes_evaluation import GRID, RULES, eps_name
from experiments.prototypes_trials import Setting, trials
from experiments.rows import Claims, Row, cell, claim_lines, value
from jaxclus.evaluation import ITEMS

GRID_NAMES = tuple(eps_name(eps) for eps in GRID)
# Trained without adversaries, by prototypes.
PLAIN = ("published", "cosine", "max-mahalanobis", "learned")
SHOWN = ("standard", "published", "cosine", "pgd", "published, pgd", "cosine, pgd")
COLOURS = ("#6b7280", "#b45309", "#7c3aed", "#111827", "#d97706", "#1d6fb8")


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
        ("pgd", "common"), ("published", "common"), "primary",
    )  # fmt: skip
    found.add(
        "the same attack on margins leaves less than on the own loss",
        ("published", f"published_margin.{eps}"), ("published", f"published.{eps}"), "primary",
    )  # fmt: skip
    found.add(
        "PGD training onto prototypes is more robust than PGD training",
        ("pgd", "common"), ("cosine, pgd", "common"), "primary",
    )  # fmt: skip
    for trial in PLAIN:
        found.add("more robust than plain training", ("standard", "common"), (trial, "common"))
        found.add(
            "as published against PGD training",
            ("pgd", f"published.{eps}"), (trial, f"published.{eps}"),
        )  # fmt: skip
        found.add(
            "the published evaluation hides more than of PGD training",
            ("pgd", "hidden"), (trial, "hidden"),
        )  # fmt: skip
    found.add("more robust than PGD training", ("pgd", "common"), ("published, pgd", "common"))
    found.add("more robust than TRADES", ("trades", "common"), ("cosine, trades", "common"))
    for kind in ("published", "targeted"):
        found.add(
            f"keeps more than PGD training at the largest radius ({kind})",
            ("pgd", f"{kind}.{GRID_NAMES[-1]}"), ("published", f"{kind}.{GRID_NAMES[-1]}"),
        )  # fmt: skip


def _ablations(found: Claims, eps: str) -> None:
    for trial in trials("ablations"):
        if trial.base is not None:
            found.add("is more robust", (trial.base, "common"), (trial.name, "common"))


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    setting, rows = result["setting"], result["rows"]
    eps, headline = eps_name(setting["eps"]), result["part"] == "headline"
    lines = [f"# Repulsive prototypes on {result['dataset']}", "", _caption(result, eps), ""]
    if headline:
        lines += [*_verdict_lines(rows, eps), ""]
    columns = {
        "training accuracy %": "accuracy",
        "clean %": "clean_accuracy",
        "clean, attacked images %": "clean_attacked",
        "published %": f"published.{eps}",
        "on margins %": f"published_margin.{eps}",
        "common %": "common",
        "worst %": "worst",
        "hidden %": "hidden",
    }
    lines += [f"| network | epochs (steps) | {' | '.join(columns)} |"]
    lines += ["|---" * (len(columns) + 2) + "|"]
    for name, own in _by_trial(rows):
        cells = [name, f"{own[0]['epochs']} ({own[0]['step']})"]
        lines.append(f"| {' | '.join([*cells, *(_cell(own, c) for c in columns.values())])} |")
    lines += ["", *_attack_lines(rows, eps), "", *_separation_lines(rows), "", *_rule_lines(rows)]
    if headline:
        lines += ["", *_gradient_free_lines(rows), "", *_grid_lines(rows)]
        lines += ["", *_masking_lines(rows)]
    if result["claims"]:
        lines += ["", *claim_lines(result["claims"])]
    return "\n".join(lines) + "\n"


def _caption(result: dict[str, Any], eps: str) -> str:
    setting = result["setting"]
    seeds, count = sorted({row["seed"] for row in result["rows"]}), setting["num_images"]
    shown, hardware = (
        ", ".join(map(str, found))
        for found in (seeds, dict.fromkeys(row["hardware"] for row in result["rows"]))
    )
    images = "all training images" if count is None else f"{count} training images"
    return (
        f"`{result['command']}` ({hardware}; JAX {result['versions']['jax']}). Mean and standard "
        f"deviation over {len(seeds)} seeds ({shown}), {images}. Linf eps {eps} unless it says "
        "otherwise. Published: PGD-100 on the network's own loss, one run, "
        "its last iterate; on margins: the same run on them. Common: rightly classified under the "
        "targeted attack (APGD on z_t - z_y, 9 targets), and under the suite's attacks on own "
        "loss and margins and AutoAttack. Worst: under the rest of the adaptive suite as well. "
        "Hidden: published less worst. "
        f"Clean accuracy on all test images; attacks on {setting['test_images']} from number "
        f"{setting['first_image']} on, the suite with {setting['steps']} steps and "
        f"{setting['restarts']} restarts. A share of n images near 50 % has a sampling error of "
        f"{50 / setting['test_images'] ** 0.5:.1f} points beside the seeds' spread. "
        f"Code {result['code']}."
    )


def _verdict_lines(rows: Sequence[Row], eps: str) -> Iterable[str]:
    yield f"**More than 50 % without adversarial training, at Linf eps {eps}?**"
    by_name = dict(_by_trial(rows))
    for name in PLAIN:
        if name in by_name:
            own = by_name[name]
            over = [_over_half(own, path) for path in (f"published.{eps}", "common", "worst")]
            yield (
                f"{name}: as published {_cell(own, f'published.{eps}')} % (over 50 % in {over[0]} "
                f"of {len(own)} seeds), common attacks {_cell(own, 'common')} % ({over[1]}), worst "
                f"{_cell(own, 'worst')} % ({over[2]})."
            )
    for name in ("standard", "pgd"):
        if name in by_name:
            own = by_name[name]
            yield (
                f"For comparison, {name}: as published {_cell(own, f'published.{eps}')} %, common "
                f"{_cell(own, 'common')} %."
            )


def _over_half(rows: Sequence[Row], path: str) -> int:
    return sum(value(row, path) > 0.5 for row in rows)


def _by_trial(rows: Sequence[Row]) -> Iterable[tuple[str, list[Row]]]:
    for name in dict.fromkeys(row["trial"] for row in rows):
        yield name, [row for row in rows if row["trial"] == name]


def _cell(rows: Sequence[Row], path: str) -> str:
    """A share in %, or nothing where the item did not run."""
    try:
        return cell(rows, path, percent=True)
    except KeyError:
        return ""


def _attack_lines(rows: Sequence[Row], eps: str) -> Iterable[str]:
    items = [name for name in ITEMS if any(name in row["suite"] for row in rows)]
    paths = {"PGD-20, as published %": f"published_20.{eps}", "targeted %": f"targeted.{eps}"}
    paths |= {f"{name} %": f"suite.{name}" for name in items}
    paths |= {"gap of the suite %": "masking_gap"}
    paths |= {"cross-entropy, T = 1 %": "cross_entropy"}
    paths |= {"cross-entropy, calibrated %": "cross_entropy_calibrated"}
    yield (
        "Each attack on all images, accuracy in %. Noise, own-loss, margin, prototypes (distances "
        "to them), autoattack, transfer (from a linear head on the embeddings): items of the "
        "adaptive suite, every iterate and restart judged; its gap: own-loss less all items. "
        "Cross-entropy: PGD on it, with the head "
        "at temperature 1 and at that of its calibration. T: the temperature of AutoAttack."
    )
    yield ""
    yield f"| network | {' | '.join(paths)} | T |"
    yield "|---" * (len(paths) + 2) + "|"
    for name, own in _by_trial(rows):
        temperature = f"{np.mean([row['temperature'] for row in own]):.3g}"
        cells = [_cell(own, path) for path in paths.values()]
        yield f"| {' | '.join([name, *cells, temperature])} |"


def _separation_lines(rows: Sequence[Row]) -> Iterable[str]:
    yield (
        "Prototypes, means over seeds: distances of pairs, angles in degrees, and the share that "
        "inner products classify as their own class."
    )
    yield ""
    yield "| network | min Linf | mean Linf | min L2 | mean L2 | min angle | mean angle | own % |"
    yield "|---" * 8 + "|"
    for name, own in _by_trial(rows):
        if "separation" in own[0]:
            cells = [
                f"{np.mean([row['separation'][f'{kind}_{norm}'] for row in own]):.3g}"
                for norm in ("linf", "l2")
                for kind in ("min", "mean")
            ]
            cells += [
                f"{np.degrees(np.mean([row['separation'][f'{kind}_angle'] for row in own])):.1f}"
                for kind in ("min", "mean")
            ]
            cells.append(_cell(own, "separation.self_classified.inner_product"))
            yield f"| {' | '.join([name, *cells])} |"


def _rule_lines(rows: Sequence[Row]) -> Iterable[str]:
    yield (
        "The same embeddings by each rule, on the first of the attacked images: accuracy in %, "
        "clean and under targeted APGD on the rule's scores and on L8 distances to prototypes."
    )
    yield ""
    columns = [(rule, when) for rule in RULES for when in ("clean", "attacked")]
    yield f"| network | {' | '.join(map(', '.join, columns))} |"
    yield "|---" * (len(columns) + 1) + "|"
    for name, own in _by_trial(rows):
        if "rules" in own[0]:
            cells = [_cell(own, f"rules.{rule}.{when}") for rule, when in columns]
            yield f"| {' | '.join([name, *cells])} |"


def _gradient_free_lines(rows: Sequence[Row]) -> Iterable[str]:
    attacks = {name: None for row in rows for name in row.get("without_gradients", {})}
    if not attacks:
        return
    yield (
        "Without the network's gradients, on the first of the attacked images: accuracy in % after "
        "each attack on all of them; white box: after the suite and the targeted attack; alone: "
        "broken by no attack with gradients, but by one without. HopSkipJump in L2 has no radius: "
        "median distance over seeds of the images that are rightly classified."
    )
    yield ""
    yield f"| network | {' | '.join(attacks)} | white box | alone | HopSkipJump, L2 distance |"
    yield "|---" * (len(attacks) + 4) + "|"
    for name, own in _by_trial(rows):
        if "without_gradients" in own[0]:
            cells = [_cell(own, f"without_gradients.{attack}") for attack in attacks]
            cells += [_cell(own, "white_box"), _cell(own, "without_gradients_alone")]
            cells.append(cell(own, "hop_skip_jump_l2"))
            yield f"| {' | '.join([name, *cells])} |"


def _grid_lines(rows: Sequence[Row]) -> Iterable[str]:
    yield "Accuracy in % by Linf radius:"
    yield ""
    yield f"| network, evaluation | {' | '.join(GRID_NAMES)} |"
    yield "|---" * (len(GRID_NAMES) + 1) + "|"
    kinds = {"published": "published", "on margins": "published_margin", "targeted": "targeted"}
    for name, own in _by_trial(rows):
        for kind, path in kinds.items():
            cells = [cell(own, f"{path}.{eps}", percent=True) for eps in GRID_NAMES]
            yield f"| {name}, {kind} | {' | '.join(cells)} |"


def _masking_lines(rows: Sequence[Row]) -> Iterable[str]:
    yield (
        "Masking checks of the logits / T on up to 100 images: zero gradient, the share whose "
        "gradient of the cross-entropy or the DLR loss is 0 at a random start, and in how many "
        "seeds which checks found something:"
    )
    yield ""
    yield "| network | zero gradient % | findings |"
    yield "|---|---|---|"
    for name, own in _by_trial(rows):
        found = [finding for row in own for finding in row.get("findings", [])]
        shown = ", ".join(f"{each} ({found.count(each)})" for each in dict.fromkeys(found))
        yield f"| {name} | {_cell(own, 'masking.zero gradient')} | {shown or 'none'} |"


def figures(result: dict[str, Any]) -> dict[str, Any]:
    """Accuracy over eps by attack, and the embeddings before and after an attack."""
    found = {"-eps": _curves(result)}
    pictures = {row["trial"]: row["picture"] for row in result["rows"] if "picture" in row}
    pictures = {name: pictures[name] for name in SHOWN if name in pictures}
    return found | ({"-embeddings": _embeddings(pictures, result)} if pictures else {})


def _curves(result: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    made = Figure(figsize=(13, 4.2), dpi=130, layout="constrained")
    titles = {
        "published": "PGD-100 on the own loss, as published",
        "published_margin": "PGD-100 on margins",
        "targeted": "targeted APGD; crosses: worst of all attacks",
    }
    both = zip(np.ravel(made.subplots(1, 3, sharey=True)), titles, strict=True)
    radii = [0, *(255 * eps for eps in GRID)]
    for axes, kind in both:
        for name, own in _by_trial(result["rows"]):
            if name in SHOWN:
                values = [[row["clean_attacked"], *row[kind].values()] for row in own]
                mean, deviation = 100 * np.mean(values, axis=0), 100 * np.std(values, axis=0)
                colour = COLOURS[SHOWN.index(name)]
                axes.plot(radii, mean, color=colour, label=name)
                axes.fill_between(
                    radii, mean - deviation, mean + deviation, color=colour, alpha=0.15, lw=0
                )
                if kind == "targeted":
                    worst = 100 * np.mean([row["worst"] for row in own])
                    eps = 255 * result["setting"]["eps"]
                    axes.plot(eps, worst, "x", color=colour, clip_on=False)
        axes.set(xlabel="Linf eps, in 1/255", title=titles[kind], ylim=(0, 100), xlim=(0, 32))
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
    grid = made.subplots(2, len(pictures), squeeze=False, sharex="col", sharey="col")
    colours, eps = colormaps["tab10"], eps_name(result["setting"]["eps"])
    for column, (name, found) in enumerate(pictures.items()):
        for row, when in enumerate(("before", "after")):
            axes, labels = grid[row, column], np.array(found["labels"])
            axes.scatter(*np.array(found[when]).T, c=labels, cmap=colours, s=6, vmin=0, vmax=9)
            for label, place in enumerate(found.get("prototypes", [])):
                axes.plot(*place, "*", color=colours(label), markeredgecolor="black", ms=9)
            title = f"{name}, {when}"
            if when == "after":
                title += f": {100 * np.mean(found['right']):.0f} % right"
            axes.set_title(title, fontsize=9)
            axes.set(xticks=[], yticks=[])
    made.suptitle(
        f"Features on {result['dataset']}, two principal components, clean and after PGD-100 on "
        f"margins, Linf eps {eps}; stars: prototypes",
        fontsize=11,
    )
    return made
