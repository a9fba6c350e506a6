"""The page: sections from top to bottom, each a function of the runs."""

import base64
import dataclasses
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxclus.report import _charts, _facts, _images
from jaxclus.report._colours import class_colours, group_colours, run_colours
from jaxclus.report._facts import VARIANT_TITLES, percent, score_text
from jaxclus.report._html import Markup, chip, document, element, escape, figure, join, table, tree
from jaxclus.report._read import NORMS, VARIANTS, Run, Variant, read_runs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SCORES = (
    ("within", "Within", "mean of C over pairs of different classes of the same group"),
    ("between", "Between", "mean of C over pairs of classes of different groups"),
    ("difference", "Difference", "within minus between; above 0 if weights cluster by meaning"),
    (
        "p_value",
        "p",
        "share of all ways to deal the classes into groups of these sizes whose difference is at "
        "least as large",
    ),
    ("smallest_p", "Smallest p", "the lowest p that these group sizes allow at all"),
    ("cophenetic", "Cophenetic", "correlation of the tree's joining heights with 1 − C; 1 is best"),
    (
        "adjusted_rand",
        "ARI",
        "adjusted Rand index of the tree, cut at the number of groups, with the groups: "
        "1 the same, 0 by chance",
    ),
    ("silhouette", "Silhouette", "mean silhouette of the groups on 1 − C, from −1 to 1"),
)


@dataclasses.dataclass(frozen=True)
class _Context:
    """What all sections share: the runs, their colours, and where figures go."""

    runs: tuple[Run, ...]
    colours: tuple[str, ...]
    groups: Mapping[str, str]
    directory: Path

    def chip(self, run: Run) -> Markup:
        """The run's name behind a dot in its colour."""
        return chip(run.label, self.colours[self.runs.index(run)])

    def draw(self, name: str, plot: "Figure", alt: str, header: Any, caption: Any) -> Markup:
        """Writes the plot as `figures/<name>.png` and returns the card that shows it."""
        path = self.directory / f"{name}.png"
        plot.savefig(path)
        source = base64.b64encode(path.read_bytes()).decode("ascii")
        return figure(source, alt, header, caption)

    def lacks(self, run: Run, part: str) -> Markup:
        """A card that says what is missing and how to make it; empty if nothing is."""
        return join(
            element(
                "div",
                self.chip(run),
                element("p", f"{gap.title}: not measured: run ", element("code", gap.command)),
                class_="card missing",
            )
            for gap in _facts.gaps(run)
            if gap.part == part
        )

    def grid(self, cards: Sequence[Markup]) -> Markup:
        """Cards side by side, as many in a row as read well."""
        name = {1: "grid alone", 3: "grid three", 5: "grid three", 6: "grid three"}
        return element("div", *cards, class_=name.get(len(cards), "grid two"))

    def per_variant(self, card: Callable[[Run, str], Markup]) -> Markup:
        """One grid of runs for each variant; a single run has its variants side by side."""
        if len(self.runs) == 1:
            return self.grid([card(self.runs[0], variant) for variant in VARIANTS])
        return join(
            element("h3", VARIANT_TITLES[variant].capitalize())
            + self.grid([card(run, variant) for run in self.runs])
            for variant in VARIANTS
        )

    def group_legend(self) -> Markup:
        """The colours of the class groups."""
        chips = [chip(name, colour) for name, colour in self.groups.items()]
        return element("div", *chips, class_="chips") if chips else Markup()


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
        ValueError: if `runs` is empty or holds something that is no run directory or unreadable.
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
        context = _Context(read, run_colours(len(read)), group_colours(read), figures)
        with _charts.style(), warnings.catch_warnings():
            # A name in a script that the font lacks is drawn as boxes; the page itself has it.
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            text = _document(context)
        page.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OSError(f"`output` {output} cannot be written: {error}") from error
    return page


