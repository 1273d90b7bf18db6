"""Which operators multiply which parameters: a function read through its jaxpr, with no hook, wrapper or registry."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from pruneopt.structure import forms
from pruneopt.structure.forms import Form
from pruneopt.structure.leaves import is_prunable, nearest
from pruneopt.structure.program import Equation, Literal, Program, bodies, flatten, holds, opened_only
from pruneopt.structure.rules import BLOCKS, LAYOUT, LOOKUPS, PRODUCTS, SCALES
from pruneopt.structure.segment import Segment, closure

Tree = Any


@dataclass(frozen=True)
class Use:
    """One product with an operator's weights. equation: its index; inputs: its data variables; form: its shape."""

    equation: int
    inputs: tuple[int, ...]
    form: Form


@dataclass(frozen=True)
class Refusal:
    """What could not be read: the primitive, the leaves that it touches, and why."""

    primitive: str
    paths: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        return f"{self.primitive} of {', '.join(self.paths) or 'constants'}: {self.reason}"


@dataclass(frozen=True)
class Lookup:
    """Rows of a leaf picked by indices: an embedding table."""

    paths: tuple[str, ...]
    rows: int
    picked: int


@dataclass(eq=False)
class Reading:
    """How an operand is made of leaves: the layout (without scales), the parts read, the primitives passed.

    slab: the layer of a stacked leaf, as text, if the leaf is first cut into layers. again: whether a leaf occurs in it
    more than once.
    """

    leaves: dict[str, int]
    scaled_by: tuple[str, ...]
    through: tuple[str, ...]
    repeated: frozenset[int]
    part: str
    slab: str | None
    again: bool
    layout: Segment
    whole: Segment


