"""Whether a robust accuracy can be believed: checks for masked gradients and failing attacks."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxclus import _checks, _classifier, compose, losses, runs
from jaxclus._classifier import Classifier
from jaxclus.attacks import APGD, Attack, Finding, lint
from jaxclus.attacks._base import BoundedAttack
from jaxclus.attacks._gradient import evaluate_with_gradient
from jaxclus.data import Dataset, to_float
from jaxclus.evaluation import _flags, _indicators
from jaxclus.evaluation._result import Robustness
from jaxclus.evaluation._robustness import _check as _check_data
from jaxclus.evaluation._robustness import _microbatches, describe
from jaxclus.evaluation._signs import SIGNS, Checked
from jaxclus.threat import L1, L2, Threat, image_keys

#: Passes over the same images that must agree, as in the reference implementation of AutoAttack.
PASSES = 5
#: Draws of noise for each image. The authors' code of the indicators takes 100 for single images.
DRAWS = 10
#: Noise is uniform in [-NOISE, NOISE] for each pixel, as in the same code.
NOISE = 4 / 255
#: The radii of the accuracy curve as multiples of the threat model's, as far as they are smaller
#: than the last one, which covers the whole pixel box.
RADII = (0.5, 1.0, 2.0, 4.0)

_SEVERITIES = ("certain", "suspected", "information")

# The numbers under which an image's key is split for noise and for the random start.
_NOISE, _START = 2**31 - 2, 2**31 - 3

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
        attack: the attack to look at, one that is bounded by a threat model, which `threat`
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
        probe = _Probe(key, model, data, num_images)
        found = _lint(model, data)
        _flag(record, probe, threat, classes, found, robustness)
        record.add(_indicators.unstable_predictions(*probe.margins()))
        advance(1, "")
        norms = _gradients(record, probe, attack, classes)
        advance(1, "")
        search, searched = _bind_search(model), []
        for radius in radii if norms else ():
            searched.append(_attacked(search, probe, _with_threat(attack, radius), classes))
            advance(1, "")
        number = [radius.eps for radius in radii].index(threat.eps)
        own = searched[number] if searched else _Searched.nothing(probe.x)
        eps = np.array([radius.eps for radius in radii[: len(searched)]])
        standing = ~np.array([each.success for each in searched], bool).reshape(
            -1, len(own.success)
        )
        if searched:
            _judge(record, own, eps, standing)
        else:
            record.skip(_NO_GRADIENT, *_OF_THE_ATTACK)
        _transfer(record, probe, surrogate, attack, classes, own)
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


class _Probe:
    """A model, and the first images of a data set that it classifies correctly."""

    def __init__(self, key: jax.Array, model: Classifier, data: Dataset, num_images: int):
        self.key, self.model = key, model
        self.verdict = _bind_verdict(model)
        self.gradient_norms = _bind_gradient_norms(model)
        found: list[int] = []
        for numbers, count in _microbatches(np.arange(len(data)), min(num_images, len(data))):
            index = jnp.asarray(numbers, jnp.int32)
            _, predicted = self.verdict(key, to_float(data.images[numbers]), index)
            right = np.asarray(predicted)[:count] == data.labels[numbers[:count]]
            found += numbers[:count][right].tolist()
            if len(found) >= num_images:
                break
        if not found:
            raise ValueError(
                f"`data` must hold images that the model classifies correctly, got {len(data)} "
                "of which none is"
            )
        chosen = np.array(found[:num_images], np.int32)
        self.index, self.y = jnp.asarray(chosen), jnp.asarray(data.labels[chosen])
        self.x = to_float(data.images[chosen])

    def passes(self) -> np.ndarray:
        """Logits of several passes [passes, n, k].

        In each the images stand at other places of the batch, and a callable without visible
        weights is traced anew: random numbers that are fixed for a place or a program show too.
        """
        logits = []
        for shift in range(PASSES):
            order = np.roll(np.arange(len(self.index)), shift)
            rolled, _ = _bind_verdict(self.model)(self.key, self.x[order], self.index[order])
            logits.append(np.roll(np.asarray(rolled), -shift, axis=0))
        return np.stack(logits)

    def margins(self) -> tuple[np.ndarray, np.ndarray]:
        """Margins of the images [n], and with noise added [draws, n]."""
        keys = compose.split(image_keys(self.key, self.index), _NOISE)

        def margin(x: jax.Array) -> np.ndarray:
            logits, _ = self.verdict(self.key, x, self.index)
            return np.asarray(losses.margin(logits, self.y))

        def uniform(key: jax.Array) -> jax.Array:
            return jax.random.uniform(key, self.x.shape[1:], minval=-NOISE, maxval=NOISE)

        noise = (jax.vmap(uniform)(compose.split(keys, draw)) for draw in range(DRAWS))
        noisy = [margin(jnp.clip(self.x + each, min=0.0, max=1.0)) for each in noise]
        return margin(self.x), np.stack(noisy)

    def right(self, x: jax.Array) -> np.ndarray:
        """Whether the images x are classified correctly [n]."""
        _, predicted = self.verdict(self.key, x, self.index)
        return np.asarray(predicted == self.y)

    def norms(self, x: jax.Array, used: Mapping[str, losses.Loss]) -> dict[str, np.ndarray]:
        """The gradient's norm at the images x [n], for each loss."""
        found = self.gradient_norms(self.key, x, self.y, self.index, used=tuple(used.values()))
        return dict(zip(used, map(np.asarray, found), strict=True))


