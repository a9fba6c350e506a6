"""The page: checks, sections from top to bottom, and the file."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from jaxclus.report import _charts, _linear_sections, _masking_section, _sections
from jaxclus.report._colours import run_colours
from jaxclus.report._context import Context
from jaxclus.report._html import document, element
from jaxclus.report._read import read_runs
from jaxclus.report._summary import summary
from jaxclus.runs import write_atomic

_SECTIONS = (
    ("training", "Training", _sections.training),
    ("robustness", "Robust accuracy", _sections.robustness),
    ("masking", "Masking checks", _masking_section.masking),
    ("examples", "Adversarial examples", _sections.examples),
    ("correlation", "Correlation of class weights", _linear_sections.correlation),
    ("dendrograms", "Dendrograms", _linear_sections.dendrograms),
    ("weights", "Class weights", _linear_sections.weights),
    ("features", "Feature distance", _linear_sections.features),
    ("filters", "Filters", _linear_sections.filters),
    ("scores", "Clustering scores", _linear_sections.scores),
    ("settings", "Settings", _sections.settings),
)


def write(runs: Sequence[str | os.PathLike], output: str | os.PathLike) -> Path:
    """Writes one self-contained HTML page that compares runs side by side, and its plots as PNG.

    Only stored artefacts are read: no model is loaded and nothing is computed anew. What a run
    lacks is named on the page together with the command that makes it.

    Args:
        runs: run directories, each with a `config.json`; at least one, up to six read well.
        output: directory for `index.html` and `figures/*.png`; made if it does not exist.

    Returns:
        The path of `index.html`, which holds all images itself and can be moved alone.

    Raises:
        TypeError: if `runs` is a single path.
        ValueError: if `runs` is empty, or a path in it is no run directory, or a file of a run
            cannot be read or does not hold what it should.
        OSError: if `output` cannot be written.
    """
    if isinstance(runs, (str, os.PathLike)):
        raise TypeError(f"`runs` must be a sequence of run directories, got one path {runs!r}")
    if not runs:
        raise ValueError("`runs` must hold at least one run directory, got none")
    read = read_runs(runs)
    page = Path(output) / "index.html"
    try:
        figures = Path(output) / "figures"
        figures.mkdir(parents=True, exist_ok=True)
        context = Context(read, run_colours(len(read)), figures)
        with _charts.style(), warnings.catch_warnings():
            # A name in a script that the font lacks is drawn as boxes; the page's text has it.
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            text = _document(context)
        write_atomic(page, text.encode("utf-8"))
    except OSError as error:
        raise OSError(f"`output` {output} cannot be written: {error}") from error
    return page


def _document(context: Context) -> str:
    count = len(context.runs)
    names = ", ".join(run.label for run in context.runs)
    links = (element("a", title, href=f"#{key}") for key, title, _ in _SECTIONS)
    return document(
        f"jaxclus report: {names}",
        element("nav", element("div", element("b", "jaxclus"), *links)),
        element(
            "main",
            element("h1", "Robustness and clustering", f" of {count} runs" if count > 1 else ""),
            summary(context),
            *(
                element("section", element("h2", title), section(context), id=key)
                for key, title, section in _SECTIONS
            ),
            element("footer", "Made by jaxclus.report from the files of the run directories."),
        ),
    )