class Operator:
    """The weights of one or several products: `problems` matrices (n_in, n_out), y = x W.

    name: the path of its leaf, with the part that it reads ("layers/kernel[2]"); paths: its leaves; uses: its products.
    """

    def __init__(self, program: Program, reading: Reading, uses: list[Use], kind: str):
        self._program, self._reading, self.uses, self.kind = program, reading, uses, kind
        self.paths = tuple(reading.leaves)
        self.name = " + ".join(self.paths) + reading.part
        form = uses[0].form
        self.problems, self.n_in, self.n_out = form.problems, form.n_in, form.n_out

    @property
    def slab(self) -> str | None:
        """Which layer of a stacked leaf it reads, as text, if it reads one."""
        return self._reading.slab if len(self.paths) == 1 else None

    @property
    def scaled_by(self) -> tuple[str, ...]:
        """Leaves that mask or scale it."""
        return self._reading.scaled_by

    @property
    def repeated(self) -> frozenset[int]:
        """Axes of the operand along which it repeats itself."""
        return self._reading.repeated

    @property
    def flops(self) -> int:
        """Of all its products on the traced batch."""
        return sum(use.form.flops for use in self.uses)

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.problems * self.n_in * self.n_out

    @property
    def through(self) -> tuple[str, ...]:
        """What stands between the leaf and the product: primitives passed, scaling leaves last."""
        return self._reading.through + tuple(f"scaled by {p}" for p in self._reading.scaled_by)

    def to_matrix(self, leaves: Mapping[str, Any]) -> Shaped[Array, "problems n_in n_out"]:
        """The weights that the product sees. leaves: {path: array} of all params that it reads."""
        return _matrix(self._reading.whole, self.uses[0].form, self._inputs(self._reading.whole, leaves))

    def to_leaves(self, matrix: Shaped[Array, "problems n_in n_out"], leaves: Mapping[str, Any]) -> dict[str, Any]:
        """{path: leaf} of the operator's leaves: `matrix` where the operator reads them, `leaves` elsewhere.

        Entries of `matrix` that equal `to_matrix(leaves)` leave theirs bit for bit; scales are divided out.
        """
        layout, whole = self._reading.layout, self._reading.whole
        new = _merged(
            (layout, whole, self.uses[0].form, self._places(layout), self._places(whole)),
            self._inputs(layout, leaves),
            self._inputs(whole, leaves),
            matrix,
        )
        return dict(zip(self.paths, new, strict=True))

    def masks(self, support: Shaped[Array, "problems n_in n_out"]) -> dict[str, Any]:
        """{path: boolean mask}: `support` where the operator reads the leaf, True elsewhere."""
        return dict(zip(self.paths, self._back(jnp.asarray(support).astype(self.dtype), True), strict=True))

    def support(self, masks: Mapping[str, Any]) -> Shaped[Array, "problems n_in n_out"]:
        """The canonical form of boolean masks {path: mask} of its leaves."""
        program, layout = self._program, self._reading.layout
        ones = {p: jnp.asarray(masks[p]).astype(program.shapes[v].dtype) for p, v in self._reading.leaves.items()}
        return _matrix(layout, self.uses[0].form, self._inputs(layout, ones)) != 0

    def part_of(self, path: str) -> Shaped[Array, "..."]:
        """Which entries of a leaf the operator reads."""
        ones = jnp.ones((self.problems, self.n_in, self.n_out), self.dtype)
        return self._back(ones, False)[self.paths.index(path)]

    @property
    def is_one_to_one(self) -> bool:
        """Whether no weight stands in two places of the matrix; only joining a leaf with itself does that."""
        layout = self._reading.layout
        if not self._reading.again:
            return True
        _, back = _inverse(layout, self.uses[0].form, self._places(layout), self._zeros())
        ones = jnp.ones((self.problems, self.n_in, self.n_out), self.dtype)
        return all(bool(jnp.max(times) <= 1) for times in back(ones))

    @property
    def dtype(self) -> Any:
        """Of the weights as the product sees them."""
        return self._program.type_of(self._reading.layout.outputs[0]).dtype

    def _inputs(self, segment: Segment, leaves: Mapping[str, Any]) -> list[Any]:
        named = self._program.names
        return [leaves[named[v]] if v in named else self._program.constants[v] for v in segment.inputs]

    def _places(self, segment: Segment) -> tuple[int, ...]:
        """Where its leaves stand among a segment's inputs."""
        return tuple(segment.inputs.index(v) for v in self._reading.leaves.values())

    def _zeros(self) -> list[Any]:
        """Inputs of the layout with zeros for its leaves."""
        shapes = {v: self._program.shapes[v] for v in self._reading.leaves.values()}
        known = self._program.constants
        return [jnp.zeros(t.shape, t.dtype) if (t := shapes.get(v)) else known[v] for v in self._reading.layout.inputs]

    def _back(self, matrix: Any, elsewhere: bool) -> list[Any]:
        layout = self._reading.layout
        return _masks((layout, self.uses[0].form, self._places(layout)), self._zeros(), matrix, elsewhere)


@partial(jax.jit, static_argnums=(0, 1))
def _matrix(segment: Segment, form: Form, inputs: list[Any]) -> Any:
    return form.to_matrix(segment.trace(inputs)[0])


def _inverse(layout: Segment, form: Form, places: tuple[int, ...], inputs: list[Any]) -> tuple[Any, Any]:
    """(leaves -> matrix, matrix -> leaves): a layout's transpose is its inverse on the entries that it reads."""

    def laid(leaves: list[Any]) -> Any:
        values = list(inputs)
        for place, leaf in zip(places, leaves, strict=True):
            values[place] = leaf
        return form.to_matrix(layout.trace(values)[0])

    types = [jax.ShapeDtypeStruct(inputs[i].shape, inputs[i].dtype) for i in places]
    transpose = jax.linear_transpose(laid, types)
    return laid, lambda matrix: transpose(matrix)[0]


