"""Whether a robust accuracy can be believed: checks for masked gradients and failing attacks."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxclus import _checks, _classifier, compose, losses, runs
from jaxclus._classifier import Classifier
from jaxclus.attacks import APGD, Attack, Finding, Square, lint
from jaxclus.attacks._base import BoundedAttack
from jaxclus.data import Dataset, to_float
from jaxclus.evaluation import _flags, _indicators
from jaxclus.evaluation._probe import Probe, Searched, bind_search
from jaxclus.evaluation._result import Robustness, describe
from jaxclus.evaluation._robustness import _check as _check_data
from jaxclus.evaluation._signs import SIGNS, Checked
from jaxclus.threat import L1, Threat

#: The radii of the accuracy curve as multiples of the threat model's, as far as they are smaller
#: than the last one, which covers the whole pixel box.
RADII = (0.5, 1.0, 2.0, 4.0)

_SEVERITIES = ("certain", "suspected", "information")

_NO_GRADIENT = "the model has no gradient"
_OF_THE_ATTACK = (
    "silent success", "incomplete optimisation", "unconstrained attack failure",
    "loss does not rise", "noisy loss", "accuracy rises with eps",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Masking:
    """What the masking checks saw on n images, all of which the model classifies correctly.

    Attributes:
        findings: what to worry about, certain signs of masking first, mere information last.
        figures: the figure of each check that ran, by its name; `jc.evaluation.SIGNS` says what it
            is, and above which limit it is a finding.
        not_run: the checks that did not run, each with the reason.
        attack: the attack that was looked at.
        dataset: name of the data set.
        split: name of its split.
        seed: the key's data.
        index: numbers of the images in the data set, int [n].
        loss: the attack's loss at every iterate, float32 [steps, n], for each image in its round of
            highest loss; no steps if the model has no gradient.
        eps: radii of the accuracy curve, ascending, the last one the whole pixel box [m].
        standing: whether each image is classified correctly after the attack at each radius,
            bool [m, n].
        gradient_norms: L2 norm of the gradient at a random point of the ball, by the loss's name,
            float32 [n] each.
    """

    findings: tuple[Finding, ...]
    figures: Mapping[str, float]
    not_run: Mapping[str, str]
    attack: BoundedAttack
    dataset: str
    split: str
    seed: tuple[int, ...]
    index: np.ndarray
    loss: np.ndarray
    eps: np.ndarray
    standing: np.ndarray
    gradient_norms: Mapping[str, np.ndarray]

    @property
    def robust_accuracy(self) -> np.ndarray:
        """Share of the n images that stand at each radius [m]."""
        return self.standing.mean(axis=1)

    def to_json(self) -> dict[str, Any]:
        """All that a page shows, as JSON values; of losses and gradient norms the distribution."""
        eps, names = float(self.attack.threat.eps), {finding.name for finding in self.findings}
        return {
            "attack": describe(self.attack),
            "norm": self.attack.threat.name,
            "eps": eps,
            "eps_255": eps * 255,
            "dataset": self.dataset,
            "split": self.split,
            "num_images": len(self.index),
            "index": self.index.tolist(),
            "seed": list(self.seed),
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
            "checks": [
                {
                    "name": name,
                    "figure": figure,
                    "limit": SIGNS[name].limit,
                    "unit": SIGNS[name].unit,
                    "found": name in names,
                }
                for name, figure in self.figures.items()
            ],
            "not_run": dict(self.not_run),
            "loss": _quantiles(self.loss),
            "accuracy": {"eps": self.eps.tolist(), "robust": self.robust_accuracy.tolist()},
            "gradient_norms": {
                name: _quantiles(norms[None]) for name, norms in self.gradient_norms.items()
            },
            **runs.environment(),
        }


def masking(
    key: jax.Array,
    model: Classifier,
    data: Dataset,
    threat: Threat,
    *,
    attack: Attack | None = None,
    robustness: Robustness | None = None,
    surrogate: Classifier | None = None,
    num_images: int = 100,
    progress: bool = True,
) -> Masking:
    """Looks for signs that attacks fail for other reasons than robustness.

    On the first `num_images` images that the model classifies correctly, it runs

    1. the flags of the reference implementation of AutoAttack: "randomised", "softmax output",
       "zero gradient" (cross-entropy and DLR, at a random start), "Square wins", "dynamic",
       "classes" (information, no sign of masking);
    2. `jc.attacks.lint`, whose findings have the names that are listed there;
    3. the six indicators of attack failure: "unavailable gradients" (at the clean images),
       "unstable predictions", "silent success", "incomplete optimisation" (the loss still rises at
       the end), "transfer failure", "unconstrained attack failure";
    4. the curves: "loss does not rise", "noisy loss", "accuracy rises with eps", and "transfer
       wins". That accuracy must reach 0 where the ball is the whole box is the sixth indicator.

    Formulas stand in `_flags` and `_indicators`, limits in `jc.evaluation.SIGNS`. Silence proves
    nothing: an attack made for the defence can still break it (arXiv:2002.08347).

    Args:
        key: a typed key; image i uses `fold_in(key, i)`.
        model: a classifier, images [b, h, w, c] in [0, 1] -> float32 logits [b, k].
        data: images; as many as needed are looked at, in their order.
        threat: the threat model of interest.
        attack: the attack to look at, a gradient attack in a threat model, which `threat`
            replaces; its step size, if it is given one, is scaled as eps. Default: `APGD(threat)`.
        robustness: an evaluation of the same model under AutoAttack, or another ensemble with
            Square, for "Square wins".
        surrogate: another classifier of the same images, for "transfer failure" and "transfer
            wins": an undefended network, or a smooth copy of the model.
        num_images: number of images, at least 1.
        progress: whether to show a progress bar.

    Raises:
        TypeError, ValueError: if an argument does not fit, or no image is classified correctly.

    References:
        Croce and Hein, arXiv:2003.01690, and fra31/auto-attack, `flags_doc.md`. Pintor et al.,
        "Indicators of Attack Failure", arXiv:2106.09947. Carlini et al., "On Evaluating Adversarial
        Robustness", arXiv:1902.06705.
    """
    classes = _check(key, model, data, threat, robustness, surrogate, num_images)
    attack = APGD(threat) if attack is None else _with_threat(attack, threat)
    attack.check_classes(classes)
    radii, record = _radii(threat, data.input_shape), _Record()
    total = len(radii) + 2 + (surrogate is not None)
    bar = runs.progress("masking checks", total, "runs", enabled=progress)
    with bar as advance, jax.default_matmul_precision("highest"):
        probe = Probe(key, model, data, num_images)
        found = _lint(model, data)
        _flag(record, probe, threat, classes, found, robustness)
        record.add(_indicators.unstable_predictions(*probe.margins()))
        advance(1, "")
        norms = _gradients(record, probe, attack, classes)
        advance(1, "")
        own, standing = probe.not_attacked(), []
        search = bind_search(model)
        for radius in radii if norms else ():
            asked = radius == threat
            at = probe.attacked(search, _with_threat(attack, radius), trace=asked)
            own = at if asked else own
            standing.append(~at.success)
            advance(1, "")
        eps = np.array([radius.eps for radius in radii[: len(standing)]])
        standing = np.array(standing, bool).reshape(len(eps), len(probe.index))
        _judge(record, own, eps, standing, _proof(model, attack, classes))
        _transfer(record, probe, surrogate, attack, own.success)
        advance(float(surrogate is not None), "")
    findings = [*record.findings, *found]
    return Masking(
        findings=tuple(sorted(findings, key=lambda each: _SEVERITIES.index(each.severity))),
        figures=record.figures,
        not_run=record.not_run,
        attack=attack,
        dataset=data.name,
        split=data.split,
        seed=tuple(np.asarray(jax.random.key_data(key)).tolist()),
        index=np.asarray(probe.index),
        loss=own.loss,
        eps=eps,
        standing=standing,
        gradient_norms=norms,
    )


class _Record:
    """What the checks have given so far."""

    def __init__(self) -> None:
        self.figures: dict[str, float] = {}
        self.not_run: dict[str, str] = {}
        self.findings: list[Finding] = []

    def add(self, *outcomes: Checked) -> None:
        for outcome in outcomes:
            self.figures[outcome.name] = outcome.figure
            if outcome.finding is not None:
                self.findings.append(outcome.finding)

    def skip(self, reason: str, *names: str) -> None:
        self.not_run |= dict.fromkeys(names, reason)


def _lint(model: Classifier, data: Dataset) -> list[Finding]:
    """The lint's findings; that a jc.Stochastic draws random numbers is no news."""
    found = lint(model, jax.ShapeDtypeStruct((2, *data.input_shape), jnp.float32))
    declared = compose.is_stochastic(model)
    return [each for each in found if not (declared and each.name == "random numbers")]