class _Searched(NamedTuple):
    """What an attack did to n images.

    Attributes:
        x_adv: what it returned, the image itself where that is outside the threat model.
        passed: whether it went through a misclassified iterate [n].
        success: whether `x_adv` is misclassified [n].
        loss: the loss at every iterate, of each image's round of highest loss [steps, n].
    """

    x_adv: jax.Array
    passed: np.ndarray
    success: np.ndarray
    loss: np.ndarray

    @classmethod
    def nothing(cls, x: jax.Array) -> "_Searched":
        """What an attack that cannot be run does."""
        none = np.zeros(len(x), bool)
        return cls(x, none, none, np.zeros((0, len(x)), np.float32))


def _verdict(model, key, x, index):
    return _classifier.verdict(model, image_keys(key, index), x)


def _gradient_norms(model, key, x, y, index, *, used):
    keys = compose.split(image_keys(key, index), 0)
    gradients = [evaluate_with_gradient(model, keys, loss, x, y).gradient for loss in used]
    return [L2(1.0).norm(gradient) for gradient in gradients]


def _search(model, attack, key, x, y, index):
    keys = image_keys(key, index)
    logits, _ = _classifier.verdict(model, keys, x)
    found = attack._search(keys, model, x, y, logits, y >= 0, trace=True)
    inside = attack.ball.norm(found.x_adv - x) <= attack.ball.limit  # False for NaN too
    x_adv = jnp.where(inside[:, None, None, None], found.x_adv, x)
    wrong = _classifier.verdict(model, keys, x_adv)[1] != y
    return x_adv, found.success, wrong, found.trace


_bind_verdict = _classifier.jit_over_model(_verdict)
_bind_gradient_norms = _classifier.jit_over_model(_gradient_norms, static_argnames=("used",))
_bind_search = _classifier.jit_over_model(_search)


def _attacked(search: Any, probe: _Probe, attack: BoundedAttack, classes: int) -> _Searched:
    """The attack on the probe's images, by `_bind_search` of some model."""
    x_adv, passed, success, trace = search(attack, probe.key, probe.x, probe.y, probe.index)
    trace = np.clip(np.nan_to_num(np.asarray(trace)), -1e30, 1e30)  # differences must be finite
    proof = math.inf if compose.is_stochastic(probe.model) else _proof(attack, classes)
    passed = np.asarray(passed) | (trace > proof).any(axis=(0, 1))
    highest = trace.max(axis=1).argmax(axis=0)
    loss = np.take_along_axis(trace, highest[None, None], axis=0)[0]
    return _Searched(x_adv, passed, np.asarray(success), loss)


def _proof(attack: BoundedAttack, classes: int) -> float:
    """The loss above which an iterate is misclassified for sure.

    Where the prediction is right, the label's probability is at least 1 / k. None for losses that
    are not known, and in the L1 norm, where APGD's first iterates are outside the ball.
    """
    loss = None if isinstance(attack.ball, L1) else getattr(attack, "loss", None)
    if loss in ("cross_entropy", losses.cross_entropy):
        return math.log(classes) + 1e-4
    return 0.0 if loss in ("dlr", "margin", losses.dlr, losses.margin) else math.inf


