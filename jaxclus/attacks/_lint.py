"""What in a classifier can hide its gradient from an attack, read off its program.

Robust accuracy under a gradient attack means little where the gradient is absent or misleading
("obfuscated gradients", Athalye et al., arXiv:1802.00420). The program of a classifier shows the
usual causes without running it.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxclus import _classifier, _jaxpr, compose
from jaxclus._classifier import Classifier
from jaxclus._jaxpr import Influence, Need, Operation, Value

Severity = Literal["certain", "suspected", "information"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that a classifier's program contains and an attack has to deal with.

    Attributes:
        name: the rule that found it, as `lint` lists them.
        severity: "certain" if gradient attacks meet a wrong, absent or random gradient there;
            "suspected" if that depends on what the code is for; "information" if it merely limits
            which attacks can be run.
        detail: what was found, and in which lines of source.
        advice: what to try next.
    """

    name: str
    severity: Severity
    detail: str
    advice: str


class _Rule(NamedTuple):
    severity: Severity
    advice: str


_BPDA = (
    "Attack with a smooth stand-in for its gradient, at first the identity (BPDA), and compare "
    "with Square and with images transferred from an undefended model."
)
_RULES = {
    "rounding": _Rule("certain", _BPDA),
    "sign": _Rule("certain", _BPDA),
    "argmax": _Rule(
        "certain",
        "Attack with a softmax of low temperature in its place (BPDA), and compare with Square.",
    ),
    "step function": _Rule(
        "certain", "Attack with a steep sigmoid in its place (BPDA), and compare with Square."
    ),
    "integer cast": _Rule("certain", _BPDA),
    "stop_gradient": _Rule("certain", "Attack a copy of the classifier without stop_gradient."),
    "custom gradient": _Rule(
        "suspected",
        "Check that the rule approximates the function's own gradient, attack with other "
        "stand-ins too, and compare with Square.",
    ),
    "random numbers": _Rule(
        "certain",
        "Wrap the classifier in jc.Stochastic, so that every pass draws anew, and attack the mean "
        "over draws (jc.attacks.EOT, or AutoAttack's version rand).",
    ),
    "data-dependent loop": _Rule(
        "certain",
        "Attack a copy whose loop has a fixed number of rounds, and compare with Square.",
    ),
    "inner gradient": _Rule(
        "suspected",
        "Attack through all steps of the inner optimisation, with fewer of them if memory or "
        "vanishing gradients forbid that, and compare with attacks on the bare classifier.",
    ),
    "softmax head": _Rule("certain", "Attack the classifier without its softmax, on the logits."),
    "log-softmax head": _Rule(
        "suspected",
        "Attack the logits below the log-softmax if their differences are large, since float32 "
        "cannot resolve them any more.",
    ),
    "saturating head": _Rule(
        "suspected", "Attack the values that go into the last non-linearity, in place of its own."
    ),
}

_COMPARISONS = frozenset("eq ne lt le gt ge is_finite eq_to lt_to le_to".split())
_RANKS = frozenset("argmax argmin sort top_k approx_top_k".split())
_CASTS = frozenset("convert_element_type bitcast_convert_type".split())
_DRAWS = frozenset("random_bits threefry2x32 rng_bit_generator rng_uniform random_gamma".split())
_SQUASHING = {"logistic": "sigmoid", "tanh": "tanh", "erf": "erf"}
# Monotone in the one input that depends on the images, or a mere sum over passes or an ensemble.
_MONOTONE = _jaxpr.ARRANGING | frozenset(
    "add sub mul div neg exp log max min clamp reduce_sum".split()
)
_LINEAR = _jaxpr.ARRANGING | frozenset(
    "add sub mul div neg reduce_sum dot_general select_n".split()
)