def _flag(
    record: _Record,
    probe: Probe,
    threat: Threat,
    classes: int,
    found: Sequence[Finding],
    robustness: Robustness | None,
) -> None:
    """The reference's flags, but for the one on gradients."""
    logits = probe.passes()
    if compose.is_stochastic(probe.model):
        record.skip("the classifier is a jc.Stochastic, whose passes may differ", "randomised")
    else:
        record.add(_flags.randomised(logits, np.asarray(probe.y)))
    record.add(_flags.softmax_output(logits[0]))
    record.add(_flags.dynamic(found), _flags.classes(classes, threat))
    square = None if robustness is None else _flags.square_wins(robustness)
    if square is not None:
        record.add(square)
    elif robustness is None:
        record.skip("no evaluation under AutoAttack was given", "Square wins")
    else:
        record.skip("in the evaluation given, Square does not follow another attack", "Square wins")


def _gradients(
    record: _Record, probe: Probe, attack: BoundedAttack, classes: int
) -> dict[str, np.ndarray]:
    """The checks of gradients; their norms at the random start, none if there is no gradient."""
    loss = losses.get(getattr(attack, "loss", "cross_entropy"))
    name = next((name for name, known in losses.LOSSES.items() if known is loss), "its loss")
    used = {"cross_entropy": losses.cross_entropy, name: loss}
    if classes >= 3:
        used["dlr"] = losses.dlr
    try:
        clean, _ = probe.gradient_norms(probe.x, used)
    except (TypeError, ValueError, NotImplementedError) as error:  # JAX's, while it differentiates
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        record.add(_indicators.gradient_raises(reason))
        record.skip(_NO_GRADIENT, "zero gradient")
        return {}
    start, right = probe.gradient_norms(probe.random_start(attack.threat), used)
    flagged = {name: start[name] for name in ("cross_entropy", "dlr") if name in start}
    record.add(_flags.zero_gradient(flagged, right))
    record.add(_indicators.unavailable_gradients(clean[name], name))
    return start


