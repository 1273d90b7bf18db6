"""What each primitive says about axes: which index the same units, which fall into parts, which cannot be cut."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pruneopt.program.axes import Ids, Reader, Rule
from pruneopt.program.program import Equation

_MET = {"add": "added", "sub": "subtracted", "mul": "multiplied", "div": "divided", "select_n": "chosen"}


def _same(reader: Reader, equation: Equation) -> list[Ids] | None:
    """Output i has the axes of input i."""
    made = [reader.of(a) for a in equation.inputs[: len(equation.outputs)]]
    shapes = [reader.shape(a) for a in equation.inputs[: len(equation.outputs)]]
    return made if shapes == [reader.shape(v) for v in equation.outputs] else None


def _elementwise(reader: Reader, equation: Equation) -> list[Ids]:
    """Axes of one size meet; an axis of size 1 and a scalar are repeated."""
    name, shape = equation.primitive.name, reader.shape(equation.outputs[0])
    full = [reader.of(a) for a in equation.inputs if len(reader.shape(a)) == len(shape)]
    out = []
    for k, n in enumerate(shape):
        met = [axes[k] for axes in full if reader.axes.size[axes[k]] == n]
        for other in met[1:]:
            reader.axes.tie(met[0], other, f"{_MET.get(name, 'met')} in {name}")
        out.append(met[0])
    return [tuple(out)]


def _broadcast(reader: Reader, equation: Equation) -> list[Ids]:
    """Old axes keep their units; new ones hold copies."""
    shape, old = reader.shape(equation.outputs[0]), reader.shape(equation.inputs[0])
    made = list(reader.made(shape))
    kept = {k: i for i, k in enumerate(equation.params["broadcast_dimensions"]) if old[i] == shape[k]}
    reader.copies.update(axis for k, axis in enumerate(made) if k not in kept)
    for k, i in kept.items():
        made[k] = reader.of(equation.inputs[0])[i]
    return [tuple(made)]


def _reshape(reader: Reader, equation: Equation) -> list[Ids] | None:
    """Row-major: stretches of axes with one product are the same index, merged or split."""
    axes, ids = reader.axes, reader.of(equation.inputs[0])
    made = list(reader.made(reader.shape(equation.outputs[0])))
    if 0 in (axes.size[i] for i in ids) or equation.params["dimensions"] is not None:
        return None if equation.params["dimensions"] is not None else [tuple(made)]
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


def _along(param: str, word: str) -> Rule:
    """The rule of a primitive that works along the axes named by a parameter: they are blocked."""

    def rule(reader: Reader, equation: Equation) -> list[Ids]:
        rank, name = len(reader.shape(equation.inputs[0])), equation.primitive.name
        dims = [int(k) % rank for k in np.atleast_1d(equation.params[param])]
        return _without(reader, equation, dims, f"it is {word} by {name}")

    return rule


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


def _reduce(reader: Reader, equation: Equation) -> list[Ids] | None:
    """A reduced axis is blocked: the divisor of a mean, the statistic of a norm or a softmax would change."""
    name, (atom, *rest) = equation.primitive.name, equation.inputs
    dims = equation.params["dimensions"] if name == "reduce" else equation.params["axes"]
    if any(reader.shape(a) for a in rest):
        return None
    reader.block((atom,), dims, _REDUCED.get(name, f"it is reduced by {name}"))
    return [tuple(a for k, a in enumerate(reader.of(atom)) if k not in dims)]


_REDUCED = {
    "reduce_sum": "it is reduced by sum (reduce_sum): a mean, norm or softmax over it would change",
    "reduce_max": "it is reduced by max (reduce_max)",
    "reduce_min": "it is reduced by min (reduce_min)",
    "argmax": "it is reduced by argmax",
    "argmin": "it is reduced by argmin",
}


def _window(reader: Reader, equation: Equation) -> list[Ids] | None:
    """Axes over which a window slides are blocked."""
    if equation.primitive.name == "reduce_window" and len(equation.outputs) > 1:
        return None
    still = zip(
        *(equation.params[k] for k in ("window_dimensions", "window_strides", "padding", "base_dilation")), strict=True
    )
    dims = [k for k, (size, stride, pads, dilation) in enumerate(still) if size * stride * dilation != 1 or any(pads)]
    return _without(reader, equation, dims, f"a window slides over it in {equation.primitive.name}")


def _dot_general(reader: Reader, equation: Equation) -> list[Ids]:
    """Contracted axes meet, batch axes meet; the others go on."""
    (left, right), (left_batch, right_batch) = equation.params["dimension_numbers"]
    a, b = equation.inputs
    x, w = reader.of(a), reader.of(b)
    reader.contract([(x[i], w[j]) for i, j in zip(left, right, strict=True)], equation)
    for i, j in zip(left_batch, right_batch, strict=True):
        reader.axes.tie(x[i], w[j], "paired in dot_general")
    x_free = tuple(axis for i, axis in enumerate(x) if i not in (*left, *left_batch))
    w_free = tuple(axis for j, axis in enumerate(w) if j not in (*right, *right_batch))
    for atom, free, batch in ((a, x_free, [x[i] for i in left_batch]), (b, w_free, [w[j] for j in right_batch])):
        reader.role(atom, free, "out")
        reader.role(atom, tuple(batch), "problem")
    return [(*(x[i] for i in left_batch), *x_free, *w_free)]


def _conv(reader: Reader, equation: Equation) -> list[Ids] | None:
    """Channels are contracted; with G groups the image has G x in channels and the result G x out."""
    p, axes, (image, kernel) = equation.params, reader.axes, equation.inputs[:2]
    if p["batch_group_count"] != 1:
        return None
    spec, groups, shape = p["dimension_numbers"], p["feature_group_count"], reader.shape(equation.outputs[0])
    x, w = reader.of(image), reader.of(kernel)
    channels, in_axis, out_axis = x[spec.lhs_spec[1]], w[spec.rhs_spec[1]], w[spec.rhs_spec[0]]
    window = "a window slides over it in conv_general_dilated"
    reader.block((image,), spec.lhs_spec[2:], window)
    reader.block((kernel,), spec.rhs_spec[2:], "it is the window of a convolution")
    if groups == 1:
        reader.contract([(channels, in_axis)], equation)
    elif axes.size[in_axis] == 1:  # depthwise: each channel has its own outputs
        copies = axes.new(axes.size[out_axis] // groups)
        axes.split("product", (channels, copies), (out_axis,), "one kernel a channel in conv_general_dilated")
    else:
        for axis in (channels, in_axis, out_axis):
            axes.block(axis, f"the convolution has {groups} groups")
    reader.role(kernel, (in_axis,), "in")
    reader.role(kernel, (out_axis,), "out")
    reader.role(kernel, tuple(w[k] for k in spec.rhs_spec[2:]), "window")
    made = list(reader.made(shape, window))
    made[spec.out_spec[0]], made[spec.out_spec[1]] = x[spec.lhs_spec[0]], out_axis
    return [tuple(made)]


def _ragged(reader: Reader, equation: Equation) -> list[Ids] | None:
    """Rows sorted by group meet the group's matrix: rows and groups are blocked."""
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (left, right), (batch, _) = numbers.dot_dimension_numbers
    rows, groups = numbers.lhs_ragged_dimensions, numbers.rhs_group_dimensions
    a, b, sizes = equation.inputs[:3]
    if batch or len(groups) != 1 or len(left) != 1 or set(rows) & set(left) or len(reader.shape(a)) != 2:
        return None
    x, w = reader.of(a), reader.of(b)
    reader.block((a,), rows, "its rows are sorted by group for ragged_dot_general")
    reader.block((b,), groups, "it is the experts of ragged_dot_general")
    reader.block((sizes,), (0,), "it is the experts of ragged_dot_general")
    reader.contract([(x[left[0]], w[right[0]])], equation)
    free = next(axis for j, axis in enumerate(w) if j not in (*right, *groups))
    reader.role(b, (free,), "out")
    reader.role(b, (w[groups[0]],), "expert")
    return [(x[rows[0]], free)]


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