@partial(jax.jit, static_argnums=0)
def _merged(static: Any, layout_inputs: list[Any], whole_inputs: list[Any], matrix: Any) -> list[Any]:
    layout, whole, form, places, whole_places = static
    _, back = _inverse(layout, form, places, layout_inputs)
    old = form.to_matrix(whole.trace(whole_inputs)[0])
    with_ones = list(whole_inputs)
    for place in whole_places:
        with_ones[place] = jnp.ones(whole_inputs[place].shape, whole_inputs[place].dtype)
    scale = form.to_matrix(whole.trace(with_ones)[0])
    dead, one, zero = scale == 0, jnp.ones((), scale.dtype), jnp.zeros((), scale.dtype)
    new = back(jnp.where(dead, zero, matrix.astype(scale.dtype) / jnp.where(dead, one, scale)))
    changed = back((matrix.astype(old.dtype) != old).astype(scale.dtype))
    leaves = [layout_inputs[place] for place in places]
    return [jnp.where(c != 0, n.astype(x.dtype), x) for c, n, x in zip(changed, new, leaves, strict=True)]


@partial(jax.jit, static_argnums=0)
def _masks(static: Any, inputs: list[Any], matrix: Any, elsewhere: bool) -> list[Any]:
    layout, form, places = static
    _, back = _inverse(layout, form, places, inputs)
    part = back(jnp.ones(matrix.shape, matrix.dtype))
    return [(m != 0) | (elsewhere & (p == 0)) for m, p in zip(back(matrix), part, strict=True)]


@dataclass(eq=False)
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

    def __str__(self) -> str:
        rows = [("operator", "kind", "in x out", "problems", "uses", "MFLOPs", "weights", "KiB", "read through")]
        for op in self.operators:
            rows.append(
                (
                    op.name,
                    op.kind,
                    f"{op.n_in} x {op.n_out}",
                    str(op.problems),
                    str(len(op.uses)),
                    f"{op.flops / 1e6:.3f}",
                    f"{op.size:,}",
                    f"{op.size * op.dtype.itemsize / 1024:.1f}",
                    ", ".join(filter(None, (op.uses[0].form.arrangement, *op.through))),
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        text = [
            "  ".join(
                c.ljust(w) if i in (0, 1, 8) else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))
            )
            for r in rows
        ]
        text += [f"look-up of {', '.join(look.paths)}: {look.picked} of {look.rows} rows" for look in self.lookups]
        text += [f"not read: {refusal}" for refusal in self.refusals]
        text += [f"not an operator: {path}: {self.why_not(path)}" for path in self.others]
        total = sum(op.flops for op in self.operators)
        text.append(f"{total / 1e6:.3f} MFLOPs in operators, {self.activations / 1e6:.3f} between activations")
        return "\n".join(line.rstrip() for line in text)

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

    def why_not(self, path: str) -> str:
        """Why no operator reads a leaf, in words."""
        for refusal in self.refusals:
            if path in refusal.paths:
                return f"{refusal.primitive}: {refusal.reason}"
        for op in self.operators:
            if path in op.paths:
                return f"it is read together with others, as '{op.name}'; choose all of them"
        for look in self.lookups:
            if path in look.paths:
                return "it is an embedding look-up: its rows are picked, not multiplied"
        if path not in self.program.leaves:
            return f"params has no such array; there are {nearest(path, list(self.program.leaves))}"
        used = _meets_data(self.program, self.program.leaves[path])
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
        elif (
            name in LOOKUPS and program.is_parametric(equation.inputs[0]) and any(map(program.is_data, equation.inputs))
        ):
            graph.lookups.append(_lookup(program, equation))
        elif bodies(equation) and any(holds(opened_only(b), PRODUCTS) for b in bodies(equation)):
            paths = tuple(dict.fromkeys(p for a in equation.inputs for p in _leaves_of(program, a)))
            weights = tuple(p for p in paths if program.shapes[program.leaves[p]].ndim >= 2)
            if weights:
                reason = f"it stands inside {BLOCKS.get(name, 'a call without a rule')}"
                graph.refusals.append(Refusal(name, weights, reason))
    _known_inputs(graph, found, fixed)
    graph.operators = _consistent(graph, list(found.values()))
    seen: dict[str, int] = {}
    for op in graph.operators:  # what differs in a way that no part tells, such as a transpose before a slice
        seen[op.name] = seen.get(op.name, 0) + 1
        op.name += f" ({seen[op.name]})" if seen[op.name] > 1 else ""
    return graph


