"""Which steps of a program are needed once units are gone: what is zero everywhere is not computed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from pruneopt.program.axes import Reader
from pruneopt.program.forms import PRODUCTS
from pruneopt.program.program import Atom, Equation
from pruneopt.program.resize import Left

_ADDS = {"add": (0, 1), "add_any": (0, 1), "sub": (0,)}  # of one input and zeros they give that input
_PASSING = {"mul", "neg", "copy", "convert_element_type", "reshape", "transpose", "broadcast_in_dim", "squeeze"}


class Step(NamedTuple):
    """What is done next: an equation, with its number, or a call in the place of its body (number -1).

    takes: the input that it gives as it is, the other being zeros; -1 where it computes. needs: what it reads beside
        its inputs.
    """

    number: int
    equation: Equation
    takes: int = -1
    needs: frozenset[int] = frozenset()

    @property
    def reads(self) -> set[int]:
        """The variables that it reads."""
        inputs = self.equation.inputs if self.takes < 0 else (self.equation.inputs[self.takes],)
        return {atom for atom in inputs if isinstance(atom, int)} | self.needs


class Live(NamedTuple):
    """steps: in order. null: variables that are zero everywhere. last: {variable: the last step that reads it}."""

    steps: list[Step]
    null: set[Atom]
    last: dict[int, int]


def live(reader: Reader, left: Left, needs: Mapping[int, set[int]]) -> Live:
    """The steps that the outputs need: of a call with a derivative of its own the call, not its body as well.

    needs: {equation: what it reads beside its inputs}, of sums that add what they take of units that are gone.
    """
    null: set[Atom] = set()
    steps: list[Step] = []
    calls = list(reader.program.calls)
    for i, equation in enumerate(reader.program.equations):
        while calls and calls[0].at <= i:
            steps.append(Step(-1, calls.pop(0).equation))
        if i not in needs and _is_null(reader, left, i, null):
            null.update(equation.outputs)
        else:
            steps.append(Step(i, equation, _taken(reader, left, equation, null), frozenset(needs.get(i, ()))))
    steps += [Step(-1, call.equation) for call in calls]
    wanted = {atom for atom in reader.program.outputs if isinstance(atom, int)}
    needed: list[Step] = []
    for step in reversed(steps):
        if wanted & set(step.equation.outputs) or not step.equation.outputs:
            wanted -= set(step.equation.outputs)
            wanted |= step.reads
            needed.append(step)
    needed.reverse()
    last = {atom: i for i, step in enumerate(needed) for atom in step.reads}
    return Live(needed, null, last)


def _is_null(reader: Reader, left: Left, i: int, null: set[Atom]) -> bool:
    """Whether the outputs of an equation are zero everywhere, or have no entry at all."""
    equation, read = reader.program.equations[i], reader.read[i]
    name, inputs = equation.primitive.name, equation.inputs
    if equation.outputs and all(0 in left.sizes(reader.of(atom)) for atom in equation.outputs):
        return True
    summed: Iterable[int] = ()
    if name == "reduce_sum":
        summed = (read[0][k] for k in equation.params["axes"])
    elif name == "dot_general":
        summed = (read[0][k] for k in equation.params["dimension_numbers"][0][0])
    elif name == "conv_general_dilated":
        summed = (read[1][equation.params["dimension_numbers"].rhs_spec[1]],)
    if not all(map(left.any, summed)):
        return True
    zero = [isinstance(atom, int) and atom in null for atom in inputs]
    if name in _ADDS or name in PRODUCTS:
        return all(zero) if name in _ADDS else any(zero[:2])
    return name in _PASSING and any(zero)


def _taken(reader: Reader, left: Left, equation: Equation, null: set[Atom]) -> int:
    """The input of an addition that is its result, the other being zeros, or -1."""
    for i in _ADDS.get(equation.primitive.name, ()):
        one, other, (out,) = equation.inputs[i], equation.inputs[1 - i], equation.outputs
        if isinstance(one, int) and isinstance(other, int) and other in null:
            sizes = [left.sizes(reader.of(atom)) for atom in (one, out)]
            if sizes[0] == sizes[1]:
                return i
    return -1
