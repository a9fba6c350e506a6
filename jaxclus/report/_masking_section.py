"""The section on masked gradients and failing attacks."""

from typing import TYPE_CHECKING, Any

import numpy as np

from jaxclus.report import _charts, _facts
from jaxclus.report._context import Context, lead
from jaxclus.report._html import Markup, element, join, table
from jaxclus.report._read import NORMS, Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def masking(context: Context) -> Markup:
    """What speaks against a run's robust accuracies, with the curves behind it."""
    parts = []
    for run in context.runs:
        record = run.masking
        if record is None:
            continue
        header = context.header(run, _evidence(record))
        plot = _curves(run, context.colour(run))
        name = f"run{context.number(run)}-masking"
        alt = f"loss over iterations and accuracy over eps of {run.label}"
        parts.append(context.draw(name, plot, alt, header, ""))
        parts.append(_findings(record))
        parts.append(_checks(record))
    return join(
        lead(
            "An attack that fails says nothing about robustness. Masked gradients, a search that "
            "has not converged, or an accuracy that does not fall to 0 at large eps are signs "
            "that a stronger or an adaptive attack would break more images."
        ),
        *parts,
        context.all_lacking("masking"),
    )


def _evidence(record: Any) -> str:
    return (
        f"{NORMS[record['norm']]}, eps = {_facts.eps_text(record['eps'], record['norm'])}, "
        f"{record['attack'].split('(')[0]}, {record['num_images']:,} images"
    )


def _findings(record: Any) -> Markup:
    """The findings with their advice, or that there are none."""
    if not record["findings"]:
        return element("p", f"None of {len(record['checks'])} checks found anything.")
    rows = [
        (finding["severity"], finding["name"], finding["detail"], finding["advice"])
        for finding in record["findings"]
    ]
    return table(("Severity", "Finding", "Seen", "Try next"), rows, numeric=())


def _checks(record: Any) -> Markup:
    """All figures and limits, and what did not run, folded."""
    rows = [
        (check["name"], f"{check['figure']:.3g}", f"{check['limit']:g}", check["unit"])
        for check in record["checks"]
    ]
    rows += [(name, "not run", "", reason) for name, reason in record["not_run"].items()]
    body = table(("Check", "Figure", "Limit", "What it is"), rows, numeric=(1, 2))
    return element("details", element("summary", "All checks"), element("div", body))


def _curves(run: Run, colour: str) -> "Figure":
    """The attack's loss over its steps, and accuracy over eps up to the whole box."""
    assert run.masking is not None
    record = run.masking
    figure = _charts.blank_figure(13.0, 3.4, "constrained")
    losses, accuracy = figure.subplots(1, 2)
    loss = {name: np.array(values, float) for name, values in record["loss"].items()}
    steps = np.arange(len(loss["median"]))
    losses.fill_between(steps, loss["low"], loss["high"], color=colour, alpha=0.15, linewidth=0)
    losses.plot(steps, loss["median"], color=colour)
    losses.set_title("Loss of the attack: median and spread over the images", loc="left")
    losses.set_xlabel("step")
    losses.grid(True, axis="y")
    eps, robust = record["accuracy"]["eps"], record["accuracy"]["robust"]
    accuracy.plot(eps, robust, color=colour, marker="o")
    accuracy.axvline(record["eps"], color=_charts.MUTED, linestyle=":")
    accuracy.set_title("Robust accuracy over eps; the last is the whole box", loc="left")
    accuracy.set_xlabel(f"eps ({NORMS[record['norm']]})")
    _charts.percent_axis(accuracy)
    return figure
