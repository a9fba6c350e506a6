"""HTML from nested calls: every text is escaped unless it was made by these functions."""

import html
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

_LONGEST_SETTING = 400


class Markup(str):
    """Text that is HTML already."""


def escape(value: Any) -> Markup:
    """Any value as HTML text; markup stays as it is."""
    return value if isinstance(value, Markup) else Markup(html.escape(str(value)))


def join(*parts: Any) -> Markup:
    """Parts one after the other, each escaped unless it is markup."""
    return Markup("".join(escape(part) for part in parts))


def element(tag: str, *children: Any, **attributes: Any) -> Markup:
    """`<tag attributes>children</tag>`; `class_` stands for class, `_` in names for `-`."""
    given = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    if tag in ("img", "meta", "input"):
        return Markup(f"<{tag}{given}>")
    return Markup(f"<{tag}{given}>{join(*children)}</{tag}>")


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]], numeric: Iterable[int]) -> Markup:
    """A table that scrolls by itself when it is too wide; `numeric` columns are right-aligned."""
    right = set(numeric)

    def cells(tag: str, row: Sequence[Any]) -> Markup:
        return join(
            *(
                element(tag, value, class_="number" if i in right else None)
                for i, value in enumerate(row)
            )
        )

    body = join(*(element("tr", cells("td", row)) for row in rows))
    return element(
        "div",
        element(
            "table", element("thead", element("tr", cells("th", head))), element("tbody", body)
        ),
        class_="scroll",
    )


def tree(value: Any) -> Markup:
    """A JSON value as nested two-column tables; long texts are cut short."""
    if isinstance(value, Mapping) and value:
        rows = (element("tr", element("th", k), element("td", tree(v))) for k, v in value.items())
        return element("table", element("tbody", *rows), class_="tree")
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        head = list(dict.fromkeys(key for item in value for key in item))
        lines = (element("tr", *(element("td", tree(item.get(k))) for k in head)) for item in value)
        titles = element("tr", *(element("th", key) for key in head))
        return element("table", element("tbody", titles, *lines), class_="tree")
    if isinstance(value, list):
        value = ", ".join(str(item) for item in value)
    text = "–" if value in (None, "", {}) else str(value)
    if len(text) > _LONGEST_SETTING:
        text = f"{text[:_LONGEST_SETTING]}… ({len(text):,} characters)"
    return element("span", text)


def chip(text: str, colour: str) -> Markup:
    """A coloured dot and a text."""
    return element("span", element("i", style=f"background:{colour}"), text, class_="chip")


def figure(source: str, width: float, alt: str, header: Any, caption: Any) -> Markup:
    """A card with an embedded PNG (`source` is base64) that a click enlarges.

    `width` is the size in CSS pixels at which its text is as large as the page's.
    """
    zoom = element(
        "label",
        element("input", type="checkbox", aria_label="enlarge"),
        element(
            "img",
            src=f"data:image/png;base64,{source}",
            alt=alt,
            style=f"max-width:{width:.0f}px",
        ),
        class_="zoom",
    )
    return element(
        "figure",
        element("header", header) if header else "",
        zoom,
        element("figcaption", caption) if caption else "",
        class_="card",
    )


def document(title: str, *body: Any) -> str:
    """The whole page, with its style sheet inside."""
    style = resources.files("jaxclus.report").joinpath("page.css").read_text(encoding="utf-8")
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Markup(style)),
    )
    return "<!doctype html>\n" + element("html", head, element("body", *body), lang="en") + "\n"
