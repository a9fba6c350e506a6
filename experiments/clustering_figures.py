"""Figures of `experiments.clustering_effect`."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import jaxclus as jc
from experiments.clustering_summary import SCORE, by_eps
from experiments.rows import Row, value


def figures(result: dict[str, Any]) -> dict[str, Any]:
    """Matplotlib figures by name: "matrices" of seed 0, and the "effect" by factor."""
    rows = result["rows"]
    groups = tuple((name, tuple(members)) for name, members in result["groups"])
    shown = ("standard", "pgd", "pgd, logits", "pgd, weight")
    matrices = {
        row["trial"]: np.array(row["correlation"])
        for row in rows
        if row["seed"] == 0 and row["trial"] in shown
    }
    return {
        "matrices": jc.report.correlation_panels(matrices, result["class_names"], groups),
        "effect": _effect(result),
    }


def _effect(result: dict[str, Any]) -> Any:
    """The score of every network: by trial, along training, over eps of training."""
    from matplotlib.figure import Figure

    rows = [row for row in result["rows"] if "clean_accuracy" in row]
    steps = sorted(by_eps(rows))
    widths = (1.5, 1, 0.8) if steps else (1.5, 1)
    figure = Figure(figsize=(4 * sum(widths), 4.4), dpi=130, layout="constrained")
    by_trial, by_epoch, *over_eps = figure.subplots(1, len(widths), width_ratios=widths)
    _draw_trials(by_trial, [row for row in rows if ", eps " not in row["trial"]])
    _draw_epochs(by_epoch, rows)
    for axes in over_eps:
        scores = [[value(r, SCORE) for r in rows if r["trial"] == name] for _, name in steps]
        for (eps, _), dots in zip(steps, scores, strict=True):
            axes.plot([eps] * len(dots), dots, "o", color="#1d6fb8", alpha=0.5, markersize=4)
        axes.plot([eps for eps, _ in steps], [np.mean(s) for s in scores], color="#1d6fb8")
        axes.set(xlabel="Linf eps of training", title="over eps of training")
    by_trial.set_xlabel("within - between")
    for axes in (by_epoch, *over_eps):
        axes.set_ylabel("within - between")
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, color="#e5e7eb")
        axes.set_axisbelow(True)
    figure.suptitle(f"The clustering effect on {result['dataset']}", fontsize=12)
    return figure


def _draw_trials(axes: Any, rows: Sequence[Row]) -> None:
    names = list(dict.fromkeys(row["trial"] for row in rows))
    for place, name in enumerate(names):
        dots = [value(row, SCORE) for row in rows if row["trial"] == name]
        colour = "#6b7280" if "standard" in name else "#1d6fb8"
        axes.plot(dots, [place] * len(dots), "o", color=colour, alpha=0.5, markersize=4)
        axes.plot([np.mean(dots)], [place], "|", color=colour, markersize=14, markeredgewidth=2)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_title("by training (dots: seeds, bars: means)")


def _draw_epochs(axes: Any, rows: Sequence[Row]) -> None:
    from matplotlib.ticker import MaxNLocator

    colours: Callable[[str], str | None] = {
        "standard": "#6b7280", "pgd": "#1d6fb8", "trades": "#15803d", "fast": "#7c3aed",
        "pgd, logits": "#c2410c", "pgd, weight": "#be185d",
    }.get  # fmt: skip
    for name in dict.fromkeys(row["trial"] for row in rows):
        if colours(name) is None:
            continue
        curves = np.array([row["epochs"] for row in rows if row["trial"] == name])
        mean, deviation = curves.mean(axis=0), curves.std(axis=0, ddof=1)
        epochs = range(len(mean))
        axes.plot(epochs, mean, "-o", color=colours(name), markersize=3, label=name)
        axes.fill_between(
            epochs, mean - deviation, mean + deviation, color=colours(name), alpha=0.15
        )
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.25 * (high - low))  # room for the legend above the curves
    axes.legend(fontsize=8, frameon=False, ncols=2, loc="upper left")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="epoch", title="along training (mean ± deviation)")
