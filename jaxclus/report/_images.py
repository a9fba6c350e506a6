"""Class weights and adversarial examples as grids of small images."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxclus.report._charts import _figure, _shorten
from jaxclus.report._colours import INK, MUTED
from jaxclus.report._read import Examples

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WRONG, _RIGHT = "#b91c1c", "#15803d"
MOST_EXAMPLES = 6


def _show(axes: Any, image: np.ndarray, grey: str = "RdBu_r") -> None:
    """Draws one image [h, w, c] of values in [0, 1]; what is not RGB is shown as its mean."""
    rgb = image.shape[-1] == 3
    axes.imshow(
        np.clip(image if rgb else image.mean(-1), 0, 1),
        cmap=grey,
        vmin=0,
        vmax=1,
        interpolation="nearest",
    )
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def weight_images(weight: np.ndarray, names: Sequence[str], colours: Sequence[str]) -> "Figure":
    """The rows of the implicit weight as images, each scaled symmetrically about 0.

    A value w is drawn as 1/2 + w / (2 s), s being the 99.5th percentile of |w| of its class.

    Args:
        weight: [k, h, w, c].
        names: k class names.
        colours: k colours of the names.
    """
    count = len(weight)
    columns = min(count, 5) if count <= 10 else math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    cell = 6.4 / columns if count <= 30 else 0.85
    figure = _figure(cell * columns, (cell + 0.22) * rows)
    for i, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        if i >= count:
            axes.axis("off")
            continue
        scale = np.percentile(np.abs(weight[i]), 99.5) or 1.0
        _show(axes, 0.5 + weight[i] / (2 * scale))
        size = 9.5 if count <= 30 else 7
        axes.set_title(_shorten(names[i], 14), fontsize=size, color=colours[i], pad=3)
    return figure


def magnification(examples: Examples) -> int:
    """The whole factor by which the largest shown perturbation just fills the grey scale."""
    shown = slice(MOST_EXAMPLES)
    largest = np.abs(examples.adversarial[shown] - examples.images[shown]).max(initial=0.0)
    return max(1, int(0.5 / largest)) if largest > 0 else 1


def example_grid(examples: Examples, name: Callable[[int], str]) -> "Figure":
    """Original, adversarial image and magnified perturbation, with labels and predictions.

    Args:
        examples: at least one attacked image; the first six are shown.
        name: the name of a class by its number.
    """
    count = min(len(examples.images), MOST_EXAMPLES)
    factor = magnification(examples)
    figure = _figure(6.4, 6.4 * 3.75 / max(count, 3))
    grid = figure.subplots(3, count, squeeze=False)
    for i in range(count):
        label = int(examples.labels[i])
        clean, attacked = int(examples.predictions[i]), int(examples.adversarial_predictions[i])
        delta = examples.adversarial[i] - examples.images[i]
        _show(grid[0, i], examples.images[i], "gray")
        _show(grid[1, i], examples.adversarial[i], "gray")
        _show(grid[2, i], 0.5 + factor * delta)
        grid[0, i].set_title(_shorten(name(label), 14), fontsize=9, color=INK, pad=3)
        for row, prediction in ((0, clean), (1, attacked)):
            grid[row, i].set_xlabel(
                "→ " + _shorten(name(prediction), 14),
                fontsize=8.5,
                color=_RIGHT if prediction == label else _WRONG,
                labelpad=3,
            )
    for axes, text in zip(grid[:, 0], ("original", "adversarial", f"perturbation ×{factor}")):
        axes.set_ylabel(text, fontsize=9, color=MUTED)
    return figure
