"""Primitives that multiply by a matrix of parameters: its canonical form, and the axes that are contracted."""

from __future__ import annotations

from pruneopt.program.axes import Ids, Reader
from pruneopt.program.forms import Conv, Dot, Form, Ragged
from pruneopt.program.program import Equation
from pruneopt.program.resize import convolved
from pruneopt.program.row import Product, Row
from pruneopt.program.zeros import multiplied

_REPEATED = "its entries are repeated along an axis"


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
    else:  # the units are whole groups, and the k-th channel of every group
        every, outs = axes.new(groups), axes.new(axes.size[out_axis] // groups)
        axes.split("product", (channels,), (every, in_axis), "grouped in conv_general_dilated")
        axes.split("product", (out_axis,), (every, outs), "grouped in conv_general_dilated")
        reader.contractions.append((channels, in_axis, image, kernel, equation.primitive.name))
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


def _dot_form(equation: Equation, shapes: list[tuple[int, ...]], side: int, repeated: frozenset[int]) -> Form | str:
    (left, right), (left_batch, right_batch) = equation.params["dimension_numbers"]
    pairs, batch = list(zip(left, right, strict=True)), list(zip(left_batch, right_batch, strict=True))
    if side == 0:
        pairs, batch = [(b, a) for a, b in pairs], [(b, a) for a, b in batch]
    copies = tuple(p for p in batch if p[1] in repeated)
    if len(copies) < len(repeated):
        return f"{_REPEATED} that is multiplied"
    own = tuple(p for p in batch if p[1] not in repeated)
    return Dot(shapes[1 - side], shapes[side], tuple(pairs), own, copies, side == 1, tuple(batch))


def _conv_form(equation: Equation, shapes: list[tuple[int, ...]], side: int, repeated: frozenset[int]) -> Form | str:
    params = equation.params
    if repeated:
        return _REPEATED
    if side == 0:
        return "it is the image of a convolution, not the kernel"
    if params["batch_group_count"] != 1:
        return "the convolution has batch groups, as gradients of convolutions do"
    spec = params["dimension_numbers"]
    return Conv(
        x_shape=shapes[0],
        w_shape=shapes[1],
        x_spec=tuple(spec.lhs_spec),
        w_spec=tuple(spec.rhs_spec),
        y_spec=tuple(spec.out_spec),
        y_shape=shapes[2],
        strides=tuple(params["window_strides"]),
        padding=tuple(params["padding"]),
        x_dilation=tuple(params["lhs_dilation"]),
        w_dilation=tuple(params["rhs_dilation"]),
        groups=params["feature_group_count"],
    )


def _ragged_form(equation: Equation, shapes: list[tuple[int, ...]], side: int, repeated: frozenset[int]) -> Form | str:
    if repeated:
        return _REPEATED
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (left, right), (left_batch, _) = numbers.dot_dimension_numbers
    ragged, groups = numbers.lhs_ragged_dimensions, numbers.rhs_group_dimensions
    if side == 0 or left_batch or len(left) != 1 or len(groups) != 1 or len(shapes[0]) != 2 or set(ragged) & set(left):
        return "the ragged product is not rows by groups of matrices"
    other = next(a for a in range(3) if a not in (groups[0], right[0]))
    return Ragged(shapes[0], shapes[1], (ragged[0], left[0]), (groups[0], right[0], other))


ROWS: dict[str, Row] = {
    "conv_general_dilated": Row(product=Product("conv", _conv_form), axes=_conv, zeros=multiplied, resize=convolved),
    "dot_general": Row(product=Product("dot", _dot_form), axes=_dot_general, zeros=multiplied),
    "ragged_dot_general": Row(product=Product("ragged dot", _ragged_form), axes=_ragged, zeros=multiplied),
}
