"""One colour per run and one per class group, the same in every plot and table of a report."""

import colorsys
from collections.abc import Sequence

from jaxclus.report._read import Run

INK, MUTED, GRID = "#1f2937", "#6b7280", "#e5e7eb"
_RUNS = ("#2563eb", "#ea580c", "#0d9488", "#c026d3", "#ca8a04", "#64748b")
_GROUPS = ("#1d6fb8", "#c2410c", "#15803d", "#7c3aed", "#be185d", "#a16207", "#0e7490", "#4b5563")


def run_colours(count: int) -> tuple[str, ...]:
    """A colour per run; more than six runs repeat them."""
    return tuple(_RUNS[i % len(_RUNS)] for i in range(count))


def group_colours(runs: Sequence[Run]) -> dict[str, str]:
    """A colour per group name over all runs, dark enough to be read as text on white."""
    names = dict.fromkeys(
        group for run in runs if run.linear for group in run.linear.group_of if group is not None
    )
    if len(names) <= len(_GROUPS):
        return dict(zip(names, _GROUPS))
    # Neighbouring hues of many groups are told apart by alternating lightness.
    return {name: _hue(i / len(names), (0.30, 0.45)[i % 2]) for i, name in enumerate(names)}


def class_colours(run: Run, groups: dict[str, str]) -> tuple[str, ...]:
    """The colour of each class: its group's, or plain ink."""
    group_of = run.linear.group_of if run.linear else ()
    return tuple(groups.get(group, INK) if group is not None else INK for group in group_of)


def _hue(hue: float, lightness: float) -> str:
    return "#" + "".join(f"{round(255 * c):02x}" for c in colorsys.hls_to_rgb(hue, lightness, 0.75))