def _lint(model: Classifier, data: Dataset) -> list[Finding]:
    """The lint's findings; that a jc.Stochastic draws random numbers is no news."""
    found = lint(model, jax.ShapeDtypeStruct((2, *data.input_shape), jnp.float32))
    declared = compose.is_stochastic(model)
    return [each for each in found if not (declared and each.name == "random numbers")]


def _flag(
    record: _Record,
    probe: _Probe,
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
    record: _Record, probe: _Probe, attack: BoundedAttack, classes: int
) -> dict[str, np.ndarray]:
    """The checks of gradients; their norms at the random start, empty if there is no gradient."""
    loss = losses.get(getattr(attack, "loss", "cross_entropy"))
    name = next((name for name, known in losses.LOSSES.items() if known is loss), "its loss")
    used = {"cross_entropy": losses.cross_entropy, name: loss}
    if classes >= 3:
        used["dlr"] = losses.dlr
    keys = compose.split(image_keys(probe.key, probe.index), _START)
    try:
        clean = probe.norms(probe.x, used)
    except (TypeError, ValueError, NotImplementedError) as error:  # JAX's, while it differentiates
        record.add(_indicators.gradient_raises(f"{type(error).__name__}: {error}".splitlines()[0]))
        record.skip(_NO_GRADIENT, "zero gradient")
        return {}
    x = attack.threat.random_start(keys, probe.x)
    start, right = probe.norms(x, used), probe.right(x)
    flagged = {name: start[name] for name in ("cross_entropy", "dlr") if name in start}
    record.add(_flags.zero_gradient(flagged, right))
    record.add(_indicators.unavailable_gradients(clean[name], name))
    return start


def _judge(record: _Record, own: _Searched, eps: np.ndarray, standing: np.ndarray) -> None:
    """The checks of the attack's runs."""
    stands = ~own.success
    record.add(
        _indicators.silent_success(own.passed, own.success),
        _indicators.incomplete_optimisation(own.loss, stands),
        _indicators.unconstrained_attack_failure(standing[-1]),
        _indicators.loss_does_not_rise(own.loss, stands),
        _indicators.noisy_loss(own.loss, stands),
        _indicators.accuracy_rises(eps, standing.mean(axis=1)),
    )


def _transfer(
    record: _Record,
    probe: _Probe,
    surrogate: Classifier | None,
    attack: BoundedAttack,
    classes: int,
    own: _Searched,
) -> None:
    """The checks of an attack on another model."""
    if surrogate is None:
        record.skip("no surrogate was given", "transfer failure", "transfer wins")
        return
    found = _attacked(_bind_search(surrogate), probe, attack, classes)
    fooled = ~probe.right(found.x_adv)
    record.add(
        _indicators.transfer_failure(found.success, fooled),
        _indicators.transfer_wins(fooled, own.success),
    )


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
    if threat.eps >= _box(threat, data.input_shape):
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
    if not isinstance(attack, BoundedAttack):
        raise TypeError(
            f"`attack` must be one attack that a threat model bounds, as APGD, got {attack!r}"
        )
    changed: dict[str, Any] = {"threat": threat}
    step_size = getattr(attack, "step_size", None)
    if step_size is not None:
        changed["step_size"] = step_size * threat.eps / attack.threat.eps
    return dataclasses.replace(attack, **changed)


def _box(threat: Threat, shape: tuple[int, ...]) -> float:
    """The radius of the ball around any image that covers the pixel box."""
    pixels = math.prod(shape)
    return {"linf": 1.0, "l2": math.sqrt(pixels), "l1": float(pixels)}[threat.name]


def _radii(threat: Threat, shape: tuple[int, ...]) -> list[Threat]:
    """The threat models of the accuracy curve, ascending."""
    box = _box(threat, shape)
    return [
        type(threat)(eps) for eps in (*(share * threat.eps for share in RADII), box) if eps <= box
    ]


def _quantiles(values: np.ndarray) -> dict[str, list[float]]:
    """Mean, median, 10th and 90th percentile of each row of values [m, n]."""
    columns = [values.mean(axis=1), *np.quantile(values, (0.1, 0.5, 0.9), axis=1)]
    names = ("mean", "low", "median", "high")
    return {
        name: np.asarray(each, float).tolist() for name, each in zip(names, columns, strict=True)
    }