def _document(context: _Context) -> str:
    sections = (
        ("training", "Training", _training),
        ("robustness", "Robust accuracy", _robustness),
        ("examples", "Adversarial examples", _examples),
        ("correlation", "Correlation of class weights", _correlation),
        ("dendrograms", "Dendrograms", _dendrograms),
        ("weights", "Class weights", _weights),
        ("features", "Feature distance", _features),
        ("filters", "Filters", _filters),
        ("scores", "Clustering scores", _scores),
        ("settings", "Settings", _settings),
    )
    count = len(context.runs)
    names = ", ".join(run.label for run in context.runs)
    links = [element("a", title, href=f"#{key}") for key, title, _ in sections]
    return document(
        f"jaxclus report: {names}",
        element("nav", element("div", element("b", "jaxclus"), *links)),
        element(
            "main",
            element("h1", "Robustness and clustering", f" of {count} runs" if count > 1 else ""),
            _summary(context),
            *(
                element("section", element("h2", title), section(context), id=key)
                for key, title, section in sections
            ),
            element(
                "footer",
                "Written by jaxclus.report from the files of the run directories. "
                "Accuracies are point estimates; ± is one binomial standard error.",
            ),
        ),
    )


def _lead(*text: Any) -> Markup:
    return element("p", *text, class_="lead")


def _summary(context: _Context) -> Markup:
    datasets = sorted({run.dataset for run in context.runs})
    lead = _lead(
        f"Data: {', '.join(datasets)}. Robust accuracy is the lowest that any attack of the run "
        "reached, at the eps that most runs on the data set share."
    )
    tiles = element("div", *(_tile(context, run) for run in context.runs), class_="tiles")
    return join((lead, tiles, _headline_table(context), _notes(context)))


def _tile(context: _Context, run: Run) -> Markup:
    def entry(title: str, value: str, detail: str) -> Markup:
        known = value != "–"
        shown = element("dd", value if known else "not measured", class_=None if known else "none")
        return element("div", element("dt", title), shown, element("small", detail))

    clean = _facts.clean_accuracy(run)
    entries = [entry("Clean accuracy", percent(clean[0]), clean[1])] if clean else []
    entries = entries or [entry("Clean accuracy", "–", "")]
    best = _facts.headlines(run, context.runs)
    if best:
        point, evaluation = best[0].point, best[0].evaluation
        norm, attack = NORMS[evaluation.norm], evaluation.attack.split("(")[0]
        detail = f"{norm} {_facts.eps_text(point.eps, evaluation.norm)}, {attack}"
        entries.append(entry("Robust accuracy", percent(point.robust_accuracy), detail))
    else:
        entries.append(entry("Robust accuracy", "–", ""))
    score = _first_score(run)
    detail = f"within − between, p = {score_text(score, 'p_value')}" if score else ""
    entries.append(entry("Clustering", score_text(score, "difference"), detail))
    about = " · ".join(
        (run.setting("dataset", "name"), run.setting("model", "name"), _method(run))
    )
    return element(
        "div",
        element("h3", run.label),
        element("p", about),
        element("dl", *entries),
        class_="card tile",
        style=f"--run:{context.colours[context.runs.index(run)]}",
    )


def _method(run: Run) -> str:
    return run.setting("objective", "name")


def _variant(run: Run, name: str) -> Variant | None:
    return run.linear.variants.get(name) if run.linear else None


def _first_score(run: Run) -> Mapping[str, Any] | None:
    """The paper's variant is the one without BatchNorm; the other stands in for it."""
    for name in reversed(VARIANTS):
        variant = _variant(run, name)
        if variant and variant.score:
            return variant.score
    return None


def _headline_table(context: _Context) -> Markup:
    rows = []
    for run in context.runs:
        best = _facts.headlines(run, context.runs)
        clean = _facts.clean_accuracy(run)
        clean_cell = join((percent(clean[0]), element("small", clean[1]))) if clean else "–"
        rows.append(
            (
                context.chip(run),
                run.setting("model", "name"),
                run.setting("dataset", "name"),
                _method(run),
                clean_cell,
                join(element("div", percent(b.point.robust_accuracy)) for b in best) or "–",
                join(element("div", _facts.evidence(b.evaluation, b.point.eps)) for b in best)
                or "not measured",
                *(_difference(_variant(run, name)) for name in VARIANTS),
            )
        )
    head = (
        "Run",
        "Model",
        "Data set",
        "Method",
        "Clean accuracy",
        "Robust accuracy",
        "Measured with",
        *(
            join(("Within − between", element("small", VARIANT_TITLES[name])))
            for name in VARIANTS
        ),
    )
    return element("div", table(head, rows, numeric=(4, 5, 7, 8)), class_="stack")


