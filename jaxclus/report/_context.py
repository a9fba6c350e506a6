"""What the sections of a page share: runs, colours, cards of figures and of missing parts."""

import base64
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxclus.report._colours import group_colours
from jaxclus.report._facts import Gap, gaps
from jaxclus.report._html import Markup, chip, element, escape, figure, join
from jaxclus.report._read import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Rows of a grid come out full, or nearly so, for up to six cards.
_PIXELS_PER_INCH = 100
_COLUMNS = {1: "alone", 3: "three", 5: "three", 6: "three"}


@dataclasses.dataclass(frozen=True)
class Context:
    """The runs of the page, a colour per run, and the folder for PNG files."""

    runs: tuple[Run, ...]
    colours: tuple[str, ...]
    figures: Path

    def number(self, run: Run) -> int:
        """The position of a run on the page, from 1; names its files."""
        return self.runs.index(run) + 1

    def colour(self, run: Run) -> str:
        """The colour of a run in every plot and table."""
        return self.colours[self.runs.index(run)]

    def chip(self, run: Run) -> Markup:
        """The run's name behind a dot in its colour."""
        return chip(run.label, self.colour(run))

    def header(self, run: Run, *details: str) -> Markup:
        """The head of a card: the run, then details in grey."""
        return join(self.chip(run), *(element("span", detail) for detail in details))

    def draw(self, name: str, plot: "Figure", alt: str, header: Any, caption: Any) -> Markup:
        """Writes the plot as `<name>.png` and returns the card that shows it."""
        path = self.figures / f"{name}.png"
        plot.savefig(path, bbox_inches="tight", pad_inches=0.06)
        content = path.read_bytes()
        # A PNG file has its width in pixels at this place.
        width = int.from_bytes(content[16:20], "big") / plot.dpi * _PIXELS_PER_INCH
        source = base64.b64encode(content).decode("ascii")
        return figure(source, width, alt, header, caption)

    def lacks(self, run: Run, part: str) -> Markup:
        """A card that says what is missing and how to make it; empty if nothing is."""
        return join(
            *(
                element(
                    "div",
                    self.chip(run),
                    element("p", f"{gap.title} {gap.variant}".strip(), " ", remedy(gap)),
                    class_="card missing",
                )
                for gap in gaps(run)
                if gap.part == part
            )
        )

    def all_lacking(self, *parts: str) -> Markup:
        """The cards of all runs for some missing parts, side by side."""
        cards = [self.lacks(run, part) for part in parts for run in self.runs]
        return self.grid([card for card in cards if card], "stack")

    def grid(self, cards: Sequence[Markup], *classes: str) -> Markup:
        """Cards side by side, as many in a row as read well."""
        if not cards:
            return Markup()
        name = " ".join(("grid", _COLUMNS.get(len(cards), "two"), *classes))
        return element("div", *cards, class_=name)

    def rows(self, rows: Sequence[tuple[str, Sequence[Markup]]]) -> Markup:
        """Titled grids with a card per run; a single run has its cards side by side."""
        full = [(title, [card for card in cards if card]) for title, cards in rows]
        if len(self.runs) == 1:
            return self.grid([card for _, cards in full for card in cards])
        return join(
            *(join(element("h3", title), self.grid(cards)) for title, cards in full if cards)
        )

    def group_legend(self) -> Markup:
        """The colours of the class groups, a line per data set."""
        legends = {run.dataset: group_colours(run) for run in self.runs if any(run.groups)}
        return join(
            *(
                element(
                    "div",
                    element("span", f"Groups of {dataset}:"),
                    *(chip(name, colour) for name, colour in colours.items()),
                    class_="chips",
                )
                for dataset, colours in legends.items()
            )
        )


def remedy(gap: Gap) -> Markup:
    """What to do about a missing part, or why nothing can be done."""
    if gap.reason:
        return escape(f"not measured: {gap.reason}")
    return join("not measured: run ", element("code", gap.command))


def lead(*text: Any) -> Markup:
    """The explanation at the head of a section."""
    return element("p", *text, class_="lead")
