"""The sections on training, attacks and settings."""

from typing import Any

from jaxclus.report import _charts, _facts, _images
from jaxclus.report._context import Context, lead
from jaxclus.report._facts import percent
from jaxclus.report._html import Markup, element, join, table, tree
from jaxclus.report._read import NORMS, Evaluation

_POINT = ("eps", "robust_accuracy", "largest_norm", "seconds", "images_per_second")


def training(context: Context) -> Markup:
    """Loss and accuracy over training, all runs in the same axes."""
    measured = any(
        run.series(key)[0].size
        for run in context.runs
        for key in ("loss", "accuracy", "validation_accuracy")
    )
    curves = Markup()
    if measured:
        plot = _charts.training_curves(context.runs, context.colours)
        curves = context.draw("training", plot, "training loss and accuracy", "", "")
    return join(
        lead(
            "Thin lines: training batches, as the running mean over 2 % of the points, on the "
            "pale raw values. Lines with dots: validation; dashed with dots: validation under "
            "attack."
        ),
        curves,
        context.all_lacking("training", "validation"),
    )


def robustness(context: Context) -> Markup:
    """Robust accuracy over eps as curves, then every figure in tables, one per norm."""
    parts = []
    if any(run.evaluations for run in context.runs):
        plot = _charts.robustness_curves(context.runs, context.colours)
        parts.append(context.draw("robustness", plot, "robust accuracy over eps", "", ""))
    for norm in NORMS:
        if any(e.norm == norm for run in context.runs for e in run.evaluations):
            parts.append(element("h3", f"Robust accuracy under {NORMS[norm]}"))
            parts.append(_curve_table(context, norm))
            parts.append(_member_table(context, norm))
            parts.append(_bracket_table(context, norm))
    return join(
        lead(
            "Share of images still classified correctly when an attack may change them by eps on "
            "the [0, 1] pixel scale; eps = 0 is the clean accuracy. ± and the bands are one "
            "binomial standard error. Certified images are those that no attack can break, "
            "undecided ones those that are neither certified nor broken."
        ),
        *parts,
        context.all_lacking("attacks"),
    )


def _curve_table(context: Context, norm: str) -> Markup:
    """One row per evaluation, one column per eps that any of them has."""
    shown = [(run, e) for run in context.runs for e in run.evaluations if e.norm == norm]
    radii: list[float] = []
    for eps in sorted(point.eps for _, e in shown for point in e.curve):
        if eps > 0 and not (radii and _facts.same_eps(radii[-1], eps)):
            radii.append(eps)
    rows = [
        (
            context.chip(run),
            join(
                e.attack, element("small", f"{run.dataset}, {e.num_images:,} images, seed {e.seed}")
            ),
            _cell(e, e.clean_accuracy),
            *(_at(e, eps) for eps in radii),
        )
        for run, e in shown
    ]
    head = ["Run", "Attack", join("Clean", element("small", "eps = 0"))]
    for eps in radii:
        first, second = _facts.eps_forms(eps, norm)
        head.append(join(f"{NORMS[norm]} {first}", element("small", second)))
    return table(head, rows, numeric=range(2, len(head)))


def _member_table(context: Context, norm: str) -> Markup:
    """Accuracy after each attack of the ensembles, a row for each radius; nothing without any."""
    rows = []
    for run in context.runs:
        for evaluation in run.evaluations:
            points = evaluation.record["curve"] if evaluation.norm == norm else []
            for point in points:
                members = point.get("members", [])
                if len(members) < 2:
                    continue
                after = ", ".join(f"{m['name']} {percent(m['robust_accuracy'])}" for m in members)
                seconds = ", ".join(f"{m['name']} {m['seconds']:,.0f}" for m in members)
                name = f"{_facts.attack_name(evaluation)}, {evaluation.num_images:,} images"
                radius = _facts.eps_text(point["eps"], norm)
                rows.append((context.chip(run), name, radius, after, seconds))
    head = ("Run", "Ensemble", "eps", "Accuracy after each attack", "Seconds")
    return table(head, rows, numeric=()) if rows else Markup()