def _difference(variant: Variant | None) -> Markup:
    score = variant.score if variant else None
    if not score:
        return escape("–")
    p = element("small", f"p = {score_text(score, 'p_value')}")
    return join((score_text(score, "difference"), p))


def _notes(context: _Context) -> Markup:
    remarks = [
        element("li", context.chip(run), " ", remark)
        for run in context.runs
        for remark in _facts.remarks(run)
    ]
    missing = []
    for run in context.runs:
        commands: dict[str, list[str]] = {}
        for gap in _facts.gaps(run):
            commands.setdefault(gap.command, []).append(gap.title)
        missing.extend(
            element("li", context.chip(run), f" {', '.join(parts)}: run ", element("code", command))
            for command, parts in commands.items()
        )
    cards = [
        element("div", element("h3", title), element("ul", *lines), class_="card notes")
        for title, lines in (("Read with care", remarks), ("Not measured", missing))
        if lines
    ]
    if not cards:
        return Markup()
    name = "grid two stack" if len(cards) == 2 else "stack"
    return element("div", *cards, class_=name)


def _all_lacking(context: _Context, part: str) -> Markup:
    cards = [card for run in context.runs if (card := context.lacks(run, part))]
    return element("div", context.grid(cards), class_="stack") if cards else Markup()


def _training(context: _Context) -> Markup:
    parts = [
        _lead(
            "Thin lines: training batches (their running mean over 2 % of the points, the raw "
            "values pale). Lines with dots: validation; dashed with dots: validation under attack."
        )
    ]
    measured = ("loss", "accuracy", "validation_accuracy")
    if any(run.series(key)[0].size for run in context.runs for key in measured):
        plot = _charts.training_curves(context.runs, context.colours)
        parts.append(context.draw("training", plot, "training loss and accuracy", "", ""))
    parts += [_all_lacking(context, part) for part in ("training", "validation")]
    return join(parts)


def _robustness(context: _Context) -> Markup:
    parts = [
        _lead(
            "Share of images still classified correctly when an attack may change them by eps. "
            "Point 0 is the clean accuracy; the bands are one binomial standard error."
        )
    ]
    if any(run.evaluations for run in context.runs):
        plot = _charts.robustness_curves(context.runs, context.colours)
        parts.append(context.draw("robustness", plot, "robust accuracy over eps", "", ""))
        parts.append(element("div", _evaluation_table(context), class_="stack"))
    parts.append(_all_lacking(context, "attacks"))
    return join(parts)


def _evaluation_table(context: _Context) -> Markup:
    rows = []
    for run in context.runs:
        for evaluation in run.evaluations:
            for i, point in enumerate(evaluation.curve):
                error = _facts.standard_error(point.robust_accuracy, evaluation.num_images)
                first = i == 0
                rows.append(
                    (
                        context.chip(run) if first else "",
                        evaluation.attack if first else "",
                        f"{NORMS[evaluation.norm]}, {_facts.eps_text(point.eps, evaluation.norm)}",
                        percent(point.robust_accuracy),
                        f"± {100 * error:.1f}",
                        percent(evaluation.clean_accuracy),
                        f"{evaluation.num_images:,}",
                        evaluation.seed,
                        "–" if point.largest_norm is None else f"{point.largest_norm:.5g}",
                        "–" if point.images_per_second is None else f"{point.images_per_second:.4g}",
                    )
                )
    head = ("Run", "Attack", "Norm, eps", "Robust", "", "Clean", "Images", "Seed")
    head += ("Largest norm", "Images/s")
    return table(head, rows, numeric=range(3, 10))


def _examples(context: _Context) -> Markup:
    cards = []
    for number, run in enumerate(context.runs, 1):
        attacked = [e for e in run.evaluations if e.examples and len(e.examples.images)]
        for evaluation in attacked:
            examples = evaluation.examples
            assert examples is not None
            shown = min(len(examples.images), _images.MOST_EXAMPLES)
            caption = (
                f"{_facts.evidence(evaluation, examples.eps)}. First {shown} of "
                f"{len(examples.images)} stored images; perturbation times "
                f"{_images.magnification(examples)} around the neutral colour."
            )
            plot = _images.example_grid(examples, run.class_name)
            name = f"run{number}-examples-{evaluation.path.stem}"
            alt = f"adversarial examples of {run.label}"
            cards.append(context.draw(name, plot, alt, context.chip(run), caption))
        if not attacked:
            cards.append(context.lacks(run, "examples"))
    lead = _lead(
        "Above each image its label, below it the model's prediction: green if right, red if wrong."
    )
    return lead + context.grid(cards)


