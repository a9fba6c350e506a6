"""How the images reach the outputs of a dataflow: as numbers with a derivative, or otherwise.

Three questions about every value, each answered by a sweep that is repeated until nothing changes
(loops are cycles):

- does it depend on the images?
- does it do so smoothly, that is, does a derivative reach it? Rounding, comparisons, argmax,
  integers and `stop_gradient` end that.
- what do the outputs need it for? As a `VALUE`; as a factor of a smooth value (`FACTOR`: the mask
  of `x * (x > 0)`); or only to select among smooth values (`SELECTION`: the predicate of
  `where(x > 0, x, 0)`, an index into smooth values, the value under a custom derivative).

So a value that depends on the images, not smoothly, and is needed as a `VALUE` tells the outputs
something that no gradient shows, while masks and selections of a network that is differentiable
almost everywhere do not.
"""

import enum
from collections import defaultdict
from collections.abc import Iterator

from jaxclus._jaxpr._dataflow import CUSTOM, Dataflow, Operation, Value

# Floating-point operations whose derivative is zero, almost everywhere or by decree.
_FLAT = frozenset("round floor ceil sign stop_gradient".split())
_PRODUCTS = frozenset("mul div dot_general conv_general_dilated".split())
# The place of the first index among the inputs; the input at place 0 is indexed.
_INDEXING = {
    "gather": 1,
    "dynamic_slice": 1,
    "dynamic_update_slice": 2,
}
#: Operations that only arrange numbers or change their type.
ARRANGING = frozenset(
    "reshape transpose squeeze expand_dims broadcast_in_dim convert_element_type copy "
    "reduce_precision slice concatenate name optimization_barrier sharding_constraint".split()
)


class Need(enum.IntEnum):
    """What a value is needed for; a larger one includes the smaller ones."""

    NOTHING = 0
    SELECTION = 1
    FACTOR = 2
    VALUE = 3


class Influence:
    """The answers for a dataflow.

    Attributes:
        flow: the dataflow.
        dependent: values that depend on the images.
        smooth: those that do so with a derivative.
        needs: what each value is needed for.
        origin: the operation that each value comes from.
    """

    def __init__(self, flow: Dataflow):
        self.flow = flow
        self.origin = {value: op for op in flow.operations for value in op.outputs}
        self._users: dict[Value, list[Operation]] = defaultdict(list)
        for op in flow.operations:
            for value in op.inputs:
                self._users[value].append(op)
        self.dependent = {flow.images}
        self.smooth = {flow.images}
        while self._spread():
            pass
        self.needs: dict[Value, Need] = defaultdict(lambda: Need.NOTHING)
        self.needs.update(dict.fromkeys(flow.outputs, Need.VALUE))
        while self._trace_back():
            pass

    def depends(self, op: Operation) -> bool:
        """Whether an input of the operation depends on the images."""
        return any(value in self.dependent for value in op.inputs)

    def need(self, op: Operation) -> Need:
        """What the outputs of an operation are needed for."""
        return max((self.needs[value] for value in op.outputs), default=Need.NOTHING)

    def is_stabiliser(self, op: Operation) -> bool:
        """Whether a `stop_gradient` is that of a softmax or a logarithm of a sum of exponentials.

        These subtract the largest exponent, exp(y - stop_gradient(max y)), and the derivative with
        respect to the maximum cancels.
        """
        upward = self.upward(op.inputs[0], ARRANGING | {"max", "select_n"})
        if not any(origin.name == "reduce_max" for origin in upward):
            return False
        shifts = [user for user in self._downward(op.outputs[0]) if user.name == "sub"]
        return any(
            user.name == "exp" for shift in shifts for user in self._downward(shift.outputs[0])
        )

    def is_straight_through(self, op: Operation) -> bool:
        """Whether the output of a `stop_gradient` is added to a smooth value.

        As in x + stop_gradient(f(x) - x), the sum has a derivative that is not its own.
        """
        return any(
            user.name in ("add", "sub") and any(value in self.smooth for value in user.inputs)
            for user in self._downward(op.outputs[0])
        )

    def _spread(self) -> bool:
        """One sweep from the images to the outputs; whether it changed anything."""
        before = len(self.dependent), len(self.smooth)
        for op in self.flow.operations:
            if self.depends(op):
                self.dependent.update(op.outputs)
            # The derivative of a custom rule goes to the inputs of the call, after the body's.
            inputs = op.inputs[1:] if op.name in CUSTOM else op.inputs
            if op.name not in _FLAT and any(value in self.smooth for value in inputs):
                self.smooth.update(value for value in op.outputs if value.is_floating)
        return before != (len(self.dependent), len(self.smooth))

    def _trace_back(self) -> bool:
        """One sweep from the outputs to the images; whether it changed anything."""
        changed = False
        for op in reversed(self.flow.operations):
            need = self.need(op)
            if need == Need.NOTHING:
                continue
            for place, value in enumerate(op.inputs):
                wanted = min(need, self._role(op, place))
                if wanted > self.needs[value]:
                    self.needs[value] = wanted
                    changed = True
        return changed

    def _role(self, op: Operation, place: int) -> Need:
        """What an operation whose output is needed as a value needs its input at a place for."""
        value = op.inputs[place]
        if op.name in CUSTOM and place == 0:
            return Need.SELECTION
        if op.name == "stop_gradient" and self.is_straight_through(op):
            return Need.SELECTION
        others = [each for each in op.inputs if each is not value]
        if not any(each in self.smooth for each in others):
            return Need.VALUE
        if op.name in ("select_n", "while") and place == 0:
            return Need.SELECTION
        if place >= _INDEXING.get(op.name, place + 1):
            return Need.SELECTION
        if op.name.startswith("scatter") and place == 1:
            return Need.SELECTION
        return Need.FACTOR if op.name in _PRODUCTS and value not in self.smooth else Need.VALUE

    def upward(self, value: Value, through: frozenset[str]) -> Iterator[Operation]:
        """The operations that a value comes from, beyond those to look through, with these."""
        pending, seen = [value], set()
        while pending:
            op = self.origin.get(pending.pop())
            if op is not None and id(op) not in seen:
                seen.add(id(op))
                yield op
                if op.name in through:
                    pending.extend(each for each in op.inputs if each in self.dependent)

    def _downward(self, value: Value) -> Iterator[Operation]:
        """The operations that use a value, beyond those that only arrange it, with these."""
        pending, seen = [value], set()
        while pending:
            for op in self._users[pending.pop()]:
                if id(op) not in seen:
                    seen.add(id(op))
                    yield op
                    if op.name in ARRANGING:
                        pending.extend(op.outputs)
