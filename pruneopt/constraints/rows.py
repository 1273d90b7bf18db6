"""Units of a matrix's inputs: rows that live or die for all outputs, neighbours or not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Shaped

from pruneopt import _tree
from pruneopt.constraints.base import Constraint
from pruneopt.constraints.cardinality import Cardinality
from pruneopt.constraints.members import Members, pooled
from pruneopt.constraints.parts import Choice, Parts

Tree = Any


@dataclass(frozen=True)
class Rows(Constraint):
    """At most `count` units of a matrix's inputs are nonzero; units need not be neighbours.

    units: for each input its unit, 0, 1, ..., or -1 where it lives in any case.
    """

    units: tuple[int, ...]
    count: int

    def __repr__(self) -> str:
        return f"Rows({max(self.units, default=-1) + 1} units of {len(self.units)} inputs, count={self.count})"

    @property
    def exact(self) -> bool:
        """True."""
        return True

    @property
    def allows_empty(self) -> bool:
        """Where no unit is to live."""
        return self.count == 0

    def described(self, ndim: int | None = None) -> Parts:
        """Units of inputs; nothing where all live."""
        if self.count > max(self.units, default=-1):
            return Parts()
        return Parts(choices=(Choice(self, units=True, rows=self.units),))

    def check(self, variable: Tree) -> None:
        """Raise ValueError for a leaf with another number of inputs."""
        for path, leaf in _tree.named_leaves(variable):
            if len(leaf.shape) != 2 or leaf.shape[0] != len(self.units):
                raise ValueError(f"{self!r} does not fit {_tree.called(path)} of shape {tuple(leaf.shape)}")

    def select(self, scores: Tree) -> Tree:
        """The units with the largest sums."""
        return jax.tree.map(self._selected, scores)

    def violation(self, support: Tree) -> int:
        """Units alive beyond the count."""
        group = self._group()
        alive = [pooled(group, {"": jnp.asarray(mask, jnp.float32)}) > 0 for mask in jax.tree.leaves(support)]
        return sum(max(0, int(a.sum()) - self.count) for a in alive)

    def density(self, variable: Tree) -> float:
        """The fraction of units."""
        return min(1.0, self.count / max(1, max(self.units, default=-1) + 1))

    def relaxed(self, cut: float) -> Rows:
        """More units."""
        size = max(self.units, default=-1) + 1
        return replace(self, count=size - int((size - self.count) * cut + 1e-9))

    def scope(self, by_layer: bool = False) -> str:
        """Units of inputs."""
        return "units of inputs"

    def _group(self) -> Members:
        return Members("", max(self.units, default=-1) + 1, {("", 0): np.asarray(self.units)})

    def _selected(self, scores: Shaped[Array, "n m"]) -> Bool[Array, "n m"]:
        size, units = max(self.units, default=-1) + 1, np.asarray(self.units)
        if not size:
            return jnp.ones(scores.shape, bool)
        totals = {"": pooled(self._group(), {"": scores})}
        alive = Cardinality(count=min(self.count, size), floor=0).select(totals)[""]
        return jnp.broadcast_to(jnp.where(units >= 0, alive[np.maximum(units, 0)], True)[:, None], scores.shape)
