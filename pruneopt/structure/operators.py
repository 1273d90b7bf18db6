"""The weights of a product, their canonical matrix and the way back to the leaves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from pruneopt.program.forms import Form
from pruneopt.program.program import Program
from pruneopt.program.segment import Segment
from pruneopt.structure.reading import Reading

_NAMED, _LETTERS = 4, 40  # paths of a list and letters of a name that are printed


def named(paths: Sequence[str]) -> str:
    """Paths as words: the first few, and how many more."""
    more = f" and {len(paths) - _NAMED} more" if len(paths) > _NAMED else ""
    return ", ".join(paths[:_NAMED]) + more


@dataclass(frozen=True)
class Use:
    """One product with an operator's weights. equation: its index; inputs: its data variables; form: its shape."""

    equation: int
    inputs: tuple[int, ...]
    form: Form


@dataclass(frozen=True)
class Refusal:
    """What could not be read: the primitive, the leaves that it touches, and why."""

    primitive: str
    paths: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        return f"{self.primitive} of {named(self.paths) or 'constants'}: {self.reason}"


@dataclass(frozen=True)
class Lookup:
    """Rows of a leaf picked by indices: an embedding table."""

    paths: tuple[str, ...]
    rows: int
    picked: int


class Operator:
    """The weights of one or several products: `problems` matrices (n_in, n_out), y = x W.

    name: the path of its leaf, with the part that it reads ("layers/kernel[2]"); paths: its leaves; uses: its products.
    """

    def __init__(self, program: Program, reading: Reading, uses: list[Use], kind: str):
        self._program, self._reading, self.uses, self.kind = program, reading, uses, kind
        self.paths = tuple(reading.leaves)
        self.name = " + ".join(self.paths) + reading.part
        form = uses[0].form
        self.problems, self.n_in, self.n_out = form.problems, form.n_in, form.n_out

    def __repr__(self) -> str:
        name, kind, matrix, problems, uses, work, *_ = self.columns
        several = f"{problems} problems of " if self.problems > 1 else ""
        return f"Operator({name}: {kind}, {several}{matrix}, {uses} use{'s' * (uses != '1')}, {work} MFLOPs)"

    @property
    def columns(self) -> tuple[str, ...]:
        """As words: name, kind, matrix, problems, uses, MFLOPs, weights, what it is read through."""
        half, name = (_LETTERS - 3) // 2, self.name
        short = name if len(name) <= _LETTERS else f"{name[:half]}...{name[-half:]}"
        through = ", ".join(filter(None, (self.uses[0].form.arrangement, *self.through)))
        numbers = (str(self.problems), str(len(self.uses)), f"{self.flops / 1e6:.3f}", f"{self.size:,}")
        return (short, self.kind, f"{self.n_in} x {self.n_out}", *numbers, through)

    @property
    def slab(self) -> str | None:
        """Which layer of a stacked leaf it reads, as text, if it reads one."""
        return self._reading.slab if len(self.paths) == 1 else None

    @property
    def scaled_by(self) -> tuple[str, ...]:
        """Leaves that mask or scale it."""
        return self._reading.scaled_by

    @property
    def repeated(self) -> frozenset[int]:
        """Axes of the operand along which it repeats itself."""
        return self._reading.repeated

    @property
    def flops(self) -> int:
        """Of all its products on the traced batch."""
        return sum(use.form.flops for use in self.uses)

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.problems * self.n_in * self.n_out

    @property
    def through(self) -> tuple[str, ...]:
        """What stands between the leaf and the product: primitives passed, scaling leaves last."""
        return self._reading.through + tuple(f"scaled by {p}" for p in self._reading.scaled_by)

    def to_matrix(self, leaves: Mapping[str, Any]) -> Shaped[Array, "problems n_in n_out"]:
        """The weights that the product sees. leaves: {path: array} of all params that it reads."""
        return _matrix(self._reading.whole, self.uses[0].form, self._inputs(self._reading.whole, leaves))

    def to_leaves(self, matrix: Shaped[Array, "problems n_in n_out"], leaves: Mapping[str, Any]) -> dict[str, Any]:
        """{path: leaf} of the operator's leaves: `matrix` where the operator reads them, `leaves` elsewhere.

        Entries of `matrix` that equal `to_matrix(leaves)` leave theirs bit for bit; scales are divided out.
        """
        layout, whole = self._reading.layout, self._reading.whole
        new = _merged(
            (layout, whole, self.uses[0].form, self._places(layout), self._places(whole)),
            self._inputs(layout, leaves),
            self._inputs(whole, leaves),
            matrix,
        )
        return dict(zip(self.paths, new, strict=True))

    def masks(self, support: Shaped[Array, "problems n_in n_out"]) -> dict[str, Any]:
        """{path: boolean mask}: `support` where the operator reads the leaf, True elsewhere."""
        return dict(zip(self.paths, self._back(jnp.asarray(support).astype(self.dtype), True), strict=True))

    def support(self, masks: Mapping[str, Any]) -> Shaped[Array, "problems n_in n_out"]:
        """The canonical form of boolean masks {path: mask} of its leaves."""
        program, layout = self._program, self._reading.layout
        ones = {p: jnp.asarray(masks[p]).astype(program.shapes[v].dtype) for p, v in self._reading.leaves.items()}
        return _matrix(layout, self.uses[0].form, self._inputs(layout, ones)) != 0

    def part_of(self, path: str) -> Shaped[Array, "..."]:
        """Which entries of a leaf the operator reads."""
        ones = jnp.ones((self.problems, self.n_in, self.n_out), self.dtype)
        return self._back(ones, False)[self.paths.index(path)]

    def places(self) -> np.ndarray:
        """(problems, n_in, n_out): where each entry stands among its leaves, laid flat one after the other."""
        layout, shapes = self._reading.layout, [self._program.shapes[v].shape for v in self._reading.leaves.values()]
        ends = np.cumsum([math.prod(shape) for shape in shapes])
        values: list[Any] = [self._program.constants.get(v) for v in layout.inputs]
        for place, shape, end in zip(self._places(layout), shapes, ends, strict=True):
            values[place] = jnp.arange(end - math.prod(shape), end, dtype=jnp.int32).reshape(shape)
        return np.asarray(self.uses[0].form.to_matrix(layout.moved(values)[0]))

    @property
    def is_one_to_one(self) -> bool:
        """Whether no weight stands in two places of the matrix; only joining a leaf with itself does that."""
        layout = self._reading.layout
        if not self._reading.again:
            return True
        _, back = _inverse(layout, self.uses[0].form, self._places(layout), self._zeros())
        ones = jnp.ones((self.problems, self.n_in, self.n_out), self.dtype)
        return all(bool(jnp.max(times) <= 1) for times in back(ones))

    @property
    def dtype(self) -> Any:
        """Of the weights as the product sees them."""
        return self._program.type_of(self._reading.layout.outputs[0]).dtype

    def _inputs(self, segment: Segment, leaves: Mapping[str, Any]) -> list[Any]:
        named = self._program.names
        return [leaves[named[v]] if v in named else self._program.constants[v] for v in segment.inputs]

    def _places(self, segment: Segment) -> tuple[int, ...]:
        """Where its leaves stand among a segment's inputs."""
        return tuple(segment.inputs.index(v) for v in self._reading.leaves.values())

    def _zeros(self) -> list[Any]:
        """Inputs of the layout with zeros for its leaves."""
        shapes = {v: self._program.shapes[v] for v in self._reading.leaves.values()}
        known = self._program.constants
        return [jnp.zeros(t.shape, t.dtype) if (t := shapes.get(v)) else known[v] for v in self._reading.layout.inputs]

    def _back(self, matrix: Any, elsewhere: bool) -> list[Any]:
        layout = self._reading.layout
        return _masks((layout, self.uses[0].form, self._places(layout)), self._zeros(), matrix, elsewhere)