def _header(context: _Context, run: Run, *details: str) -> Markup:
    return join((context.chip(run), *(element("span", detail) for detail in details)))


def _variant_card(
    context: _Context,
    run: Run,
    name: str,
    part: str,
    title: str,
    plot: Callable[[Variant, Sequence[str], Sequence[str]], "Figure"],
    caption: Callable[[Variant], str],
) -> Markup:
    """One plot of one variant of one run, or the card that says it is missing."""
    variant = _variant(run, name)
    if run.linear is None or variant is None or getattr(variant, part) is None:
        return context.lacks(run, f"{part}/{name}")
    colours = class_colours(run, dict(context.groups))
    drawn = plot(variant, run.linear.class_names, colours)
    file = f"run{context.runs.index(run) + 1}-{title}-{name}"
    alt = f"{title} of {run.label}, {VARIANT_TITLES[name]}"
    header = _header(context, run, VARIANT_TITLES[name])
    return context.draw(file, drawn, alt, header, caption(variant))


def _score_caption(variant: Variant) -> str:
    if not variant.score:
        return "No clustering score: the classes have no groups."
    values = {key: score_text(variant.score, key) for key, _, _ in _SCORES}
    return (
        f"within {values['within']}, between {values['between']}, "
        f"difference {values['difference']}, p = {values['p_value']} "
        f"(smallest possible {values['smallest_p']})"
    )


def _correlation(context: _Context) -> Markup:
    def card(run: Run, name: str) -> Markup:
        def plot(variant: Variant, names: Sequence[str], colours: Sequence[str]) -> "Figure":
            assert variant.correlation is not None
            return _charts.heat_map(
                variant.correlation, names, colours, variant.order, signed=True
            )

        return _variant_card(context, run, name, "correlation", "correlation", plot, _score_caption)

    lead = _lead(
        "Cosine between the rows of the implicit weight W of the linear sub-network, one row per "
        "class. Red: similar, blue: opposed, white: unrelated. Rows and columns stand in the "
        "order of each run's own dendrogram; names have the colour of their group."
    )
    return lead + context.group_legend() + context.per_variant(card)


def _dendrograms(context: _Context) -> Markup:
    def card(run: Run, name: str) -> Markup:
        def plot(variant: Variant, names: Sequence[str], colours: Sequence[str]) -> "Figure":
            assert variant.linkage is not None
            return _charts.dendrogram(variant.linkage, names, colours)

        def caption(variant: Variant) -> str:
            score = variant.score
            return (
                f"cophenetic correlation {score_text(score, 'cophenetic')}, "
                f"adjusted Rand index {score_text(score, 'adjusted_rand')}, "
                f"silhouette {score_text(score, 'silhouette')}"
            )

        return _variant_card(context, run, name, "linkage", "dendrogram", plot, caption)

    lead = _lead(
        "Average linkage on 1 − C: classes that join far to the left have similar weights. A branch "
        "has a group's colour as long as all its leaves belong to that group."
    )
    return lead + context.group_legend() + context.per_variant(card)


def _weights(context: _Context) -> Markup:
    def card(run: Run, name: str) -> Markup:
        def plot(variant: Variant, names: Sequence[str], colours: Sequence[str]) -> "Figure":
            assert variant.weight is not None
            return _images.weight_images(variant.weight, names, colours)

        def caption(variant: Variant) -> str:
            error = variant.affine_error
            return f"affine error {'–' if error is None else f'{error:.2g}'}"

        return _variant_card(context, run, name, "weight", "weights", plot, caption)

    lead = _lead(
        "Rows of W as images. Each is scaled symmetrically about 0 by the 99.5th percentile of its "
        "|w|: mid-grey (white for one channel) is 0; brighter (red) raises the class's logit, "
        "darker (blue) lowers it. RGB channels are scaled together."
    )
    return lead + context.per_variant(card)


