"""How an operand of a product is made of leaves: laid out otherwise, cut, joined, masked or scaled."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np

from pruneopt.program.keys import Literal
from pruneopt.program.primitives import row_of
from pruneopt.program.program import Equation, Program
from pruneopt.program.row import Bounds, Layout
from pruneopt.program.segment import Segment, closure


class Unreadable(Exception):
    """Why an operand is not a leaf in another layout."""


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


def read_operand(program: Program, operand: Any) -> Reading:
    """How `operand` is made of leaves. Raises Unreadable, saying which primitive computes with them."""
    trail = _Trail(program)
    repeated = trail.follow(operand)
    if itself := [p for p in trail.scaled if p in trail.leaves]:
        raise Unreadable(f"its weights are scaled by a function of '{itself[0]}' itself, as weight normalisation does")
    whole = closure(program, [operand], set())
    target = trail.resolved(operand)
    return Reading(
        trail.leaves,
        tuple(dict.fromkeys(trail.scaled)),
        tuple(dict.fromkeys(trail.through)),
        repeated,
        "".join(p for p in reversed(trail.parts) if p),
        trail.slabs[0] if trail.slabs else None,
        len(trail.reads) > len(trail.leaves),
        Segment(program, _only(trail.unscaled(whole), target), [target]),
        Segment(program, whole, [operand]),
    )


@dataclass(eq=False)
class _Trail:
    """What is met on the way from an operand back to its leaves.

    leaves: their variables by path. reads: paths, once for each time that they are met. scaled: paths of what scales
    them. through: primitives passed. parts, slabs: slices taken, and those that cut a leaf into layers. alias: the
    weights that a scaled variable stands for.
    """

    program: Program
    leaves: dict[str, int] = field(default_factory=dict)
    reads: list[str] = field(default_factory=list)
    scaled: list[str] = field(default_factory=list)
    through: list[str] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    slabs: list[str] = field(default_factory=list)
    alias: dict[int, Any] = field(default_factory=dict)

    def follow(self, var: Any) -> frozenset[int]:
        """The axes of `var` along which it repeats itself."""
        if var in self.program.names:
            return self._at_leaf(var)
        equation = self.program.equations[self.program.maker[var]]
        row = row_of(equation)
        if row.scales is not None:
            return self._through_scale(equation, var)
        if row.layout is None:
            paths = ", ".join(leaves_of(self.program, var))
            raise Unreadable(f"its weights are computed from {paths} by {equation.primitive.name}")
        return self._through_layout(equation, row.layout, var)

    def _at_leaf(self, var: Any) -> frozenset[int]:
        path, dtype = self.program.names[var], self.program.shapes[var].dtype
        if not jnp.issubdtype(dtype, jnp.floating):
            raise Unreadable(f"leaf '{path}' is {dtype}, not floating point")
        self.leaves[path] = var
        self.reads.append(path)
        return frozenset()

    def _through_scale(self, equation: Equation, var: Any) -> frozenset[int]:
        kept = _scaled_side(self.program, equation)
        self.scaled.extend(p for a in equation.inputs if a != kept for p in leaves_of(self.program, a))
        self.through.append("scale")
        self.alias[var] = kept
        return self.follow(kept)

    def _through_layout(self, equation: Equation, layout: Layout, var: Any) -> frozenset[int]:
        program, name = self.program, equation.primitive.name
        arrays = equation.inputs if layout.joins else equation.inputs[:1]
        if not all(map(program.is_parametric, arrays)):
            raise Unreadable(f"its weights are joined with constants by {name}")
        if name != "convert_element_type" or program.type_of(arrays[0]).dtype != program.type_of(var).dtype:
            self.through.append(name)
        if layout.cut is not None:
            self.parts.append(_part(program, equation, layout.cut(program, equation, var)))
            if re.fullmatch(r"\[\d+\]", self.parts[-1]) and _is_leaf(program, arrays[0]):
                self.slabs.append(self.parts[-1])
        repeated = [self.follow(a) for a in arrays]
        if len(set(repeated)) > 1:
            raise Unreadable(f"some of its entries are repeated by broadcasting, then joined with others by {name}")
        before, repeats = repeated[0], layout.repeats
        after = repeats(program, equation, before) if repeats else None if before else before
        if after is None:
            raise Unreadable(f"its entries are repeated by broadcasting, then go through {name}")
        return after

    def resolved(self, atom: Any) -> Any:
        """The weights that a scaled atom stands for."""
        while atom in self.alias:
            atom = self.alias[atom]
        return atom

    def unscaled(self, equations: list[Equation]) -> list[Equation]:
        """The equations without those that scale."""
        return [
            e._replace(inputs=tuple(a if isinstance(a, Literal) else self.resolved(a) for a in e.inputs))
            for e in equations
            if not set(e.outputs) & self.alias.keys()
        ]


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
    scales = row_of(equation).scales
    inputs = scales(equation) if scales else ()
    candidates = [a for a in inputs if program.is_parametric(a)]
    weights = [a for a in candidates if not all(map(program.masks, leaves_of(program, a)))]
    candidates = weights if len(weights) == 1 else candidates
    largest = [
        max(math.prod(program.shapes[program.leaves[p]].shape) for p in leaves_of(program, a)) for a in candidates
    ]
    if not candidates or sum(size == max(largest) for size in largest) != 1:
        floats = [a for a in candidates if jnp.issubdtype(program.type_of(a).dtype, jnp.floating)]
        paths = [p for a in floats for p in leaves_of(program, a)]
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
    return row_of(equation).layout is not None and all(_is_zero(program, a) for a in equation.inputs)


def _is_leaf(program: Program, var: Any) -> bool:
    """Whether a variable is a leaf, its dtype apart."""
    while var in program.maker and program.equations[program.maker[var]].primitive.name == "convert_element_type":
        var = program.equations[program.maker[var]].inputs[0]
    return var in program.names


def _part(program: Program, equation: Equation, bounds: Bounds | None) -> str:
    """The slice that an equation takes, as text: "[2]", "[:, 0:64]"; empty for the whole."""
    if bounds is None:
        raise Unreadable("it is sliced at an index that is computed from params or data")
    inside = []
    for start, stop, step, n in zip(*bounds, program.type_of(equation.inputs[0]).shape, strict=True):
        span = f"{start}:{stop}" + (f":{step}" if step > 1 else "")
        inside.append(":" if stop - start == n and step == 1 else str(start) if stop - start == 1 else span)
    while inside and inside[-1] == ":":
        inside.pop()
    return f"[{', '.join(inside)}]" if inside else ""


def sources(program: Program, atom: Any) -> Iterator[int]:
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


def leaves_of(program: Program, atom: Any) -> list[str]:
    """Paths of the leaves that an atom is computed from, in the order of params."""
    read = set(sources(program, atom))
    return [path for path, var in program.leaves.items() if var in read]


def meets_data(program: Program, leaf: int) -> list[str]:
    """Primitives in which what is computed from a leaf alone meets data."""
    of_leaf, met = {leaf}, []
    for equation in program.equations:
        if of_leaf & {a for a in equation.inputs if isinstance(a, int)}:
            if any(map(program.is_data, equation.inputs)):
                met.append(equation.primitive.name)
            else:
                of_leaf.update(equation.outputs)
    return list(dict.fromkeys(met))
