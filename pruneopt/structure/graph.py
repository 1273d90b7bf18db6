"""Which operators multiply which parameters: a function read through its jaxpr, with no hook, wrapper or registry."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np

from pruneopt.network.leaves import is_prunable, nearest
from pruneopt.program.flatten import flatten
from pruneopt.program.forms import PRODUCTS, Form
from pruneopt.program.primitives import TABLE, form_of, row_of
from pruneopt.program.program import Equation, Program
from pruneopt.program.versions import carried, holds
from pruneopt.structure.operators import Lookup, Operator, Refusal, Use, named
from pruneopt.structure.reading import Unreadable, leaves_of, meets_data, read_operand, sources
from pruneopt.structure.units import Units, described

Tree = Any

_LISTED, _WIDTH = 40, 120  # entries of a list and letters of a line that a graph prints
_WRAPPED: Any = {"subsequent_indent": "    ", "break_long_words": False, "break_on_hyphens": False}


@dataclass(eq=False, repr=False)
class Graph:
    """What a function multiplies by what. `print(graph)` shows the table.

    operators: in the order of their first use. lookups: embedding tables. refusals: products that were found and could
    not be read. activations: FLOPs of products of two activations.
    """

    program: Program
    operators: list[Operator]
    lookups: list[Lookup] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    activations: int = 0

    def __repr__(self) -> str:
        counts = [(self.operators, "operator"), (self.lookups, "look-up"), (self.refusals, "refusal")]
        held = [f"{len(part)} {word}{'s' * (len(part) != 1)}" for part, word in counts if part or word == "operator"]
        return f"Graph({', '.join(held)}, {sum(op.flops for op in self.operators) / 1e6:.3f} MFLOPs)"

    def __str__(self) -> str:
        rows = [("operator", "kind", "in x out", "problems", "uses", "MFLOPs", "weights", "read through")]
        rows += [op.columns for op in self.operators[:_LISTED]]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        text = [
            "  ".join(
                c.ljust(w) if i in (0, 1, 7) else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))
            ).rstrip()
            for r in rows
        ]
        text = [line if len(line) <= _WIDTH else line[: _WIDTH - 3] + "..." for line in text]
        text += [f"and {len(self.operators) - _LISTED} more operators"] * (len(self.operators) > _LISTED)
        looks = [f"look-up of {named(look.paths)}: {look.picked} of {look.rows} rows" for look in self.lookups]
        why = [f"not an operator: {path}: {self.why_not(path)}" for path in self.others[: _LISTED + 1]]
        for part, n in ((looks, len(looks)), (self.refusals, len(self.refusals)), (why, len(self.others))):
            head = "not read: " if part is self.refusals else ""
            text += [textwrap.fill(f"{head}{line}", _WIDTH, **_WRAPPED) for line in part[:_LISTED]]
            text += [f"and {n - _LISTED} more of these"] * (n > _LISTED)
        total = sum(op.flops for op in self.operators)
        text.append(f"{total / 1e6:.3f} MFLOPs in operators, {self.activations / 1e6:.3f} between activations")
        return "\n".join(text)

    @property
    def others(self) -> list[str]:
        """Prunable leaves of two or more axes (of size above 1) that no operator, look-up or refusal names."""
        named = {p for part in (self.operators, self.lookups, self.refusals) for entry in part for p in entry.paths}
        named |= {p for op in self.operators for p in op.scaled_by}
        types = {p: self.program.shapes[v] for p, v in self.program.leaves.items() if p not in named}
        wide = {p: t for p, t in types.items() if sum(n > 1 for n in t.shape) >= 2}
        floats = {p: t for p, t in wide.items() if jnp.issubdtype(t.dtype, jnp.floating)}
        return [p for p, t in floats.items() if is_prunable(p, np.broadcast_to(np.float32(0), t.shape))]

    def operator(self, name: str) -> Operator:
        """The operator of that name or leaf path. Raises ValueError, the nearest names first."""
        for op in self.operators:
            if name == op.name or (name,) == op.paths:
                return op
        raise ValueError(f"'{name}' is no operator; there are {nearest(name, [op.name for op in self.operators])}")

    def units(self) -> Units:
        """Which axes of which leaves must be cut together, and which cannot be cut; unsure means blocked."""
        return Units(self.program.rolled())

    def explain(self, path: str) -> str:
        """In words: which operators a leaf feeds, what its axes are and are tied to, and why; what blocks cutting them.

        Raises ValueError for a path that params does not have, the nearest ones named.
        """
        if path not in self.program.leaves:
            raise ValueError(f"params has no array '{path}'; there are {nearest(path, list(self.program.leaves))}")
        readers = [op for op in self.operators if path in op.paths]
        looks = [look for look in self.lookups if path in look.paths]
        return described(self.units(), path, readers, looks, "" if readers or looks else self.why_not(path))

    def unread(self, paths: Sequence[str]) -> str | None:
        """Why a product with one of these leaves was not read; None if all were."""
        for refusal in self.refusals:
            if set(refusal.paths) & set(paths):
                return f"{refusal.primitive}: {refusal.reason}"
        return None

    def why_not(self, path: str) -> str:
        """Why no operator reads a leaf, in words."""
        if refused := self.unread([path]):
            return refused
        for op in self.operators:
            if path in op.paths:
                return f"it is read together with others, as '{op.name}'; choose all of them"
        for look in self.lookups:
            if path in look.paths:
                return "it is an embedding look-up: its rows are picked, not multiplied"
        if path not in self.program.leaves:
            return f"params has no such array; there are {nearest(path, list(self.program.leaves))}"
        used = meets_data(self.program, self.program.leaves[path])
        return f"it meets data in {', '.join(used)} alone, no product" if used else "fn does not use it"


def trace(fn: Callable[[Tree, Any], Any], params: Tree, batch: Any) -> Graph:
    """Read fn(params, batch) for one example batch: every product with a leaf of params, its matrix, what was refused.

    fn: any traceable function of a pytree of parameters and a batch; outputs or a loss.
    Raises ValueError for a function that JAX cannot trace, that returns no array, or whose traces differ.
    """
    return read(flatten(fn, params, batch))


def read(program: Program) -> Graph:
    """The graph of a straight-line program."""
    graph = Graph(program, [])
    found: dict[Any, Operator] = {}
    fixed: list[tuple[int, Equation, int]] = []
    for index, equation in enumerate(program.equations):
        name = equation.primitive.name
        if name in PRODUCTS:
            _product(graph, found, fixed, index, equation)
        elif row_of(equation).picks and _is_weights_at_data(program, equation):
            graph.lookups.append(_lookup(program, equation))
        else:
            _inside(graph, equation)
    _known_inputs(graph, found, fixed)
    graph.operators = _consistent(graph, list(found.values()))
    seen: dict[str, int] = {}
    for op in graph.operators:  # what differs in a way that no part tells, such as a transpose before a slice
        seen[op.name] = seen.get(op.name, 0) + 1
        op.name += f" ({seen[op.name]})" if seen[op.name] > 1 else ""
    return graph


def _is_weights_at_data(program: Program, equation: Equation) -> bool:
    return program.is_parametric(equation.inputs[0]) and any(map(program.is_data, equation.inputs))


def _inside(graph: Graph, equation: Equation) -> None:
    """Refuse the leaves that go into a body that is evaluated whole, if it multiplies or if nothing is known of it.

    Those that met data before it were read there.
    """
    name, bodies = equation.primitive.name, carried(equation)
    inside = [key for key, found in bodies.items() if any(holds(body, PRODUCTS) for body in found)]
    inside = inside or ([] if name in TABLE else list(bodies))
    if not inside:
        return
    program = graph.program
    found = [leaves_of(program, a) if program.is_parametric(a) else _picked(program, a) for a in equation.inputs]
    paths = tuple(dict.fromkeys(path for one in found for path in one))
    if weights := tuple(p for p in paths if program.shapes[program.leaves[p]].ndim >= 2):
        whole = row_of(equation).whole or f"a call without a rule, whose parameter '{inside[0]}' is a body"
        graph.refusals.append(Refusal(name, weights, f"it stands inside {whole}"))


def _lookup(program: Program, equation: Equation) -> Lookup:
    """A gather or dynamic slice of leaves at indices from the data."""
    shape, sizes = program.type_of(equation.inputs[0]).shape, equation.params["slice_sizes"]
    rows = [a for a in range(len(shape)) if sizes[a] < shape[a]]
    indices = program.type_of(equation.inputs[1]).shape[:-1]
    picked = math.prod(indices) * math.prod(sizes[a] for a in rows)
    return Lookup(tuple(leaves_of(program, equation.inputs[0])), math.prod(shape[a] for a in rows), picked)


def _picked(program: Program, atom: Any) -> tuple[str, ...]:
    """The leaves of which an operand is matrices picked at indices from the data, or none."""
    while isinstance(atom, int) and atom in program.maker:
        equation = program.equations[program.maker[atom]]
        if row_of(equation).picks and program.is_parametric(equation.inputs[0]):
            is_matrix = sum(size > 1 for size in equation.params["slice_sizes"]) > 1
            return tuple(leaves_of(program, equation.inputs[0])) if is_matrix else ()
        if row_of(equation).layout is None:
            return ()
        atom = equation.inputs[0]
    return ()


def _known_inputs(graph: Graph, found: dict[Any, Operator], fixed: list[tuple[int, Equation, int]]) -> None:
    """Products with a constant input: one more use of weights that data meet too, as an RNN's first state of zeros."""
    by_operand: dict[Any, list[Operator]] = {}
    for (operand, _), op in found.items():
        by_operand.setdefault(operand, []).append(op)
    for index, equation, side in fixed:
        shapes = _shapes(graph.program, equation)
        for op in by_operand.get(equation.inputs[side], []):
            form = form_of(equation, shapes, side, op.repeated)
            if isinstance(form, Form) and form.weight_key == op.uses[0].form.weight_key:
                inputs = _others(equation, side)
                graph.program.data.update(inputs)
                op.uses = sorted([*op.uses, Use(index, inputs, form)], key=lambda use: use.equation)
                break
        else:
            paths = tuple(leaves_of(graph.program, equation.inputs[side]))
            graph.refusals.append(Refusal(equation.primitive.name, paths, "the other side is a constant, no input"))