def _lookup(program: Program, equation: Equation) -> Lookup:
    """A gather or dynamic slice of leaves at indices from the data."""
    shape, sizes = program.type_of(equation.inputs[0]).shape, equation.params["slice_sizes"]
    rows = [a for a in range(len(shape)) if sizes[a] < shape[a]]
    indices = program.type_of(equation.inputs[1]).shape[:-1]
    picked = math.prod(indices) * math.prod(sizes[a] for a in rows)
    return Lookup(tuple(_leaves_of(program, equation.inputs[0])), math.prod(shape[a] for a in rows), picked)


def _picked(program: Program, atom: Any) -> tuple[str, ...]:
    """The leaves of which an operand is matrices picked at indices from the data, or none."""
    while isinstance(atom, int) and atom in program.maker:
        equation = program.equations[program.maker[atom]]
        if equation.primitive.name in LOOKUPS and program.is_parametric(equation.inputs[0]):
            is_matrix = sum(size > 1 for size in equation.params["slice_sizes"]) > 1
            return tuple(_leaves_of(program, equation.inputs[0])) if is_matrix else ()
        if equation.primitive.name not in LAYOUT:
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
            form = forms.of_equation(equation, shapes, side, op.repeated)
            if isinstance(form, Form) and form.weight_key == op.uses[0].form.weight_key:
                inputs = _others(equation, side)
                graph.program.data.update(inputs)
                op.uses = sorted([*op.uses, Use(index, inputs, form)], key=lambda use: use.equation)
                break
        else:
            paths = tuple(_leaves_of(graph.program, equation.inputs[side]))
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
    paths = tuple(_leaves_of(program, equation.inputs[side]))
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
    form = forms.of_equation(equation, shapes, side, reading.repeated)
    if isinstance(form, str):
        refuse(form)
        return
    use = Use(index, _others(equation, side), form)
    key = (equation.inputs[side], form.weight_key)
    if key in found:
        found[key].uses.append(use)
    else:
        kind = {"dot_general": "dot", "conv_general_dilated": "conv", "ragged_dot_general": "ragged dot"}
        found[key] = Operator(program, reading, [use], kind[equation.primitive.name])


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
            known = [v for v in _sources(program, atom) if v in program.constants]
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
    form = forms.of_equation(equation, shapes, 1, frozenset())
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


class Unreadable(Exception):
    """Why an operand is not a leaf in another layout."""


