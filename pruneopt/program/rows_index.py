"""Primitives that read or write at an index: rows picked from a table, layers of a stack, updates in place."""

from __future__ import annotations

from typing import Any

import numpy as np

from pruneopt.program.axes import Ids, Reader
from pruneopt.program.keys import Literal
from pruneopt.program.program import Equation, Program
from pruneopt.program.resize import dynamic_slice, gathered
from pruneopt.program.row import Bounds, Layout, Row, rows
from pruneopt.program.zeros import keeps, scattered, writes


def _dynamic_slice(reader: Reader, equation: Equation) -> list[Ids]:
    """As a slice, where the start is known; otherwise the axis is blocked."""
    atom, made = equation.inputs[0], []
    for k, (start, size) in enumerate(zip(equation.inputs[1:], equation.params["slice_sizes"], strict=True)):
        n, at = reader.shape(atom)[k], reader.known(start)
        if size != n and at is None:
            reader.block((atom,), (k,), "a part of it is picked by an index that is computed")
        at = int(np.clip(0 if at is None else at, 0, n - size))
        made.append(reader.part(atom, k, at, at + size, 1, equation.primitive.name))
    return [tuple(made)]


def _dynamic_update_slice(reader: Reader, equation: Equation) -> list[Ids]:
    """Axes that are overwritten whole meet; the others are blocked."""
    operand, update = equation.inputs[:2]
    for k, (n, size) in enumerate(zip(reader.shape(operand), reader.shape(update), strict=True)):
        if n == size:
            reader.axes.tie(reader.of(operand)[k], reader.of(update)[k], "written in dynamic_update_slice")
        else:
            reader.block((operand, update), (k,), "a part of it is overwritten by dynamic_update_slice")
    return [reader.of(operand)]


def _gather(reader: Reader, equation: Equation) -> list[Ids]:
    """Axes of which whole slices are taken stay; those that an index picks from are blocked."""
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    operand, indices = equation.inputs
    shape, ids, at = reader.shape(operand), reader.of(operand), reader.of(indices)
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    picked = tuple(k for k, n in enumerate(shape) if sizes[k] != n and k not in numbers.operand_batching_dims)
    reader.block((indices,), (-1,), "it holds the parts of an index (gather)")
    reader.block((operand,), picked, "its entries are picked by an index (gather)")
    for k, j in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True):
        reader.axes.tie(ids[k], at[j], "paired in gather")
    kept = [k for k in range(len(shape)) if k not in gone]
    reader.role(operand, tuple(ids[k] for k in picked), "row")
    reader.role(operand, tuple(ids[k] for k in kept if k not in picked), "feature")
    made, batch = [], iter(at[:-1])
    offset = dict(zip(numbers.offset_dims, kept, strict=True))
    for k, n in enumerate(reader.shape(equation.outputs[0])):
        if k not in offset:
            made.append(next(batch))
        elif offset[k] in picked:
            made += reader.made((n,), "its entries are picked by an index (gather)")
        else:
            made.append(ids[offset[k]])
    return [tuple(made)]


def _scatter(reader: Reader, equation: Equation) -> list[Ids]:
    """Axes that are written whole meet; those that an index picks from are blocked."""
    numbers, name = equation.params["dimension_numbers"], equation.primitive.name
    operand, indices, updates = equation.inputs
    ids, at, new = reader.of(operand), reader.of(indices), reader.of(updates)
    written = f"its entries are written at an index ({name})"
    for k, j in zip(numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True):
        reader.axes.tie(ids[k], at[j], f"paired in {name}")
    reader.block((indices,), (-1,), f"it holds the parts of an index ({name})")
    reader.block((operand,), numbers.inserted_window_dims, written)
    inside = [k for k in range(len(ids)) if k not in (*numbers.inserted_window_dims, *numbers.operand_batching_dims)]
    for k, j in zip(inside, numbers.update_window_dims, strict=True):
        if reader.shape(operand)[k] == reader.shape(updates)[j]:
            reader.axes.tie(ids[k], new[j], f"written in {name}")
        else:
            reader.block((operand,), (k,), written)
            reader.block((updates,), (j,), written)
    batch = [j for j in range(len(new)) if j not in numbers.update_window_dims]
    for j, axis in zip(batch, at[:-1], strict=True):
        reader.axes.tie(new[j], axis, f"paired in {name}")
    return [ids]


def _dynamic_slice_cut(program: Program, equation: Equation, var: int) -> Bounds | None:
    shape, sizes = program.type_of(equation.inputs[0]).shape, equation.params["slice_sizes"]
    known: list[Any] = [a.value if isinstance(a, Literal) else program.constants.get(a) for a in equation.inputs[1:]]
    if any(k is None for k in known):
        return None
    starts = [int(np.clip(int(k), 0, n - s)) for k, n, s in zip(known, shape, sizes, strict=True)]
    return Bounds(starts, [k + s for k, s in zip(starts, sizes, strict=True)], [1] * len(shape))


ROWS: dict[str, Row] = {
    "dynamic_slice": Row(
        layout=Layout(cut=_dynamic_slice_cut), picks=True, axes=_dynamic_slice, zeros=keeps, resize=dynamic_slice
    ),
    "dynamic_update_slice": Row(axes=_dynamic_update_slice, zeros=writes),
    "gather": Row(picks=True, axes=_gather, zeros=keeps, resize=gathered),
    **rows("scatter scatter-add scatter-max scatter-min scatter-mul scatter-sub", axes=_scatter, zeros=scattered),
}