def _shapes(program: Program, equation: Equation) -> list[tuple[int, ...]]:
    """Of both operands and the result."""
    return [tuple(program.type_of(a).shape) for a in (*equation.inputs[:2], equation.outputs[0])]


def _others(equation: Equation, side: int) -> tuple[int, ...]:
    """The variables that a product reads beside its operand number `side`."""
    return tuple(a for i, a in enumerate(equation.inputs) if i != side and isinstance(a, int))


def _product(
    graph: Graph, found: dict[Any, Operator], fixed: list[tuple[int, Equation, int]], index: int, equation: Equation
) -> None:
    program = graph.program
    sides = [i for i in (0, 1) if program.is_parametric(equation.inputs[i])]
    other = [i for i in (0, 1) if program.is_data(equation.inputs[i])]
    shapes = _shapes(program, equation)
    if not sides:
        _between(graph, equation, shapes)
        return
    side = sides[0]
    paths = tuple(leaves_of(program, equation.inputs[side]))
    refuse = lambda why: graph.refusals.append(Refusal(equation.primitive.name, paths, why))  # noqa: E731
    if not other:
        if len(sides) == 1:  # a constant meets a leaf
            fixed.append((index, equation, side))
        return  # a product of parameters: an operand in the making, read where it meets data
    try:
        reading = read_operand(program, equation.inputs[side])
    except Unreadable as error:
        refuse(str(error))
        return
    if any(np.issubdtype(program.shapes[v].dtype, np.complexfloating) for v in equation.inputs if isinstance(v, int)):
        refuse("it multiplies complex numbers, whose Gram is not real; split them into real and imaginary parts")
        return
    form = form_of(equation, shapes, side, reading.repeated)
    if isinstance(form, str):
        refuse(form)
        return
    use = Use(index, _others(equation, side), form)
    key = (equation.inputs[side], form.weight_key)
    if key in found:
        found[key].uses.append(use)
    else:
        product = row_of(equation).product
        found[key] = Operator(program, reading, [use], product.kind if product else "")


