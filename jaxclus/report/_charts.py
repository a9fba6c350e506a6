"""Curves, heat maps and dendrograms as Matplotlib figures (no pyplot, no global state)."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from jaxclus.report._colours import GRID, INK, MUTED
from jaxclus.report._facts import legend_name, standard_error
from jaxclus.report._read import NORMS, Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Cells of larger matrices are too small to hold a number.
_LARGEST_ANNOTATED = 12
_DASHES = ("-", "--", "-.", ":")


@contextmanager
def style() -> Iterator[None]:
    """The look of all figures; names of classes and runs are never read as TeX."""
    import matplotlib

    settings: dict[Any, Any] = {
        "text.parse_math": False,
        "font.size": 10,
        "text.color": INK,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": INK,
        "axes.titlesize": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": False,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "legend.frameon": False,
        "figure.facecolor": "white",
        "savefig.facecolor": "white",
    }
    with matplotlib.rc_context(settings):
        yield


def blank_figure(
    width: float, height: float, layout: Literal["constrained"] | None = None
) -> "Figure":
    """An empty figure of this size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout=layout)


def shorten(text: str, limit: int) -> str:
    """The text, cut with an ellipsis if it is longer than `limit`."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def percent_axis(axes: Any) -> None:
    """Shares from 0 to 1 as percentages."""
    from matplotlib.ticker import PercentFormatter

    axes.set_ylim(-0.02, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    axes.grid(True, axis="y")


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window of 2 % of the points, narrower at the ends."""
    half = len(values) // 100
    sums = np.concatenate([[0.0], np.cumsum(values)])
    centre = np.arange(len(values))
    reach = np.minimum(np.minimum(centre, len(values) - 1 - centre), half)
    return (sums[centre + reach + 1] - sums[centre - reach]) / (2 * reach + 1)


def training_curves(runs: Sequence[Run], colours: Sequence[str]) -> "Figure":
    """Loss and accuracy over epochs (over steps unless every run recorded its epochs)."""
    from matplotlib.ticker import MaxNLocator

    figure = blank_figure(13.0, 4.2, "constrained")
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    keys = ("loss", "accuracy", "validation_accuracy", "validation_robust_accuracy")
    by_epoch = all(not np.isnan(run.series(key)[1]).any() for run in runs for key in keys)

    def curve(axes: Any, run: Run, key: str, colour: str, **looks: Any) -> None:
        steps, epochs, values = run.series(key)
        if values.size:
            axes.plot(epochs if by_epoch else steps, values, color=colour, **looks)

    for run, colour in zip(runs, colours, strict=True):
        for key, axes in (("loss", loss_axes), ("accuracy", accuracy_axes)):
            steps, epochs, values = run.series(key)
            if values.size:
                x = epochs if by_epoch else steps
                axes.plot(x, values, color=colour, alpha=0.18, linewidth=0.8)
                axes.plot(x, _running_mean(values), color=colour, alpha=0.75, linewidth=1.3)
        marker = {"marker": "o", "markersize": 3.5, "linewidth": 1.8}
        curve(accuracy_axes, run, "validation_accuracy", colour, **marker)
        curve(accuracy_axes, run, "validation_robust_accuracy", colour, linestyle="--", **marker)
    loss_axes.set_title("Training loss", loc="left")
    loss_axes.set_ylim(bottom=0)
    loss_axes.grid(True, axis="y")
    accuracy_axes.set_title("Accuracy", loc="left")
    percent_axis(accuracy_axes)
    for axes in (loss_axes, accuracy_axes):
        axes.set_xlabel("epoch" if by_epoch else "step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(x=0.01)
    _legend(figure, [(run.label, colour, "-") for run, colour in zip(runs, colours, strict=True)])
    return figure


def _legend(figure: "Figure", entries: Sequence[tuple[str, str, Any]]) -> None:
    """A legend of (text, colour, dashes) below the axes."""
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=c, linestyle=dash, linewidth=2) for _, c, dash in entries]
    texts = [shorten(text, 44) for text, _, _ in entries]
    figure.legend(lines, texts, loc="outside lower left", ncols=min(3, len(entries)))


def robustness_curves(runs: Sequence[Run], colours: Sequence[str]) -> "Figure":
    """Robust accuracy over eps of all runs, one axes per norm; bands are one standard error."""
    evaluations = [evaluation for run in runs for evaluation in run.evaluations]
    norms = [norm for norm in NORMS if any(e.norm == norm for e in evaluations)]
    figure = blank_figure(13.0, 5.0, "constrained")
    entries: dict[str, tuple[str, str, Any]] = {}
    for axes, norm in zip(figure.subplots(1, len(norms), squeeze=False)[0], norms, strict=True):
        scale = 255 if norm == "linf" else 1
        for run, colour in zip(runs, colours, strict=True):
            own = [e for e in run.evaluations if e.norm == norm]
            for dash, evaluation in zip(itertools.cycle(_DASHES), own, strict=False):
                points = {0.0: evaluation.clean_accuracy}
                points.update((p.eps, p.robust_accuracy) for p in evaluation.curve)
                x = scale * np.array(list(points))
                y = np.array(list(points.values()))
                error = np.array([standard_error(v, evaluation.num_images) for v in y])
                axes.plot(x, y, color=colour, linestyle=dash, marker="o", markersize=4, lw=1.8)
                axes.fill_between(x, y - error, y + error, color=colour, alpha=0.12, lw=0)
                text = f"{run.label}: {legend_name(evaluation, own)}"
                entries[text] = (text, colour, dash)
        percent_axis(axes)
        axes.grid(True, axis="x")
        axes.set_xlim(left=0)
        axes.set_title(f"{NORMS[norm]} threat model", loc="left")
        axes.set_xlabel("eps in units of 1/255" if norm == "linf" else "eps")
    figure.axes[0].set_ylabel("robust accuracy")
    _legend(figure, list(entries.values()))
    return figure