def lint(model: Classifier, x: Any) -> tuple[Finding, ...]:
    """What hides the gradient of a classifier, from its program alone: nothing is executed.

    The classifier is traced, and whatever lies on a path from the images to the logits is judged.
    Branches, loops and nested compiled functions are looked into. The rules:

    - "rounding" (round, floor, ceil), "sign", "integer cast" (of a floating-point number): their
      derivative is zero, which shatters gradients (arXiv:1802.00420, section 3);
    - "argmax" (also argmin, and the places that sort and top_k give) and "step function" (a
      comparison) if the result enters the logits as a number: by a cast, by one_hot, by an index
      into a table that does not depend on the images. They are left alone where they choose among
      values that carry the gradient, or switch these on and off: `where(x > 0, x, 0)`,
      `x * (x > 0)`, `x[argmax(x)]`, max-pooling. So is the sign in `x * sign(x)`;
    - "stop_gradient", except for the one that shifts a softmax;
    - "custom gradient", suspected: a `jax.custom_vjp` or `jax.custom_jvp` whose rule is neither
      JAX's nor this library's, or a stop_gradient added to a value that carries the gradient
      (straight-through). What such a function computes inside is not judged, as its derivative is
      not used. A good one is BPDA done right (arXiv:1802.00420, section 4.1), a bad one masks;
    - "random numbers": a gradient for one draw says little about the next
      (arXiv:1802.00420, section 4.2);
    - "data-dependent loop": a `while` loop whose condition depends on the images, for which there
      is no reverse-mode gradient;
    - "inner gradient", suspected: a derivative taken inside the classifier, as by defences that
      optimise at test time, whose steps attacks must go through (arXiv:2002.08347);
    - "softmax head", "log-softmax head", "saturating head" (sigmoid, tanh, erf, weighted sums of
      exponentials as of distances) as the last operation, affine maps aside: the loss has no
      gradient left where it saturates (an indicator of failure in arXiv:2106.09947). The last two
      are suspected.

    Silence proves nothing: exploding or vanishing gradients and steps made of smooth functions are
    for the checks that run attacks, and a step with one smooth branch that is never taken (the NaN
    of `jnp.heaviside`) counts as a selection.

    Args:
        model: a classifier: images [b, h, w, c] -> logits [b, k]; also a `jc.Stochastic` one.
        x: images, or anything with their `shape` [b, h, w, c] and floating-point `dtype`, such as a
            `jax.ShapeDtypeStruct`.

    Returns:
        The findings, at most one for each rule, certain ones first; none for a plain network.

    Raises:
        TypeError: if `model` cannot be called or `x` is not of floating point.
        ValueError: if `x` is not of shape [b, h, w, c] or the output is not one array.

    References:
        Athalye, Carlini, Wagner: Obfuscated Gradients Give a False Sense of Security, 2018,
        arXiv:1802.00420. Tramer, Carlini, Brendel, Madry: On Adaptive Attacks to Adversarial
        Example Defenses, 2020, arXiv:2002.08347. Pintor et al.: Indicators of Attack Failure,
        2021, arXiv:2106.09947.
    """
    influence = _traced(model, x)
    places: dict[str, dict[str, None]] = {}
    for op in influence.flow.operations:
        for name in _judged(influence, op):
            places.setdefault(name, {})[_located(op.name, op)] = None
    head = _head(influence)
    if head is not None:
        name, detail = head
        places[name] = {detail: None}
    findings = [
        Finding(name, rule.severity, _listed(list(places[name])), rule.advice)
        for name, rule in _RULES.items()
        if name in places
    ]
    return tuple(sorted(findings, key=lambda finding: finding.severity != "certain"))


def _traced(model: Any, x: Any) -> Influence:
    if not callable(model):
        raise TypeError(f"`model` must be a callable from images to logits, got {type(model)}")
    shape, dtype = getattr(x, "shape", ()), getattr(x, "dtype", None)
    if len(shape) != 4:
        raise ValueError(f"`x` must be images [b, h, w, c], got shape {shape}")
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"`x` must be of a floating-point dtype, got {dtype}")
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), shape[0]))
    visible = _classifier.is_pytree(model)

    def apply(arguments, images):
        weights, keys = arguments
        return compose.with_keys(weights if visible else model, keys)(images)

    arguments = (model if visible else None, keys)
    flow = _jaxpr.dataflow(apply, arguments, jax.ShapeDtypeStruct(shape, dtype))
    if len(flow.outputs) != 1:
        raise ValueError(f"`model` must return one array of logits, got {len(flow.outputs)}")
    return Influence(flow)


def _judged(influence: Influence, op: Operation) -> Iterator[str]:
    """The names of the rules that an operation sets off, heads aside."""
    need = influence.need(op)
    if need == Need.NOTHING:
        return
    if op.name in _DRAWS:
        yield "random numbers"
    if op.differentiated and influence.depends(op):
        yield "inner gradient"
    if op.name == "while" and op.inputs[0] in influence.dependent:
        yield "data-dependent loop"
    if not any(value in influence.smooth for value in op.inputs):
        return
    if op.name in _jaxpr.CUSTOM and need >= Need.FACTOR:
        yield "custom gradient"
    for value in op.outputs:
        if value not in influence.smooth and (name := _cut(influence, op, value)):
            yield name


