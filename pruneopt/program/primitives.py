"""What each JAX primitive does, one row a primitive: how parameters pass it, which axes it ties, where it is zero."""

from __future__ import annotations

from typing import Any

from pruneopt.program import rows_elementwise, rows_index, rows_layout, rows_loop, rows_product, rows_reduce
from pruneopt.program.forms import Form
from pruneopt.program.program import Equation
from pruneopt.program.row import Row

FAMILIES = (rows_elementwise, rows_layout, rows_index, rows_reduce, rows_product, rows_loop)
TABLE: dict[str, Row] = {name: row for family in FAMILIES for name, row in family.ROWS.items()}

_UNKNOWN = Row()


def row_of(equation: Any) -> Row:
    """The row of an equation's primitive, empty where it has none."""
    return TABLE.get(equation.primitive.name, _UNKNOWN)


def form_of(equation: Equation, shapes: list[tuple[int, ...]], side: int, repeated: frozenset[int]) -> Form | str:
    """The form of a product whose operand number `side` is the weights, or why it has none.

    shapes: of both operands and the result. repeated: axes along which the weights are copies of each other.
    """
    product = row_of(equation).product
    if product is None:
        return f"{equation.primitive.name} is no product"
    return product.form(equation, shapes, side, repeated)


def column(name: str) -> dict[str, Any]:
    """{primitive: what stands in this column}, of the rows that fill it."""
    return {primitive: entry for primitive, row in TABLE.items() if (entry := getattr(row, name))}