def _tick_size(count: int, inches: float) -> float:
    """The font size at which `count` labels fit into a side of this length."""
    return min(9.5, 72 * inches / count * 0.85)


def heat_map(
    matrix: np.ndarray,
    names: Sequence[str],
    colours: Sequence[str],
    order: np.ndarray | None = None,
    *,
    signed: bool,
) -> "Figure":
    """A square matrix with classes on both sides, in the given order, coloured by group.

    Args:
        matrix: [k, k]; in [-1, 1] if `signed`, else any non-negative distances.
        names: k class names; none for a matrix whose rows have no names.
        colours: k colours of the class names.
        order: [k] the order of rows and columns.
        signed: diverging colours on [-1, 1] instead of light to dark from 0 to the maximum.
    """
    count = len(matrix)
    side = 4.2 if count <= 30 else min(12.0, 0.11 * count)
    positions = list(range(count)) if order is None else [int(i) for i in order]
    matrix = matrix[np.ix_(positions, positions)]
    # Names and colour bar stand outside: the file is cropped to what is drawn.
    figure = blank_figure(side, side)
    axes = figure.add_axes((0, 0, 1, 1))
    if signed:
        image = axes.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    else:
        image = axes.imshow(matrix, cmap="YlGnBu", vmin=0, interpolation="nearest")
    bar = figure.colorbar(image, cax=figure.add_axes((1.02, 0.1, 0.035, 0.8)))
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if not names:
        axes.set_xticks([])
        axes.set_yticks([])
        return figure
    size = _tick_size(count, side)
    shown = [shorten(names[i], 20) for i in positions]
    axes.set_xticks(
        range(count), shown, rotation=90 if max(map(len, shown)) > 2 else 0, fontsize=size
    )
    axes.set_yticks(range(count), shown, fontsize=size)
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        for label, index in zip(labels, positions, strict=True):
            label.set_color(colours[index])
    if count <= _LARGEST_ANNOTATED:
        _annotate(axes, image, matrix)
    return figure


def _annotate(axes: Any, image: Any, matrix: np.ndarray) -> None:
    """Writes each value into its cell, in white on dark cells."""
    largest = np.nanmax(np.abs(matrix))
    digits = 2 if largest < 10 else 1 if largest < 100 else 0
    for (row, column), value in np.ndenumerate(matrix):
        red, green, blue, _ = image.cmap(image.norm(value))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        axes.text(
            column,
            row,
            # Adding 0 turns a rounded -0.0 into 0.0.
            f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−"),
            ha="center",
            va="center",
            fontsize=7.5,
            color="white" if dark else INK,
        )


def filter_maps(filters: Mapping[str, np.ndarray]) -> "Figure":
    """Overlaps [o, o] between the filters of each layer as small heat maps on [0, 1]."""
    columns = min(4, len(filters))
    rows = -(-len(filters) // columns)
    figure = blank_figure(6.0, 0.3 + rows * (6.0 / columns + 0.1), "constrained")
    image = None
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, (name, matrix) in zip(figure.axes, filters.items(), strict=False):
        image = axes.imshow(matrix, cmap="Reds", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(f"{shorten(name, 20)} ({len(matrix)})", fontsize=8.5)
    assert image is not None
    figure.colorbar(image, ax=figure.axes, fraction=0.03, pad=0.02).outline.set_visible(False)
    return figure


def dendrogram(linkage: np.ndarray, names: Sequence[str], colours: Sequence[str]) -> "Figure":
    """The tree of a SciPy linkage, leaves at the left; branches within one group take its colour.

    Args:
        linkage: [k-1, 4] as `scipy.cluster.hierarchy.linkage` returns it.
        names: k class names.
        colours: k colours of the leaves.
    """
    from scipy.cluster import hierarchy

    count = len(names)
    branch_colours = list(colours)
    for left, right, _, _ in linkage:
        a, b = branch_colours[int(left)], branch_colours[int(right)]
        branch_colours.append(a if a == b else MUTED)
    tree = hierarchy.dendrogram(
        linkage, no_plot=True, link_color_func=lambda node: branch_colours[node]
    )
    height = max(2.0, 0.3 * count) if count <= 30 else 0.13 * count
    figure = blank_figure(4.2, height)
    axes = figure.add_axes((0, 0, 1, 1))
    branches = tree["dcoord"], tree["icoord"], tree["color_list"]
    for heights, positions, colour in zip(*branches, strict=True):
        axes.plot(heights, positions, color=colour, linewidth=1.6 if count <= 30 else 1.1)
    # SciPy places leaf i at 10 i + 5.
    leaves = [int(leaf) for leaf in tree["leaves"]]
    axes.set_yticks(
        [10 * i + 5 for i in range(count)],
        [shorten(names[leaf], 24) for leaf in leaves],
        fontsize=_tick_size(count, height),
    )
    for label, leaf in zip(axes.get_yticklabels(), leaves, strict=True):
        label.set_color(colours[leaf])
    axes.set_ylim(10 * count, 0)
    axes.set_xlim(left=min(0.0, float(linkage[:, 2].min())))
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(True, axis="x")
    axes.set_xlabel("distance 1 − C at which branches join")
    return figure
