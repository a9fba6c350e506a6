"""What the page says in words: headline figures, remarks, gaps, and numbers as text."""

import dataclasses
import itertools
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxclus.report._read import NORMS, VARIANTS, Evaluation, Point, Run

VARIANT_TITLES = {"with_batch_norm": "with BatchNorm", "without_batch_norm": "without BatchNorm"}
# The radii most papers report, used only to choose which point of a curve is the headline.
_CUSTOMARY_EPS = {"linf": 8 / 255, "l2": 0.5, "l1": 12.0}
_AFFINE_TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Gap:
    """A part that a run lacks, and the command that makes it, or why none can.

    `part` is its key on the page; `variant` says of which sub-network it is, if of one.
    """

    part: str
    title: str
    command: str
    variant: str = ""
    reason: str = ""


def gaps(run: Run) -> tuple[Gap, ...]:
    """Every part of the page that this run has nothing for."""
    train, attack, evaluate, linearize = _commands(run)
    measured = run.series("loss")[0].size > 0
    found = []
    if not measured:
        found.append(Gap("training", "training curves", train))
    if not run.series("validation_accuracy")[0].size:
        # A finished run made without validation needs a held-out part of the training set.
        command = f"{train} --validation 0.05" if measured else train
        found.append(Gap("validation", "validation accuracy", command))
    if not run.evaluations:
        found.append(Gap("attacks", "robust accuracy", attack))
    if run.masking is None:
        found.append(Gap("masking", "masking checks", evaluate))
    if not any(evaluation.examples for evaluation in run.evaluations):
        found.append(Gap("examples", "adversarial examples", attack))
    found.extend(gap for name in VARIANTS for gap in _variant_gaps(run, name, linearize))
    if run.linear is None or run.linear.feature_distance is None:
        found.append(Gap("features", "feature distance", linearize))
    if run.linear is None or not run.linear.filters:
        found.append(Gap("filters", "filter correlations", linearize))
    return tuple(found)


def _variant_gaps(run: Run, name: str, linearize: str) -> Iterator[Gap]:
    title, variant = VARIANT_TITLES[name], run.variant(name)
    for part, words in (
        ("correlation", "correlation of the class weights"),
        ("linkage", "dendrogram"),
        ("weight", "weights as images"),
    ):
        if variant is None or getattr(variant, part) is None:
            yield Gap(f"{part}/{name}", words, linearize, title)
    if variant is not None and not any(run.groups):
        reason = f"{run.dataset} has no groups of classes to score"
        yield Gap(f"score/{name}", "clustering scores", "", title, reason)
    elif variant is None or not variant.score:
        yield Gap(f"score/{name}", "clustering scores", linearize, title)


def _commands(run: Run) -> tuple[str, str, str, str]:
    """The commands that train, attack, evaluate and linearize this run, as it was trained."""
    directory = shlex.quote(str(run.directory))
    train = str(run.config.get("command") or f"jaxclus train {shlex.quote(run.dataset)}")
    norm, eps = _trained_at(run)
    chosen = f"--norm {norm} --eps {eps}" if eps else "--eps 8/255"
    attack, evaluate = (f"jaxclus {word} {directory} {chosen}" for word in ("attack", "evaluate"))
    return train, attack, evaluate, f"jaxclus linearize {directory}"


def _trained_at(run: Run) -> tuple[str | None, float | None]:
    """Norm and eps of the attack that the run was trained on, as config.json has them."""
    objective = run.config.get("objective")
    if not isinstance(objective, Mapping) or not isinstance(objective.get("eps"), (int, float)):
        return None, None
    return objective.get("norm", "linf"), float(objective["eps"])


@dataclasses.dataclass(frozen=True, eq=False)
class Headline:
    """One robust accuracy: the lowest that any attack of the run reached at this norm and eps."""

    evaluation: Evaluation
    point: Point


def headlines(run: Run, runs: Sequence[Run]) -> tuple[Headline, ...]:
    """One figure per norm, at the eps that most runs on the same data set share.

    Among equally shared eps the one nearest to the largest that these runs were trained at is
    taken, or, if none was, to the customary 8/255 (Linf), 0.5 (L2) or 12 (L1); so the runs of a
    report are compared at the same radius.
    """
    peers = [other for other in runs if other.dataset == run.dataset]
    chosen = []
    for norm, customary in _CUSTOMARY_EPS.items():
        trained = [eps for peer in peers for its, eps in [_trained_at(peer)] if its == norm and eps]
        target = max(trained, default=customary)
        points = [Headline(e, p) for e in run.evaluations if e.norm == norm for p in e.curve]
        radii = {h.point.eps for h in points if h.point.eps > 0}
        if not radii:
            continue
        shares = {eps: sum(_measured(peer, norm, eps) for peer in peers) for eps in radii}
        ranks = {eps: (shares[eps], -abs(eps - target)) for eps in radii}
        best = max(radii, key=ranks.__getitem__)
        at_best = [h for h in points if same_eps(h.point.eps, best)]
        chosen.append(min(at_best, key=lambda h: h.point.robust_accuracy))
    return tuple(chosen)


