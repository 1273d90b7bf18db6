"""Which operators multiply which parameters: a function read through its jaxpr, with no hook, wrapper or registry."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from pruneopt.structure import forms
from pruneopt.structure.forms import Form
from pruneopt.structure.leaves import nearest
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
    """How an operand is made of leaves: the layout (without scales), the parts read, the primitives passed."""

    leaves: dict[str, int]
    scaled_by: tuple[str, ...]
    through: tuple[str, ...]
    repeated: frozenset[int]
    part: str
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
        layer = re.match(r"\[\d+\]", self._reading.part)
        return layer.group() if layer and len(self.paths) == 1 else None

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

    def to_matrix(self, leaves: dict[str, Any]) -> Shaped[Array, "problems n_in n_out"]:
        """The weights that the product sees. leaves: {path: array} of all params that it reads."""
        operand = self._reading.whole.run(self._inputs(self._reading.whole, leaves))[0]
        return self.uses[0].form.to_matrix(operand)

    def to_leaves(self, matrix: Shaped[Array, "problems n_in n_out"], leaves: dict[str, Any]) -> dict[str, Any]:
        """{path: leaf} for the operator's leaves, holding `matrix` where the operator reads them and `leaves` elsewhere.

        Entries of `matrix` that equal `to_matrix(leaves)` leave theirs bit for bit; scales are divided out.
        """
        old = self.to_matrix(leaves)
        scale = self._laid(self._scale(leaves))
        safe = jnp.where(scale == 0, jnp.ones((), scale.dtype), scale)
        moved = self._back(jnp.where(scale == 0, jnp.zeros((), scale.dtype), matrix.astype(scale.dtype) / safe))
        same = self._back((matrix.astype(old.dtype) == old).astype(scale.dtype))
        return {
            path: jnp.where(self.part_of(path) & (same[path] == 0), new.astype(leaves[path].dtype), leaves[path])
            for path, new in moved.items()
        }

    def masks(self, support: Shaped[Array, "problems n_in n_out"]) -> dict[str, Any]:
        """{path: boolean mask}: `support` where the operator reads the leaf, True elsewhere."""
        back = self._back(support.astype(self._dtype))
        return {path: (mask != 0) | ~self.part_of(path) for path, mask in back.items()}

    def support(self, masks: dict[str, Any]) -> Shaped[Array, "problems n_in n_out"]:
        """The canonical form of boolean masks {path: mask} of its leaves."""
        ones = {p: jnp.asarray(masks[p]).astype(self._types[p].dtype) for p in self.paths}
        return self._laid(ones) != 0

    def part_of(self, path: str) -> Shaped[Array, "..."]:
        """Which entries of a leaf the operator reads."""
        return self._back(jnp.ones((self.problems, self.n_in, self.n_out), self._dtype))[path] != 0

    @property
    def _dtype(self) -> Any:
        return self._program.type_of(self._reading.layout.outputs[0]).dtype

    @property
    def _types(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {
            p: jax.ShapeDtypeStruct(self._program.shapes[v].shape, self._program.shapes[v].dtype)
            for p, v in self._reading.leaves.items()
        }

    def _inputs(self, segment: Segment, leaves: dict[str, Any]) -> dict[int, Any]:
        named = self._program.names
        return {v: leaves[named[v]] if v in named else self._program.constants[v] for v in segment.inputs}

    def _scale(self, leaves: dict[str, Any]) -> dict[str, Any]:
        """What multiplies each entry, as leaves: the whole map at ones, brought back."""
        if "scale" not in self._reading.through and not self._reading.scaled_by:
            return {p: jnp.ones(t.shape, t.dtype) for p, t in self._types.items()}
        ones = {**leaves, **{p: jnp.ones(t.shape, t.dtype) for p, t in self._types.items()}}
        return self._back(self.to_matrix(ones))

    def _laid(self, leaves: dict[str, Any]) -> Any:
        operand = self._reading.layout.run(self._inputs(self._reading.layout, leaves))[0]
        return self.uses[0].form.to_matrix(operand)

    def _back(self, matrix: Any) -> dict[str, Any]:
        """The transpose of the layout, which is its inverse on the entries that it reads."""
        names = {v: p for p, v in self._reading.leaves.items()}
        given = {v: self._program.constants[v] for v in self._reading.layout.inputs if v not in names}

        def laid(leaves: dict[str, Any]) -> Any:
            values = [leaves[names[v]] if v in names else given[v] for v in self._reading.layout.inputs]
            return self.uses[0].form.to_matrix(self._reading.layout.trace(values)[0])

        return jax.linear_transpose(laid, self._types)(matrix)[0]


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
                    f"{op.size * op._dtype.itemsize / 1024:.1f}",
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
        total = sum(op.flops for op in self.operators)
        text.append(f"{total / 1e6:.3f} MFLOPs in operators, {self.activations / 1e6:.3f} between activations")
        return "\n".join(line.rstrip() for line in text)

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
    for index, equation in enumerate(program.equations):
        name = equation.primitive.name
        if name in PRODUCTS:
            _product(graph, found, index, equation)
        elif (
            name in LOOKUPS and program.is_parametric(equation.inputs[0]) and any(map(program.is_data, equation.inputs))
        ):
            shape = program.type_of(equation.inputs[0]).shape
            picked = math.prod(program.type_of(equation.inputs[1]).shape[:-1])
            graph.lookups.append(Lookup(tuple(_leaves_of(program, equation.inputs[0])), shape[0], picked))
        elif bodies(equation) and any(holds(opened_only(b), PRODUCTS) for b in bodies(equation)):
            paths = tuple(dict.fromkeys(p for a in equation.inputs for p in _leaves_of(program, a)))
            weights = tuple(p for p in paths if program.shapes[program.leaves[p]].ndim >= 2)
            if weights:
                reason = f"it stands inside {BLOCKS.get(name, 'a call without a rule')}"
                graph.refusals.append(Refusal(name, weights, reason))
    graph.operators = _consistent(graph, list(found.values()))
    return graph


def _product(graph: Graph, found: dict[Any, Operator], index: int, equation: Equation) -> None:
    program = graph.program
    sides = [i for i in (0, 1) if program.is_parametric(equation.inputs[i])]
    other = [i for i in (0, 1) if program.is_data(equation.inputs[i])]
    shapes = [tuple(program.type_of(a).shape) for a in equation.inputs[:2]]
    shapes.append(tuple(program.type_of(equation.outputs[0]).shape))
    if not sides:
        _between(graph, equation, shapes)
        return
    side = sides[0]
    paths = tuple(_leaves_of(program, equation.inputs[side]))
    refuse = lambda why: graph.refusals.append(Refusal(equation.primitive.name, paths, why))  # noqa: E731
    if not other:
        if len(sides) == 1:  # a constant meets a leaf
            refuse("the other side is a constant, no input")
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
    inputs = tuple(a for i, a in enumerate(equation.inputs) if i != side and isinstance(a, int))
    use = Use(index, inputs, form)
    key = (equation.inputs[side], form.weight_key)
    if key in found:
        found[key].uses.append(use)
    else:
        kind = {"dot_general": "dot", "conv_general_dilated": "conv", "ragged_dot_general": "ragged dot"}
        found[key] = Operator(program, reading, [use], kind[equation.primitive.name])


def _between(graph: Graph, equation: Equation, shapes: list[tuple[int, ...]]) -> None:
    """A product without a parameter: of activations, or with a large constant that the function closed over."""
    program = graph.program
    for side in (0, 1):
        atom = equation.inputs[side]
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
    for path, ops in owners.items():
        if len(ops) == 1 or len({op.slab for op in ops} - {None}) == len(ops):
            continue  # alone, or each with its own layer of a stack
        parts = [np.asarray(op.part_of(path)) for op in ops]
        if np.max(np.sum(parts, axis=0)) <= 1:
            continue
        clash = {i for i in range(len(ops)) for j in range(len(ops)) if i != j and np.any(parts[i] & parts[j])}
        bad |= {id(ops[i]) for i in clash}
        reason = "its products read the same weights in different arrangements: no single Gram holds for them"
        graph.refusals.append(Refusal(ops[0].kind, (path,), reason))
    return [op for op in operators if id(op) not in bad]


class Unreadable(Exception):
    """Why an operand is not a leaf in another layout."""


def read_operand(program: Program, operand: int) -> Reading:
    """How `operand` is made of leaves. Raises Unreadable, saying which primitive computes with them."""
    leaves: dict[str, int] = {}
    scaled: list[str] = []
    through: list[str] = []
    parts: list[str] = []
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
        arrays = equation.inputs if name == "concatenate" else equation.inputs[:1]
        if not all(map(program.is_parametric, arrays)):
            raise Unreadable(f"its weights are joined with constants by {name}")
        if name != "convert_element_type" or program.type_of(arrays[0]).dtype != program.type_of(var).dtype:
            through.append(name)
        if name in ("slice", "dynamic_slice"):
            parts.append(_part(program, equation))
        repeated = [follow(a) for a in arrays]
        return _repeated(program, equation, repeated[0]) if len(arrays) == 1 else frozenset().union(*repeated)

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
    if name in ("convert_element_type", "copy", "copy_p", "reduce_precision", "device_put", "optimization_barrier"):
        return before
    raise Unreadable(f"its entries are repeated by broadcasting, then go through {name}")


def _part(program: Program, equation: Equation) -> str:
    """The slice that an equation takes, as text: "[2]", "[:, 0:64]"; empty for the whole."""
    shape, inside = program.type_of(equation.inputs[0]).shape, []
    if equation.primitive.name == "slice":
        starts, stops = equation.params["start_indices"], equation.params["limit_indices"]
    else:
        known = [a.value if isinstance(a, Literal) else program.constants.get(a) for a in equation.inputs[1:]]
        if any(k is None for k in known):
            raise Unreadable("it is sliced at an index that is computed from params or data")
        starts = [
            int(np.clip(int(k), 0, n - s)) for k, n, s in zip(known, shape, equation.params["slice_sizes"], strict=True)
        ]
        stops = [k + s for k, s in zip(starts, equation.params["slice_sizes"], strict=True)]
    for start, stop, n in zip(starts, stops, shape, strict=True):
        inside.append(":" if stop - start == n else str(start) if stop - start == 1 else f"{start}:{stop}")
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
