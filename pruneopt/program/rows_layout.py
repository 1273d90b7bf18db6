"""Primitives that lay entries out otherwise: where a parameter's entries go, which axes stay, merge, split or join."""

from __future__ import annotations

import math

import numpy as np

from pruneopt.program.axes import Ids, Reader
from pruneopt.program.program import Equation, Program
from pruneopt.program.resize import cut, reshaped, split, to_shape
from pruneopt.program.row import Bounds, Layout, Row
from pruneopt.program.rows_reduce import along
from pruneopt.program.zeros import joins, keeps, pads, spread


def _broadcast(reader: Reader, equation: Equation) -> list[Ids]:
    """Old axes keep their units; new ones hold copies."""
    shape, old = reader.shape(equation.outputs[0]), reader.shape(equation.inputs[0])
    made = list(reader.made(shape))
    kept = {k: i for i, k in enumerate(equation.params["broadcast_dimensions"]) if old[i] == shape[k]}
    reader.copies.update(axis for k, axis in enumerate(made) if k not in kept)
    for k, i in kept.items():
        made[k] = reader.of(equation.inputs[0])[i]
    return [tuple(made)]


def _reshape(reader: Reader, equation: Equation) -> list[Ids]:
    """Row-major, after a transposition where `dimensions` asks for one: stretches of axes with one product are the same
    index, merged or split.
    """
    axes, ids, first = reader.axes, reader.of(equation.inputs[0]), equation.params["dimensions"]
    ids = ids if first is None else tuple(ids[k] for k in first)
    made = list(reader.made(reader.shape(equation.outputs[0])))
    if 0 in (axes.size[i] for i in ids):
        return [tuple(made)]
    old, new = [i for i in ids if axes.size[i] != 1], [k for k, i in enumerate(made) if axes.size[i] != 1]
    while old:
        left, right = [old.pop(0)], [new.pop(0)]
        while (a := math.prod(axes.size[i] for i in left)) != (b := math.prod(axes.size[made[k]] for k in right)):
            if a < b:
                left.append(old.pop(0))
            else:
                right.append(new.pop(0))
        if len(left) == len(right) == 1:
            made[right[0]] = left[0]
        else:
            axes.split("product", tuple(left), tuple(made[k] for k in right), "folded by reshape")
    return [tuple(made)]


def _transpose(reader: Reader, equation: Equation) -> list[Ids]:
    return [tuple(reader.of(equation.inputs[0])[k] for k in equation.params["permutation"])]


def _squeeze(reader: Reader, equation: Equation) -> list[Ids]:
    return [tuple(a for k, a in enumerate(reader.of(equation.inputs[0])) if k not in equation.params["dimensions"])]


def _slice(reader: Reader, equation: Equation) -> list[Ids]:
    """Axes read whole stay; a stretch of an axis is a part of it."""
    atom, p = equation.inputs[0], equation.params
    strides = p["strides"] or (1,) * len(reader.shape(atom))
    bounds = zip(p["start_indices"], p["limit_indices"], strides, strict=True)
    return [tuple(reader.part(atom, k, *bound, equation.primitive.name) for k, bound in enumerate(bounds))]


def _split(reader: Reader, equation: Equation) -> list[Ids]:
    """Consecutive parts of one axis."""
    atom, sizes, k = equation.inputs[0], tuple(map(int, equation.params["sizes"])), int(equation.params["axis"])
    stops = np.cumsum(sizes)
    ids = reader.of(atom)
    parts = [reader.part(atom, k, int(b) - n, int(b), 1, "split") for n, b in zip(sizes, stops, strict=True)]
    return [(*ids[:k], part, *ids[k + 1 :]) for part in parts]


def _concatenate(reader: Reader, equation: Equation) -> list[Ids]:
    """One axis is the sum of the inputs'; the others meet."""
    k, name = equation.params["dimension"], equation.primitive.name
    every = [reader.of(a) for a in equation.inputs]
    out = list(every[0])
    reader.meet(every, [j for j in range(len(out)) if j != k], f"joined in {name}")
    if len(every) > 1:
        out[k] = reader.made((reader.shape(equation.outputs[0])[k],))[0]
        if all(reader.axes.size[ids[k]] == 1 for ids in every):
            reader.axes.block(out[k], f"it is stacked of single entries by {name}")
        else:
            reader.axes.split("sum", tuple(ids[k] for ids in every), (out[k],), f"joined in {name}")
    return [tuple(out)]


def _stack(reader: Reader, equation: Equation) -> list[Ids]:
    """A new axis, blocked; the others meet."""
    k, every = equation.params["axis"], [reader.of(a) for a in equation.inputs]
    reader.meet(every, list(range(len(every[0]))), "joined in stack")
    new = reader.made((len(every),), "it is stacked of single entries by stack")
    return [(*every[0][:k], *new, *every[0][k:])]


def _unstack(reader: Reader, equation: Equation) -> list[Ids]:
    """The axis that is taken apart is blocked."""
    k, atom = equation.params["axis"], equation.inputs[0]
    reader.part(atom, k, 0, 1, 1, "unstack")
    ids = reader.of(atom)
    return [(*ids[:k], *ids[k + 1 :])] * len(equation.outputs)


