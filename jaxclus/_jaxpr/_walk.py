"""Reading jaxprs: what is inside an equation, and what depends on the images."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

_CALLS = frozenset(
    "jit pjit closed_call core_call custom_jvp_call custom_vjp_call remat2 checkpoint".split()
)


def opened(closed) -> tuple[Any, Sequence[Any]]:
    """The jaxpr and its constants; from jax 0.11 on both are one object."""
    return getattr(closed, "jaxpr", closed), getattr(closed, "consts", ())


def constants(closed) -> list[np.ndarray]:
    """The arrays and numbers that a program and all programs inside it hold; of keys their data."""
    jaxpr, held = opened(closed)
    held, found = list(held), []
    for eqn in jaxpr.eqns:
        held += [atom.val for atom in eqn.invars if isinstance(atom, Literal)]
        for inner in jax.tree.leaves(eqn.params):
            if hasattr(opened(inner)[0], "eqns"):
                found += constants(inner)
    return found + [np.asarray(_data(value)) for value in held]


def _data(value: Any) -> Any:
    is_key = jnp.issubdtype(jnp.result_type(value), jax.dtypes.prng_key)
    return jax.random.key_data(value) if is_key else value


def variables(atoms) -> list[Any]:
    return [atom for atom in atoms if not isinstance(atom, Literal)]


def is_call(eqn) -> bool:
    return eqn.primitive.name in _CALLS


def dependent(closed, marks: Sequence[bool]) -> set[Any]:
    """The variables of a jaxpr that depend on its marked arguments."""
    jaxpr, _ = opened(closed)
    marked = {var for var, mark in zip(jaxpr.invars, marks, strict=True) if mark}
    for eqn in jaxpr.eqns:
        outputs = _output_marks(eqn, marks_of(eqn.invars, marked))
        marked.update(var for var, mark in zip(eqn.outvars, outputs, strict=True) if mark)
    return marked


def marks_of(atoms, marked) -> list[bool]:
    return [not isinstance(atom, Literal) and atom in marked for atom in atoms]


def _jaxpr_output_marks(closed, marks: Sequence[bool]) -> list[bool]:
    return marks_of(opened(closed)[0].outvars, dependent(closed, marks))


def _output_marks(eqn, marks: Sequence[bool]) -> list[bool]:
    """Which outputs of an equation depend on the images."""
    inner = inner_jaxprs(eqn, marks) if any(marks) else []
    name = eqn.primitive.name
    if not inner or (name == "cond" and marks[0]):
        return [any(marks)] * len(eqn.outvars)
    if name == "while":
        (condition, condition_marks), (_, body_marks) = inner
        # The number of rounds shows in every carried value.
        endless = any(_jaxpr_output_marks(condition, condition_marks))
        return [mark or endless for mark in body_marks[eqn.params["body_nconsts"] :]]
    outputs = [_jaxpr_output_marks(closed, inner_marks) for closed, inner_marks in inner]
    return [any(column) for column in zip(*outputs, strict=True)]


def inner_jaxprs(eqn, marks: Sequence[bool]) -> list[tuple[Any, Sequence[bool]]]:
    """The jaxprs inside an equation that are walked into, each with the marks of its arguments."""
    name, params = eqn.primitive.name, eqn.params
    if name in _CALLS:
        return [(params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"], marks)]
    if name == "cond":
        return [(branch, marks[1:]) for branch in params["branches"]]
    if name == "scan":
        consts, carry = scan_counts(eqn)
        return [(params["jaxpr"], _carried(params["jaxpr"], marks, consts, carry))]
    if name == "while":
        split = params["cond_nconsts"]
        body = marks[split:]
        consts = params["body_nconsts"]
        body = _carried(params["body_jaxpr"], body, consts, len(body) - consts)
        condition = [*marks[:split], *body[consts:]]
        return [(params["cond_jaxpr"], condition), (params["body_jaxpr"], body)]
    return []


def _carried(body, marks: Sequence[bool], consts: int, carry: int) -> list[bool]:
    """Marks of a loop body's arguments once what it carries has gone round often enough."""
    marks = list(marks)
    while True:
        carried = _jaxpr_output_marks(body, marks)[:carry]
        update = [a or b for a, b in zip(marks[consts : consts + carry], carried, strict=True)]
        if update == marks[consts : consts + carry]:
            return marks
        marks[consts : consts + carry] = update


def scan_counts(eqn) -> tuple[int, int]:
    """Numbers of constants and of carried values of a scan.

    Read off the ranks, since their names in the parameters differ between jax versions: what is
    scanned over or stacked has one axis more outside the body than inside.
    """
    body, _ = opened(eqn.params["jaxpr"])

    def stacked(outside, inside):
        return sum(a.aval.ndim != b.aval.ndim for a, b in zip(outside, inside, strict=True))

    carry = len(eqn.outvars) - stacked(eqn.outvars, body.outvars)
    return len(eqn.invars) - stacked(eqn.invars, body.invars) - carry, carry