def read_operand(program: Program, operand: Any) -> Reading:
    """How `operand` is made of leaves. Raises Unreadable, saying which primitive computes with them."""
    leaves: dict[str, int] = {}
    scaled: list[str] = []
    through: list[str] = []
    parts: list[str] = []
    slabs: list[str] = []
    reads: list[str] = []
    alias: dict[int, Any] = {}
    named = program.names

    def follow(var: Any) -> frozenset[int]:
        """The axes of `var` along which it repeats itself."""
        if var in named:
            if np.dtype(program.shapes[var].dtype).kind != "f" and not jnp.issubdtype(
                program.shapes[var].dtype, jnp.floating
            ):
                raise Unreadable(f"leaf '{named[var]}' is {program.shapes[var].dtype}, not floating point")
            leaves[named[var]] = var
            reads.append(named[var])
            return frozenset()
        equation = program.equations[program.maker[var]]
        name = equation.primitive.name
        if name in SCALES:
            kept = _scaled_side(program, equation)
            scaled.extend(p for a in equation.inputs if a != kept for p in _leaves_of(program, a))
            through.append("scale")
            alias[var] = kept
            return follow(kept)
        if name not in LAYOUT:
            raise Unreadable(f"its weights are computed from {', '.join(_leaves_of(program, var))} by {name}")
        arrays = equation.inputs if name in ("concatenate", "stack") else equation.inputs[:1]
        if not all(map(program.is_parametric, arrays)):
            raise Unreadable(f"its weights are joined with constants by {name}")
        if name != "convert_element_type" or program.type_of(arrays[0]).dtype != program.type_of(var).dtype:
            through.append(name)
        if name in ("slice", "dynamic_slice", "split", "unstack"):
            parts.append(_part(program, equation, var))
            if re.fullmatch(r"\[\d+\]", parts[-1]) and _is_leaf(program, arrays[0]):
                slabs.append(parts[-1])
        repeated = [follow(a) for a in arrays]
        if len(set(repeated)) > 1:
            raise Unreadable(f"some of its entries are repeated by broadcasting, then joined with others by {name}")
        return _repeated(program, equation, repeated[0])

    repeated = follow(operand)
    if itself := [p for p in scaled if p in leaves]:
        raise Unreadable(f"its weights are scaled by a function of '{itself[0]}' itself, as weight normalisation does")

    def resolved(atom: Any) -> Any:
        while atom in alias:
            atom = alias[atom]
        return atom

    whole = closure(program, [operand], set())
    laid = [
        e._replace(inputs=tuple(a if isinstance(a, Literal) else resolved(a) for a in e.inputs))
        for e in whole
        if not set(e.outputs) & alias.keys()
    ]
    target = resolved(operand)
    needed = _only(laid, target)
    return Reading(
        leaves,
        tuple(dict.fromkeys(scaled)),
        tuple(dict.fromkeys(through)),
        repeated,
        "".join(p for p in reversed(parts) if p),
        slabs[0] if slabs else None,
        len(reads) > len(leaves),
        Segment(program, needed, [target]),
        Segment(program, whole, [operand]),
    )


def _only(equations: list[Equation], target: int) -> list[Equation]:
    """The equations that `target` needs."""
    needed, kept = {target}, []
    for e in reversed(equations):
        if needed & set(e.outputs):
            needed |= {a for a in e.inputs if isinstance(a, int)}
            kept.append(e)
    return kept[::-1]


def _scaled_side(program: Program, equation: Equation) -> Any:
    """Which input of a scaling is the weights: the one that holds the largest leaf."""
    name = equation.primitive.name
    inputs = (
        equation.inputs[1:]
        if name == "select_n"
        else equation.inputs[:1]
        if name in ("div", "neg")
        else equation.inputs
    )
    candidates = [a for a in inputs if program.is_parametric(a)]
    weights = [a for a in candidates if not all(map(program.masks, _leaves_of(program, a)))]
    candidates = weights if len(weights) == 1 else candidates
    largest = [
        max(math.prod(program.shapes[program.leaves[p]].shape) for p in _leaves_of(program, a)) for a in candidates
    ]
    if not candidates or sum(size == max(largest) for size in largest) != 1:
        floats = [a for a in candidates if jnp.issubdtype(program.type_of(a).dtype, jnp.floating)]
        paths = [p for a in floats for p in _leaves_of(program, a)]
        raise Unreadable(f"{name} joins {', '.join(paths) or 'no leaf'}: neither is the scale of the other")
    if name == "select_n":
        others = [a for a in equation.inputs[1:] if a != candidates[largest.index(max(largest))]]
        if any(program.is_parametric(a) for a in others) or not all(_is_zero(program, a) for a in others):
            raise Unreadable("select_n puts something other than zero in place of the weights")
    return candidates[largest.index(max(largest))]


def _is_zero(program: Program, atom: Any) -> bool:
    """Whether an atom is zero everywhere."""
    if isinstance(atom, Literal):
        return not np.any(np.asarray(atom.value))
    if atom in program.constants:
        return not np.any(np.asarray(program.constants[atom]))
    if atom not in program.maker:
        return False
    equation = program.equations[program.maker[atom]]
    return equation.primitive.name in LAYOUT and all(_is_zero(program, a) for a in equation.inputs)


