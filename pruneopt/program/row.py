"""What is known of one primitive: a row of the table that `primitives` joins, its columns side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from pruneopt.program import axes, resize, zeros
from pruneopt.program.forms import Form
from pruneopt.program.program import Atom, Equation, Program


class Bounds(NamedTuple):
    """A slice of an array, one number an axis."""

    starts: list[int]
    stops: list[int]
    steps: list[int]


@dataclass(frozen=True)
class Layout:
    """Each entry of a result is one entry of an input.

    joins: whether all inputs are arrays whose entries it holds, not the first alone. cut: the slice of the first input
    that makes an output, None where an index is computed from params or data. repeats: the axes along which the result
    repeats itself, given those of the input; None where it cannot be told.
    """

    joins: bool = False
    cut: Callable[[Program, Equation, int], Bounds | None] | None = None
    repeats: Callable[[Program, Equation, frozenset[int]], frozenset[int] | None] | None = None


class Product(NamedTuple):
    """A product of a matrix of weights: its kind in words, and the form of one whose operand `side` is the weights."""

    kind: str
    form: Callable[[Equation, list[tuple[int, ...]], int, frozenset[int]], Form | str]


@dataclass(frozen=True)
class Row:
    """A primitive. A column that is empty says that nothing is known, and that what asks for it must refuse or block.

    layout: how a parameter goes through it to a product, each entry as it is. scales: the inputs of which one may be a
        parameter, each of its entries times one number or masked. picks: whether it picks rows of its first input.
    product: what it multiplies.
    axes: which axes index the same units, which fall into parts, which cannot be cut.
    zeros: where its outputs are zero. infinite: the inputs at whose zeros a value may be infinite or not a number.
    resize: how its parameters take other sizes, where its inputs do not say it all.
    inlined: whether it is read as if its body stood in its place. whole: in words, why its body is evaluated whole.
    """

    layout: Layout | None = None
    scales: Callable[[Equation], tuple[Atom, ...]] | None = None
    picks: bool = False
    product: Product | None = None
    axes: axes.AxisRule | None = None
    zeros: zeros.ZeroRule | None = None
    infinite: zeros.Infinite | None = None
    resize: resize.Resize | None = None
    inlined: bool = False
    whole: str = ""


def rows(names: str, **columns: Any) -> dict[str, Row]:
    """One row for each of these primitives, which do the same."""
    return dict.fromkeys(names.split(), Row(**columns))