def same_eps(a: float, b: float) -> bool:
    """Whether two radii are the same up to the rounding of float32."""
    return math.isclose(a, b, rel_tol=1e-6)


def _measured(run: Run, norm: str, eps: float) -> bool:
    return any(same_eps(p.eps, eps) for e in run.evaluations if e.norm == norm for p in e.curve)


def clean_accuracy(run: Run) -> tuple[float, str] | None:
    """The clean accuracy over the most images, and where it comes from."""
    if run.evaluations:
        best = max(run.evaluations, key=lambda e: e.num_images)
        return best.clean_accuracy, f"{best.num_images:,} images"
    _, _, values = run.series("validation_accuracy")
    return (float(values[-1]), "validation, last epoch") if values.size else None


def remarks(run: Run) -> tuple[str, ...]:
    """What a careful reader should know before believing this run's figures."""
    found = []
    for evaluation in run.evaluations:
        name = f"{evaluation.attack} ({evaluation.path.name})"
        for before, after in itertools.pairwise(evaluation.curve):
            if after.robust_accuracy > before.robust_accuracy:
                found.append(
                    f"{name}: robust accuracy rises from {percent(before.robust_accuracy)} at "
                    f"{eps_text(before.eps, evaluation.norm)} to {percent(after.robust_accuracy)} "
                    f"at {eps_text(after.eps, evaluation.norm)}: the attack is too weak, or "
                    "gradients are masked."
                )
                break
        for point in evaluation.curve:
            # 1e-6 absolute and 1e-5 relative are the tolerances of the evaluation itself.
            if point.largest_norm is not None and point.largest_norm > point.eps * 1.00001 + 1e-6:
                found.append(
                    f"{name}: the largest perturbation has {NORMS[evaluation.norm]} norm "
                    f"{point.largest_norm:.6g}, above eps = {point.eps:.6g}."
                )
    if run.evaluations and not any("autoattack" in e.attack.lower() for e in run.evaluations):
        found.append(
            "No AutoAttack among the evaluations: the robust accuracy is an upper bound "
            "that a stronger attack may lower."
        )
    for name, variant in (run.linear.variants if run.linear else {}).items():
        if variant.affine_error is not None and variant.affine_error > _AFFINE_TOLERANCE:
            found.append(
                f"Linear sub-network {VARIANT_TITLES.get(name, name)}: affine error "
                f"{variant.affine_error:.2g} is above {_AFFINE_TOLERANCE:g}."
            )
    return tuple(found)


def percent(value: float | None) -> str:
    """0.473 as "47.3 %"; a dash for None."""
    return "–" if value is None else f"{100 * value:.1f} %"


def standard_error(accuracy: float, num_images: int) -> float:
    """The binomial standard error of an accuracy over `num_images` images."""
    return math.sqrt(accuracy * (1 - accuracy) / num_images)


def eps_text(eps: float, norm: str) -> str:
    """The radius in both forms, as in "8/255 (0.03137)"."""
    first, second = eps_forms(eps, norm)
    return f"{first} ({second})"


def eps_forms(eps: float, norm: str) -> tuple[str, str]:
    """The radius in pixel steps and as a float, the customary one first."""
    steps, plain = f"{eps * 255:.4g}/255", f"{eps:.4g}"
    return (steps, plain) if norm == "linf" else (plain, steps)


def evidence(evaluation: Evaluation, eps: float, short: bool = False) -> str:
    """Norm, eps, attack, number of images and seed: what makes a robust accuracy a figure."""
    attack = attack_name(evaluation) if short else evaluation.attack
    return (
        f"{NORMS[evaluation.norm]}, eps = {eps_text(eps, evaluation.norm)}, "
        f"{attack}, {evaluation.num_images:,} images, seed {evaluation.seed}"
    )


def score_text(score: Mapping[str, Any] | None, key: str) -> str:
    """One entry of a clustering score; a dash where it is unknown."""
    value = None if score is None else score.get(key)
    if value is None:
        return "–"
    if key in ("p_value", "smallest_p"):
        return f"{value:.2g}"
    return f"{value:.3f}".replace("-", "−")


def p_text(score: Mapping[str, Any]) -> str:
    """The p-value as "p = 0.0048", never broken over two lines."""
    return f"p\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{score_text(score, 'p_value')}"


def attack_name(evaluation: Evaluation) -> str:
    """The attack without its settings: "PGD" for "PGD(steps=20)"."""
    return evaluation.attack.split("(")[0].strip()


def legend_name(evaluation: Evaluation, evaluations: Sequence[Evaluation]) -> str:
    """The attack's name, with its file's where several evaluations share it."""
    name = attack_name(evaluation)
    shared = sum(attack_name(other) == name for other in evaluations) > 1
    return f"{name}, {evaluation.path.stem}" if shared else name
