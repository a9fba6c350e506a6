"""Class weights and adversarial examples as grids of small images."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxclus.report._charts import blank_figure, shorten
from jaxclus.report._colours import INK, MUTED
from jaxclus.report._read import Examples

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_EXAMPLES = 6
_WRONG, _RIGHT = "#b91c1c", "#15803d"
# In units of an image's width: from one column to the next; and inches for a line of text.
_PITCH, _LINE = 1.06, 0.2


def _place(axes: Any, image: np.ndarray, x: float, y: float, grey: str) -> None:
    """Draws an image [h, w, c] of values in [0, 1], one unit wide; not RGB: its mean over c."""
    height, width, channels = image.shape
    axes.imshow(
        np.clip(image if channels == 3 else image.mean(-1), 0, 1),
        cmap=grey,
        vmin=0,
        vmax=1,
        interpolation="nearest",
        extent=(x, x + 1, y + height / width, y),
    )


def _canvas(columns: int, height: float, cell: float) -> tuple["Figure", Any]:
    """A figure whose unit is an image of `cell` inches, with y pointing down."""
    width = columns * _PITCH
    figure = blank_figure(width * cell, height * cell)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    return figure, axes


def _frame(axes: Any, columns: int, height: float) -> None:
    """The limits, to be set last: every image drawn resets them."""
    axes.set_xlim(0, columns * _PITCH)
    axes.set_ylim(height, 0)


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
    cell = min(2.0, 6.0 / columns) if count <= 30 else 0.85
    head, ratio = _LINE / cell, weight.shape[1] / weight.shape[2]
    height = math.ceil(count / columns) * (head + ratio + 0.04)
    figure, axes = _canvas(columns, height, cell)
    for i in range(count):
        x, y = i % columns * _PITCH, i // columns * (head + ratio + 0.04) + head
        scale = np.percentile(np.abs(weight[i]), 99.5) or 1.0
        _place(axes, 0.5 + weight[i] / (2 * scale), x, y, "RdBu_r")
        axes.text(
            x + 0.5,
            y - 0.2 * head,
            shorten(names[i], 14),
            ha="center",
            fontsize=9.5 if count <= 30 else 7,
            color=colours[i],
        )
    _frame(axes, columns, height)
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
    columns = min(len(examples.images), MOST_EXAMPLES)
    cell = min(1.6, 6.0 / columns)
    line, ratio = _LINE / cell, examples.images.shape[1] / examples.images.shape[2]
    factor = magnification(examples)
    tops = [line + row * (ratio + 1.5 * line) for row in range(3)]
    height = tops[2] + ratio
    figure, axes = _canvas(columns, height, cell)

    def write(column: int, y: float, text: str, colour: str) -> None:
        x = column * _PITCH + 0.5
        axes.text(x, y, shorten(text, 13), ha="center", fontsize=8.5, color=colour)

    for i in range(columns):
        label = int(examples.labels[i])
        delta = examples.adversarial[i] - examples.images[i]
        _place(axes, examples.images[i], i * _PITCH, tops[0], "gray")
        _place(axes, examples.adversarial[i], i * _PITCH, tops[1], "gray")
        _place(axes, 0.5 + factor * delta, i * _PITCH, tops[2], "RdBu_r")
        write(i, tops[0] - 0.25 * line, name(label), INK)
        for top, predictions in (
            (tops[0], examples.predictions),
            (tops[1], examples.adversarial_predictions),
        ):
            predicted = int(predictions[i])
            colour = _RIGHT if predicted == label else _WRONG
            write(i, top + ratio + 0.8 * line, f"→ {name(predicted)}", colour)
    for top, text in zip(tops, ("original", "adversarial", f"change ×{factor}"), strict=True):
        looks: dict[str, Any] = {"ha": "right", "va": "center", "rotation": 90, "color": MUTED}
        axes.text(-0.04, top + ratio / 2, text, fontsize=9, **looks)
    _frame(axes, columns, height)
    return figure
