"""The linear sub-network as a program transformation.

A classifier is traced to a jaxpr, which is walked with a mark on every value that depends on the
images. On marked values activations become the identity and maxima become means; everything else
runs as traced. The same walk lists the primitives that are not affine in marked values.

An activation is found in two ways: by the name of its compiled function (`jax.nn.relu` is traced
as a call of that name), or by what it computes. For the second, an operation that can bend a line
(maximum, choice, sum, product, quotient, call) is followed back to the one value x that it is an
elementwise function f of. If nothing but literal numbers enters besides x, f is evaluated far from
zero: f(x) = s x on the right, with a smaller slope of the same sign on the left, is a rectifier,
and becomes s x. So `x * sigmoid(1.7 * x)` and `0.5 * x * (1 + tanh(...))`, which is how
`jax.nn.gelu` is traced, become x, while a gate `x * sigmoid(y)` and a squashing `tanh(x)` stay.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Literal

from jaxclus._jaxpr import _walk

ACTIVATIONS = frozenset(
    "relu relu6 leaky_relu elu celu selu gelu silu swish hard_silu hard_swish mish softplus "
    "squareplus sparse_plus".split()
)
_REMAT = frozenset({"remat2", "checkpoint"})
# What can bend a line, with one operand or with two that depend on the images.
_BENDS = frozenset({"max", "select_n"})
_PAIRS = frozenset({"mul", "div", "add", "sub"})
# Operations on numbers, whose parameters hold no shape: they can be evaluated on scalars.
_ELEMENTWISE = _BENDS | _PAIRS | frozenset(
    "neg min sign abs clamp square sqrt rsqrt cbrt pow integer_pow exp exp2 log expm1 "
    "log1p tanh logistic erf erfc atan sin cos gt ge lt le eq ne and or not is_finite copy "
    "convert_element_type stop_gradient".split()
)  # fmt: skip
# Affine in all operands together; in each operand alone; in the operands at these places.
_LINEAR = frozenset(
    "add sub neg add_any copy convert_element_type real imag reshape transpose broadcast_in_dim "
    "squeeze expand_dims rev slice pad concatenate split tile reduce_sum reduce_window_sum "
    "cumsum fft name psum optimization_barrier sharding_constraint".split()
)
_BILINEAR = frozenset({"mul", "dot_general", "conv_general_dilated"})
_LINEAR_AT = {
    "div": {0},
    "gather": {0},
    "dynamic_slice": {0},
    "dynamic_update_slice": {0, 1},
    "scatter": {0, 2},
    "scatter-add": {0, 2},
    "scatter_add": {0, 2},
}
_FAR = 20.0  # far enough from zero for every known activation to be straight, to 1e-4
_TOLERANCE = 1e-4


class _Scaled(NamedTuple):
    """Stands for an activation: `slope` times the value of `source`."""

    source: Any
    slope: float


def linear_call(fn: Callable, arguments: Any, images: Any) -> Any:
    """Output of the linear sub-network of `fn(arguments, images)`, for a function with one output.

    Only what depends on `images` is rewritten; the result is differentiable in both arguments.
    """
    closed = jax.make_jaxpr(fn)(arguments, images)
    leaves = [*jax.tree.leaves(arguments), images]
    marks = [False] * (len(leaves) - 1) + [True]
    outputs = _evaluate(closed, leaves, marks)
    if len(outputs) != 1:
        raise ValueError(f"the classifier must return one array of logits, got {len(outputs)}")
    return outputs[0]


def nonlinear_primitives(fn: Callable, arguments: Any, images: Any) -> tuple[str, ...]:
    """Sorted names of the primitives of `fn(arguments, images)` that are not affine in `images`."""
    closed = jax.make_jaxpr(fn)(arguments, images)
    marks = [False] * len(jax.tree.leaves(arguments)) + [True]
    return tuple(sorted(_nonlinear(closed, marks)))


# Activations -------------------------------------------------------------------------------------


def _activation(eqn, marked, definitions) -> _Scaled | None:
    """What stands for an equation that is an activation of an image-dependent value, or None."""
    if len(eqn.outvars) != 1 or not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating):
        return None
    inputs = [
        a for a, mark in zip(eqn.invars, _walk.marks_of(eqn.invars, marked), strict=True) if mark
    ]
    if not inputs:
        return None
    name = eqn.primitive.name
    if _walk.is_call(eqn):
        if eqn.params.get("name") in ACTIVATIONS and _is_elementwise(eqn):
            shape = eqn.outvars[0].aval.shape
            return next((_Scaled(a, 1.0) for a in inputs if a.aval.shape == shape), None)
    elif not (name in _BENDS or (name in _PAIRS and len(inputs) == 2)):
        return None
    source = _common_source(inputs, marked, definitions)
    if source is None or source.aval.shape != eqn.outvars[0].aval.shape:
        return None
    slope = _rectifier_slope(eqn, source, definitions)
    return None if slope is None else _Scaled(source, slope)


def _is_elementwise(eqn) -> bool:
    if not _walk.is_call(eqn):
        return eqn.primitive.name in _ELEMENTWISE or eqn.primitive.name == "broadcast_in_dim"
    ((closed, _),) = _walk.inner_jaxprs(eqn, ())
    return all(map(_is_elementwise, _walk.opened(closed)[0].eqns))


def _common_source(inputs, marked, definitions) -> Any | None:
    """The nearest image-dependent value through which all the inputs go, elementwise; or None."""
    frontier = set(inputs)
    while len(frontier) > 1:
        latest = max(frontier, key=lambda var: definitions.get(var, (-1, None))[0])
        _, eqn = definitions.get(latest, (-1, None))
        if eqn is None or not _is_elementwise(eqn):
            return None
        frontier.remove(latest)
        frontier.update(var for var in _walk.variables(eqn.invars) if var in marked)
    (source,) = frontier
    return source if jnp.issubdtype(source.aval.dtype, jnp.floating) else None


def _rectifier_slope(eqn, source, definitions) -> float | None:
    """Slope s of f(x) = s x for large x if the output f of an equation rectifies `source`."""

    def output(x):
        known = {source: np.asarray(x, source.aval.dtype)}
        value = _scalar(eqn.outvars[0], known, definitions)
        return None if value is None else float(value)

    with jax.ensure_compile_time_eval():
        points = [output(_FAR), output(2 * _FAR), output(-_FAR)]
    if None in points:
        return None
    near, far, left = np.array(points) / (_FAR, 2 * _FAR, -_FAR)
    straight = abs(far - near) <= _TOLERANCE * abs(near)
    bent = near != 0 and -_TOLERANCE <= left / near < 1 - _TOLERANCE
    return float(near) if straight and bent else None


def _scalar(atom, known, definitions) -> Any | None:
    """Value of one element of `atom`, given one of each `known` variable; None if that is not all
    that it depends on, or not elementwise."""
    if isinstance(atom, Literal):
        aval: Any = atom.aval
        value = np.asarray(atom.val, aval.dtype)
        return value.reshape(()) if value.size == 1 else None
    if atom not in known:
        _, eqn = definitions.get(atom, (-1, None))
        if eqn is None or not _is_elementwise(eqn):
            return None
        values = [_scalar(invar, known, definitions) for invar in eqn.invars]
        if any(value is None for value in values):
            return None
        known.update(zip(eqn.outvars, _scalar_outputs(eqn, values), strict=True))
    return known[atom]


def _scalar_outputs(eqn, values) -> list[Any]:
    if eqn.primitive.name == "broadcast_in_dim":
        return values
    if not _walk.is_call(eqn):
        return [eqn.primitive.bind(*values, **eqn.params)]
    ((closed, _),) = _walk.inner_jaxprs(eqn, ())
    jaxpr, _ = _walk.opened(closed)
    known, definitions = dict(zip(jaxpr.invars, values, strict=True)), _definitions(jaxpr)
    return [_scalar(var, known, definitions) for var in jaxpr.outvars]


def _definitions(jaxpr) -> dict[Any, tuple[int, Any]]:
    """The place and the equation that each variable of a jaxpr comes from."""
    return {var: (i, eqn) for i, eqn in enumerate(jaxpr.eqns) for var in eqn.outvars}


# Rewriting ---------------------------------------------------------------------------------------


def _plan(closed, marks: Sequence[bool]) -> list[tuple[Any, list[bool], _Scaled | None]]:
    """The equations that the rewritten jaxpr needs, with marks and with what stands for them."""
    jaxpr, _ = _walk.opened(closed)
    marked, definitions = _walk.dependent(closed, marks), _definitions(jaxpr)
    needed = set(_walk.variables(jaxpr.outvars))
    plan = []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or needed.intersection(eqn.outvars):
            activation = _activation(eqn, marked, definitions)
            needed.update(
                _walk.variables(eqn.invars) if activation is None else [activation.source]
            )
            plan.append((eqn, _walk.marks_of(eqn.invars, marked), activation))
    return plan[::-1]


def _changes(closed, marks: Sequence[bool]) -> bool:
    """Whether there is anything to rewrite in a jaxpr, at any depth."""
    return any(
        activation is not None
        or _is_maximum(eqn, eqn_marks)
        or any(_changes(*inner) for inner in _walk.inner_jaxprs(eqn, eqn_marks))
        for eqn, eqn_marks, activation in _plan(closed, marks)
    )


def _evaluate(closed, arguments: Sequence[Any], marks: Sequence[bool]) -> list[Any]:
    """Outputs of the rewritten jaxpr."""
    jaxpr, consts = _walk.opened(closed)
    values = dict(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, arguments, strict=True))

    def read(atom):
        return atom.val if isinstance(atom, Literal) else values[atom]

    for eqn, eqn_marks, activation in _plan(closed, marks):
        if activation is not None:
            source = read(activation.source)
            # Comparing first keeps the common case free of a product with one.
            scaled = source if abs(activation.slope - 1) < 1e-6 else source * activation.slope
            outputs = [lax.convert_element_type(scaled, eqn.outvars[0].aval.dtype)]
        else:
            outputs = _outputs(eqn, [read(atom) for atom in eqn.invars], eqn_marks)
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _outputs(eqn, inputs: list[Any], marks: Sequence[bool]) -> Sequence[Any]:
    """Outputs of one equation, rewritten inside where there is something to rewrite.

    A call without such a thing is bound as it was, which keeps its own derivative rules.
    """
    if _is_maximum(eqn, marks):
        return [_MEANS[eqn.primitive.name](*inputs, **eqn.params)]
    inner = _walk.inner_jaxprs(eqn, marks) if any(marks) else []
    if any(_changes(*each) for each in inner):
        return _rewritten(eqn, inputs, inner)
    outputs = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
    return outputs if eqn.primitive.multiple_results else [outputs]


def _rewritten(eqn, inputs: list[Any], inner) -> Sequence[Any]:
    """Outputs of a call or of control flow whose inside is rewritten."""
    name, params = eqn.primitive.name, eqn.params
    functions = [_function(closed, marks) for closed, marks in inner]
    if name == "cond":
        return lax.switch(inputs[0], functions, *inputs[1:])
    if name == "scan":
        consts, carry = _walk.scan_counts(eqn)

        def step(carried, slices):
            outputs = functions[0](*inputs[:consts], *carried, *slices)
            return outputs[:carry], outputs[carry:]

        carried, xs = inputs[consts : consts + carry], inputs[consts + carry :]
        options = {key: params[key] for key in ("length", "reverse", "unroll")}
        carried, stacked = lax.scan(step, carried, xs, **options)
        return [*carried, *stacked]
    if name == "while":
        condition, body = functions
        first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        return lax.while_loop(
            lambda carried: condition(*inputs[:first], *carried)[0],
            lambda carried: body(*inputs[first:second], *carried),
            inputs[second:],
        )
    (function,) = functions
    if name in _REMAT:
        function = jax.checkpoint(
            function, prevent_cse=params["prevent_cse"], policy=params["policy"]
        )
    return function(*inputs)


def _function(closed, marks: Sequence[bool]) -> Callable[..., list[Any]]:
    return lambda *arguments: _evaluate(closed, arguments, marks)


def _is_maximum(eqn, marks: Sequence[bool]) -> bool:
    floating = jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating) if eqn.outvars else False
    return any(marks) and floating and eqn.primitive.name in _MEANS


def _window_mean(x, *, window_dimensions, **params):
    # Padding counts in the sum, as zero, and in the size, as in the paper's average pooling.
    zero = np.zeros((), x.dtype)
    total = lax.reduce_window(x, zero, lax.add, window_dimensions, **params)
    return total / math.prod(window_dimensions)


def _mean(x, *, axes, **_):
    return jnp.mean(x, axis=axes)


_MEANS = {"reduce_window_max": _window_mean, "reduce_max": _mean}


# What is not affine ------------------------------------------------------------------------------


def _nonlinear(closed, marks: Sequence[bool]) -> set[str]:
    """Names of the primitives of a jaxpr that are not affine in what depends on the images."""
    jaxpr, _ = _walk.opened(closed)
    marked = _walk.dependent(closed, marks)
    needed = set(_walk.variables(jaxpr.outvars))
    names = set()
    for eqn in reversed(jaxpr.eqns):
        if not needed.intersection(eqn.outvars):
            continue
        needed.update(_walk.variables(eqn.invars))
        eqn_marks = _walk.marks_of(eqn.invars, marked)
        if any(eqn_marks):
            names.update(*(_nonlinear(*each) for each in _walk.inner_jaxprs(eqn, eqn_marks)))
            if not _is_affine(eqn, eqn_marks):
                names.add(eqn.primitive.name)
    return names


def _is_affine(eqn, marks: Sequence[bool]) -> bool:
    """Whether an equation is affine in its marked operands, if the jaxprs inside it are."""
    name = eqn.primitive.name
    # A `while` loop is none of these: it has no reverse mode, so no weight can be read off it.
    if _walk.is_call(eqn) or name == "scan":
        return True
    if name == "convert_element_type":
        return jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.inexact)
    if name in _LINEAR:
        return True
    if name in _BILINEAR:
        return sum(marks) == 1
    if name in ("select_n", "cond"):
        return not marks[0]
    places = {place for place, mark in enumerate(marks) if mark}
    return places <= _LINEAR_AT.get(name, set())
