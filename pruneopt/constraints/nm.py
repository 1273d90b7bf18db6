"""N:M sparsity: at most n of every m consecutive weights along an axis."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Shaped

from pruneopt import _tree
from pruneopt.constraints.base import Constraint, check_cut, check_orientation, matrix_axis
from pruneopt.constraints.parts import Choice, Parts
from pruneopt.structure.layout import Slot

Tree = Any


@dataclass(frozen=True)
class NM(Constraint):
    """At most `n` of every `m` consecutive weights along `axis` are nonzero, in every leaf.

    axis: "in" (the axis before the last) or "out" (the last; JAX's layout (..., n_in, n_out)), or an axis number.
        `m` must divide its length. 2:4 along the inputs is what sparse tensor cores run.

    `select` is exact: the n largest scores of each group. Source: Zhou et al. 2021, section 3.1.
    """

    n: int
    m: int
    axis: Literal["in", "out"] | int = "in"

    def __post_init__(self) -> None:
        for name in ("n", "m"):
            if hasattr(getattr(self, name), "__index__"):
                object.__setattr__(self, name, operator.index(getattr(self, name)))
        if not (isinstance(self.n, int) and isinstance(self.m, int) and 1 <= self.n <= self.m):
            raise ValueError(f"n={self.n!r}, m={self.m!r}: N:M needs whole numbers 1 <= n <= m, such as n=2, m=4")
        if isinstance(self.axis, str) and self.axis not in ("in", "out"):
            raise ValueError(f"axis={self.axis!r} is unknown; pass 'in', 'out' or an axis number")

    @property
    def exact(self) -> bool:
        """True."""
        return True

    def described(self, ndim: int | None = None) -> Parts:
        """Groups of `m` inputs or outputs; nothing where n = m."""
        if self.n == self.m:
            return Parts()
        axis = {"in": -2, "out": -1}[self.axis] if isinstance(self.axis, str) else self.axis
        if ndim is not None and axis >= 0:
            axis -= ndim
        box = {-2: (self.m, 1), -1: (1, self.m)}.get(axis)
        return Parts(choices=(Choice(self, box, free=True, group=(self.n, self.m)),))

    def check(self, variable: Tree) -> None:
        """Raise ValueError for an axis that a leaf lacks, is not known to have or whose length `m` does not divide."""
        if self.is_oriented:
            check_orientation(repr(self), variable)
        for path, leaf in _tree.named_leaves(variable):
            length = leaf.shape[self.positive_axis(leaf.ndim, path)]
            if length % self.m:
                raise ValueError(
                    f"m={self.m} does not divide axis {self.axis!r} of {_tree.called(path)}, of length {length} "
                    f"(shape {tuple(leaf.shape)}); leave that leaf out with leaves=, or choose another m or axis"
                )

    def select(self, scores: Tree) -> Tree:
        """The n largest of each group; traceable by JAX."""
        return jax.tree.map(self._select_leaf, scores)

    def violation(self, support: Tree) -> int:
        """Weights above n, summed over all groups."""
        over = 0
        for leaf in jax.tree.leaves(support):
            groups, axis = self._groups(leaf)
            kept = np.asarray(jnp.sum(groups, axis=axis, dtype=jnp.int32))
            over += int(np.maximum(kept.astype(np.int64) - self.n, 0).sum())
        return over

    @property
    def is_oriented(self) -> bool:
        """Whether `axis` is "in" or "out"."""
        return isinstance(self.axis, str)

    def scope(self, by_layer: bool = False) -> str:
        """n of every m along the axis."""
        along = {"in": "the inputs", "out": "the outputs"}.get(str(self.axis), f"axis {self.axis}")
        return f"{self.n} of every {self.m} along {along}"

    def restricted(self, slots: Sequence[Slot]) -> list[Constraint]:
        """Along the matrices' inputs or outputs; a numbered axis of a leaf must be one of them."""
        if self.is_oriented:
            return [self for _ in slots]
        return [replace(self, axis=matrix_axis(slot, self.axis, "axis")) for slot in slots]

    def density(self, variable: Tree) -> float:
        """n / m."""
        return self.n / self.m

    def relaxed(self, cut: float) -> NM:
        """n' : m with n' = m - floor(cut (m - n))."""
        check_cut(cut)
        return replace(self, n=self.m - int((self.m - self.n) * cut + 1e-9))

    def positive_axis(self, ndim: int, path: str = "") -> int:
        """The number of `axis` in a leaf of `ndim` axes, counted from the first. Raises ValueError where it is not."""
        axis = {"in": -2, "out": -1}[self.axis] if isinstance(self.axis, str) else self.axis
        if not -ndim <= axis < ndim:
            raise ValueError(
                f"axis={self.axis!r} does not exist in {_tree.called(path)} of {ndim} axes; pass another axis"
            )
        return axis % ndim

    def _groups(self, leaf: Shaped[Array, "..."]) -> tuple[Shaped[Array, "..."], int]:
        """The leaf with its axis split into (groups, m), memory as it lies, and the axis of the m."""
        axis = self.positive_axis(leaf.ndim)
        return leaf.reshape(*leaf.shape[:axis], -1, self.m, *leaf.shape[axis + 1 :]), axis + 1

    def _select_leaf(self, scores: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        groups, axis = self._groups(jnp.asarray(scores))
        index = lax.broadcasted_iota(jnp.int32, groups.shape, axis)

        def counted(i, ahead):
            other = lax.dynamic_index_in_dim(groups, i, axis=axis)
            before = jnp.asarray(i, jnp.int32) < index
            return ahead + jnp.where(before, other >= groups, other > groups).astype(jnp.int32)

        # Unrolled the comparisons fuse into one pass; past 16 they only cost compile time.
        ahead = lax.fori_loop(0, self.m, counted, jnp.zeros(groups.shape, jnp.int32), unroll=min(self.m, 16))
        return ((ahead < self.n) & (groups > -jnp.inf)).reshape(scores.shape)
