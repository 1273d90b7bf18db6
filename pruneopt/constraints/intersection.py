"""Several constraints at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pruneopt.constraints import parts
from pruneopt.constraints.base import Constraint, check_constraints
from pruneopt.structure.layout import Slot

Tree = Any


@dataclass(frozen=True)
class Intersection(Constraint):
    """Every one of `parts` holds.

    `select` goes from part to part, each choosing among what the ones before it kept: fixed supports first, then in
    the order given, parts with a floor last (no other may cut below it). So the result is always feasible if any
    support is, two floors aside. It is exact after fixed supports, and where each part's scopes lie in those of the
    next: give the finer part first, as in Intersection((NM(2, 4), Cardinality(sparsity=0.7))).
    """

    parts: tuple[Constraint, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.parts, tuple) or not self.parts:
            raise ValueError(f"parts={self.parts!r}: pass a tuple of constraints, Intersection((a, b))")
        check_constraints("parts", self.parts)
        if len(self.described().values) > 1:
            raise ValueError(
                f"parts={self.parts!r} hold more than one set of values, whose projections do not compose; pass one of "
                "them, or one for each pattern of a ByPath"
            )

    @property
    def exact(self) -> bool:
        """Whether every part is, and the scopes of each that chooses surely lie in those of the next."""
        choices = self.described().choices
        return all(part.exact for part in self.parts) and all(map(parts.Choice.lies_within, choices, choices[1:]))

    @property
    def allows_empty(self) -> bool:
        """Whether every part that is not a fixed support allows it."""
        found = self.described()
        free = [choice.by for choice in found.choices] + list(found.values)
        return bool(free) and all(part.allows_empty for part in free)

    def described(self, ndim: int | None = None) -> parts.Parts:
        """The parts of all parts."""
        return parts.merged(parts.of(part, ndim) for part in self.parts)

    def check(self, variable: Tree) -> None:
        """Check every part."""
        for part in self.parts:
            part.check(variable)

    def select(self, scores: Tree) -> Tree:
        """Part by part; traceable by JAX."""
        return self.described().select(scores)

    @property
    def bounds_values(self) -> bool:
        """Whether a part does."""
        return bool(self.described().values)

    def project(self, values: Tree, support: Tree = None, metric: Tree = None) -> Tree:
        """The nearest point of the set of values, or of everything, that vanishes where a mask or `support` does."""
        found = self.described()
        within = found.allowed(values)
        if support is not None:
            within = jax.tree.map(jnp.logical_and, within, support)
        if found.values:
            return found.values[0].project(values, within, metric)
        return super().project(values, within, metric)

    def value_violation(self, values: Tree) -> float:
        """Of the set of values."""
        return sum(part.value_violation(values) for part in self.described().values)

    def largest_product(self, u: Tree) -> float:
        """Of the set of values, for what no mask cuts."""
        found = self.described()
        free = found.cut(u)
        return found.values[0].largest_product(free) if found.values else super().largest_product(free)

    def violation(self, support: Tree) -> int:
        """Sum over the parts."""
        return sum(part.violation(support) for part in self.parts)

    def density(self, variable: Tree) -> float:
        """The smallest density of a part."""
        return min(part.density(variable) for part in self.parts)

    def relaxed(self, cut: float) -> Intersection:
        """Every part relaxed."""
        return Intersection(tuple(part.relaxed(cut) for part in self.parts))

    def scope(self, by_layer: bool = False) -> str:
        """Of every part."""
        return "; ".join(part.scope(by_layer) for part in self.parts)

    @property
    def shares(self) -> bool:
        """Whether a part does."""
        return any(part.shares for part in self.parts)

    @property
    def is_oriented(self) -> bool:
        """Whether a part is."""
        return any(part.is_oriented for part in self.parts)

    def mapped(self, fn: Callable[[Constraint], Constraint]) -> Intersection:
        """Part by part."""
        return Intersection(tuple(part.mapped(fn) for part in self.parts))

    def restricted(self, slots: Sequence[Slot]) -> list[Constraint]:
        """Every part on the matrices."""
        each = [part.restricted(slots) for part in self.parts]
        return [Intersection(tuple(parts)) for parts in zip(*each, strict=True)]

    def portion(self, support: Any, problem: int) -> Intersection:
        """Every part's."""
        return Intersection(tuple(part.portion(support, problem) for part in self.parts))
