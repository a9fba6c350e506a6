"""The sections on the linear sub-network: correlations, trees, weights, features, scores."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxclus.report import _charts, _images
from jaxclus.report._colours import class_colours
from jaxclus.report._context import Context, lead
from jaxclus.report._facts import VARIANT_TITLES, p_text, score_text
from jaxclus.report._html import Markup, element, join, table
from jaxclus.report._read import VARIANTS, Run, Variant

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SCORES = (
    ("within", "Within", "mean of C over pairs of different classes of the same group"),
    ("between", "Between", "mean of C over pairs of classes of different groups"),
    ("difference", "Difference", "within minus between; above 0 if weights cluster by meaning"),
    (
        "p_value",
        "p",
        "share of the labellings with groups of these sizes whose difference is at least as large",
    ),
    ("smallest_p", "Smallest p", "the lowest p that groups of these sizes allow at all"),
    (
        "cophenetic",
        "Cophenetic",
        "correlation of the heights at which classes join in the tree with 1 − C; 1 is best",
    ),
    (
        "adjusted_rand",
        "ARI",
        "adjusted Rand index of the tree, cut into as many clusters as there are groups, with the "
        "groups: 1 the same, 0 as by chance",
    ),
    ("silhouette", "Silhouette", "mean silhouette of the groups on 1 − C, from −1 to 1"),
)
_OTHER_TERMS = (
    (
        "Labellings",
        "how many labellings p was counted over: all there are, or some drawn at random",
    ),
    (
        "Affine error",
        "largest error of W x + b against the sub-network on images, relative to its largest "
        "output; at most 1e-4 is rounding",
    ),
)


def _variant_cards(
    context: Context,
    part: str,
    title: str,
    plot: Callable[[Variant, Sequence[str], Sequence[str]], "Figure"],
    caption: Callable[[Variant], str],
) -> Markup:
    """A plot of every variant of every run, or the card that says it is missing."""

    def card(run: Run, name: str) -> Markup:
        variant = run.variant(name)
        if run.linear is None or variant is None or getattr(variant, part) is None:
            return context.lacks(run, f"{part}/{name}")
        drawn = plot(variant, run.linear.class_names, class_colours(run))
        return context.draw(
            f"run{context.number(run)}-{title}-{name}",
            drawn,
            f"{title} of {run.label}, {VARIANT_TITLES[name]}",
            context.header(run, VARIANT_TITLES[name]),
            caption(variant),
        )

    return context.rows(
        [(VARIANT_TITLES[name], [card(run, name) for run in context.runs]) for name in VARIANTS]
    )


def correlation(context: Context) -> Markup:
    """C as heat maps in the order of the dendrogram."""

    def plot(variant: Variant, names: Sequence[str], colours: Sequence[str]) -> "Figure":
        assert variant.correlation is not None
        return _charts.heat_map(variant.correlation, names, colours, variant.order, signed=True)

    return join(
        lead(
            "Cosine C between the rows of the implicit weight W of the linear sub-network, one row "
            "per class. Red: similar, white: unrelated, blue: opposed. Rows and columns stand in "
            "the order of each run's own dendrogram; names have the colour of their group."
        ),
        context.group_legend(),
        _variant_cards(context, "correlation", "correlation", plot, _score_caption),
    )


def _score_caption(variant: Variant) -> str:
    return _brief(variant.score) or "No clustering score: the classes have no groups."


def _brief(score: Mapping[str, Any] | None) -> str:
    """Difference first, since that is the score; then what it is made of."""
    if not score:
        return ""
    return (
        f"Difference {score_text(score, 'difference')} = within {score_text(score, 'within')} − "
        f"between {score_text(score, 'between')}; {p_text(score)} (smallest possible "
        f"{score_text(score, 'smallest_p')})"
    )


def dendrograms(context: Context) -> Markup:
    """The trees that order the heat maps."""

    def plot(variant: Variant, names: Sequence[str], colours: Sequence[str]) -> "Figure":
        assert variant.linkage is not None
        return _charts.dendrogram(variant.linkage, names, colours)

    def caption(variant: Variant) -> str:
        if not variant.score:
            return ""
        return (
            f"Cophenetic correlation {score_text(variant.score, 'cophenetic')}, adjusted Rand "
            f"index {score_text(variant.score, 'adjusted_rand')}, silhouette "
            f"{score_text(variant.score, 'silhouette')}"
        )

    return join(
        lead(
            "Average linkage on 1 − C: classes that join far to the left have similar weights. A "
            "branch has a group's colour as long as all its leaves belong to that group."
        ),
        context.group_legend(),
        _variant_cards(context, "linkage", "dendrogram", plot, caption),
    )


def weights(context: Context) -> Markup:
    """The rows of W as images."""

    def plot(variant: Variant, names: Sequence[str], colours: Sequence[str]) -> "Figure":
        assert variant.weight is not None
        return _images.weight_images(variant.weight, names, colours)

    def caption(variant: Variant) -> str:
        return f"Affine error {_error(variant)}"

    return join(
        lead(
            "Rows of W as images, each scaled symmetrically about 0 by the 99.5th percentile of "
            "its |w|. Colour images: mid-grey is 0, a brighter channel raises the logit of the "
            "class and a darker one lowers it. One channel: white is 0, red raises, blue lowers."
        ),
        _variant_cards(context, "weight", "weights", plot, caption),
    )


def features(context: Context) -> Markup:
    """F, raw and as the paper's code computes it."""
    raw = [context.lacks(run, "features") or _feature_card(context, run) for run in context.runs]
    published = [_feature_card(context, run, as_published=True) for run in context.runs]
    return join(
        lead(
            "Mean squared distance F between the mean outputs of the full network for two classes: "
            "light is near, dark is far, each matrix on its own scale. Classes stand in the order "
            "of the run's first heat map of C. As published: from the first 128 images of each "
            "class, every row divided by its own maximum."
        ),
        context.group_legend(),
        context.rows([("F", raw), ("F as published", published)]),
    )


