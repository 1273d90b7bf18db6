"""Primitives that work along axes: sums and maxima, sums so far, sorts and sliding windows; those axes are blocked."""

from __future__ import annotations

from typing import Any

import numpy as np

from pruneopt.program.axes import AxisRule, Ids, Reader
from pruneopt.program.program import Equation
from pruneopt.program.row import Row, rows
from pruneopt.program.zeros import keeps

_REDUCED = {
    "reduce_max": "it is reduced by max (reduce_max)",
    "reduce_min": "it is reduced by min (reduce_min)",
    "argmax": "it is reduced by argmax",
    "argmin": "it is reduced by argmin",
}


def _without(reader: Reader, equation: Equation, dims: Any, why: str) -> list[Ids]:
    """These axes are blocked and new in each output; the others stay, and meet where there are several inputs."""
    rank = len(reader.shape(equation.outputs[0]))
    inputs = tuple(a for a in equation.inputs if len(reader.shape(a)) == rank)
    reader.block(inputs, tuple(dims), why)
    reader.meet([reader.of(a) for a in inputs], list(range(rank)), f"met in {equation.primitive.name}")
    made = []
    for var in equation.outputs:
        new = reader.made(reader.shape(var), why)
        made.append(tuple(new[k] if k in dims else axis for k, axis in enumerate(reader.of(inputs[0]))))
    return made


def along(param: str, word: str) -> AxisRule:
    """The rule of a primitive that works along the axes named by a parameter: they are blocked."""

    def rule(reader: Reader, equation: Equation) -> list[Ids]:
        rank, name = len(reader.shape(equation.inputs[0])), equation.primitive.name
        dims = [int(k) % rank for k in np.atleast_1d(equation.params[param])]
        return _without(reader, equation, dims, f"it is {word} by {name}")

    return rule


def _sum(reader: Reader, equation: Equation) -> list[Ids]:
    """What is summed may go where it is zero; `Zeros` decides."""
    (atom,), dims = equation.inputs, equation.params["axes"]
    ids = reader.of(atom)
    return [tuple(a for k, a in enumerate(ids) if k not in dims)]


def _reduce(reader: Reader, equation: Equation) -> list[Ids] | None:
    """A reduced axis is blocked: a maximum over units at zero is not one without them."""
    name, (atom, *rest) = equation.primitive.name, equation.inputs
    dims = equation.params["dimensions"] if name == "reduce" else equation.params["axes"]
    if any(reader.shape(a) for a in rest):
        return None
    reader.block((atom,), dims, _REDUCED.get(name, f"it is reduced by {name}"))
    return [tuple(a for k, a in enumerate(reader.of(atom)) if k not in dims)]


def _window(reader: Reader, equation: Equation) -> list[Ids] | None:
    """Axes over which a window slides are blocked."""
    if equation.primitive.name == "reduce_window" and len(equation.outputs) > 1:
        return None
    still = zip(
        *(equation.params[k] for k in ("window_dimensions", "window_strides", "padding", "base_dilation")), strict=True
    )
    dims = [k for k, (size, stride, pads, dilation) in enumerate(still) if size * stride * dilation != 1 or any(pads)]
    return _without(reader, equation, dims, f"a window slides over it in {equation.primitive.name}")


ROWS: dict[str, Row] = {
    "reduce_sum": Row(axes=_sum, zeros=keeps),
    **rows("reduce_max reduce_min", axes=_reduce, zeros=keeps),
    **rows("argmax argmin reduce reduce_and reduce_or reduce_prod reduce_xor", axes=_reduce),
    "cumsum": Row(axes=along("axis", "accumulated"), zeros=keeps),
    **rows("cumlogsumexp cummax cummin cumprod", axes=along("axis", "accumulated")),
    **rows("reduce_window reduce_window_max reduce_window_min reduce_window_sum", axes=_window),
    "sort": Row(axes=along("dimension", "sorted")),
    "top_k": Row(axes=along("axis", "ranked")),
}
