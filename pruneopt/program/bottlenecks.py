"""Where a network can be cut in two: variables through which all of the batch's way to the outputs goes."""

from __future__ import annotations

from typing import Any

from pruneopt.program.forms import PRODUCTS
from pruneopt.program.program import Program
from pruneopt.program.segment import closure


def bottlenecks(program: Program) -> list[tuple[Any, ...]]:
    """Nothing, the variables through which all of the batch's way goes, and the outputs.

    Of a row of such variables without a product with a leaf between them, the last.
    """
    outputs = [atom for atom in program.outputs if isinstance(atom, int)]
    equations = closure(program, outputs, set())
    last: dict[int, int] = dict.fromkeys(outputs, len(equations))
    for i, equation in enumerate(equations):
        last.update({a: max(i, last.get(a, 0)) for a in equation.inputs if isinstance(a, int)})
    live: set[int] = set()
    found: list[tuple[Any, ...]] = [()]
    waiting: int | None = None
    multiplied = False  # since the cut before
    for i, equation in enumerate(equations):
        if equation.primitive.name in PRODUCTS and any(map(program.is_parametric, equation.inputs)):
            if waiting is not None and multiplied:
                found.append((waiting,))
                waiting, multiplied = None, False
            multiplied = True
        live |= {v for v in equation.outputs if v in program.data and v in program.parametric}
        live = {v for v in live if last.get(v, -1) > i}
        waiting = next(iter(live)) if len(live) == 1 else waiting if live and waiting in live else None
    return [*found, tuple(program.outputs)]
