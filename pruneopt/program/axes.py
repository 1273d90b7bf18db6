"""Which axes of a program index the same units: a union-find whose classes may be products or sums of others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from pruneopt.program.keys import Literal
from pruneopt.program.program import Atom, Equation, Program

_STACKS = "it stacks layers: one entry of it is read at a time"
_PARTS = 64  # parts of one axis; beyond it the axis is blocked, not split further
Ids = tuple[int, ...]
AxisRule = Callable[["Reader", Equation], list[Ids] | None]  # the axes of each output, or None for no rule


class Axes:
    """Axes as numbers, in a union-find: two in one class index the same units in the same order.

    A class is a set of units of its own or has parts: the ordered product of others (a reshape that merges them, the
    first varying slowest) or their sum (a concatenation). Size 1 is the empty product.
    """

    def __init__(self) -> None:
        self.size: list[int] = []
        self.links: list[tuple[int, int, str]] = []  # (axis, axis, the words that tie them)
        self.blocks: list[tuple[int, str]] = []
        self._parent: list[int] = []
        self._parts: dict[int, tuple[str, Ids]] = {}
        self._dead: dict[int, str] = {}

    def new(self, size: int, blocked: str = "") -> int:
        """An axis of its own, blocked where a reason is given."""
        axis = len(self.size)
        self.size.append(size)
        self._parent.append(axis)
        if size == 1:
            self._parts[axis] = ("product", ())
        if blocked:
            self.block(axis, blocked)
        return axis

    def find(self, axis: int) -> int:
        """The axis that stands for its class."""
        while self._parent[axis] != axis:
            self._parent[axis] = axis = self._parent[self._parent[axis]]
        return axis

    def parts(self, axis: int) -> tuple[str, Ids]:
        """("product" | "sum", parts), or ("", ()) for units of its own."""
        return self._parts.get(self.find(axis), ("", ()))

    def atoms(self, axis: int) -> Ids:
        """The classes of units that an axis is made of, in order."""
        kind, parts = self.parts(axis)
        return tuple(a for part in parts for a in self.atoms(part)) if kind else (self.find(axis),)

    def owned(self, axis: int, atom: int) -> Bool[np.ndarray, "units entries"]:
        """True where a unit of a class owns an entry of an axis."""
        kind, parts = self.parts(axis)
        if not kind:
            whole = np.eye(self.size[atom], dtype=bool)
            return whole if self.find(axis) == atom else np.zeros((self.size[atom], self.size[axis]), bool)
        inside = [self.owned(part, atom) for part in parts]
        if kind == "sum":
            return np.concatenate(inside, axis=1)
        whole = np.zeros((self.size[atom], 1), bool)
        for one in inside:
            whole = (whole[:, :, None] | one[:, None, :]).reshape(len(whole), whole.shape[1] * one.shape[1])
        return whole

    def block(self, axis: int, reason: str) -> None:
        """No unit of this axis can be cut, for this reason."""
        self.blocks.append((axis, reason))
        for one in {self.find(axis), *self.atoms(axis)}:
            self._dead.setdefault(one, reason)

    def why_blocked(self, axis: int) -> str:
        """The first reason found so far for which the whole axis is blocked."""
        return self._dead.get(self.find(axis), "")

    def tie(self, a: int, b: int, why: str) -> None:
        """Two axes index the same units."""
        if a != b:
            self.links.append((a, b, why))
            self._unify(a, b)

    def split(self, kind: str, whole: Ids, parts: Ids, why: str) -> None:
        """The product or sum of `whole` is that of `parts`."""
        self.links += [(a, b, why) for a in whole for b in parts]
        self._match(kind, whole, parts)

    def _unify(self, a: int, b: int) -> None:
        a, b = self.find(a), self.find(b)
        if a == b:
            return
        kinds = self.parts(a)[0], self.parts(b)[0]
        if all(kinds):
            if a in self._dead and b in self._dead:
                return  # nothing can be cut; parts need not meet
            if kinds[0] != kinds[1] or self.size[a] != self.size[b]:
                self._clash((a, b))
                return
            self._match(kinds[0], (a,), (b,))
            a, b = self.find(a), self.find(b)
        elif kinds[0]:
            a, b = b, a
        self._parent[a] = b
        for reason in [self._dead[one] for one in (a, b) if one in self._dead]:
            for one in (b, *self.atoms(b)):
                self._dead.setdefault(one, reason)

    def _match(self, kind: str, left: Ids, right: Ids) -> None:
        """Two lists of axes with one product (or sum): tie the parts that line up, splitting where one is larger."""
        queues = [list(left)[::-1], list(right)[::-1]]
        total = math.prod if kind == "product" else sum
        for _ in range(_PARTS):
            heads = [self._head(kind, queue) for queue in queues]
            if heads[0] is None or heads[1] is None:
                return
            sizes = [self.size[h] for h in heads]
            small, large = sorted((0, 1), key=lambda i: sizes[i])
            root = self.find(heads[large])
            if sizes[0] == sizes[1]:
                self._unify(heads[0], heads[1])
            elif self.parts(root)[0] or (kind == "product" and (not sizes[small] or sizes[large] % sizes[small])):
                segment = [[heads[0]], [heads[1]]]
                while (a := total(self.size[s] for s in segment[0])) != (b := total(self.size[s] for s in segment[1])):
                    shorter = 0 if a < b else 1
                    segment[shorter].append(self._head(kind, queues[shorter]))
                self._clash((*segment[0], *segment[1]))
            else:
                rest = sizes[large] // sizes[small] if kind == "product" else sizes[large] - sizes[small]
                pair = (self.new(sizes[small]), self.new(rest))
                self._parts[root] = (kind, pair)
                if root in self._dead:
                    self._dead.update(dict.fromkeys(pair, self._dead[root]))
                self._unify(heads[small], pair[0])
                queues[large].append(pair[1])
        else:
            self._clash(tuple(a for queue in queues for a in queue))

    def _head(self, kind: str, queue: list[int]) -> Any:
        """The next axis of a list, parts of the same kind opened; None at its end."""
        while queue:
            axis = queue.pop()
            own, parts = self.parts(axis)
            if own != kind:
                return axis
            queue += parts[::-1]
        return None

    def _clash(self, axes: Ids) -> None:
        for axis in axes:
            self.block(axis, "it is cut into parts in two ways that do not line up")


class Reader:
    """The axes of every variable of a program, by the rules of its primitives; `whole` says why some have none.

    repeated: {path: axes along which a leaf holds copies}. leaves: {path: axes}. contractions: (axis of left, axis of
    right, left, right, primitive). roles: {axis: words}, of axes of
    parameters. unknown: [(primitive, reason, axes that it touches)], without a rule. read: for each equation, the axes
    of each input as it reads them: `of`, with axes of its own for copies. inner: {equation: the reader of its body}, of
    loops that stayed whole. ends: the axes of the outputs. updates: {output: the leaf that it renews}, cut like the
    leaf. state: {variable of the batch: number of the output} that is its value in the next call, such as keys and
    values: their units go too. within, given: for a body, the reader that it shares axes with, and the axes of its
    inputs.
    """

    def __init__(
        self,
        program: Program,
        rules: Mapping[str, AxisRule],
        whole: Mapping[str, str],
        repeated: Mapping[str, Iterable[int]] = MappingProxyType({}),
        state: Mapping[int, int] = MappingProxyType({}),
        within: Reader | None = None,
        given: Mapping[str, Ids] = MappingProxyType({}),
    ):
        self.program, self._rules, self._whole, self.state = program, rules, whole, state
        self.axes = Axes() if within is None else within.axes
        self.contractions: list[tuple[int, int, Atom, Atom, str]] = []
        self.read: list[tuple[Ids, ...]] = []
        self.inner: dict[int, Reader] = {}
        self.roles: dict[int, list[str]] = {} if within is None else within.roles
        self.unknown: list[tuple[str, str, Ids]] = []
        self.copies: set[int] = set()  # axes along which all entries are equal
        self._of: dict[int, Ids] = {}
        self._now: dict[Any, Ids] = {}  # while an equation is read: the axes of its inputs
        self._fresh: set[int] = set()
        self._taken: list[int] = []  # stretches of parameters that slices read, and what they passed by
        self._passed: list[int] = []
        self._reading = True
        self.leaves = {
            path: given[path] if path in given else self.made(program.shapes[var].shape)
            for path, var in program.leaves.items()
        }
        self._of.update({var: self.leaves[path] for path, var in program.leaves.items()})
        self.copies |= {self.leaves[path][k] for path, dims in repeated.items() for k in dims}
        for var in program.batch:
            self._of[var] = self.made(program.shapes[var].shape, "" if var in state else "it is an axis of the batch")
        for equation in program.equations:
            self._now, self._fresh, links = {}, set(), len(self.axes.links)
            self.read.append(tuple(self.of(atom) for atom in equation.inputs))
            outputs = self._read(equation)
            self._of.update(zip(equation.outputs, outputs, strict=True))
            met = {axis for a, b, _ in self.axes.links[links:] for axis in (a, b)}
            kept = (self._fresh - met) & {axis for ids in outputs for axis in ids}
            self.copies |= {axis for axis in kept if not self.axes.why_blocked(axis)}
        self._now, self._reading = {}, False
        read = {one for axis in self._taken for one in self.axes.atoms(axis)}
        for one in dict.fromkeys(one for axis in self._passed for one in self.axes.atoms(axis)):
            if one not in read:
                self.axes.block(one, "this batch does not reach it, a longer one may")
        self.ends = [
            tuple(self._own(axis) if axis in self.copies else axis for axis in self.of(atom))
            for atom in program.outputs
        ]
        self.updates = {} if within is not None else self._updates()
        if within is None:
            for var, out in self.state.items():
                for a, b in zip(self._of[var], self.ends[out], strict=True):
                    self.axes.tie(a, b, "carried from call to call")
            carried = {*self.state.values(), *self.updates}
            for axis in (axis for i, ids in enumerate(self.ends) if i not in carried for axis in ids):
                self.axes.block(axis, "it is an output of fn")

    def _updates(self) -> dict[int, str]:
        """{output: the leaf of params whose new value it is}, by the last name of its path and by its axes."""
        classes = {path: [self.axes.atoms(axis) for axis in ids] for path, ids in self.leaves.items() if ids}
        found = {}
        for i, (path, ids) in enumerate(zip(self.program.returned.paths, self.ends, strict=False)):
            own = [self.axes.atoms(axis) for axis in ids]
            named = [leaf for leaf in classes if own == classes[leaf] and _last(leaf) == _last(path)]
            whole = [leaf for leaf in named if path.endswith(leaf)] or named
            if whole and math.prod(self.axes.size[axis] for axis in ids) > 1:
                found[i] = whole[0]
        return found

    def of(self, atom: Atom) -> Ids:
        """The axes of a variable, of a constant or of a literal.

        All entries along an axis of copies are equal, so each equation that reads one may have its own number of them:
        it gets an axis of its own, and a mask that two layers share does not tie their heads.
        """
        key = (atom.key, self.shape(atom)) if isinstance(atom, Literal) else atom
        if key in self._now:
            return self._now[key]
        axes = self._of.get(atom) if isinstance(atom, int) else None
        if axes is None:
            value = atom.value if isinstance(atom, Literal) else self.program.constants[atom]
            uniform = [_uniform(value, k) for k in range(len(self.shape(atom)))]
            axes = self.made(self.shape(atom))
            self.copies.update(axis for axis, u in zip(axes, uniform, strict=True) if u)
            if isinstance(atom, int):
                self._of[atom] = axes
        if self._reading:
            axes = tuple(self._own(axis) if axis in self.copies else axis for axis in axes)
            self._now[key] = axes
        return axes

    def inside(self, program: Program, inputs: Sequence[Ids]) -> list[Ids]:
        """Read the body of the equation at hand, whose inputs have these axes; the axes of its outputs."""
        given = {str(i): ids for i, ids in enumerate(inputs)}
        body = Reader(program, self._rules, self._whole, within=self, given=given)
        self.inner[len(self.read) - 1] = body
        self.unknown += body.unknown
        return body.ends

    def _own(self, axis: int) -> int:
        new = self.axes.new(self.axes.size[axis])
        self._fresh.add(new)
        return new

    def made(self, shape: tuple[int, ...], blocked: str = "") -> Ids:
        """New axes; those of more than one entry are blocked where a reason is given."""
        return tuple(self.axes.new(n, blocked if n != 1 else "") for n in shape)

    def shape(self, atom: Atom) -> tuple[int, ...]:
        """Of a variable."""
        return tuple(self.program.type_of(atom).shape)

    def part(self, atom: Atom, k: int, start: int, stop: int, stride: int, name: str) -> int:
        """Axis `k` of a slice of `atom`: the axis itself, a part of it, or blocked."""
        axis, n, length = self.of(atom)[k], self.shape(atom)[k], -(-(stop - start) // stride)
        if length == n:
            return axis
        if not length:
            return self.made((0,))[0]
        why, stacked = self.axes.why_blocked(axis), length == 1 and self.program.is_parametric(atom)
        if not why and stride > 1 and n % stride == 0 and length == n // stride:
            outer, inner = self.axes.new(length), self.axes.new(stride, f"one in {stride} entries is read by {name}")
            self.axes.split("product", (axis,), (outer, inner), f"cut by {name}")
            return outer
        if not why and stride == 1 and not stacked:
            pieces = [self.axes.new(size) for size in (start, length, n - stop) if size]
            self.axes.split("sum", (axis,), tuple(pieces), f"cut by {name}")
            taken = pieces[bool(start)]
            if self.program.is_parametric(atom):
                self._taken.append(taken)
                self._passed += [piece for piece in pieces if piece != taken]
            return taken
        amount = "one entry" if length == 1 else "a part" if stride == 1 else f"one in {stride} entries"
        why = why or f"{amount} of it is read by {name}"
        if stacked:
            self.role(atom, (axis,), "layer")
            self.axes.block(axis, _STACKS)
        else:
            self.axes.block(axis, why)
        return self.made((length,), why)[0]

    def block(self, atoms: Iterable[Atom], dims: Iterable[int], why: str) -> None:
        """Block these axes of these variables; an axis of one entry holds nothing to cut."""
        for atom in atoms:
            for k in dims:
                if self.shape(atom)[k] != 1:
                    self.axes.block(self.of(atom)[k], why)

    def meet(self, every: Sequence[Ids], dims: Iterable[int], why: str) -> None:
        """These axes index the same units in all of `every`."""
        for other in every[1:]:
            for k in dims:
                self.axes.tie(every[0][k], other[k], why)

    def known(self, atom: Atom) -> int | None:
        """The whole number that an atom holds, whatever params and the batch."""
        value = atom.value if isinstance(atom, Literal) else self.program.constants.get(atom)
        return None if value is None else int(value)

    def contract(self, pairs: list[tuple[int, int]], equation: Equation) -> None:
        """The products over these axes are summed."""
        name = equation.primitive.name
        left, right = equation.inputs[:2]
        for a, b in pairs:
            self.axes.tie(a, b, f"contracted in {name}")
            self.contractions.append((a, b, left, right, name))
            self.role(left, (a,), "in")
            self.role(right, (b,), "in")

    def role(self, atom: Atom, axes: Ids, word: str) -> None:
        """What axes of a parameter are for."""
        if self.program.is_parametric(atom):
            for axis in axes:
                self.roles.setdefault(axis, []).append(word)

    def _read(self, equation: Equation) -> list[Ids]:
        name = equation.primitive.name
        made = self._rules[name](self, equation) if name in self._rules else None
        if made is not None:
            return made
        why = f"it goes through {self._whole[name]} ({name})" if name in self._whole else f"{name} has no rule"
        touched = tuple(axis for atom in equation.inputs for axis in self.of(atom))
        for axis in touched:
            self.axes.block(axis, why)
        made = [self.made(self.shape(var), why) for var in equation.outputs]
        self.unknown.append((name, why, (*touched, *(axis for ids in made for axis in ids))))
        return made


def _uniform(value: Any, axis: int) -> bool:
    """Whether an array repeats itself along an axis."""
    if jnp.issubdtype(value.dtype, jax.dtypes.extended):
        return False
    array = np.asarray(value)
    return bool(np.all(array == array.take([0], axis))) if array.size else False


def _last(path: str) -> str:
    return path.rsplit("/", 1)[-1]
