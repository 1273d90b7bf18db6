"""Which axes of which leaves must be cut together: the dependency of axes, and why some cannot be cut."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Bool

from pruneopt.network.leaves import nearest
from pruneopt.program.axes import Reader
from pruneopt.program.primitives import column
from pruneopt.program.program import Program
from pruneopt.program.rewrite import Rewritten, Rules, gone_units
from pruneopt.program.zeros import Zeros
from pruneopt.structure.operators import Lookup, Operator, Refusal

_SHOWN = 8  # ties that an explanation spells out for each axis


@dataclass(frozen=True)
class Group:
    """Axes that index the same `size` units: cutting unit u cuts its entries of every member.

    members: ((path, axis), ...). blocked: why no unit can be cut; empty where units can be. because: what ties the
    members, as words. `Units.places` says which entries of an axis a unit owns.
    """

    members: tuple[tuple[str, int], ...]
    size: int
    blocked: tuple[str, ...]
    because: tuple[str, ...]


class Units:
    """The groups of a program's leaves, in the order of their first member.

    In a group that is not blocked, zeroing a unit in every member leaves fn's output as deleting it does, where numbers
    that fn computed from shapes stay as they were traced. refusals: primitives without a rule and the leaves reached.
    state: {number of an array of the batch: number of the output} that is its value in the next call, such as keys and
    values, which start as zeros: units go there too.
    """

    def __init__(self, program: Program, state: Mapping[int, int] = MappingProxyType({})):
        carried = {program.batch[i]: out for i, out in state.items()}
        self._reader = reader = Reader(program, column("axes"), column("whole"), state=carried)
        self._axes = axes = reader.axes
        read = {a for e in program.equations for a in e.inputs if isinstance(a, int)}
        for path, var in program.leaves.items():
            if var not in read and var not in program.outputs:
                for axis in reader.leaves[path]:
                    axes.block(axis, "fn does not use it")
        zeros = self.zeros()
        self._remainder = zeros.remainder
        for unit, why in zeros.left:
            axes.block(unit, why)
        members: dict[int, list[tuple[str, int]]] = {}
        for path, ids in reader.leaves.items():
            for k, axis in enumerate(ids):
                for atom in dict.fromkeys(axes.atoms(axis)):
                    members.setdefault(atom, []).append((path, k))
        blocked: dict[int, dict[str, None]] = {atom: {} for atom in members}
        because: dict[int, dict[str, None]] = {atom: {} for atom in members}
        for axis, reason in axes.blocks:
            for atom in members.keys() & set(axes.atoms(axis)):
                blocked[atom][reason] = None
        for a, b, why in axes.links:
            for atom in members.keys() & set(axes.atoms(a)) & set(axes.atoms(b)):
                because[atom][why] = None
        self._groups = {
            atom: Group(tuple(found), axes.size[atom], tuple(blocked[atom]), tuple(because[atom]))
            for atom, found in members.items()
        }
        self.groups = list(self._groups.values())
        self._atom_of = {id(group): atom for atom, group in self._groups.items()}
        reached: dict[tuple[str, str], dict[str, None]] = {}
        for name, why, touched in reader.unknown:
            atoms = members.keys() & {a for axis in touched for a in axes.atoms(axis)}
            paths = [p for p, ids in reader.leaves.items() if any(atoms & set(axes.atoms(axis)) for axis in ids)]
            reached.setdefault((name, why), {}).update(dict.fromkeys(paths))
        self.refusals = [Refusal(name, tuple(paths), why) for (name, why), paths in reached.items()]

    def __repr__(self) -> str:
        free = sum(not group.blocked and group.size > 1 for group in self.groups)
        return f"Units({len(self.groups)} groups, {free} of which units can be cut)"

    def zeros(self, start: Mapping[str, Sequence[frozenset[int]]] | None = None) -> Zeros:
        """Where variables are zero once units are zeroed in leaves, {path: those of each axis}; all by default."""
        return Zeros(self._reader, column("zeros"), column("infinite"), start)

    @property
    def reader(self) -> Reader:
        """The axes of every variable of the program."""
        return self._reader

    @property
    def paths(self) -> list[str]:
        """Of all leaves."""
        return list(self._reader.leaves)

    def type_of(self, path: str) -> Any:
        """Shape and dtype of a leaf."""
        return self._reader.program.type_of(self._reader.program.leaves[path])

    def of(self, path: str, axis: int) -> tuple[Group, ...]:
        """The groups of an axis of a leaf, one for each of its parts in order: one where the axis is whole, two where
        it is heads x width or two joined projections, none where its size is 1. Raises ValueError for no such axis.
        """
        return tuple(self._groups[atom] for atom in dict.fromkeys(self._axes.atoms(self._axis(path, axis))))

    def name(self, group: Group) -> str:
        """What a group is called: the leaf and axis of its first member, 'layers/0/up/kernel[1]', and which part of it
        where that is not the first, such as the width of heads: 'query/kernel[1].1'.
        """
        path, axis = group.members[0]
        part = self.of(path, axis).index(group)
        return f"{path}[{axis}]" + (f".{part}" if part else "")

    def group(self, name: str) -> Group:
        """The group of that name, or the first one along the axis of a leaf that it names, 'query/kernel[1]'.

        Raises ValueError for none, and for one that cannot be cut, with the reason.
        """
        found = next((group for group in self.groups if name in (self.name(group), *self._axes_of(group))), None)
        if found is None:
            free = [self.name(group) for group in self.groups if not group.blocked and group.size > 1]
            raise ValueError(f"groups: there is no '{name}'; those that can be cut are {', '.join(free[:8])}")
        if found.blocked:
            raise ValueError(f"groups: units of '{name}' cannot be cut: {found.blocked[0]}")
        return found

    def _axes_of(self, group: Group) -> list[str]:
        """The axes that a group is the first part of."""
        return [f"{path}[{axis}]" for path, axis in group.members if self.of(path, axis)[0] is group]

    def places(self, group: Group, path: str, axis: int) -> np.ndarray:
        """Whole numbers (units, entries): the entries of an axis that each unit of a group owns."""
        atom = self._atom_of.get(id(group))
        if atom is None or (path, axis) not in group.members:
            raise ValueError(f"axis {axis} of '{path}' is no member of that group; its members are {group.members}")
        owned = self._axes.owned(self._axis(path, axis), atom)
        return np.nonzero(owned)[1].reshape(group.size, -1 if group.size else 0)

    def gone(self, lost: Mapping[str, Sequence[Bool[np.ndarray, " n"]]]) -> dict[int, Bool[np.ndarray, " units"]]:
        """The units that go with these entries: {path: for each axis, which of its entries}.

        Raises ValueError where entries are not whole units, or units that cannot be cut, with the reason.
        """
        entries = [
            (f"axis {k} of '{path}'", self._axis(path, k), one)
            for path, every in lost.items()
            if path in self._reader.leaves
            for k, one in enumerate(every)
        ]
        gone = gone_units(self._axes, entries)
        for atom in gone:
            if why := self._groups[atom].blocked:
                members = ", ".join(f"axis {k} of '{path}'" for path, k in self._groups[atom].members[:_SHOWN])
                raise ValueError(f"units of {members} cannot be cut: {why[0]}")
        return gone

    def carried(self, gone: Mapping[int, Bool[np.ndarray, " units"]], arrays: Sequence[Any]) -> list[Any]:
        """The batch's arrays without these units, which stand in those of state alone."""
        cut, reader = self.rewritten(gone), self._reader
        return [cut.left.sliced(x, reader.of(v)) for v, x in zip(reader.program.batch, arrays, strict=True)]

    def rewritten(self, gone: Mapping[int, Bool[np.ndarray, " units"]]) -> Rewritten:
        """The program without these units."""
        return Rewritten(self._reader, gone, Rules(column("axes"), column("whole"), column("resize")), self._remainder)

    def atom(self, group: Group) -> int:
        """The class of axes that a group stands for."""
        return self._atom_of[id(group)]

    def _axis(self, path: str, axis: int) -> int:
        ids = self._reader.leaves.get(path)
        if ids is None:
            raise ValueError(f"params has no array '{path}'; there are {nearest(path, list(self._reader.leaves))}")
        if not 0 <= axis < len(ids):
            raise ValueError(f"leaf '{path}' has {len(ids)} axes, so axis={axis} is none; count them from 0")
        return ids[axis]

    def _parts(self, axis: int) -> str:
        """The parts of an axis: "8 x 4", "(8 x 4) + 16"."""
        kind, parts = self._axes.parts(axis)
        if not parts:
            return str(self._axes.size[axis])
        inside = [self._parts(p) if self._axes.parts(p)[0] in ("", kind) else f"({self._parts(p)})" for p in parts]
        return (" x " if kind == "product" else " + ").join(i for i in inside if kind == "sum" or i not in ("1", "(1)"))

    def _ties(self, axis: int, atom: int) -> dict[tuple[str, int], tuple[str, ...]]:
        """{(path, axis): the shortest chain of words that ties it to `axis`} for the members that share `atom`."""
        near: dict[int, list[tuple[int, str]]] = {}
        for a, b, why in self._axes.links:
            if atom in self._axes.atoms(a) and atom in self._axes.atoms(b):
                near.setdefault(a, []).append((b, why))
                near.setdefault(b, []).append((a, why))
        words: dict[int, tuple[str, ...]] = {axis: ()}
        queue = deque([axis])
        while queue:
            for other, why in near.get(here := queue.popleft(), ()):
                if other not in words:
                    words[other] = tuple(dict.fromkeys((*words[here], why)))
                    queue.append(other)
        ids = {(p, k): self._axis(p, k) for p, k in self._groups[atom].members}
        return {member: words.get(i, ()) for member, i in ids.items() if i != axis}

    def _role(self, axis: int) -> str:
        """What an axis of a leaf is for: "in", "out", "layer", ...; found through reshapes and slices of the leaf."""
        layout = ("folded", "cut", "joined", "repeated")
        seen, stack = {axis}, [axis]
        while stack:
            here = stack.pop()
            for a, b, why in self._axes.links:
                if here in (a, b) and why.startswith(layout) and (other := b if here == a else a) not in seen:
                    seen.add(other)
                    stack.append(other)
        words = self._reader.roles.get(axis) or [w for i in sorted(seen) for w in self._reader.roles.get(i, ())]
        return " and ".join(dict.fromkeys(words))


