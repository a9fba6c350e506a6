"""A function as one flat list of operations: calls opened, control flow turned into choices.

A jaxpr nests: compiled functions, branches and loops hold jaxprs of their own. For the question
which value reaches which, nesting does not matter, so that it is removed:

- a call becomes what it calls;
- a branch becomes `select_n` between the outputs of the branches;
- a loop becomes its body, once. A carried value is the output of a `carry` of its start and of
  what the body makes of it, which closes a cycle; a `while` loop hands out `while` of its
  condition and of the carried value;
- a call with a derivative of its own, `custom_jvp_call` or `custom_vjp_call`, becomes its body and
  an operation of that name on the body's output followed by the call's inputs: the value is that
  of the first, the derivative goes to the others. Where the derivative is known to be the true one
  the call is opened like any other.
"""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import source_info_util
from jax.extend.core import Literal

from jaxclus._jaxpr import _walk

CUSTOM = frozenset({"custom_jvp_call", "custom_vjp_call"})
# Whose custom derivatives are the true ones, written out for speed or for accuracy.
_TRUE_DERIVATIVES = (
    str(Path(jax.__file__).parent) + os.sep,
    str(Path(__file__).parents[1] / "models" / "_ops.py"),
)


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """One array of a dataflow; two are equal only if they are the same."""

    dtype: Any

    @property
    def is_floating(self) -> bool:
        """Whether a derivative can go through: a real or complex number."""
        return self.dtype is not None and jnp.issubdtype(self.dtype, jnp.inexact)


class Operation(NamedTuple):
    """A primitive, or one of the stand-ins of this module.

    Attributes:
        name: the primitive's.
        inputs: values that go in; literal numbers are values without origin.
        outputs: values that come out.
        place: the line of source that asked for it, "file:line:column (function)"; of a custom
            derivative the function it belongs to, "function (file:line)".
        differentiated: whether it was traced inside a derivative that the function itself takes.
    """

    name: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    place: str
    differentiated: bool


class Dataflow(NamedTuple):
    """The operations, in an order in which only a `carry` uses values that come later."""

    operations: list[Operation]
    images: Value
    outputs: list[Value]


def dataflow(fn: Callable, arguments: Any, images: Any) -> Dataflow:
    """`fn(arguments, images)`, traced; `images` may be a `jax.ShapeDtypeStruct`."""
    closed = jax.make_jaxpr(fn)(arguments, images)
    inputs = [_value(var) for var in _walk.opened(closed)[0].invars]
    flattener = _Flattener([])
    outputs = flattener.flatten(closed, inputs, _Context("", ""))
    return Dataflow(flattener.operations, inputs[-1], outputs)


class _Context(NamedTuple):
    """Where a jaxpr is called from."""

    place: str
    stack: str


class _Flattener(NamedTuple):
    """Collects operations."""

    operations: list[Operation]

    def flatten(self, closed: Any, inputs: list[Value], context: _Context) -> list[Value]:
        """Adds the operations of a jaxpr; returns its outputs."""
        jaxpr, _ = _walk.opened(closed)
        values = {var: _value(var) for var in jaxpr.constvars}
        values.update(zip(jaxpr.invars, inputs, strict=True))

        def read(atom) -> Value:
            return _value(atom) if isinstance(atom, Literal) else values[atom]

        for eqn in jaxpr.eqns:
            outputs = self._outputs(eqn, [read(atom) for atom in eqn.invars], context)
            values.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _outputs(self, eqn, inputs: list[Value], outer: _Context) -> list[Value]:
        """Adds what stands for one equation; returns its outputs."""
        name, params = eqn.primitive.name, eqn.params
        info = eqn.source_info
        # What jax itself traced has no line of its own, but the line that called it.
        place = os.path.basename(source_info_util.summarize(info)) or outer.place
        context = _Context(place, f"{outer.stack}/{info.name_stack}")
        if name == "cond":
            branches = [self.flatten(each, inputs[1:], context) for each in params["branches"]]
            choices = [(inputs[0], *column) for column in zip(*branches, strict=True)]
            return [self._stand_in("select_n", choice, context) for choice in choices]
        if name == "scan":
            consts, carry = _walk.scan_counts(eqn)
            start = inputs[consts : consts + carry]
            carried = [Value(value.dtype) for value in start]
            body = [*inputs[:consts], *carried, *inputs[consts + carry :]]
            outputs = self.flatten(params["jaxpr"], body, context)
            self._close(carried, start, outputs[:carry], context)
            return [*carried, *outputs[carry:]]
        if name == "while":
            first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
            start = inputs[second:]
            carried = [Value(value.dtype) for value in start]
            condition = [*inputs[:first], *carried]
            (more,) = self.flatten(params["cond_jaxpr"], condition, context)
            body = [*inputs[first:second], *carried]
            self._close(carried, start, self.flatten(params["body_jaxpr"], body, context), context)
            return [self._stand_in("while", (more, value), context) for value in carried]
        called = _called(eqn)
        if called is None:
            outputs = [_value(var) for var in eqn.outvars]
            self._add(name, inputs, outputs, context)
            return outputs
        outputs = self.flatten(called, inputs, context)
        if name not in CUSTOM or all(map(_is_true, sources := _sources(eqn))):
            return outputs
        context = context._replace(place=_named(sources[0]))
        return [self._stand_in(name, (output, *inputs), context) for output in outputs]

    def _add(self, name, inputs, outputs, context: _Context) -> None:
        differentiated = "jvp(" in context.stack
        self.operations.append(
            Operation(name, tuple(inputs), tuple(outputs), context.place, differentiated)
        )

    def _stand_in(self, name, inputs, context: _Context) -> Value:
        """An operation with one output, of the type of the last but the deciding input."""
        output = Value((inputs[0] if name in CUSTOM else inputs[1]).dtype)
        self._add(name, inputs, [output], context)
        return output

    def _close(self, carried, start, following, context: _Context) -> None:
        for value, *inputs in zip(carried, start, following, strict=True):
            self._add("carry", inputs, [value], context)


def _value(atom) -> Value:
    return Value(getattr(atom.aval, "dtype", None))


def _called(eqn) -> Any | None:
    """The jaxpr that stands for an equation one to one, or None."""
    closed = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    if closed is None:
        return None
    jaxpr, _ = _walk.opened(closed)
    sizes = len(jaxpr.invars), len(jaxpr.outvars)
    return closed if sizes == (len(eqn.invars), len(eqn.outvars)) else None


def _sources(eqn) -> list[str]:
    """Where a function with a custom derivative and the rule of this derivative are defined.

    Each as "function at file:line", or empty if unknown.
    """
    params = eqn.params
    rule = params.get("bwd", params.get("jvp_jaxpr_fun"))
    infos = [_walk.opened(params["call_jaxpr"])[0].debug_info, getattr(rule, "debug_info", None)]
    return [getattr(info, "func_src_info", None) or "" for info in infos]


def _is_true(source: str) -> bool:
    return source.partition(" at ")[2].startswith(_TRUE_DERIVATIVES)


def _named(source: str) -> str:
    function, _, line = source.partition(" at ")
    return f"{function} ({os.path.basename(line)})"