def _words(text: str, rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys(text.split(), rule)


# Every primitive with a rule. All others, loops and branches that stay whole among them, block what they touch.
RULES: dict[str, Rule] = {
    **_words(
        "abs acos acosh asin asinh atan atanh bessel_i0e bessel_i1e bitcast_convert_type cbrt ceil clz conj", _same
    ),
    **_words(
        "convert_element_type copy copy_p cos cosh device_put digamma erf erf_inv erfc exp exp2 expm1 floor", _same
    ),
    **_words("imag integer_pow is_finite lgamma log log1p logistic name neg not optimization_barrier", _same),
    **_words("population_count pvary real reduce_precision round rsqrt sharding_constraint sign sin sinh sqrt", _same),
    **_words("square stop_gradient tan tanh", _same),
    **_words(
        "add add_any and atan2 clamp complex div eq eq_to ge gt igamma igamma_grad_a igammac le le_to", _elementwise
    ),
    **_words("lt lt_to max min mul mulhi ne nextafter or polygamma pow random_gamma_grad", _elementwise),
    **_words("regularized_incomplete_beta rem select_n shift_left shift_right_arithmetic", _elementwise),
    **_words("shift_right_logical sub xor zeta", _elementwise),
    **_words("reduce reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum reduce_xor", _reduce),
    **_words("argmax argmin", _reduce),
    **_words("cumsum cumprod cummax cummin cumlogsumexp", _along("axis", "accumulated")),
    **_words("reduce_window reduce_window_max reduce_window_min reduce_window_sum", _window),
    **_words("scatter scatter-add scatter-max scatter-min scatter-mul scatter-sub", _scatter),
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "conv_general_dilated": _conv,
    "dot_general": _dot_general,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
    "iota": _iota,
    "pad": _pad,
    "ragged_dot_general": _ragged,
    "reshape": _reshape,
    "rev": _along("dimensions", "reversed"),
    "slice": _slice,
    "sort": _along("dimension", "sorted"),
    "split": _split,
    "squeeze": _squeeze,
    "stack": _stack,
    "tile": _tile,
    "top_k": _along("axis", "ranked"),
    "transpose": _transpose,
    "unstack": _unstack,
}