def described(found: Units, path: str, readers: Sequence[Operator], looks: Sequence[Lookup], why_not: str) -> str:
    """In words: which operators a leaf feeds (or why none), what its axes are tied to and what blocks cutting them."""
    shape = found.type_of(path)
    text = [f"{path}: {' x '.join(map(str, shape.shape)) or 'a single number'}, {shape.dtype}"]
    for op in readers[:_SHOWN]:
        through = f", through {', '.join(op.through)}" if op.through else ""
        text.append(f"  read by '{op.name}': {op.kind} {op.n_in} x {op.n_out}, {_count(len(op.uses), 'use')}{through}")
    text += [f"  and by {_count(len(readers) - _SHOWN, 'operator')} more"] * (len(readers) > _SHOWN)
    text += [f"  looked up: {look.picked} of {look.rows} rows" for look in looks]
    text += [f"  no operator reads it: {why_not}"] * bool(why_not)
    for k, n in enumerate(shape.shape):
        text += _axis_text(found, path, k, n)
    return "\n".join(text)


def _axis_text(found: Units, path: str, k: int, n: int) -> list[str]:
    axis = found._axis(path, k)
    atoms = list(dict.fromkeys(found._axes.atoms(axis)))
    role = ", ".join(filter(None, (found._role(axis), str(n))))
    text = [f"  axis {k} ({role})" + (f", made of {found._parts(axis)}" if len(atoms) > 1 else "")]
    if not atoms:
        return [f"{text[0]}: a single unit, nothing to cut"]
    for atom in atoms:
        group = found._groups[atom]
        owned = found.places(group, path, k).shape[1]
        margin = "    "
        if len(atoms) > 1 or owned > 1:
            text.append(f"    {_count(group.size, 'unit')} of {owned} {'entries' if owned > 1 else 'entry'}")
            margin = "      "
        ties = found._ties(axis, atom)
        for (other, j), words in list(ties.items())[:_SHOWN]:
            name = "its own" if other == path else other
            text.append(f"{margin}tied to {name} axis {j}: {', '.join(words)}")
        text += [f"{margin}tied to {_count(len(ties) - _SHOWN, 'axis', 'axes')} more"] * (len(ties) > _SHOWN)
        text.append(f"{margin}blocked: {'; '.join(group.blocked)}" if group.blocked else f"{margin}units can be cut")
    return text


def _count(n: int, one: str, many: str = "") -> str:
    return f"{n} {one if n == 1 else many or one + 's'}"