def _between(graph: Graph, equation: Equation, shapes: list[tuple[int, ...]]) -> None:
    """A product of activations, of matrices that the data pick, or with a constant that the function closed over."""
    program = graph.program
    for side in (0, 1):
        atom = equation.inputs[side]
        if paths := _picked(program, atom):
            why = "its matrices are picked at indices from the data; multiply by all, or sort rows for ragged_dot"
            graph.refusals.append(Refusal(equation.primitive.name, paths, why))
            graph.lookups = [look for look in graph.lookups if look.paths != paths]
            return
        if isinstance(atom, int) and not program.is_data(atom) and program.is_data(equation.inputs[1 - side]):
            known = [v for v in sources(program, atom) if v in program.constants]
            shape = "x".join(map(str, shapes[side]))
            if any(np.dtype(program.shapes[v].dtype).kind == "f" for v in known):
                graph.refusals.append(
                    Refusal(
                        equation.primitive.name,
                        (),
                        f"its weights ({shape}) are closed over by fn; pass them as a leaf of params to prune them",
                    )
                )
                return
    form = form_of(equation, shapes, 1, frozenset())
    graph.activations += 0 if isinstance(form, str) else form.flops


def _consistent(graph: Graph, operators: list[Operator]) -> list[Operator]:
    """The operators whose weights no other operator reads in another arrangement; the others are refused."""
    owners: dict[str, list[Operator]] = {}
    for op in operators:
        for path in op.paths:
            owners.setdefault(path, []).append(op)
    bad: set[int] = set()
    for op in operators:
        if not op.is_one_to_one:
            bad.add(id(op))
            graph.refusals.append(Refusal(op.kind, op.paths, "its matrix holds the same weight in several places"))
    for path, ops in owners.items():
        layers: dict[str | None, list[Operator]] = {}
        for op in ops:
            layers.setdefault(op.slab if all(op.slab for op in ops) else None, []).append(op)
        for together in layers.values():
            clash = _clash(path, together) if len(together) > 1 else []
            bad |= set(map(id, clash))
            if clash:
                reason = "its products read the same weights in different arrangements: no single Gram holds for them"
                graph.refusals.append(Refusal(clash[0].kind, (path,), reason))
    return [op for op in operators if id(op) not in bad]


def _clash(path: str, operators: list[Operator]) -> list[Operator]:
    """The operators that share an entry of a leaf with another of them."""
    times = np.zeros(1, np.uint16)
    for op in operators:
        times = times + np.asarray(op.part_of(path))
    if np.max(times) <= 1:
        return []
    return [op for op in operators if np.any(times[np.asarray(op.part_of(path))] > 1)]
