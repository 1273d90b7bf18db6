"""Where variables are zero once a unit is zeroed in every leaf: what decides whether zeroing it is deleting it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pruneopt.program import versions
from pruneopt.program.axes import Reader
from pruneopt.program.keys import Literal
from pruneopt.program.program import Atom, Equation
from pruneopt.program.remainder import SUMS, Remainder

Found = frozenset[int]
ZeroRule = Callable[["Zeros", Equation, int, int], Found]  # units at which axis k of output i is zero
Infinite = Callable[[Equation], tuple[Atom, ...]]  # the inputs at whose zeros a value may be infinite or not a number

_NONE: Found = frozenset()
_SUMMED = "it is summed (reduce_sum) where a unit at zero is not zero, and what it is there is not known apart"
_INFINITE = "may be infinite or not a number: deleting it is right all the same, zeroing it in its leaves is not"
_CARRIED = "zeroing it in its leaves is no deletion: what is carried to the next call is not zero there"
_CONTRACTED = "zeroing it in its leaves is no deletion: {} sums what is left of it"


class Zeros:
    """For each axis of each variable, the units whose entries are zero once they are zeroed in the leaves.

    left: (unit, why) where zeroing is no deletion: a product or sum takes the rest of it, or a value may be infinite.
    products: for each contraction of the reader, the units that it takes the rest of; they are in `left` too.
    rules: {primitive: where its outputs are zero}; without one nowhere. infinite: {primitive: inputs}. start: {path:
    the units zeroed in it along each axis}; all by default, in every leaf. remainder:
    what sums take of units that are not zero there, where that is known.
    """

    def __init__(
        self,
        reader: Reader,
        rules: Mapping[str, ZeroRule],
        infinite: Mapping[str, Infinite],
        start: Mapping[str, Sequence[Found]] | None = None,
    ):
        self._reader, self._rules, self._infinite = reader, rules, infinite
        within = lambda other, zeroed: Zeros(other, rules, infinite, zeroed).remainder  # noqa: E731
        self.remainder = Remainder(reader, lambda atom, k: self.of(atom)[k], within)
        self._of: dict[int, tuple[Found, ...]] = {}
        self._null: set[int] = set()
        self.left: list[tuple[int, str]] = []
        self.products: list[Found] = []
        axes, program = reader.axes, reader.program
        atoms = {axis: frozenset(axes.atoms(axis)) for axis in range(len(axes.size))}
        self._everything = frozenset().union(*atoms.values())
        self._atoms = lambda atom: [atoms[axis] for axis in reader.of(atom)]
        for path, var in program.leaves.items():
            self._of[var] = tuple(self._atoms(var) if start is None else start[path])
        self._of.update({var: tuple(self._atoms(var)) for var in reader.state})
        for i, equation in enumerate(program.equations):
            if i in reader.inner:
                self._loop(i, equation, reader.inner[i])
            else:
                self._read(equation)
        for var, out in reader.state.items():
            for axis, zero in zip(reader.of(var), self.of(program.outputs[out]), strict=True):
                self.left += [(unit, _CARRIED) for unit in atoms[axis] - zero]
        for i, equation in enumerate(program.equations):
            name = equation.primitive.name
            if name in SUMS:
                dims = equation.params["axes"] if name == "reduce_sum" else equation.params["dimension_numbers"][0][0]
                units = frozenset[int]().union(*(atoms[reader.read[i][0][k]] for k in dims))
                why = _SUMMED if name == "reduce_sum" else _CONTRACTED.format(name)
                self.left += [(unit, why) for unit in units if not self.remainder.is_known(i, unit)]
        at: dict[Any, list[int]] = {}
        for i, equation in enumerate(program.equations):
            if equation.primitive.name == "dot_general" and all(isinstance(atom, int) for atom in equation.inputs):
                at.setdefault(equation.inputs, []).append(i)
        for a, b, left, right, name in reader.contractions:
            units = atoms[b] - self.along(left, a) - self.along(right, b)
            if isinstance(left, int) and isinstance(right, int) and name in SUMS:
                known = [frozenset(u for u in units if self.remainder.is_known(i, u)) for i in at[left, right]]
                units -= frozenset.intersection(*known)
            elif name not in SUMS:
                self.left += [(unit, _CONTRACTED.format(name)) for unit in units]
            self.products.append(units)

    def of(self, atom: Atom) -> tuple[Found, ...]:
        """For each axis, the units at which a variable is zero."""
        rank = len(self._reader.shape(atom))
        if self.is_null(atom):
            return (self._everything,) * rank
        return self._of.get(atom, (_NONE,) * rank) if isinstance(atom, int) else (_NONE,) * rank

    def along(self, atom: Atom, axis: int) -> Found:
        """Units at which a variable is zero along one of its axes."""
        found = [zero for i, zero in zip(self._reader.of(atom), self.of(atom), strict=True) if i == axis]
        return frozenset.intersection(*found) if found else _NONE

    def is_null(self, atom: Atom) -> bool:
        """Whether it is zero everywhere, whatever params and the batch."""
        constants = self._reader.program.constants
        if isinstance(atom, int) and atom not in constants:
            return atom in self._null
        value: Any = atom.value if isinstance(atom, Literal) else constants[atom]
        return isinstance(value.dtype, np.dtype) and not np.any(np.asarray(value))

    def units(self, atom: Atom, k: int) -> Found:
        """The units that axis `k` of a variable holds."""
        return self._atoms(atom)[k]

    def axis(self, atom: Atom, k: int) -> int:
        """Axis `k` of a variable."""
        return self._reader.of(atom)[k]

    def at(self, equation: Equation, inputs: tuple[Atom, ...], i: int, k: int) -> list[Found]:
        """For each input, where it is zero along axis `k` of output `i`: nowhere where it is repeated along it."""
        shape, found = self._reader.shape(equation.outputs[i]), []
        for atom in inputs:
            own = self._reader.shape(atom)
            is_full = len(own) == len(shape) and own[k] == shape[k]
            found.append(self._everything if self.is_null(atom) else self.of(atom)[k] if is_full else _NONE)
        return found

    def kept(self, equation: Equation, inputs: tuple[Atom, ...], i: int, k: int) -> Found:
        """Units of axis `k` of output `i` that are zero in every axis of the inputs that holds them."""
        pairs = [pair for a in inputs for pair in zip(self._atoms(a), self.of(a), strict=True)]
        met = _NONE.union(*(own for own, _ in pairs))
        return (self.units(equation.outputs[i], k) & met) - _NONE.union(*(own - zero for own, zero in pairs))

    def _loop(self, at: int, equation: Equation, body: Reader) -> None:
        """What is carried is zero where it is at the start and after every step."""
        loop = versions.scan(equation)
        n, k = loop.shared, loop.carry
        inputs = [self.of(atom) for atom in equation.inputs]
        inputs[n + k :] = [one[1:] for one in inputs[n + k :]]
        while True:
            step = Zeros(body, self._rules, self._infinite, {str(i): one for i, one in enumerate(inputs)})
            ends = [step.of(atom) for atom in body.program.outputs]
            pairs = zip(inputs[n : n + k], ends[:k], strict=True)
            carried = [tuple(a & b for a, b in zip(*pair, strict=True)) for pair in pairs]
            if carried == inputs[n : n + k]:
                self.remainder.inner[at] = step.remainder
                break
            inputs[n : n + k] = carried
        self.left += step.left
        self._of.update(zip(equation.outputs, [*carried, *((_NONE, *end) for end in ends[k:])], strict=True))

    def _read(self, equation: Equation) -> None:
        name = equation.primitive.name
        for atom in self._infinite[name](equation) if name in self._infinite else ():
            for unit in _NONE if self.is_null(atom) else _NONE.union(*self.of(atom)):
                self.left.append((unit, f"{name} of a unit at zero {_INFINITE}"))
        rule = self._rules.get(name)
        if rule is None:
            return
        if rule in (keeps, spread) and len(equation.inputs) == 1 and self.is_null(equation.inputs[0]):
            self._null.update(equation.outputs)
        for i, var in enumerate(equation.outputs):
            self._of[var] = tuple(rule(self, equation, i, k) for k in range(len(self._reader.shape(var))))


def keeps(zeros: Zeros, equation: Equation, i: int, k: int) -> Found:
    """f(0) = 0, or only another layout of the first input's entries; of input i where there are as many as outputs."""
    at = i if len(equation.inputs) == len(equation.outputs) else 0
    return zeros.kept(equation, equation.inputs[at : at + 1], i, k)


