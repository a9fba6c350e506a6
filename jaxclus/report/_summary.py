"""The head of the page: a tile per run, the headline table, remarks and what is missing."""

from jaxclus.report import _facts
from jaxclus.report._context import Context, lead, remedy
from jaxclus.report._facts import VARIANT_TITLES, p_text, percent, score_text
from jaxclus.report._html import Markup, element, escape, join, table
from jaxclus.report._read import VARIANTS, Run, Variant


def summary(context: Context) -> Markup:
    """Everything that should be seen without scrolling."""
    return join(
        lead(
            "Robust accuracy is the lowest that any attack of a run reached, at the eps that most "
            "runs on the same data set share. Clustering is the mean correlation of class weights "
            "within groups minus that between groups. A click enlarges a plot."
        ),
        context.grid([_tile(context, run) for run in context.runs], "tiles"),
        element("div", _headline_table(context), class_="stack"),
        _notes(context),
    )


def _tile(context: Context, run: Run) -> Markup:
    about = (run.dataset, run.setting("model", "name"), run.setting("objective", "name"))
    return element(
        "div",
        element("h3", run.label),
        element("p", " · ".join(about)),
        element("dl", _clean_entry(run), _robust_entry(context, run), _score_entry(run)),
        class_="card tile",
        style=f"--run:{context.colour(run)}",
    )


def _clean_entry(run: Run) -> Markup:
    clean = _facts.clean_accuracy(run)
    return _entry("Clean accuracy", *((percent(clean[0]), clean[1]) if clean else ()))


def _robust_entry(context: Context, run: Run) -> Markup:
    best = next(iter(_facts.headlines(run, context.runs)), None)
    if best is None:
        return _entry("Robust accuracy")
    evidence = _facts.evidence(best.evaluation, best.point.eps, short=True)
    return _entry("Robust accuracy", percent(best.point.robust_accuracy), evidence)


def _score_entry(run: Run) -> Markup:
    """The paper's variant is the one without BatchNorm; the other stands in for it."""
    for name in reversed(VARIANTS):
        variant = run.variant(name)
        if variant and variant.score:
            detail = f"{VARIANT_TITLES[name]}, {p_text(variant.score)}"
            return _entry("Clustering", score_text(variant.score, "difference"), detail)
    return _entry("Clustering")


def _entry(title: str, value: str = "", detail: str = "") -> Markup:
    shown = element("dd", value) if value else element("dd", "not measured", class_="none")
    return element("div", element("dt", title), shown, element("small", detail))


def _headline_table(context: Context) -> Markup:
    rows = []
    for run in context.runs:
        best = _facts.headlines(run, context.runs)
        clean = _facts.clean_accuracy(run)
        robust = (
            element(
                "div",
                element("b", percent(b.point.robust_accuracy)),
                element("span", _facts.evidence(b.evaluation, b.point.eps)),
                class_="measured",
            )
            for b in best
        )
        rows.append(
            (
                context.chip(run),
                run.setting("model", "name"),
                run.dataset,
                run.setting("objective", "name"),
                join(percent(clean[0]), element("small", clean[1])) if clean else "–",
                join(*robust) or "not measured",
                *(_difference(run.variant(name)) for name in VARIANTS),
            )
        )
    variants = (
        join("Within − between", element("small", VARIANT_TITLES[name])) for name in VARIANTS
    )
    head = ("Run", "Model", "Data set", "Method", "Clean", "Robust accuracy")
    return table(head + tuple(variants), rows, numeric=(4, 6, 7))


def _difference(variant: Variant | None) -> Markup:
    score = variant.score if variant else None
    if not score:
        return escape("–")
    return join(score_text(score, "difference"), element("small", p_text(score)))


def _notes(context: Context) -> Markup:
    lists = (
        ("Read with care", [line for run in context.runs for line in _remarks(context, run)]),
        ("Not measured", [line for run in context.runs for line in _missing(context, run)]),
    )
    cards = [
        element("div", element("h3", title), element("ul", *lines), class_="card notes")
        for title, lines in lists
        if lines
    ]
    if not cards:
        return Markup()
    return element("div", *cards, class_="grid two stack" if len(cards) == 2 else "stack")


def _remarks(context: Context, run: Run) -> list[Markup]:
    return [element("li", context.chip(run), " ", text) for text in _facts.remarks(run)]


def _missing(context: Context, run: Run) -> list[Markup]:
    """One line per command that would fill gaps of this run."""
    by_remedy: dict[Markup, dict[str, list[str]]] = {}
    for gap in _facts.gaps(run):
        by_remedy.setdefault(remedy(gap), {}).setdefault(gap.title, []).append(gap.variant)
    return [
        element(
            "li",
            context.chip(run),
            " ",
            ", ".join(
                # A part that both variants lack is named once.
                title if len(variants) > 1 else f"{title} {variants[0]}".strip()
                for title, variants in titles.items()
            ),
            " ",
            how,
        )
        for how, titles in by_remedy.items()
    ]
