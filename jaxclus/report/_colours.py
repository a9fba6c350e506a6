"""One colour per run and one per class group, the same in every plot and table of a report."""

import colorsys

from jaxclus.report._read import Run

INK, MUTED, GRID = "#1f2937", "#6b7280", "#e5e7eb"
_RUNS = ("#2563eb", "#ea580c", "#0d9488", "#c026d3", "#ca8a04", "#64748b")
_GROUPS = ("#1d6fb8", "#c2410c", "#15803d", "#7c3aed", "#be185d", "#a16207", "#0e7490", "#4b5563")


def run_colours(count: int) -> tuple[str, ...]:
    """A colour per run; more than six runs repeat them."""
    return tuple(_RUNS[i % len(_RUNS)] for i in range(count))


def group_colours(run: Run) -> dict[str, str]:
    """A colour per class group of the run's data set, dark enough to be text on white."""
    names = sorted({group for group in run.groups if group is not None}, key=run.groups.index)
    return dict(zip(names, palette(len(names)), strict=True))


def palette(count: int) -> tuple[str, ...]:
    """As many different colours for groups, dark enough to be text on white."""
    if count <= len(_GROUPS):
        return _GROUPS[:count]
    # Neighbouring hues of many groups are told apart by alternating lightness.
    return tuple(_hue(i / count, (0.22, 0.33)[i % 2]) for i in range(count))


def class_colours(run: Run) -> tuple[str, ...]:
    """The colour of each class: its group's, or plain ink."""
    colours = group_colours(run)
    return tuple(INK if group is None else colours[group] for group in run.groups)


def _hue(hue: float, lightness: float) -> str:
    return "#" + "".join(f"{round(255 * c):02x}" for c in colorsys.hls_to_rgb(hue, lightness, 0.75))