def _tile(reader: Reader, equation: Equation) -> list[Ids]:
    """An axis that is repeated is the product of the copies and the axis."""
    made = []
    for axis, reps in zip(reader.of(equation.inputs[0]), equation.params["reps"], strict=True):
        whole = axis
        if reps != 1:
            whole = reader.axes.new(reps * reader.axes.size[axis])
            reader.axes.split("product", (reader.axes.new(reps), axis), (whole,), "repeated by tile")
        made.append(whole)
    return [tuple(made)]


def _pad(reader: Reader, equation: Equation) -> list[Ids]:
    """A padded axis is the sum of padding, which is blocked, and the axis."""
    made = []
    for axis, (low, high, inside) in zip(reader.of(equation.inputs[0]), equation.params["padding_config"], strict=True):
        whole = axis
        if inside or low < 0 or high < 0:
            reader.axes.block(axis, "it is spread or cropped by pad")
            n = reader.axes.size[axis]
            whole = reader.made((low + high + n + inside * max(n - 1, 0),), "it is spread or cropped by pad")[0]
        elif low or high:
            whole = reader.axes.new(low + high + reader.axes.size[axis])
            left, right = (reader.made((n,), "it is filled by pad") if n else () for n in (low, high))
            reader.axes.split("sum", (*left, axis, *right), (whole,), "padded by pad")
        made.append(whole)
    return [tuple(made)]


def _iota(reader: Reader, equation: Equation) -> list[Ids]:
    """The axis along which it counts is blocked."""
    made = reader.made(reader.shape(equation.outputs[0]))
    if made and reader.axes.size[made[equation.params["dimension"]]] != 1:
        reader.axes.block(made[equation.params["dimension"]], "its units are numbered by iota")
    return [made]


def _broadcast_repeats(program: Program, equation: Equation, before: frozenset[int]) -> frozenset[int]:
    old, new = (program.type_of(a).shape for a in (equation.inputs[0], equation.outputs[0]))
    kept = equation.params["broadcast_dimensions"]
    grown = {a for i, a in enumerate(kept) if old[i] != new[a] or i in before}
    return frozenset(grown | {a for a in range(len(new)) if a not in kept and new[a] > 1})


def _transpose_repeats(program: Program, equation: Equation, before: frozenset[int]) -> frozenset[int]:
    return frozenset(equation.params["permutation"].index(a) for a in before)


def _concatenate_repeats(program: Program, equation: Equation, before: frozenset[int]) -> frozenset[int] | None:
    return None if equation.params["dimension"] in before else before


def _stack_repeats(program: Program, equation: Equation, before: frozenset[int]) -> frozenset[int]:
    return frozenset(a + (a >= equation.params["axis"]) for a in before)


def _slice_cut(program: Program, equation: Equation, var: int) -> Bounds:
    p = equation.params
    return Bounds(p["start_indices"], p["limit_indices"], p["strides"] or [1] * len(p["start_indices"]))


def _split_cut(program: Program, equation: Equation, var: int) -> Bounds:
    axis, before = equation.params["axis"], equation.params["sizes"][: equation.outputs.index(var)]
    shape = program.type_of(var).shape
    starts = [sum(before) if a == axis else 0 for a in range(len(shape))]
    return Bounds(starts, [s + n for s, n in zip(starts, shape, strict=True)], [1] * len(shape))


def _unstack_cut(program: Program, equation: Equation, var: int) -> Bounds:
    at, axis = equation.outputs.index(var), equation.params["axis"]
    shape = program.type_of(equation.inputs[0]).shape
    starts = [at if a == axis else 0 for a in range(len(shape))]
    return Bounds(starts, [at + 1 if a == axis else n for a, n in enumerate(shape)], [1] * len(shape))


ROWS: dict[str, Row] = {
    "broadcast_in_dim": Row(
        layout=Layout(repeats=_broadcast_repeats), axes=_broadcast, zeros=spread, resize=to_shape("shape")
    ),
    "concatenate": Row(layout=Layout(joins=True, repeats=_concatenate_repeats), axes=_concatenate, zeros=joins),
    "iota": Row(axes=_iota, resize=to_shape("shape")),
    "pad": Row(axes=_pad, zeros=pads),
    "reshape": Row(layout=Layout(), axes=_reshape, zeros=keeps, resize=reshaped),
    "rev": Row(layout=Layout(), axes=along("dimensions", "reversed"), zeros=keeps),
    "slice": Row(layout=Layout(cut=_slice_cut), axes=_slice, zeros=keeps, resize=cut),
    "split": Row(layout=Layout(cut=_split_cut), axes=_split, zeros=keeps, resize=split),
    "squeeze": Row(layout=Layout(), axes=_squeeze, zeros=keeps),
    "stack": Row(layout=Layout(joins=True, repeats=_stack_repeats), axes=_stack, zeros=joins),
    "tile": Row(axes=_tile, zeros=keeps),
    "transpose": Row(layout=Layout(repeats=_transpose_repeats), axes=_transpose, zeros=keeps),
    "unstack": Row(layout=Layout(cut=_unstack_cut), axes=_unstack, zeros=keeps),
}