def _repeated(program: Program, equation: Equation, before: frozenset[int]) -> frozenset[int]:
    """The repeated axes after a layout equation."""
    name, params = equation.primitive.name, equation.params
    old = program.type_of(equation.inputs[0]).shape
    new = program.type_of(equation.outputs[0]).shape
    if name == "broadcast_in_dim":
        kept = params["broadcast_dimensions"]
        grown = {a for i, a in enumerate(kept) if old[i] != new[a] or i in before}
        return frozenset(grown | {a for a in range(len(new)) if a not in kept and new[a] > 1})
    if not before:
        return before
    if name == "transpose":
        return frozenset(params["permutation"].index(a) for a in before)
    if name == "concatenate" and params["dimension"] not in before:
        return before
    if name == "stack":
        return frozenset(a + (a >= params["axis"]) for a in before)
    if name in ("convert_element_type", "copy", "copy_p", "reduce_precision", "device_put"):
        return before
    raise Unreadable(f"its entries are repeated by broadcasting, then go through {name}")


def _is_leaf(program: Program, var: Any) -> bool:
    """Whether a variable is a leaf, its dtype apart."""
    while var in program.maker and program.equations[program.maker[var]].primitive.name == "convert_element_type":
        var = program.equations[program.maker[var]].inputs[0]
    return var in program.names


def _part(program: Program, equation: Equation, var: int) -> str:
    """The slice that an equation takes, as text: "[2]", "[:, 0:64]"; empty for the whole."""
    shape, inside = program.type_of(equation.inputs[0]).shape, []
    steps = (1,) * len(shape)
    if equation.primitive.name == "slice":
        starts, stops = equation.params["start_indices"], equation.params["limit_indices"]
        steps = equation.params["strides"] or steps
    elif equation.primitive.name == "unstack":
        at, axis = equation.outputs.index(var), equation.params["axis"]
        starts = [at if a == axis else 0 for a in range(len(shape))]
        stops = [at + 1 if a == axis else n for a, n in enumerate(shape)]
    elif equation.primitive.name == "split":
        axis, before = equation.params["axis"], equation.params["sizes"][: equation.outputs.index(var)]
        starts = [sum(before) if a == axis else 0 for a in range(len(shape))]
        stops = [s + n for s, n in zip(starts, program.type_of(var).shape, strict=True)]
    else:
        known: list[Any] = [
            a.value if isinstance(a, Literal) else program.constants.get(a) for a in equation.inputs[1:]
        ]
        if any(k is None for k in known):
            raise Unreadable("it is sliced at an index that is computed from params or data")
        starts = [
            int(np.clip(int(k), 0, n - s)) for k, n, s in zip(known, shape, equation.params["slice_sizes"], strict=True)
        ]
        stops = [k + s for k, s in zip(starts, equation.params["slice_sizes"], strict=True)]
    for start, stop, step, n in zip(starts, stops, steps, shape, strict=True):
        span = f"{start}:{stop}" + (f":{step}" if step > 1 else "")
        inside.append(":" if stop - start == n and step == 1 else str(start) if stop - start == 1 else span)
    while inside and inside[-1] == ":":
        inside.pop()
    return f"[{', '.join(inside)}]" if inside else ""


def _sources(program: Program, atom: Any) -> Iterator[int]:
    """The inputs of the program that an atom is computed from."""
    seen, stack = set(), [atom]
    while stack:
        var = stack.pop()
        if isinstance(var, Literal) or var in seen:
            continue
        seen.add(var)
        if var in program.maker:
            stack += program.equations[program.maker[var]].inputs
        else:
            yield var


def _leaves_of(program: Program, atom: Any) -> list[str]:
    """Paths of the leaves that an atom is computed from, in the order of params."""
    sources = set(_sources(program, atom))
    return [path for path, var in program.leaves.items() if var in sources]


def _meets_data(program: Program, leaf: int) -> list[str]:
    """Primitives in which what is computed from a leaf alone meets data."""
    of_leaf, met = {leaf}, []
    for equation in program.equations:
        if of_leaf & {a for a in equation.inputs if isinstance(a, int)}:
            if any(map(program.is_data, equation.inputs)):
                met.append(equation.primitive.name)
            else:
                of_leaf.update(equation.outputs)
    return list(dict.fromkeys(met))
