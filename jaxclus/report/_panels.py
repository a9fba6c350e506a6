"""Correlation matrices of several networks side by side, without a run behind them."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jax.typing import ArrayLike

from jaxclus import clustering
from jaxclus.data import Groups
from jaxclus.report._charts import blank_figure, shorten, style
from jaxclus.report._colours import palette

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def correlation_panels(
    matrices: Mapping[str, ArrayLike], class_names: Sequence[str], groups: Groups
) -> "Figure":
    """A heat map on [-1, 1] for each correlation matrix, classes group by group.

    Args:
        matrices: C [k, k] by title, at least one.
        class_names: k names.
        groups: named groups, each class in exactly one; lines part them, names take their colour.

    Returns:
        A Matplotlib figure; `figure.savefig(path, bbox_inches="tight")` writes it.

    Raises:
        ValueError: if there is no matrix, one has another shape than [k, k], or a class is in no
            group or in several.
    """
    order = [c for _, members in groups for c in members]
    if not matrices:
        raise ValueError("`matrices` must hold at least one matrix, got none")
    for title, matrix in matrices.items():
        if np.shape(matrix) != (len(class_names),) * 2:
            raise ValueError(
                f"`matrices` must be [k, k] for the {len(class_names)} classes, got "
                f"{np.shape(matrix)} for {title!r}"
            )
    clustering.group_ids(groups, len(class_names))  # raises unless each class is in one
    sizes = [len(members) for _, members in groups]
    colours = np.repeat(palette(len(groups)), sizes)
    with style():
        figure = blank_figure(1.3 + 2.6 * len(matrices), 3.6, "constrained")
        panels = figure.subplots(1, len(matrices), squeeze=False)[0]
        image = None
        for axes, (title, matrix) in zip(panels, matrices.items(), strict=True):
            shown = np.asarray(matrix)[np.ix_(order, order)]
            image = axes.imshow(shown, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
            axes.set_title(title, fontsize=9.5)
            axes.spines[:].set_visible(False)
            axes.tick_params(length=0)
            names = [shorten(class_names[c], 14) for c in order]
            axes.set_xticks(range(len(order)), names, rotation=90, fontsize=7.5)
            axes.set_yticks(range(len(order)), names if axes is panels[0] else [], fontsize=7.5)
            for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
                for label, colour in zip(labels, colours, strict=False):
                    label.set_color(colour)
            for end in np.cumsum(sizes)[:-1] - 0.5:
                axes.axhline(end, color="white", linewidth=2)
                axes.axvline(end, color="white", linewidth=2)
        assert image is not None
        figure.colorbar(image, ax=list(panels), fraction=0.03, pad=0.02).outline.set_visible(False)
    return figure