def _bracket_table(context: Context, norm: str) -> Markup:
    """What is certified, broken and neither, a row for each attack; nothing without certificates.

    Certified images are what no attack breaks, so that the true robust accuracy is between these
    and these plus the undecided ones.
    """
    rows = []
    for run in context.runs:
        for found in (bracket for bracket in run.brackets if bracket["norm"] == norm):
            methods = ", ".join(
                f"{each['method']} {percent(each['certified_accuracy'])}"
                for each in found["methods"]
            )
            name = f"{found['attack'].split('(')[0]}, {found['num_images']:,} images"
            shares = (percent(found[share]) for share in ("undecided", "broken", "clean_accuracy"))
            certified = join(percent(found["certified_accuracy"]), element("small", methods))
            radius = _facts.eps_text(found["eps"], norm)
            rows.append((context.chip(run), name, radius, certified, *shares))
    head = ("Run", "Attack", "eps", "Certified", "Undecided", "Broken", "Clean")
    return table(head, rows, numeric=range(3, 7)) if rows else Markup()


def _at(evaluation: Evaluation, eps: float) -> Any:
    for point in evaluation.curve:
        if _facts.same_eps(point.eps, eps):
            return _cell(evaluation, point.robust_accuracy)
    return "–"


def _cell(evaluation: Evaluation, accuracy: float) -> Markup:
    error = 100 * _facts.standard_error(accuracy, evaluation.num_images)
    return join(percent(accuracy), element("small", f"± {error:.1f}"))


def examples(context: Context) -> Markup:
    """Attacked images with labels, predictions and magnified perturbations."""
    cards = []
    for run in context.runs:
        cards.append(context.lacks(run, "examples"))
        for evaluation in run.evaluations:
            stored = evaluation.examples
            if stored is None:
                continue
            count = len(stored.images)
            caption = (
                f"{_facts.evidence(evaluation, stored.eps)}. First "
                f"{min(count, _images.MOST_EXAMPLES)} of {count} stored images; perturbation "
                f"times {_images.magnification(stored)} about the neutral colour."
            )
            plot = _images.example_grid(stored, run.class_name)
            name = f"run{context.number(run)}-examples-{evaluation.path.stem}"
            alt = f"adversarial examples of {run.label}"
            header = context.header(run, NORMS[evaluation.norm])
            cards.append(context.draw(name, plot, alt, header, caption))
    return join(
        lead(
            "Above each column the true class, below an image the model's prediction: green if "
            "right, red if wrong."
        ),
        context.grid([card for card in cards if card]),
    )


def settings(context: Context) -> Markup:
    """Exactly what was run: commands, versions and configurations, folded."""
    blocks = []
    for run in context.runs:
        parts = [
            element("h3", "Directory"),
            element("code", run.directory),
            element("h3", "Command"),
            element("code", run.config.get("command") or "not recorded"),
            element("h3", "config.json"),
            tree(run.config),
        ]
        for evaluation in run.evaluations:
            parts.append(element("h3", f"attacks/{evaluation.path.name}"))
            parts.append(tree(_settings_of(evaluation)))
        if run.linear:
            parts.append(element("h3", "linear.json"))
            parts.append(tree(run.linear.record))
        title = element("summary", context.header(run, str(run.directory)))
        blocks.append(element("details", title, element("div", *parts)))
    return join(lead("Exactly what was run; open a run to see all of it."), *blocks)


def _settings_of(evaluation: Evaluation) -> dict[str, Any]:
    """The record without the verdicts on single images and what its points repeat."""
    curve = [{key: p[key] for key in _POINT if key in p} for p in evaluation.record["curve"]]
    return {**evaluation.record, "curve": curve}