def _feature_card(context: Context, run: Run, as_published: bool = False) -> Markup:
    linear = run.linear
    if linear is None:
        return Markup()
    matrix = linear.feature_distance_as_published if as_published else linear.feature_distance
    if matrix is None:
        return Markup()
    orders = [variant.order for variant in linear.variants.values() if variant.order is not None]
    colours = class_colours(run)
    order = orders[0] if orders else None
    plot = _charts.heat_map(matrix, linear.class_names, colours, order, signed=False)
    title = "F as published" if as_published else "F"
    return context.draw(
        f"run{context.number(run)}-features{'-as-published' if as_published else ''}",
        plot,
        f"{title} of {run.label}",
        context.header(run, title),
        "" if as_published or linear.num_images is None else f"{linear.num_images:,} images",
    )


def filters(context: Context) -> Markup:
    """How far the filters of each layer are from orthogonal."""
    cards = []
    for run in context.runs:
        cards.append(context.lacks(run, "filters"))
        if run.linear and run.linear.filters:
            plot = _charts.filter_maps(run.linear.filters)
            name, alt = f"run{context.number(run)}-filters", f"filters of {run.label}"
            cards.append(context.draw(name, plot, alt, context.header(run), ""))
    return join(
        lead(
            "Absolute cosine between the filters of each layer, off the diagonal: white is "
            "orthogonal, dark red the same up to sign. The number of filters in brackets."
        ),
        context.grid([card for card in cards if card]),
    )


def scores(context: Context) -> Markup:
    """Every clustering score, and what the columns mean."""
    rows = []
    for run in context.runs:
        for name in VARIANTS:
            variant = run.variant(name)
            score = variant.score if variant else None
            rows.append(
                (
                    context.chip(run),
                    VARIANT_TITLES[name],
                    *(score_text(score, key) for key, _, _ in _SCORES),
                    _labellings(score),
                    _error(variant),
                )
            )
    head = ("Run", "Sub-network", *(title for _, title, _ in _SCORES), "Labellings", "Affine error")
    terms = [(title, words) for _, title, words in _SCORES] + list(_OTHER_TERMS)
    return join(
        lead("How far the class weights cluster by groups of classes that were fixed beforehand."),
        table(head, rows, numeric=range(2, len(head))),
        context.all_lacking(*(f"score/{name}" for name in VARIANTS)),
        element(
            "dl",
            *(join(element("dt", term), element("dd", words)) for term, words in terms),
            class_="terms",
        ),
    )


def _labellings(score: Mapping[str, Any] | None) -> str:
    if not score or score.get("num_labellings") is None:
        return "–"
    return f"{score['num_labellings']:,} {'(all)' if score.get('exact') else '(drawn)'}"


def _error(variant: Variant | None) -> str:
    if variant is None or variant.affine_error is None:
        return "–"
    return f"{variant.affine_error:.1e}".replace("-", "−")