def _features(context: _Context) -> Markup:
    cards = []
    for number, run in enumerate(context.runs, 1):
        linear = run.linear
        if linear is None or linear.feature_distance is None:
            cards.append(context.lacks(run, "features"))
            continue
        colours = class_colours(run, dict(context.groups))
        variant = next(iter(linear.variants.values()), None)
        order = variant.order if variant else None
        for key, title, matrix in (
            ("features", "F", linear.feature_distance),
            ("features-as-published", "F as published", linear.feature_distance_as_published),
        ):
            if matrix is None:
                continue
            score = linear.feature_score
            caption = f"{linear.num_images or '–'} images" + (
                f"; within {score_text(score, 'within')}, between {score_text(score, 'between')}, "
                f"difference {score_text(score, 'difference')}, p = {score_text(score, 'p_value')}"
                if score and key == "features"
                else ""
            )
            plot = _charts.heat_map(matrix, linear.class_names, colours, order, signed=False)
            header = _header(context, run, title)
            alt = f"feature distance of {run.label}"
            cards.append(context.draw(f"run{number}-{key}", plot, alt, header, caption))
    lead = _lead(
        "Distance between the classes in the feature space of the full network: light is near, "
        "dark is far; each matrix has its own scale. Same order of classes as above."
    )
    return lead + context.group_legend() + context.grid(cards)


def _filters(context: _Context) -> Markup:
    cards = []
    for number, run in enumerate(context.runs, 1):
        if run.linear is None or not run.linear.filters:
            cards.append(context.lacks(run, "filters"))
            continue
        plot = _charts.filter_maps(run.linear.filters)
        header, alt = _header(context, run), f"filter correlations of {run.label}"
        cards.append(context.draw(f"run{number}-filters", plot, alt, header, ""))
    lead = _lead("Correlation between the filters of each convolution, on the same colours as C.")
    return lead + context.grid(cards)


def _scores(context: _Context) -> Markup:
    rows = []
    for run in context.runs:
        for i, name in enumerate(VARIANTS):
            variant = _variant(run, name)
            score = variant.score if variant else None
            error = variant.affine_error if variant else None
            rows.append(
                (
                    context.chip(run) if i == 0 else "",
                    VARIANT_TITLES[name],
                    *(score_text(score, key) for key, _, _ in _SCORES),
                    _labellings(score),
                    "–" if error is None else f"{error:.1g}",
                )
            )
    head = ("Run", "Sub-network", *(title for _, title, _ in _SCORES), "Labellings", "Affine error")
    terms = [
        (title, words) for _, title, words in _SCORES
    ] + [
        ("Labellings", "how many group labellings p was counted over, and whether that is all"),
        (
            "Affine error",
            "relative error of W x + b against the sub-network at random points; 1e-4 is allowed",
        ),
    ]
    lacking = [
        _all_lacking(context, f"score/{name}") for name in VARIANTS
    ]
    return join(
        (
            _lead("How far the class weights cluster by the groups fixed beforehand."),
            table(head, rows, numeric=range(2, 2 + len(_SCORES) + 2)),
            *lacking,
            element(
                "dl",
                *(element("dt", term) + element("dd", words) for term, words in terms),
                class_="terms",
            ),
        )
    )


def _labellings(score: Mapping[str, Any] | None) -> str:
    if not score or score.get("num_labellings") is None:
        return "–"
    return f"{score['num_labellings']:,} ({'all' if score.get('exact') else 'drawn'})"


def _settings(context: _Context) -> Markup:
    blocks = []
    for run in context.runs:
        parts = [
            element("h3", "Directory"),
            element("code", run.directory),
            element("h3", "Command"),
            element("code", run.setting("command", "command")),
            element("h3", "config.json"),
            tree(run.config),
        ]
        for evaluation in run.evaluations:
            parts.append(element("h3", f"attacks/{evaluation.path.name}"))
            parts.append(tree(evaluation.record))
        blocks.append(
            element("details", element("summary", context.chip(run)), element("div", *parts))
        )
    return _lead("Exactly what was run; open a run to see it all.") + join(blocks)