def _proof(model: Classifier, attack: BoundedAttack, classes: int) -> float:
    """The loss above which an iterate is misclassified for sure; infinity if there is none.

    Where the prediction is right, the label's probability is at least 1 / k. A stochastic model's
    loss is that of some passes, and in the L1 norm APGD's first iterates are outside the ball.
    """
    loss = getattr(attack, "loss", None)
    if compose.is_stochastic(model) or isinstance(attack.threat, L1):
        return math.inf
    if loss in ("cross_entropy", losses.cross_entropy):
        return math.log(classes) + 1e-4
    return 0.0 if loss in ("dlr", "margin", losses.dlr, losses.margin) else math.inf


def _judge(
    record: _Record, own: Searched, eps: np.ndarray, standing: np.ndarray, proof: float
) -> None:
    """The checks of the attack's runs: `own` for the threat model, `standing` for all radii."""
    if not len(eps):
        record.skip(_NO_GRADIENT, *_OF_THE_ATTACK)
        return
    loss, stands = own.loss, ~own.success
    passed = own.passed | (own.trace > proof).any(axis=(0, 1))
    record.add(
        _indicators.silent_success(passed, own.success),
        _indicators.incomplete_optimisation(loss, stands),
        _indicators.unconstrained_attack_failure(standing[-1]),
        _indicators.loss_does_not_rise(loss, stands),
        _indicators.noisy_loss(loss, stands),
        _indicators.accuracy_rises(eps, standing.mean(axis=1)),
    )