def _cut(influence: Influence, op: Operation, value: Value) -> str | None:
    """The rule for an output that the gradient does not reach, though it reaches the operation."""
    need = influence.needs[value]
    if need == Need.VALUE:
        if op.name == "sign":
            return "sign"
        if op.name in _RANKS:
            return "argmax"
        if op.name in _COMPARISONS or (op.name in _CASTS and value.dtype == bool):
            return "step function"
    if need >= Need.FACTOR:
        if op.name in ("round", "floor", "ceil"):
            return "rounding"
        if op.name in _CASTS and value.dtype != bool:
            return "integer cast"
        if op.name == "stop_gradient" and not influence.is_stabiliser(op):
            return "custom gradient" if influence.is_straight_through(op) else "stop_gradient"
    return None


def _head(influence: Influence) -> tuple[str, str] | None:
    """The rule for a classifier that ends in a squashing function, and the detail; or None."""
    (value,) = influence.flow.outputs
    scale = ""  # "exp" or "log", whichever comes last
    while (op := influence.origin.get(value)) is not None:
        if op.name in _SQUASHING:
            return "saturating head", _located(_SQUASHING[op.name], op)
        kind = _normalisation(influence, op)
        if kind is not None:
            kind = {"exp": "softmax", "log": "log-softmax"}.get(scale, kind)
            return f"{kind} head", _located(kind, op)
        dependent = {each for each in op.inputs if each in influence.dependent}
        if op.name not in _MONOTONE or len(dependent) != 1:
            break
        if op.name in ("exp", "log"):
            scale = scale or op.name
        (value,) = dependent
    return _bumps(influence)


def _bumps(influence: Influence) -> tuple[str, str] | None:
    """The rule for a classifier that ends in weighted sums of exponentials, and the detail."""
    (value,) = influence.flow.outputs
    while (op := influence.origin.get(value)) is not None:
        if op.name == "exp":
            return "saturating head", _located("exp", op)
        carriers = {each for each in op.inputs if each in influence.smooth}
        if op.name not in _LINEAR or len(carriers) != 1:
            return None
        (value,) = carriers
    return None


def _normalisation(influence: Influence, op: Operation) -> str | None:
    """Whether an operation gives probabilities, "softmax", or their logarithms, "log-softmax"."""
    if op.name == "div" and _is_softmax(influence, op):
        return "softmax"
    if op.name == "sub" and _is_log_softmax(influence, op):
        return "log-softmax"
    return None


def _is_softmax(influence: Influence, op: Operation) -> bool:
    """Whether a quotient is exp(z) / sum(exp(z))."""
    above, below = (_exponentials(influence, value) for value in op.inputs)
    summed = influence.upward(op.inputs[1], _jaxpr.ARRANGING | {"add"})
    return bool(above & below) and any(each.name == "reduce_sum" for each in summed)


def _exponentials(influence: Influence, value: Value) -> set[Value]:
    """Exponents of the exponentials, or of sums of these, that a value consists of."""
    through = _jaxpr.ARRANGING | {"select_n", "add", "reduce_sum", "dot_general"}
    return {op.inputs[0] for op in influence.upward(value, through) if op.name == "exp"}


def _is_log_softmax(influence: Influence, op: Operation) -> bool:
    """Whether a difference is z - log(sum(exp(z))), whatever the exponents are shifted by."""
    z, normaliser = op.inputs
    through = _jaxpr.ARRANGING | {"add", "abs", "select_n"}
    for log in influence.upward(normaliser, through):
        if log.name == "log":
            through = _jaxpr.ARRANGING | {"abs", "reduce_sum", "select_n"}
            for exp in influence.upward(log.inputs[0], through):
                if exp.name == "exp":
                    shift = influence.origin.get(exp.inputs[0])
                    shifted = shift.inputs[0] if shift and shift.name == "sub" else None
                    if z in (exp.inputs[0], shifted):
                        return True
    return False


def _located(what: str, op: Operation) -> str:
    return f"{what} in {op.place}" if op.place else what


def _listed(details: list[str]) -> str:
    more = f" and {len(details) - 3} more" if len(details) > 3 else ""
    return ", ".join(details[:3]) + more