@partial(jax.jit, static_argnums=(0, 1))
def _matrix(segment: Segment, form: Form, inputs: list[Any]) -> Any:
    return form.to_matrix(segment.trace(inputs)[0])


def _inverse(layout: Segment, form: Form, places: tuple[int, ...], inputs: list[Any]) -> tuple[Any, Any]:
    """(leaves -> matrix, matrix -> leaves): a layout's transpose is its inverse on the entries that it reads."""

    def laid(leaves: list[Any]) -> Any:
        values = list(inputs)
        for place, leaf in zip(places, leaves, strict=True):
            values[place] = leaf
        return form.to_matrix(layout.trace(values)[0])

    types = [jax.ShapeDtypeStruct(inputs[i].shape, inputs[i].dtype) for i in places]
    transpose = jax.linear_transpose(laid, types)
    return laid, lambda matrix: transpose(matrix)[0]


@partial(jax.jit, static_argnums=0)
def _merged(static: Any, layout_inputs: list[Any], whole_inputs: list[Any], matrix: Any) -> list[Any]:
    layout, whole, form, places, whole_places = static
    _, back = _inverse(layout, form, places, layout_inputs)
    old = form.to_matrix(whole.trace(whole_inputs)[0])
    with_ones = list(whole_inputs)
    for place in whole_places:
        with_ones[place] = jnp.ones(whole_inputs[place].shape, whole_inputs[place].dtype)
    scale = form.to_matrix(whole.trace(with_ones)[0])
    dead, one, zero = scale == 0, jnp.ones((), scale.dtype), jnp.zeros((), scale.dtype)
    new = back(jnp.where(dead, zero, matrix.astype(scale.dtype) / jnp.where(dead, one, scale)))
    changed = back((matrix.astype(old.dtype) != old).astype(scale.dtype))
    leaves = [layout_inputs[place] for place in places]
    return [jnp.where(c != 0, n.astype(x.dtype), x) for c, n, x in zip(changed, new, leaves, strict=True)]


@partial(jax.jit, static_argnums=0)
def _masks(static: Any, inputs: list[Any], matrix: Any, elsewhere: bool) -> list[Any]:
    layout, form, places = static
    _, back = _inverse(layout, form, places, inputs)
    part = back(jnp.ones(matrix.shape, matrix.dtype))
    return [(m != 0) | (elsewhere & (p == 0)) for m, p in zip(back(matrix), part, strict=True)]
