"""Primitives whose result is computed entry by entry: what they scale, which axes they tie, where they are zero."""

from __future__ import annotations

from typing import Any

from pruneopt.program.axes import Ids, Reader
from pruneopt.program.program import Atom, Equation
from pruneopt.program.row import Layout, Row, rows
from pruneopt.program.zeros import at_all, at_divisor, keeps, where_all, where_any, where_chosen, where_first

_MET = {"add": "added", "sub": "subtracted", "mul": "multiplied", "div": "divided", "select_n": "chosen"}


def same(reader: Reader, equation: Equation) -> list[Ids] | None:
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


def _at_pole(equation: Equation) -> tuple[Atom, ...]:
    """A power of at most zero."""
    return equation.inputs if equation.params["y"] <= 0 else ()


def _passed(program: Any, equation: Equation, before: frozenset[int]) -> frozenset[int]:
    """The same axes repeat as before."""
    return before


_PASSED = Layout(repeats=_passed)

ROWS: dict[str, Row] = {
    # Entries as they are, perhaps in another dtype or place.
    **rows("convert_element_type copy device_put reduce_precision", layout=_PASSED, axes=same, zeros=keeps),
    **rows("layout_constraint name pvary reshard sharding_constraint", layout=Layout(), axes=same, zeros=keeps),
    **rows("stop_gradient", layout=Layout(), axes=same, zeros=keeps),
    **rows("optimization_barrier", axes=same, zeros=keeps),
    # f(0) = 0.
    **rows("abs asin asinh atan atanh cbrt ceil conj erf erf_inv expm1 floor imag log1p real", axes=same, zeros=keeps),
    **rows("round sign sin sinh sqrt square tan tanh", axes=same, zeros=keeps),
    "neg": Row(scales=lambda equation: equation.inputs[:1], axes=same, zeros=keeps),
    "integer_pow": Row(axes=same, zeros=keeps, infinite=_at_pole),
    # f(0) is another number, or none that is finite.
    **rows("acos bessel_i0e bessel_i1e bitcast_convert_type clz cos cosh erfc exp exp2 is_finite logistic", axes=same),
    **rows("not one_minus_square population_count", axes=same),
    **rows("acosh digamma lgamma log log2 rsqrt", axes=same, infinite=at_all),
    # Of several inputs.
    "mul": Row(scales=lambda equation: equation.inputs, axes=_elementwise, zeros=where_any),
    "div": Row(scales=lambda equation: equation.inputs[:1], axes=_elementwise, zeros=where_first, infinite=at_divisor),
    "select_n": Row(scales=lambda equation: equation.inputs[1:], axes=_elementwise, zeros=where_chosen),
    "and": Row(axes=_elementwise, zeros=where_any),
    "rem": Row(axes=_elementwise, zeros=where_first, infinite=at_divisor),
    **rows("add add_any clamp max min or sub xor", axes=_elementwise, zeros=where_all),
    **rows("atan2 polygamma pow zeta", axes=_elementwise, infinite=at_all),
    **rows("complex eq eq_to ge gt igamma igamma_grad_a igammac le le_to lt lt_to mulhi ne", axes=_elementwise),
    **rows("nextafter polynomial random_gamma_grad regularized_incomplete_beta shift_left", axes=_elementwise),
    **rows("shift_right_arithmetic shift_right_logical", axes=_elementwise),
}