def _transfer(
    record: _Record,
    probe: Probe,
    surrogate: Classifier | None,
    attack: BoundedAttack,
    success: np.ndarray,
) -> None:
    """The checks of the attack on another model."""
    if surrogate is None:
        record.skip("no surrogate was given", "transfer failure", "transfer wins")
        return
    crafted = probe.attacked(bind_search(surrogate), attack, trace=False)
    fooled = ~probe.right(crafted.x_adv)
    record.add(_indicators.transfer_failure(crafted.success, fooled))
    record.add(_indicators.transfer_wins(fooled, success))


def _check(
    key: jax.Array,
    model: Classifier,
    data: Dataset,
    threat: Threat,
    robustness: Robustness | None,
    surrogate: Classifier | None,
    num_images: int,
) -> int:
    """The number of classes; raises for arguments that do not fit."""
    _checks.typed_key("key", key)
    _checks.at_least("num_images", num_images, 1)
    _check_data(model, data)
    if not isinstance(threat, Threat):
        raise TypeError(f"`threat` must be one as Linf(8 / 255) makes, got {threat!r}")
    if threat.eps >= box_radius(threat, data.input_shape):
        raise ValueError(f"`threat` must be smaller than the whole pixel box, got {threat!r}")
    if robustness is not None:
        if not isinstance(robustness, Robustness):
            got = type(robustness).__name__
            raise TypeError(f"`robustness` must be what jc.evaluation.robustness gives, got {got}")
        if robustness.attack.ball != threat:
            raise ValueError(
                f"`robustness` must be for `threat` {threat!r}, got {robustness.attack.ball!r}"
            )
    x = to_float(data.images[:1])
    classes = _classifier.num_classes(model, x)
    if surrogate is not None and _classifier.num_classes(surrogate, x) != classes:
        raise ValueError(
            f"`surrogate` must have {classes} classes as `model` has, "
            f"got {_classifier.num_classes(surrogate, x)}"
        )
    return classes


def _with_threat(attack: Attack, threat: Threat) -> BoundedAttack:
    """The attack with another threat model, its step size scaled as eps if it is given one."""
    if not isinstance(attack, BoundedAttack) or isinstance(attack, Square):
        raise TypeError(
            f"`attack` must be one gradient attack that a threat model bounds, got {attack!r}"
        )
    changed: dict[str, Any] = {"threat": threat}
    step_size = getattr(attack, "step_size", None)
    if step_size is not None:
        changed["step_size"] = step_size * threat.eps / attack.threat.eps
    return dataclasses.replace(attack, **changed)


def box_radius(threat: Threat, shape: tuple[int, ...]) -> float:
    """A radius with which the ball around any image covers the pixel box."""
    pixels = math.prod(shape)
    return {"linf": 1.0, "l2": math.sqrt(pixels), "l1": float(pixels)}[threat.name]


def _radii(threat: Threat, shape: tuple[int, ...]) -> list[Threat]:
    """The threat models of the accuracy curve, ascending."""
    box = box_radius(threat, shape)
    smaller = [share * threat.eps for share in RADII if share * threat.eps < box]
    return [type(threat)(eps) for eps in (*smaller, box)]


def _quantiles(values: np.ndarray) -> dict[str, list[float]]:
    """Mean, median, 10th and 90th percentile of each row of values [m, n]."""
    columns = [values.mean(axis=1), *np.quantile(values, (0.1, 0.5, 0.9), axis=1)]
    names = ("mean", "low", "median", "high")
    return {
        name: np.asarray(each, float).tolist() for name, each in zip(names, columns, strict=True)
    }