def joins(zeros: Zeros, equation: Equation, i: int, k: int) -> Found:
    """Entries of all inputs side by side."""
    return zeros.kept(equation, equation.inputs, i, k)


def writes(zeros: Zeros, equation: Equation, i: int, k: int) -> Found:
    """Entries of the first two inputs, the others being indices."""
    return zeros.kept(equation, equation.inputs[:2], i, k)


def scattered(zeros: Zeros, equation: Equation, i: int, k: int) -> Found:
    """Entries of the first and the third input, combined, the second being indices."""
    return zeros.kept(equation, (equation.inputs[0], equation.inputs[2]), i, k)


def pads(zeros: Zeros, equation: Equation, i: int, k: int) -> Found:
    """Entries of the first input among zeros."""
    return joins(zeros, equation, i, k) if zeros.is_null(equation.inputs[1]) else _NONE


def spread(zeros: Zeros, equation: Equation, i: int, k: int) -> Found:
    """An axis of the input, or copies of it along a new one."""
    dims = list(equation.params["broadcast_dimensions"])
    return zeros.units(equation.outputs[i], k) & zeros.of(equation.inputs[0])[dims.index(k)] if k in dims else _NONE


def where_any(zeros: Zeros, equation: Equation, i: int, k: int) -> Found:
    """Zero where any input is."""
    return zeros.units(equation.outputs[i], k) & _NONE.union(*zeros.at(equation, equation.inputs, i, k))


def where_first(zeros: Zeros, equation: Equation, i: int, k: int) -> Found:
    """Zero where the first input is: a numerator."""
    return zeros.units(equation.outputs[i], k) & zeros.at(equation, equation.inputs[:1], i, k)[0]


def where_all(zeros: Zeros, equation: Equation, i: int, k: int) -> Found:
    """Zero where all inputs are."""
    return zeros.units(equation.outputs[i], k) & frozenset.intersection(*zeros.at(equation, equation.inputs, i, k))


def where_chosen(zeros: Zeros, equation: Equation, i: int, k: int) -> Found:
    """Zero where all inputs but the first, which chooses among them, are."""
    return zeros.units(equation.outputs[i], k) & frozenset.intersection(*zeros.at(equation, equation.inputs[1:], i, k))


def multiplied(zeros: Zeros, equation: Equation, i: int, k: int) -> Found:
    """A product is zero along an axis of its first two inputs where that input is."""
    axis = zeros.axis(equation.outputs[i], k)
    return zeros.units(equation.outputs[i], k) & _NONE.union(*(zeros.along(a, axis) for a in equation.inputs[:2]))


def at_all(equation: Equation) -> tuple[Atom, ...]:
    """All inputs."""
    return equation.inputs


def at_divisor(equation: Equation) -> tuple[Atom, ...]:
    """All inputs but the first."""
    return equation.inputs[1:]
