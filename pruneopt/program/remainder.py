"""What a sum still holds of units that are deleted: what fn computes there of zeros, of constants and of copies.

The variance of x less its mean m sums (0 - m)^2 at each unit at which x is zero. An equation along whose axis units can
be deleted computes each unit of the same unit alone; so one such entry is computed apart, by the same equations, and
as many of it as units are gone are added to the sum of what is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from pruneopt.program.axes import Axes, Ids, Reader
from pruneopt.program.keys import Literal
from pruneopt.program.program import Atom
from pruneopt.program.resize import Left

SUMS = frozenset({"reduce_sum", "dot_general"})


class Cut(Protocol):
    """A program with units deleted."""

    @property
    def left(self) -> Left:
        """What is left of its axes."""
        ...

    def narrow(self, i: int, values: Sequence[Any], sizes: Mapping[int, int]) -> list[Any]:
        """The results of equation `i` where these axes have other sizes."""
        ...


class _Held(NamedTuple):
    """A variable along whose axis `k` a unit stands. made: the equation that makes it, -1 for none."""

    made: int
    atom: int
    k: int


class Remainder:
    """How the entries of variables at units that are zeroed in the leaves are computed.

    zero: (variable, axis) -> the units at which it is zero. within: the same of another reader, with the units that are
    zero in its leaves. inner: {equation: those of its body}, of loops that stayed whole.
    """

    def __init__(
        self,
        reader: Reader,
        zero: Callable[[Atom, int], frozenset[int]],
        within: Callable[[Reader, Mapping[str, Sequence[frozenset[int]]]], Remainder],
    ):
        self._reader, self._zero, self.within = reader, zero, within
        self._known: dict[tuple[_Held, int], str] = {}
        self.inner: dict[int, Remainder] = {}

    def summed(self, i: int, unit: int) -> list[tuple[tuple[int, int], ...]]:
        """((input, axis), ...) of each sum of equation `i` that takes what is left of a unit, one not zero there."""
        equation, read, atoms = self._reader.program.equations[i], self._reader.read[i], self._reader.axes.atoms
        held = [place for place in _places(equation) if all(unit in atoms(read[p][k]) for p, k in place)]
        return [place for place in held if not any(unit in self._zero(equation.inputs[p], k) for p, k in place)]

    def is_known(self, i: int, unit: int) -> bool:
        """Whether what equation `i` sums of a unit can be computed apart: along one axis, and of no other unit."""
        places = self.summed(i, unit)
        if len(places) != 1:
            return not places
        inputs, read, axes = self._reader.program.equations[i].inputs, self._reader.read[i], self._reader.axes
        if not all(_is_sum(axes, read[p][k]) and self.kind(inputs[p], k, unit) for p, k in places[0]):
            return False
        own = {read[p][k] for p, k in places[0]}
        return not any(self.summed(i, other) for other in self._free({a for ids in read for a in ids} - own, unit))

    def value(self, i: int, unit: int, gone: Bool[np.ndarray, " units"], cut: Cut, arrays: Mapping[Any, Any]) -> Any:
        """What equation `i` sums of the units that are gone. arrays: of the variables, at the sizes that are left."""
        reader, (place,) = self._reader, self.summed(i, unit)
        equation, made = reader.program.equations[i], {}
        for held in sorted(self._chain(i, unit)):
            if self.kind(held.atom, held.k, unit) == "computed":
                inside = self._inputs(held, unit)
                given = [self._as_read(held.made, p, k, unit, gone, cut, arrays, made) for p, k in inside.items()]
                values = dict(zip(inside, _aligned(given, inside.values()), strict=True))
                maker, read = reader.program.equations[held.made], reader.read[held.made]
                for p in range(len(maker.inputs)):
                    if p not in values:
                        values[p] = self._whole(maker.inputs[p], read[p], cut, arrays)
                m = next(values[p].shape[k] for p, k in inside.items())
                sizes = {read[p][k]: m for p, k in inside.items()} | {reader.of(held.atom)[held.k]: m}
                ordered = [values[p] for p in range(len(maker.inputs))]
                made[held.atom, held.k] = cut.narrow(held.made, ordered, sizes)[maker.outputs.index(held.atom)]
        given = [self._as_read(i, p, k, unit, gone, cut, arrays, made) for p, k in place]
        values = _aligned(given, [k for _, k in place])
        (result,) = equation.run(values)
        (p, k), count = place[0], self._lost(reader.read[i][place[0][0]][place[0][1]], unit, gone).size
        return result if values[p].shape[k] == count else result * np.asarray(count, result.dtype)

    def needs(self, i: int, unit: int) -> set[int]:
        """The variables whose arrays `value` reads."""
        found: set[int] = set()
        for held in self._chain(i, unit):
            if self.kind(held.atom, held.k, unit) == "copies":
                found.add(held.atom)
            elif self.kind(held.atom, held.k, unit) == "computed":
                inside, inputs = self._inputs(held, unit), self._reader.program.equations[held.made].inputs
                found |= {a for p, a in enumerate(inputs) if p not in inside and isinstance(a, int)}
        return found

    def kind(self, atom: Atom, k: int, unit: int) -> str:
        """How a unit's entries along axis `k` are known: "zero", "copies", "constant", "computed", or "" for not."""
        if (given := self._given(atom, k, unit)) or isinstance(atom, Literal):
            return given
        first = self._held(atom, k)
        if (first, unit) not in self._known:
            for held in sorted(self._reached([first], unit)):
                if (held, unit) not in self._known and not self._given(held.atom, held.k, unit):
                    inside = self._inputs(held, unit)
                    equation = self._reader.program.equations[held.made] if inside else None
                    known = equation and all(self.kind(equation.inputs[p], j, unit) for p, j in inside.items())
                    self._known[held, unit] = "computed" if known else ""
        return self._known[first, unit]

    def zeros(self, atom: Atom, gone: Iterable[int]) -> list[bool]:
        """For each axis of a variable, whether it is zero at the units of it that are gone, at all where none are."""
        flags = []
        for k, axis in enumerate(self._reader.of(atom)):
            units = set(self._reader.axes.atoms(axis))
            flags.append((units & set(gone) or units) <= self._zero(atom, k))
        return flags

    def _given(self, atom: Atom, k: int, unit: int) -> str:
        """A kind that asks for no computation."""
        if unit in self._zero(atom, k):
            return "zero"
        if self._reader.of(atom)[k] in self._reader.copies:
            return "copies"
        return "constant" if isinstance(atom, Literal) or atom in self._reader.program.constants else ""

    def _held(self, atom: int, k: int) -> _Held:
        return _Held(self._reader.program.maker.get(atom, -1), atom, k)

    def _chain(self, i: int, unit: int) -> list[_Held]:
        """What `value` computes or reads, from the sum of equation `i` on back."""
        inputs = self._reader.program.equations[i].inputs
        ends = [(inputs[p], k) for place in self.summed(i, unit) for p, k in place]
        return self._reached([self._held(atom, k) for atom, k in ends if isinstance(atom, int)], unit)

    def _reached(self, start: Iterable[_Held], unit: int) -> list[_Held]:
        """From these variables on back, to those that are given."""
        found = dict.fromkeys(start)
        for held in (todo := list(found)):
            if not self._given(held.atom, held.k, unit):
                for p, k in self._inputs(held, unit).items():
                    atom = self._reader.program.equations[held.made].inputs[p]
                    if isinstance(atom, int) and (new := self._held(atom, k)) not in found:
                        found[new] = None
                        todo.append(new)
        return todo

    def _inputs(self, held: _Held, unit: int) -> dict[int, int]:
        """{input: its axis} of the inputs along which the unit stands too; empty where no equation computes it so."""
        reader = self._reader
        if held.made < 0 or held.made in reader.inner:
            return {}
        axes, read, equation = reader.axes, reader.read[held.made], reader.program.equations[held.made]
        own = reader.of(held.atom)
        places = [(p, j) for p, ids in enumerate(read) for j, axis in enumerate(ids) if unit in axes.atoms(axis)]
        is_alone = len({p for p, _ in places}) == len(places) and sum(unit in axes.atoms(a) for a in own) == 1
        whole = axes.find(own[held.k])
        if not is_alone or not _is_sum(axes, whole) or any(axes.find(read[p][j]) != whole for p, j in places):
            return {}
        if equation.primitive.name in SUMS:
            inside = {read[p][j] for place in _places(equation) for p, j in place}
            if any(self.summed(held.made, other) for other in self._free(inside, unit)):
                return {}
        return dict(places)

    def _free(self, axes: Iterable[int], unit: int) -> set[int]:
        """The other classes of units that these axes hold and that are not blocked."""
        known = self._reader.axes
        return {a for axis in axes for a in known.atoms(axis) if a != unit and not known.why_blocked(a)}

    def _lost(self, axis: int, unit: int, gone: Bool[np.ndarray, " units"]) -> np.ndarray:
        """The entries of an axis that go with the units that are gone."""
        return np.flatnonzero(np.any(self._reader.axes.owned(axis, unit)[gone], axis=0))

    def _as_read(
        self,
        i: int,
        p: int,
        k: int,
        unit: int,
        gone: Bool[np.ndarray, " units"],
        cut: Cut,
        arrays: Mapping[Any, Any],
        made: Mapping[Any, Any],
    ) -> Any:
        """Input `p` of equation `i` at the units that are gone: one entry along axis `k` where all of them agree."""
        atom, read, program = self._reader.program.equations[i].inputs[p], self._reader.read[i][p], self._reader.program
        kind = self.kind(atom, k, unit)
        if kind == "zero":
            shape = [1 if j == k else n for j, n in enumerate(cut.left.sizes(read))]
            return jnp.zeros(shape, program.type_of(atom).dtype)
        if isinstance(atom, Literal) or atom in program.constants:
            value = jnp.asarray(atom.value if isinstance(atom, Literal) else program.constants[atom])
            at = np.zeros(1, int) if kind == "copies" else self._lost(read[k], unit, gone)
            return cut.left.sliced(value.take(at, axis=k), read, k)
        value = jax.lax.slice_in_dim(arrays[atom], 0, 1, axis=k) if kind == "copies" else made[atom, k]
        return cut.left.fitted(value, self._reader.of(atom), read, k)

    def _whole(self, atom: Atom, read: Ids, cut: Cut, arrays: Mapping[Any, Any]) -> Any:
        """An input along which no unit stands, as an equation reads it."""
        if isinstance(atom, Literal):
            return atom.value
        if atom in self._reader.program.constants:
            return cut.left.sliced(self._reader.program.constants[atom], read)
        return cut.left.fitted(arrays[atom], self._reader.of(atom), read)


def _places(equation: Any) -> list[tuple[tuple[int, int], ...]]:
    """((input, axis), ...) of each axis that a sum or product sums."""
    if equation.primitive.name == "reduce_sum":
        return [((0, k),) for k in equation.params["axes"]]
    return [((0, a), (1, b)) for a, b in zip(*equation.params["dimension_numbers"][0], strict=True)]


def _aligned(values: Sequence[Any], dims: Iterable[int]) -> list[Any]:
    """With as many entries along these axes as the most of them have."""
    pairs = list(zip(values, dims, strict=True))
    n = max(value.shape[k] for value, k in pairs)
    return [value if value.shape[k] == n else jnp.repeat(value, n, axis=k) for value, k in pairs]


def _is_sum(axes: Axes, axis: int) -> bool:
    """Whether no entry of an axis belongs to units of two classes: it is one class or classes side by side."""
    kind, parts = axes.parts(axis)
    inside = [part for part in parts if axes.atoms(part)]
    return all(_is_sum(axes, part) for part in inside) and (kind != "product" or len(inside) < 2)
