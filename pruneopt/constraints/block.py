"""Whole units live or die together: blocks of any shape, and slices (rows, neurons, filters)."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Shaped

from pruneopt import _tree
from pruneopt.constraints.base import Constraint, check_orientation, matrix_axis
from pruneopt.constraints.cardinality import Cardinality
from pruneopt.constraints.parts import Choice, Parts
from pruneopt.structure.layout import Slot

Tree = Any


class Units(Constraint):
    """A budget over units, boxes that tile each leaf; a subclass says how large the boxes are.

    The score of a unit is the sum over its weights, where one +inf keeps the whole unit and weights at -inf stay
    cut. `budget` counts units: its scopes and axes are those of the grid of units, which has the leaf's axes.
    `select` is exact for weights that nobody has cut; a partly cut unit counts as one.
    """

    budget: Cardinality

    @abc.abstractmethod
    def budgeted(self, budget: Cardinality) -> Units:
        """The same units under another budget."""

    @abc.abstractmethod
    def box(self, shape: tuple[int, ...], path: str = "") -> tuple[int, ...]:
        """The shape of a unit in a leaf of `shape`. Raises ValueError where it does not tile the leaf."""

    @abc.abstractmethod
    def _unit(self, ndim: int | None) -> tuple[int, int] | None:
        """A unit's consecutive inputs and outputs, -1 for all; None where the leaf decides."""

    def described(self, ndim: int | None = None) -> Parts:
        """Units; nothing where all are kept."""
        found = self.budget.described().choices
        return Parts(choices=tuple(Choice(self, self._unit(ndim), units=True, floor=c.floor) for c in found))

    @property
    def exact(self) -> bool:
        """True."""
        return True

    @property
    def allows_empty(self) -> bool:
        """As the budget says."""
        return self.budget.allows_empty

    def check(self, variable: Tree) -> None:
        """Raise ValueError unless boxes tile every leaf and the budget fits their grids."""
        self.budget.check(_tree.map_named(self._grid, variable))

    def select(self, scores: Tree) -> Tree:
        """The units with the largest sums; traceable by JAX."""
        return self._spread_all(self.budget.select(jax.tree.map(self._pooled, scores)), scores)

    def select_stage(self, scores: Tree, cuts: Sequence[float], stage: Any) -> Tree:
        """As the budget does."""
        return self._spread_all(self.budget.select_stage(jax.tree.map(self._pooled, scores), cuts, stage), scores)

    def _spread_all(self, chosen: Tree, scores: Tree) -> Tree:
        return jax.tree.map(lambda mask, leaf: self._spread(mask, leaf.shape) & (leaf > -jnp.inf), chosen, scores)

    def violation(self, support: Tree) -> int:
        """Units above the budget, where a unit lives if any of its weights does."""
        return self.budget.violation(jax.tree.map(self._alive, support))

    def density(self, variable: Tree) -> float:
        """Living over all units."""
        return self.budget.density(_tree.map_named(self._grid, variable))

    def relaxed(self, cut: float) -> Units:
        """The same units with a relaxed budget."""
        return self.budgeted(self.budget.relaxed(cut))

    @property
    def shares(self) -> bool:
        """As the budget."""
        return self.budget.shares

    def portion(self, support: Any, problem: int) -> Constraint:
        """As many units as live in that problem of the stack."""
        if not self.shares:
            return self
        return self.budgeted(self.budget.portion(self._alive(jnp.asarray(support)), problem))

    def _grid(self, path: str, leaf: Any) -> Any:
        box = self.box(leaf.shape, path)
        shape = tuple(s // b for s, b in zip(leaf.shape, box, strict=True))
        return leaf.resized(shape) if isinstance(leaf, Slot) else jax.ShapeDtypeStruct(shape, jnp.float32)

    def _boxed(self, leaf: Shaped[Array, "..."]) -> tuple[Shaped[Array, "..."], tuple[int, ...]]:
        """The leaf with each axis split into (grid, box), and the positions of the box axes."""
        box = self.box(leaf.shape)
        split = [n for s, b in zip(leaf.shape, box, strict=True) for n in (s // b, b)]
        return leaf.reshape(split), tuple(range(1, 2 * leaf.ndim, 2))

    def _pooled(self, scores: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        boxed, axes = self._boxed(scores)
        finite = jnp.where(jnp.isfinite(boxed), boxed, jnp.zeros((), boxed.dtype))
        infinity = jnp.asarray(jnp.inf, boxed.dtype)
        total = jnp.sum(finite, axis=axes)
        total = jnp.where(jnp.any(boxed > -infinity, axis=axes), total, -infinity)
        return jnp.where(jnp.any(boxed == infinity, axis=axes), infinity, total)

    def _alive(self, support: Bool[Array, "..."]) -> Bool[Array, "..."]:
        boxed, axes = self._boxed(support)
        return jnp.any(boxed, axis=axes)

    def _spread(self, mask: Bool[Array, "..."], shape: tuple[int, ...]) -> Bool[Array, "..."]:
        box = self.box(shape)
        split = [n for s, b in zip(shape, box, strict=True) for n in (s // b, b)]
        return jnp.broadcast_to(jnp.expand_dims(mask, tuple(range(1, 2 * len(shape), 2))), split).reshape(shape)


def check_budget(budget: Cardinality) -> None:
    """Raise TypeError unless `budget` is a Cardinality."""
    if not isinstance(budget, Cardinality):
        raise TypeError(f"budget={budget!r}; pass how many units live, such as Cardinality(sparsity=0.5)")


@dataclass(frozen=True)
class Blocks(Units):
    """At most so many blocks of a fixed shape are nonzero.

    shape: of a block, along the last axes of a leaf (blocks are 1 long on earlier axes); -1 spans an axis.
        (4, 4) are square blocks of a matrix, (4, 1) runs of 4 inputs of one output.
    budget: how many blocks live, and in which scopes.
    """

    shape: tuple[int, ...]
    budget: Cardinality

    def __post_init__(self) -> None:
        check_budget(self.budget)
        if (
            not isinstance(self.shape, tuple)
            or not self.shape
            or any(not isinstance(s, int) or (s < 1 and s != -1) for s in self.shape)
        ):
            raise ValueError(f"shape={self.shape!r}: block lengths are whole numbers >= 1, or -1 for a whole axis")

    def box(self, shape: tuple[int, ...], path: str = "") -> tuple[int, ...]:
        """`self.shape`, with ones before it and -1 filled in."""
        if len(self.shape) > len(shape):
            raise ValueError(f"shape={self.shape} has more axes than {_tree.called(path)} of shape {shape}; drop some")
        box = (1,) * (len(shape) - len(self.shape)) + self.shape
        box = tuple(s if b == -1 else b for s, b in zip(shape, box, strict=True))
        if any(s % b for s, b in zip(shape, box, strict=True)):
            raise ValueError(
                f"shape={self.shape}: blocks do not tile {_tree.called(path)} of shape {shape}; choose lengths that "
                "divide it, or leave that leaf out with leaves="
            )
        return box

    @property
    def is_oriented(self) -> bool:
        """Whether its blocks are of a matrix, and not of the leaf's own axes."""
        return len(self.shape) <= 2 or self.budget.is_oriented

    def check(self, variable: Tree) -> None:
        """Raise ValueError for leaves whose matrices are not known, that blocks do not tile, or the budget refuses."""
        if self.is_oriented:
            check_orientation(f"blocks of {self.shape}", variable)
        for path, leaf in _tree.named_leaves(variable):
            if self.is_oriented and -1 in self.shape[:-1] and len(leaf.shape) > 2 and not isinstance(leaf, Slot):
                raise ValueError(
                    f"shape={self.shape} spans all inputs, but leaf '{path}' of shape {tuple(leaf.shape)} is no "
                    "matrix; pass fn and a batch to prune, or Slices(-1, ...) for whole filters"
                )
        super().check(variable)

    def scope(self, by_layer: bool = False) -> str:
        """The budget's, in blocks."""
        return f"blocks of {self.shape}: {self.budget.scope(by_layer)}"

    def restricted(self, slots: Sequence[Slot]) -> list[Constraint]:
        """Blocks of the matrices."""
        if len(self.shape) > 2:
            raise ValueError(f"shape={self.shape} has more axes than a layer's matrix (n_in, n_out); pass two lengths")
        grids = [self._grid(slot.name, slot) for slot in slots]
        return [self.budgeted(budget) for budget in self.budget.restricted(grids)]

    def budgeted(self, budget: Cardinality) -> Blocks:
        """The same blocks under another budget."""
        return replace(self, budget=budget)

    def _unit(self, ndim: int | None) -> tuple[int, int] | None:
        return (1, *self.shape)[-2], self.shape[-1]


@dataclass(frozen=True)
class Slices(Units):
    """At most so many whole slices along `axis` are nonzero: neurons and filters (axis=-1), inputs (axis=-2).

    axis: each index along it is one unit, spanning all other axes. JAX's layout puts outputs last; for PyTorch's
        (n_out, n_in, ...) pass axis=0.
    budget: how many slices live; per="tree" ranks the slices of all leaves together.
    """

    axis: int
    budget: Cardinality

    def __post_init__(self) -> None:
        check_budget(self.budget)

    def box(self, shape: tuple[int, ...], path: str = "") -> tuple[int, ...]:
        """The leaf's shape with 1 at `axis`."""
        if not -len(shape) <= self.axis < len(shape):
            raise ValueError(
                f"axis={self.axis} does not exist in {_tree.called(path)} of shape {shape}; pass another axis"
            )
        return tuple(1 if i == self.axis % len(shape) else s for i, s in enumerate(shape))

    def scope(self, by_layer: bool = False) -> str:
        """The budget's, in slices."""
        return f"slices along axis {self.axis}: {self.budget.scope(by_layer)}"

    def restricted(self, slots: Sequence[Slot]) -> list[Constraint]:
        """Slices of the matrices: whole inputs, whole outputs, or whole problems of a stack."""
        parts: list[Units] = []
        grids: list[Slot] = []
        for slot in slots:
            kind = slot.kind_of(self.axis)
            if kind == "problem" and slot.ndim == 3:
                parts.append(replace(self, axis=0))
            elif slot.ndim == 3:
                parts.append(Blocks((1, -1) if matrix_axis(slot, self.axis, "axis") == "in" else (-1, 1), self.budget))
            else:
                parts.append(replace(self, axis={"in": -2, "out": -1}[matrix_axis(slot, self.axis, "axis")]))
            grids.append(parts[-1]._grid(slot.name, slot))
        return [part.budgeted(b) for part, b in zip(parts, self.budget.restricted(grids), strict=True)]

    @property
    def shares(self) -> bool:
        """True: which slices live is chosen once for all problems."""
        return True

    def portion(self, support: Any, problem: int) -> Constraint:
        """Of slices that are whole problems, this one or nothing."""
        return Cardinality(count=int(jnp.sum(jnp.asarray(support[problem]))), floor=0)

    def budgeted(self, budget: Cardinality) -> Slices:
        """The same slices under another budget."""
        return replace(self, budget=budget)

    def _unit(self, ndim: int | None) -> tuple[int, int] | None:
        axis = self.axis if ndim is None or self.axis < 0 else self.axis - ndim
        return {-2: (1, -1), -1: (-1, 1)}.get(axis)
