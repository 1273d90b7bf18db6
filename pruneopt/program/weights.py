"""Which leaves a function multiplies as weights, read in its jaxpr, in loops, branches and kernels too."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from pruneopt import _tree
from pruneopt.network.leaves import is_floating, partition
from pruneopt.network.readable import readable
from pruneopt.program import versions
from pruneopt.program.flatten import is_mask, traced
from pruneopt.program.forms import PRODUCTS
from pruneopt.program.primitives import row_of
from pruneopt.program.rows_elementwise import ROWS as ELEMENTWISE
from pruneopt.program.versions import CALLS, bodies, plain

Tree = Any
Held = frozenset[str] | None  # the leaves whose zeros are zeros of an array; None: it depends on the batch

_NOTHING: frozenset[str] = frozenset()


class Multiplied(NamedTuple):
    """Paths of the leaves that are a matrix of a contraction, of those whose rows data pick, and of those unused."""

    matrices: frozenset[str]
    looked_up: frozenset[str]
    unused: frozenset[str]


def multiplied(fn: Callable[[Tree, Any], Any], params: Tree, batch: Any) -> Multiplied:
    """What fn(params, batch) multiplies, where a zero of the leaf is a zero of the matrix.

    A leaf counts as it is, in another layout, masked or scaled, or where the matrix is computed from it by what keeps
    its zeros: both of weight normalisation and of low-rank updates do, an exponential does not. What only scales or
    shifts activations entry by entry, or is joined with them, is no matrix; nor is a vector that becomes an activation
    by products with other leaves, as a learned query does. No loop is unrolled. Raises as `structure.trace`.
    """
    chosen, rest = partition(params, is_floating)
    closed, _ = traced(fn, chosen, rest, readable(batch))
    named = dict(_tree.named_leaves(chosen))
    walk = _Walk(named)
    given: list[Held] = [frozenset({path}) for path in named]
    given += [_NOTHING] * len(rest.arrays)
    given += [None] * (len(plain(closed).invars) - len(given))
    walk.body(closed, given)
    jaxpr = plain(closed)
    used = {id(v) for vars in (*(e.invars for e in jaxpr.eqns), jaxpr.outvars) for v in vars}
    unused = (path for path, v in zip(named, jaxpr.invars, strict=False) if id(v) not in used)
    return Multiplied(frozenset(walk.matrices), frozenset(walk.looked_up), frozenset(unused))


def _joined(held: Iterable[Held]) -> Held:
    """What is held by what is computed from several arrays."""
    parts = list(held)
    return None if any(part is None for part in parts) else _NOTHING.union(*(part for part in parts if part))


class _Walk:
    """One reading of a jaxpr, body by body."""

    def __init__(self, leaves: Mapping[str, Any]):
        self._leaves = leaves
        self.matrices: set[str] = set()
        self.looked_up: set[str] = set()

    def body(self, body: Any, given: Sequence[Held]) -> list[Held]:
        """What the outputs of a jaxpr hold."""
        jaxpr = plain(body)
        held = dict(zip(jaxpr.invars, given, strict=True))
        of = lambda atom: _NOTHING if hasattr(atom, "val") else held.get(atom, _NOTHING)  # noqa: E731
        for e in jaxpr.eqns:
            out = self._equation(e, [of(a) for a in e.invars])
            held.update(zip(e.outvars, out, strict=True))
        return [of(atom) for atom in jaxpr.outvars]

    def _equation(self, e: Any, given: list[Held]) -> list[Held]:
        name = e.primitive.name
        if name == "scan":
            loop = versions.scan(e)
            return self._loop(loop.body, given, loop.shared, loop.shared + loop.carry)
        if name == "while":
            loop = versions.while_loop(e)
            n = loop.cond_shared
            carry = self._loop(loop.body, given[n:], loop.body_shared, len(given) - n)
            self.body(loop.cond, given[:n] + carry)
            return carry
        if name == "cond":
            made = [self.body(branch, given[1:]) for branch in versions.branches(e)]
            return [_joined(each) for each in zip(*made, strict=True)]
        if name == "optimization_barrier":
            return given
        if inner := bodies(e):
            return self._called(e, inner, given)
        return [self._plain(e, given)] * len(e.outvars)

    def _loop(self, body: Any, given: list[Held], first: int, last: int) -> list[Held]:
        """A loop's body, once what its carry holds, inputs first to last, stays."""
        while True:
            out = self.body(body, given)
            carry = [_joined(pair) for pair in zip(given[first:last], out, strict=False)]
            if carry == given[first:last]:
                return carry + out[last - first :]
            given = given[:first] + carry + given[last:]

    def _called(self, e: Any, inner: list[Any], given: list[Held]) -> list[Held]:
        """Calls, read as their body, and kernels, whose further arguments are their outputs."""
        if e.primitive.name in CALLS:
            return self.body(versions.called(e), given)
        for body in inner:
            more = len(plain(body).invars) - len(given)
            self.body(body, given + [None] * more if more >= 0 else [_joined(given)] * (len(given) + more))
        return [_joined(given)] * len(e.outvars)

    def _plain(self, e: Any, given: list[Held]) -> Held:
        name, row = e.primitive.name, row_of(e)
        if name in PRODUCTS:
            return self._product(e, given)
        if row.picks and given[0] and any(held is None for held in given[1:]):
            self.looked_up |= given[0]
        if _joined(given) is None:
            return None
        if name in ELEMENTWISE and row.zeros is None:
            return _NOTHING
        if name == "mul":
            return self._scaled(given)
        return given[0] if name == "div" else _joined(given)

    def _product(self, e: Any, given: list[Held]) -> Held:
        """Marks the weights; of two operands made of leaves, both are still in the making."""
        if _contracts(e):
            for one, other in (given[:2], given[1::-1]):
                self.matrices |= _NOTHING if other else one or _NOTHING
        made = _joined(given[:2])
        return made if made is None or not all(given[:2]) else frozenset(filter(self._is_wide, made))

    def _scaled(self, given: list[Held]) -> Held:
        """The larger of two factors, the other being its scale; of two as large the one that is no mask."""
        sizes = [max((math.prod(self._leaves[p].shape) for p in held or ()), default=0) for held in given]
        largest = [held for held, size in zip(given, sizes, strict=True) if held and size == max(sizes)]
        weights = [held for held in largest if not all(is_mask(self._leaves, path) for path in held)]
        return _joined(weights or largest)

    def _is_wide(self, path: str) -> bool:
        return sum(n > 1 for n in self._leaves[path].shape) > 1


def _contracts(e: Any) -> bool:
    """Whether a product sums over anything; `einsum` writes a scale for each entry as a product that does not."""
    if e.primitive.name != "dot_general":
        return True
    (contracted, _), _ = versions.parameters(e)["dimension_numbers"]
    return bool(contracted)
