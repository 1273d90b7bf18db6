"""How far a network can be cut before any work is done: the FLOPs that its blocked axes hold on to."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from pruneopt.program import versions
from pruneopt.program.axes import Reader
from pruneopt.program.forms import PRODUCTS
from pruneopt.structure.units import Units

_SHOWN = 3  # reasons that are printed


class Reach(NamedTuple):
    """FLOPs of the products of one batch, and those left where every group that can be cut is cut to one unit.

    because: {reason: FLOPs left of products with an axis that it blocks}, the largest first.
    """

    flops: int
    left: int
    because: dict[str, int]

    def __str__(self) -> str:
        why = "; ".join(f"{reason} ({flops / max(self.left, 1):.0%} of these)" for reason, flops in self._reasons)
        return (
            f"at most {self.flops / max(self.left, 1):.3g} times fewer FLOPs can be reached: {self.left / 1e6:.3g} of "
            f"{self.flops / 1e6:.3g} MFLOPs stay where each group that can be cut keeps one unit"
            + (f", because {why}" if why else "")
        )

    @property
    def _reasons(self) -> list[tuple[str, int]]:
        return list(self.because.items())[:_SHOWN]


def reach(units: Units) -> Reach:
    """What cutting whole units can save at most, and what bars the rest."""
    free = {units.atom(group) for group in units.groups if not group.blocked}
    reasons = {units.atom(group): group.blocked[0] for group in units.groups if group.blocked}
    total, left, because = 0, 0, Counter[str]()
    for reader, times, axes, other in _products(units.reader, 1):
        sizes = [reader.axes.size[axis] for axis in axes]
        small = [_smallest(reader, axis, free) for axis in axes]
        total += 2 * times * other * math.prod(sizes)
        left += (rest := 2 * times * other * math.prod(small))
        blocked = {reasons[a] for axis in axes for a in reader.axes.atoms(axis) if a in reasons}
        because.update(dict.fromkeys(blocked, rest))
    return Reach(total, left, dict(because.most_common()))


def _products(reader: Reader, times: int) -> Iterator[tuple[Reader, int, list[int], int]]:
    """(reader, how often, axes over which it multiplies and adds, what more multiplies) of every product."""
    for i, (equation, read) in enumerate(zip(reader.program.equations, reader.read, strict=True)):
        name, params = equation.primitive.name, equation.params
        if i in reader.inner:
            yield from _products(reader.inner[i], times * versions.scan(equation).length)
        elif name in PRODUCTS:
            axes = list(reader.of(equation.outputs[0]))
            if name == "conv_general_dilated":
                kernel = params["dimension_numbers"].rhs_spec
                window = math.prod(reader.shape(equation.inputs[1])[k] for k in kernel[2:])
                yield reader, times, [*axes, read[1][kernel[1]]], window
            elif name == "dot_general":
                yield reader, times, [*axes, *(read[0][k] for k in params["dimension_numbers"][0][0])], 1
            else:
                yield reader, times, [*axes, read[0][-1]], 1


def _smallest(reader: Reader, axis: int, free: set[int]) -> int:
    """How many entries an axis keeps where every class of units that can be cut keeps one."""
    kind, parts = reader.axes.parts(axis)
    if not kind:
        return 1 if reader.axes.find(axis) in free else reader.axes.size[axis]
    sizes = [_smallest(reader, part, free) for part in parts]
    return math.prod(sizes) if kind == "product" else sum(sizes)
